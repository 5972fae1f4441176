"""The laws of a call: pure calls, the adapted weight for whoever reads it, nothing left behind, on small and on random models."""

import collections
import copy
import functools
import threading
import types
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import lora_lite as ll
from cases import move

CLOSE = {"rtol": 1e-5, "atol": 1e-6}  # float32, another order of products
SETTINGS = settings(deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


def facts(model):
    """Return everything of a model that a call could change, as values to compare."""
    found = {}
    for path, module in model.named_modules():
        found[path] = {name: plain(value) for name, value in vars(module).items()}
    return found


def plain(value):
    if isinstance(value, torch.Tensor):
        return (id(value), value._version, value.tolist())
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | collections.deque):
        return [plain(v) for v in value]
    return sorted(map(str, value)) if isinstance(value, set) else id(value)


def merged(adapt, params, model):
    """Return a copy of the model with the adapter merged: it has the adapted weight for everybody."""
    other = copy.deepcopy(model)
    other.load_state_dict(adapt.merge(params), strict=False)
    return other


# Law 1: pure calls


class Stateful(nn.Module):
    """Keep state between calls in every way that models do."""

    def __init__(self):
        super().__init__()
        self.lin, self.out = nn.Linear(6, 6), nn.Linear(6, 6)
        self.longest, self.calls, self.history, self.notes = 1, 0, [], {"seen": set(), "past": [[]]}
        self.mean, self.last = torch.zeros(6), None
        self.cells = [torch.ones(1)]
        self.recent = collections.deque(maxlen=3)
        self.register_buffer("scale", torch.ones(6), persistent=False)
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        self.calls += 1
        self.count += 1
        if len(x) > self.longest:
            self.longest = len(x)
            self.register_buffer("scale", torch.full((6,), 1.0 + len(x)), persistent=False)
            self.register_buffer(f"table_{len(x)}", torch.ones(len(x)))
        self.mean.mul_(0.9).add_(x.detach().mean(0))
        self.cells[0].add_(1)
        y = self.lin(x) * self.scale + self.mean
        y = y if self.last is None else y + self.last.mean()
        self.last = y
        self.history.append(y)
        self.recent.append(len(x))
        self.notes["seen"].add(len(x))
        self.notes["past"][0].append(len(x))
        self.lin.note = len(x)
        extra = self.calls + float(self.count) + len(self.history) + len(self.recent) + len(self.notes["past"][0])
        return self.out(y) * extra + self.cells[0]


ROUTES = ("adapt", "mixed", "base", "module", "per_example", "grad")


def through(adapt, route, params, x):
    """Return outputs and gradients of a call, by one of the ways to call."""
    if route == "mixed":
        return [adapt.mixed(ll.stack([params, params]), torch.cat([x, x]), [0] * len(x) + [1] * len(x))]
    if route == "base":
        return [adapt.base(x)]
    if route == "module":
        return [adapt.module(params).eval()(x)]
    if route == "per_example":
        grads = ll.per_example_grad(adapt, lambda y, b: y.square().mean(1))(params, x)
        return [g for leaves in grads.values() for g in leaves.values()]
    if route == "grad":
        value, grads = ll.value_and_grad(lambda p: adapt(p, x).square().sum())(params)
        func = torch.func.grad(lambda p: adapt(p, x).square().sum())(params)
        return [value, *(g for tree in (grads, func) for leaves in tree.values() for g in leaves.values())]
    return [adapt(params, x)]


def equal(got, want):
    return len(got) == len(want) and all(torch.equal(a, b) for a, b in zip(got, want))


def test_state_of_the_model_does_not_leak():
    model = Stateful().eval()
    before = facts(model)
    adapt = ll.build(model, ll.LoRAConfig(r=2))
    params = move(adapt.init())
    batches = [torch.randn(n, 6) for n in (3, 5, 2)]
    routes = ("adapt", "base", "module", "grad")
    want = {
        (r, k): through(ll.build(copy.deepcopy(model), ll.LoRAConfig(r=2)), r, params, x) for r in routes for k, x in enumerate(batches)
    }
    for r, k in [*want, *reversed(want)]:
        assert equal(through(adapt, r, params, batches[k]), want[r, k]), (r, k)
    assert facts(model) == before
    with ThreadPoolExecutor(2) as pool:
        again = list(pool.map(lambda key: through(adapt, key[0], params, batches[key[1]]), list(want) * 2))
    assert all(equal(got, want[key]) for got, key in zip(again, list(want) * 2))
    assert facts(model) == before


def test_state_within_a_call_is_the_models_own():
    model, x = Stateful().eval(), torch.randn(3, 6)
    adapt = ll.build(model, ll.LoRAConfig(r=2))
    params = adapt.init()
    got = adapt(params, x)
    assert torch.equal(got, copy.deepcopy(model)(x))


def test_module_keeps_state_of_its_own():
    model, x = Stateful().eval(), torch.randn(3, 6)
    before = facts(model)
    adapt = ll.build(model, ll.LoRAConfig(r=2))
    module, other, theirs = adapt.module(adapt.init()), adapt.module(adapt.init()), copy.deepcopy(model)
    for _ in range(3):
        assert torch.equal(module(x), theirs(x))
    assert module.calls == 3
    assert other.calls == 0
    assert other.history == []
    assert facts(model) == before
    assert torch.equal(adapt(adapt.init(), x), other(x))


def test_state_after_an_exception_and_within_a_reentrant_call():
    model, x = Stateful().eval(), torch.randn(3, 6)
    switch = {}
    model.out.register_forward_pre_hook(lambda module, args: switch["do"]() if "do" in switch else None)
    adapt = ll.build(model, ll.LoRAConfig(r=2))
    params, inner = move(adapt.init()), torch.randn(5, 6)
    want, of_inner = adapt(params, x), adapt(params, inner)

    def fail():
        raise ArithmeticError("from a hook")

    switch["do"] = fail
    with pytest.raises(ArithmeticError):
        adapt(params, inner)

    def again():
        call = switch.pop("do")
        assert torch.equal(adapt(params, inner), of_inner)
        switch["do"] = call

    switch["do"] = again
    assert torch.equal(adapt(params, x), want)
    switch.clear()
    assert torch.equal(adapt(params, x), want)


class Counted(nn.Module):
    """A block whose output depends on how often it was called."""

    def __init__(self):
        super().__init__()
        self.lin, self.calls = nn.Linear(6, 6), 0
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.count += 1
        return self.lin(x).tanh() * (self.calls + self.count)


def test_recomputed_blocks_begin_with_the_state_that_they_had():
    model, x = nn.Sequential(Counted(), Counted()), torch.randn(3, 6)
    model.append(model[0])  # called twice in one call
    trees = []
    for remat in (None, r"^\d$"):
        adapt = ll.build(model, ll.LoRAConfig(r=2), remat=remat)
        params = move(adapt.init())
        for _ in range(2):
            trees.append(ll.value_and_grad(lambda p, a=adapt: a(p, x).square().sum())(params))
    for value, grads in trees[1:]:
        assert torch.allclose(value, trees[0][0], **CLOSE)
        for path, leaves in grads.items():
            for name, g in leaves.items():
                assert torch.allclose(g, trees[0][1][path][name], **CLOSE)
    assert model[0].calls == 0


def test_dynamic_rope():
    config = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, max_position_embeddings=16, rope_parameters=config)).eval()
    for p in model.parameters():
        p.data *= 4 if p.dim() == 2 else 1
    adapt = ll.build(copy.deepcopy(model), ll.LoRAConfig(r=4))
    params = adapt.init()
    with torch.no_grad():
        for length in (40, 8, 60, 20, 40):
            batch = {"input_ids": torch.randint(0, 64, (1, length)), "use_cache": False}
            want = copy.deepcopy(model)(**batch).logits
            for _ in range(2):
                assert torch.equal(adapt(params, batch).logits, want)
                assert torch.equal(adapt.base(batch).logits, want)


def test_compiled_in_one_graph_with_state():
    model, x = Counted().eval(), torch.randn(3, 6)
    adapt = ll.build(model, ll.LoRAConfig(r=2))
    params = move(adapt.init())
    want = adapt(params, x)
    got = torch.compile(lambda p, b: adapt(p, b), fullgraph=True, backend="aot_eager")(params, x)
    assert torch.allclose(got, want, **CLOSE)
    assert torch.equal(adapt(params, x), want), "an eager call after a compiled one"
    assert model.calls == 0


class Running(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.name, self.lin = name, nn.Linear(4, 4)
        self.register_buffer(name, torch.zeros(4))

    def forward(self, x):
        mean = getattr(self, self.name)
        mean.mul_(0.9).add_(0.1 * x.detach().mean(0))
        return self.lin(x - mean)


@pytest.mark.parametrize("name", ["running_mean", "constant_mean"])
def test_buffer_of_any_name(name):
    model, x = Running(name), torch.ones(8, 4)
    adapt = ll.build(model, ll.LoRAConfig(r=2))
    params = adapt.init()
    assert torch.equal(adapt(params, x), adapt(params, x))
    assert not getattr(model, name).any()


def test_parameter_of_any_name_is_trained():
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.adapter_scale = nn.Linear(8, 4), nn.Parameter(torch.ones(4))

        def forward(self, x):
            return self.lin(x) * self.adapter_scale

    adapt = ll.build(nn.Sequential(nn.Linear(8, 8), Head()), ll.FullConfig(target_names="^1$"))
    assert set(adapt.shapes["1"]) == {"adapter_scale", "lin.weight", "lin.bias"}


# Law 2: the weight is adapted, whoever reads it


def deberta():
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    return transformers.DebertaV2ForMaskedLM(transformers.DebertaV2Config(**sizes, legacy=False)).eval()


@pytest.mark.parametrize("config", [ll.FullConfig, ll.LoRAConfig])
def test_read_embedding_is_adapted(config):
    model, ids = deberta(), torch.randint(3, 64, (2, 7))
    fields = {"target_names": r"word_embeddings$"}
    adapt = ll.build(model, config(**fields))
    params = move(adapt.init())
    want = merged(adapt, params, model)(ids).logits
    assert torch.allclose(adapt(params, (ids,)).logits, want, **CLOSE)
    assert torch.allclose(adapt.module(params)(ids).logits, want, **CLOSE)
    assert not torch.allclose(model(ids).logits, want, **CLOSE)


class Branches(nn.Module):
    """Take a branch by the batch: one calls a layer, one reads its weight, one leaves it out."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        x = self.first(x).tanh()
        if len(x) == 2:
            return x
        return self.second(x) if len(x) == 3 else nn.functional.linear(x, self.second.weight, self.second.bias)


def test_branches_in_any_order_and_thread():
    model = Branches().eval()
    adapt = ll.build(model, ll.LoRAConfig(r=2))
    params = move(adapt.init())
    want = merged(adapt, params, model)

    def check(n):
        x = torch.randn(n, 6)
        return torch.allclose(adapt(params, x), want(x), **CLOSE)

    assert all(check(n) for n in (2, 3, 4, 2, 4, 3))
    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(check, (3, 2, 4, 2)))
    assert adapt.train()(params, torch.randn(2, 6)).shape == (2, 6)


class Direct(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(8, 4)

    def forward(self, x):
        return self.lin.forward(x)


class Listed(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.ParameterList([nn.Parameter(torch.randn(8, 8)) for _ in range(2)])

    def forward(self, x):
        return (x @ self.w[0].T) @ self.w[1].T


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(4, 8))

    def forward(self, x):
        return x @ self.table.T


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = Table()

    def forward(self, x):
        return self.emb(x) @ self.emb.table


@pytest.mark.parametrize(("make", "name"), [(Direct, "lin"), (Listed, r"w\.0$"), (Tied, "table$")])
def test_weights_used_without_a_call_of_their_layer(make, name):
    model, x = make(), torch.randn(3, 8)
    adapt = ll.build(model, ll.LoRAConfig(r=2, target_names=name))
    params = move(adapt.init())
    want = merged(adapt, params, model)(x)
    assert torch.allclose(adapt(params, x), want, rtol=1e-4, atol=1e-4)  # products of products of numbers up to 30
    assert not torch.allclose(model(x), want, rtol=1e-2)


def mllama():
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_global_layers": 1, "attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 8, "vision_output_dim": 64, "intermediate_layers_indices": [0], "max_num_tiles": 1}
    text = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "cross_attention_layers": [1], "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    vision["supported_aspect_ratios"] = [[1, 1]]
    config = transformers.MllamaConfig(image_token_index=63, vision_config=vision, text_config=text)
    return transformers.MllamaForConditionalGeneration(config).eval()


def test_text_and_images_in_any_order():
    model, ids = mllama(), torch.randint(3, 60, (2, 8))
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    long = torch.long
    image = {"pixel_values": torch.randn(2, 1, 1, 3, 16, 16), "aspect_ratio_ids": torch.ones(2, 1, dtype=long)}
    image |= {"aspect_ratio_mask": torch.ones(2, 1, 1, dtype=long), "cross_attention_mask": torch.ones(2, 8, 1, 1, dtype=long), **text}
    adapt = ll.build(model, ll.LoRAConfig(r=2))
    params = adapt.init()
    with torch.no_grad():
        for batch in (text, image, text):
            assert torch.equal(adapt(params, batch).logits, model(**batch).logits)
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(lambda: torch.equal(adapt(params, text).logits, model(**text).logits)).result()
        adapt.train()(params, text)


# Law 4: nothing left behind


class Plain:
    def __init__(self, layer):
        self.layer = layer

    def __call__(self, x):
        return self.layer(x)


class Slotted:
    __slots__ = ("__layer", "me")

    def __init__(self, layer):
        self.__layer, self.me = layer, self

    def __call__(self, x):
        return self.me.__layer(x)


def cyclic(layer):
    ring = [layer]
    ring.append(ring)
    return lambda x: ring[1][1][0](x)


def by_default(layer):
    return lambda x, layer=layer: layer(x)


def by_keyword(layer):
    def call(x, *, layer=layer):
        return layer(x)

    return call


def outside(layer):
    """A module that is registered nowhere and holds a layer that is."""
    return nn.Sequential(layer, nn.Identity())


WAYS = {
    "list of lists": lambda layer: Plain([[layer]]).layer[0][0],
    "nested": lambda layer: functools.partial(lambda box, x: box[0]["a"][0](x), ({"a": [layer]},)),
    "partial": lambda layer: functools.partial(lambda layer, x: layer(x), layer),
    "lambda": lambda layer: lambda x: layer(x),
    "closure in a closure": lambda layer: (lambda inner: lambda x: inner(x))(lambda x: layer(x)),
    "default": by_default,
    "keyword": by_keyword,
    "object": Plain,
    "object in an object": lambda layer: Plain(Plain(layer)),
    "slots": Slotted,
    "bound method": lambda layer: Plain(layer).__call__,
    "method of the layer": lambda layer: layer.forward,
    "cycle": cyclic,
    "set": lambda layer: (lambda group: lambda x: next(iter(group))(x))(frozenset({layer})),
    "weak reference": lambda layer: (lambda ref: lambda x: ref()(x))(weakref.ref(layer)),
    "proxy": lambda layer: (lambda proxy: lambda x: proxy(x))(weakref.proxy(layer)),
    "weak dict": lambda layer: (lambda held: lambda x: held["a"](x))(weakref.WeakValueDictionary(a=layer)),
    "cached function": lambda layer: (lambda f: lambda x: f()(x))(functools.lru_cache(lambda: layer)),
    "namespace": lambda layer: types.SimpleNamespace(layer=layer).layer,
    "deque": lambda layer: (lambda held: lambda x: held[0](x))(collections.deque([layer])),
    "default dict": lambda layer: (lambda held: lambda x: held["any"](x))(collections.defaultdict(lambda: layer)),
    "append": lambda layer: (lambda held: lambda x: held.__getitem__(0)(x))([layer]),
    "bound builtin": lambda layer: (lambda get: lambda x: get(0)(x))([layer].__getitem__),
    "outside the tree": lambda layer: (lambda held: lambda x: held(x))(outside(layer)),
}


class Way(nn.Module):
    """Call the last layer by way of something that holds it."""

    def __init__(self, way):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.held = [[WAYS[way](self.layers[2])]]

    def forward(self, x):
        for layer in self.layers[:2]:
            x = layer(x).tanh()
        return self.held[0][0](x)


@pytest.mark.parametrize("way", list(WAYS))
def test_reference_leads_to_the_copy(way):
    model, x = Way(way), torch.randn(3, 6)
    model.layers[2].register_forward_hook(lambda module, args, y: seen.append(module))
    seen = []
    adapt = ll.build(model, ll.LoRAConfig(r=2))
    params = move(adapt.init())
    got = adapt(params, x)
    assert not any(module is model.layers[2] for module in seen)
    assert torch.allclose(adapt.module(params)(x), got, **CLOSE)
    assert torch.allclose(adapt.train()(params, x), got, **CLOSE)
    plain = nn.Sequential(model.layers[0], nn.Tanh(), model.layers[1], nn.Tanh(), model.layers[2])
    twin = ll.build(plain, ll.LoRAConfig(r=2))
    want = twin({str(2 * k): params[f"layers.{k}"] for k in range(3)}, x)
    assert torch.allclose(got, want, **CLOSE)
    assert adapt.unused() == []
    grads = ll.value_and_grad(lambda p: adapt(p, x).square().sum())(params)[1]
    assert all(g.any() for g in grads["layers.2"].values())


def test_hook_that_holds_another_layer():
    model, x = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), torch.randn(3, 6)
    other = model[1]
    model[0].register_forward_hook(lambda module, args, y: other(y).tanh())
    adapt = ll.build(model, ll.LoRAConfig(r=2))
    params = move(adapt.init())
    first, last = (ll.build(nn.Sequential(layer), ll.LoRAConfig(r=2)) for layer in (bare(model[0]), model[1]))
    second = functools.partial(last, {"0": params["1"]})
    assert torch.allclose(adapt(params, x), second(second(first({"0": params["0"]}, x)).tanh()), **CLOSE)


def bare(layer):
    other = nn.Linear(layer.in_features, layer.out_features)
    other.load_state_dict(layer.state_dict())
    return other


def test_attribute_of_a_parameter_leads_to_the_copy():
    model = nn.Sequential(nn.Linear(6, 6))
    model[0].weight.module, model[0].weight.runs = model[0], model[0].forward
    adapt = ll.build(model, ll.LoRAConfig(r=2))
    copy_ = adapt.module(adapt.init())
    assert copy_[0].weight.module is copy_[0]
    assert copy_[0].weight.runs.__self__ is copy_[0]
    assert model[0].weight.module is model[0]


def test_what_holds_no_layer_is_shared():
    model = nn.Sequential(nn.Linear(6, 6))
    lock, function = threading.Lock(), lambda x: x
    unregistered = [nn.Linear(6, 6)]
    model.kept = Plain(lock), function, Plain(torch.ones(3)), unregistered[0]
    model.one = model.two = [1, 2]
    copied = ll.build(model, ll.LoRAConfig(r=2)).module(ll.build(model, ll.LoRAConfig(r=2)).init())
    assert all(a is b for a, b in zip(copied.kept, model.kept))
    assert copied.one is copied.two
    assert copied.one is not model.one


def test_way_without_a_copy_is_refused_by_name():
    model = nn.Sequential(nn.Linear(6, 6))
    model.layers = [iter([model[0]])]
    with pytest.raises(ValueError, match=r'build: cannot copy "layers": it leads to a layer of the model through a list_iterator.*Keep'):
        ll.build(model, ll.LoRAConfig(r=2))


# Random models


class Node(nn.Module):
    """A random small module: children, and traits that models have."""

    def __init__(self, draw, depth, shared):
        super().__init__()
        self.traits = draw(st.sets(st.sampled_from(["counter", "buffer", "reassigned", "list", "cache", "branch", "several", "moving"])))
        self.way = draw(st.sampled_from(["attribute", *WAYS]))
        self.lin = nn.Linear(4, 4)
        reuse = shared and draw(st.booleans())
        inner = shared[draw(st.integers(0, len(shared) - 1))] if reuse else Node(draw, depth - 1, shared) if depth else nn.Linear(4, 4)
        shared.append(inner)
        self.inner = inner
        self.held = {"a": [inner if self.way == "attribute" else WAYS[self.way](inner)]}
        self.calls, self.history, self.cache, self.size = 0, [], None, 1
        self.mean = torch.zeros(4)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("scale", torch.ones(4), persistent=False)
        if draw(st.booleans()):
            self.lin.register_forward_hook(lambda module, args, y: y * 1.5)

    def forward(self, x):
        t = self.traits
        y = self.lin(x)
        if "counter" in t:
            self.calls += 1
            y = y * self.calls
        if "buffer" in t:
            self.count += 1
            y = y * self.count
        if "reassigned" in t and self.size < 4:
            self.size += 1
            self.register_buffer("scale", self.scale + 1, persistent=False)
        if "list" in t:
            self.history.append(len(x))
            y = y * len(self.history)
        if "cache" in t:
            self.cache = y.mean() if self.cache is None else self.cache
            y = y + self.cache
        if "moving" in t:
            self.mean.mul_(0.5).add_(1)
            y = y + self.mean
        y = (y * self.scale).tanh()
        if "branch" in t and len(x) % 2:
            return y
        found = self.held["a"][0](y)
        return y + (found[0] if isinstance(found, tuple) else found) if "several" not in t else y


@st.composite
def trees(draw):
    torch.manual_seed(draw(st.integers(0, 1000)))
    return nn.Sequential(*(Node(draw, draw(st.integers(0, 2)), []) for _ in range(draw(st.integers(1, 2))))).eval()


def check(model, order):
    """Compare every call with the first one of a fresh build, in any order, and with the model's own first call on merged weights."""
    adapt = ll.build(model, ll.LoRAConfig(r=1))
    params = move(adapt.init())
    batches = [torch.randn(n, 4) for n in (2, 3)]
    whole = by_weights(model, adapt, params)
    want = [whole(x) for x in batches]
    before, known = facts(model), {}
    for route, k in order:
        got = through(adapt, route, params, batches[k])
        known.setdefault((route, k), got)
        assert equal(got, known[route, k]), f"{route} differs from its first call"
    for x, y in zip(batches, want):
        assert torch.allclose(adapt(params, x), y, rtol=1e-4, atol=1e-5), "differs from the model with the update in its weights"
    assert facts(model) == before


def by_weights(model, adapt, params):
    """Return the model's own first call with the update in its weights, which are put back after it."""

    def run(x):
        state = {path: (dict(vars(m)), dict(m._buffers)) for path, m in model.named_modules()}
        tensors = {id(t): (t, t.data, t.detach().clone()) for m in model.modules() for t in (*m._parameters.values(), *m._buffers.values())}
        tensors |= {id(t): (t, t.data, t.clone()) for m in model.modules() for t in [getattr(m, "mean", None)] if t is not None}
        lists = [(m.history, list(m.history)) for m in model.modules() if hasattr(m, "history")]
        try:
            for path, p in params.items():
                layer = model.get_submodule(path)
                layer.weight.data = layer.weight.data + adapt.configs[0].scale * p["B"] @ p["A"]
            with torch.no_grad():
                return model(x)
        finally:
            for path, m in model.named_modules():
                vars(m).clear()
                vars(m).update(state[path][0])
                m._buffers.clear()
                m._buffers.update(state[path][1])
            for tensor, storage, was in tensors.values():
                tensor.data = storage
                tensor.data.copy_(was)
            for held, was in lists:
                held[:] = was

    return run


@settings(SETTINGS, max_examples=40)
@given(trees(), st.lists(st.tuples(st.sampled_from(["adapt", "base", "module", "grad"]), st.integers(0, 1)), min_size=2, max_size=5))
def test_random_trees(model, order):
    check(model, order)


class Chain(nn.Module):
    """Layers that keep state, row by row alike, and a hook that fails when told to."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2 + seed % 2))
        self.calls, self.log, self.fail = 0, [], threading.local()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("scale", torch.ones(()), persistent=False)
        self.call = {"last": [lambda x: self.layers[-1](x)]}
        self.layers[0].register_forward_hook(self.check)
        self.kind = seed

    def check(self, module, args, y):
        if getattr(self.fail, "on", False):
            raise ArithmeticError("injected")
        self.log.append(self.calls)

    def forward(self, x):
        self.calls += 1
        self.count += 1
        self.register_buffer("scale", self.scale + self.kind % 3, persistent=False)
        for layer in self.layers[:-1]:
            x = layer(x).tanh()
        return self.call["last"][0](x) * (self.calls * self.count + self.scale) + len(self.log)


def test_a_thousand_sequences_of_calls():
    generator = torch.Generator().manual_seed(0)

    def draw(n):
        return int(torch.randint(n, (), generator=generator))

    subjects = []
    for seed in range(10):
        model = Chain(seed).eval()
        before = facts(model)
        adapt = ll.build(model, ll.LoRAConfig(r=1))
        members = [move(adapt.init(seed=k), seed=k) for k in range(2)]
        batches = [torch.randn(n, 4) for n in (1, 2)]
        want = {}
        for route in ROUTES:
            for p in range(2):
                for b in range(2):
                    want[route, p, b] = through(ll.build(model, ll.LoRAConfig(r=1)), route, members[p], batches[b])
        subjects.append((model, adapt, members, batches, want, before))
    with ThreadPoolExecutor(2) as pool:

        def one(model, adapt, members, batches, key, fails):
            model.fail.on = fails  # this thread's own
            try:
                return through(adapt, key[0], members[key[1]], batches[key[2]])
            except ArithmeticError:
                return None
            finally:
                model.fail.on = False

        for turn in range(1000):
            model, adapt, members, batches, want, before = subjects[turn % 10]
            todo = []
            for _ in range(1 + draw(3)):
                key, fails, threaded = (ROUTES[draw(len(ROUTES))], draw(2), draw(2)), draw(5) == 0, draw(3) == 0
                args = (model, adapt, members, batches, key, fails)
                todo.append((key, fails, pool.submit(one, *args).result if threaded else functools.partial(one, *args)))
            for key, fails, result in todo:
                got = result()
                assert (got is None) == fails, key
                assert fails or equal(got, want[key]), key
    for model, _, _, _, _, before in subjects:
        assert facts(model) == before


class ProductByFunction(torch.autograd.Function):
    """A loss of its own that takes the head's weight, as those that compute logits in parts do."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.t() @ x


class OfFunction(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(6, 6), nn.Linear(6, 9, bias=False)

    def forward(self, x):
        return ProductByFunction.apply(self.body(x), self.head.weight)


@pytest.mark.parametrize("names", ["head", "head|body"])
def test_a_weight_given_to_an_autograd_function_is_adapted_or_refused(names):
    adapt = ll.build(OfFunction(), ll.LoRAConfig(r=2, target_names=names))
    params = move(adapt.init())
    x = torch.randn(3, 6)
    merged = OfFunction()
    merged.load_state_dict({**adapt._plan.base.state_dict(), **adapt.merge(params)})
    torch.testing.assert_close(adapt(params, x), merged(x))
    with torch.no_grad():
        torch.testing.assert_close(adapt.module(params).eval()(x), merged(x))
    with pytest.raises(RuntimeError, match='"head" expected a weight that autograd follows, found it given to ProductByFunction'):
        adapt.module(params)(x)
    with pytest.raises(RuntimeError, match="expected a weight that autograd follows"):
        ll.value_and_grad(lambda p: adapt(p, x).sum())(params)
    only = ll.build(OfFunction(), ll.LoRAConfig(r=2, target_names="body"))
    only.module(only.init())(x).sum().backward()
