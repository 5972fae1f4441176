"""Recomputing named blocks: the same gradients, to the bit or nearly, and the activations really not kept."""

import functools
from collections import UserDict
from dataclasses import dataclass

import pytest
import torch
import transformers as tf
from torch import nn
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

import lora_lite as ll
from cases import FIVE, assert_trees_equal, by_name, move, saved_beside, tensors_of
from common.measure import peak_bytes

BLOCKS = {
    "llama": r"layers\.\d+$",
    "gemma3": r"layers\.\d+$",
    "gemma3n": r"model\.layers\.\d+$",
    "gpt2": r"\.h\.\d+$",
    "t5": r"block\.\d+$",
    "bert": r"layer\.\d+$",
    "vit": r"layers?\.\d+$",
}


def value_and_grad(adapt, params, batch):
    return ll.value_and_grad(lambda p: adapt(p, batch).loss)(params)[1]


def func_grad(adapt, params, batch):
    return torch.func.grad(lambda p: adapt(p, batch).loss)(params)


def plain_autograd(adapt, params, batch):
    module = adapt.module(params)
    module(**batch).loss.backward()
    with torch.no_grad():
        for parameter in module.parameters():
            assert (parameter.grad is not None) <= parameter.requires_grad, "a frozen tensor has a gradient"
            if parameter.requires_grad:
                parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    return adapt.params(module)  # the gradients, in the params' place


HOW = {f.__name__: f for f in (value_and_grad, func_grad, plain_autograd)}


def pair(tiny, name, cfg, pattern=None, train=False, **overrides):
    model, batch = tiny(name, **overrides)
    model.train(train)
    plain, remat = ll.build(model, cfg), ll.build(model, cfg, remat=pattern or BLOCKS[name])
    return plain, remat, move(plain.init()), batch


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("cfg", FIVE, ids=by_name)
@pytest.mark.parametrize("name", list(BLOCKS))
def test_gradients_are_those_of_the_plain_step(tiny, name, cfg, how):
    plain, remat, params, batch = pair(tiny, name, cfg)
    want, got = HOW[how](plain, params, batch), HOW[how](remat, params, batch)
    assert_trees_equal(got, want, 1e-6)
    assert max(float(leaf.abs().max()) for leaves in want.values() for leaf in leaves.values()) > 1e-4
    with torch.no_grad():
        assert torch.equal(remat(params, batch).logits, plain(params, batch).logits)


@pytest.mark.parametrize("cfg", FIVE, ids=by_name)
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_per_example_gradients_under_vmap(tiny, name, cfg):
    plain, remat, params, batch = pair(tiny, name, cfg, attn_implementation="eager")
    rows = {key: batch[key] for key in ("input_ids", "labels")}

    def loss(adapt):
        return lambda p, row: adapt(p, {key: value[None] for key, value in row.items()}).loss

    want, got = (torch.vmap(torch.func.grad(loss(a)), in_dims=(None, 0))(params, rows) for a in (plain, remat))
    assert_trees_equal(got, want, 1e-6)
    one = func_grad(plain, params, {key: value[:1] for key, value in rows.items()})
    assert_trees_equal({path: {name: leaf[0] for name, leaf in leaves.items()} for path, leaves in got.items()}, one, 1e-5)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("cfg", [ll.LoRAConfig(r=4, dropout=0.2), ll.DoRAConfig(r=4, dropout=0.2), ll.IA3Config()], ids=by_name)
@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_dropout_falls_on_the_same_entries(tiny, name, cfg, how):
    plain, remat, params, batch = pair(tiny, name, cfg, train=True, **({"attention_dropout": 0.2} if name == "llama" else {}))
    results = []
    for adapt in (plain, remat):
        torch.manual_seed(7)
        results.append(HOW[how](adapt, params, batch))
    assert_trees_equal(results[1], results[0], 1e-6)
    torch.manual_seed(8)
    other = HOW[how](remat, params, batch)
    if cfg.name != "ia3" or name != "llama":
        path, leaf = next((p, n) for p, leaves in other.items() for n in leaves if leaves[n].abs().max() > 0)
        assert not torch.allclose(other[path][leaf], results[1][path][leaf]), "no dropout took part"


def test_random_state_goes_on_as_without(tiny):
    plain, remat, params, batch = pair(tiny, "bert", ll.LoRAConfig(r=4, dropout=0.2), train=True)
    after = []
    for adapt in (plain, remat):
        torch.manual_seed(7)
        value_and_grad(adapt, params, batch)
        after.append(torch.rand(3))
    assert torch.equal(*after)


class _Drawing(nn.Module):
    """A block that draws at random, whatever its mode."""

    def __init__(self, draw):
        super().__init__()
        self.a, self.drop, self.b, self.draw = nn.Linear(8, 8), nn.Dropout(), nn.Linear(8, 8), draw

    def forward(self, x):
        return x + self.b(self.draw(self, torch.tanh(self.a(x))))


DRAWS = {
    "a module in training mode": lambda block, h: block.drop.train()(h),
    "dropout in training mode": lambda block, h: nn.functional.dropout(h, 0.5, training=True),
    "noise": lambda block, h: h * torch.randn_like(h),
}


@pytest.mark.parametrize("way", ["value_and_grad", "grad", "hessian", "vmap"])
@pytest.mark.parametrize("draw", DRAWS)
def test_blocks_in_evaluation_mode_that_draw_at_random(draw, way):
    model, x, found = nn.Sequential(_Drawing(DRAWS[draw]), _Drawing(DRAWS[draw])).eval(), torch.randn(4, 8), []
    for pattern in (None, r"^\d$"):
        adapt = ll.build(model, ll.LoRAConfig(r=2), remat=pattern)
        run = dict(_losses(adapt, move(adapt.init()), x, randomness="different"))[way]
        torch.manual_seed(5)
        found.append((run(), torch.rand(3)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("way", ["value_and_grad", "grad", "hessian", "jvp", "vmap"])
@pytest.mark.parametrize("pattern", [r"^1$", r"^\d$"])
def test_autocast_around_the_forward_alone(pattern, way):
    shared = nn.Linear(8, 8)
    model, x, found = nn.Sequential(nn.Sequential(shared, nn.Tanh()), nn.Sequential(shared, nn.Tanh()), shared), torch.randn(4, 8), []
    for remat in (None, pattern):
        adapt = ll.build(model, ll.LoRAConfig(r=2), remat=remat)

        def call(p, x, adapt=adapt):
            with torch.autocast("cpu", torch.bfloat16):
                return adapt(p, x)

        found.append(dict(_losses(call, move(adapt.init()), x))[way]())
    # vmap adds up the gradients of the shared layer in another order, in bfloat16.
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=6e-2 if way == "vmap" else 1e-7)


@pytest.mark.parametrize("how", ["value_and_grad", "func_grad"])
def test_autocast_around_the_forward_of_a_model(tiny, how):
    # torch's fused attention takes another kernel where nothing is recorded, which in bfloat16 rounds otherwise.
    plain, remat, params, batch = pair(tiny, "t5", ll.LoRAConfig(r=4), attn_implementation="eager")

    def call(adapt):
        def run(p, batch):
            with torch.autocast("cpu", torch.bfloat16):
                return adapt(p, batch)

        return run

    want, got = (HOW[how](call(adapt), params, batch) for adapt in (plain, remat))
    assert_trees_equal(got, want, 1e-6)
    assert max(float(leaf.abs().max()) for leaf in ll.tree_leaves(want)) > 1e-4


class _Noting(nn.Module):
    """A block that writes into a mapping what later ones read."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(8, 8)

    def forward(self, x, notes, last=None):
        h = self.proj(x)
        noted = {**notes, f"h{len(notes)}": (h, h.square())}
        notes.update(noted)
        return h.tanh() + notes["h0"][1]


class _Noted(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.blocks, self.kind = nn.ModuleList(_Noting() for _ in range(3)), kind

    def forward(self, x):
        notes = self.kind()
        for block in self.blocks:
            x = block(x, notes)
        return x.sum() + sum(h.sum() + square.sin().sum() for h, square in notes.values())


@pytest.mark.parametrize("how", ["value_and_grad", "grad", "vmap", "jvp"])
@pytest.mark.parametrize("kind", [dict, UserDict])
def test_what_blocks_write_into_a_mapping_keeps_its_gradient(kind, how):
    model, x = _Noted(kind), torch.randn(4, 8)
    plain, remat = (ll.build(model, ll.LoRAConfig(r=2), remat=pattern) for pattern in (None, r"^blocks\.\d+$"))
    params = move(plain.init())
    results = []
    for adapt in (plain, remat):
        f = lambda p, x=x, adapt=adapt: adapt(p, x)  # noqa: E731
        if how == "jvp":
            results.append({"": {"": torch.func.jvp(f, (params,), (params,))[1]}})
        elif how == "vmap":
            results.append(torch.vmap(torch.func.grad(f), in_dims=(None, 0))(params, x[:, None]))
        else:
            results.append(ll.value_and_grad(f)(params)[1] if how == "value_and_grad" else torch.func.grad(f)(params))
    assert_trees_equal(results[1], results[0], 1e-6)


@dataclass
class _State:
    h: torch.Tensor
    steps: int = 0


@dataclass(frozen=True, slots=True)
class _FrozenState:
    h: torch.Tensor
    more: list


class _Plain(nn.Module):
    """A block, and the way by which a model calls it: each hands gradients in or out by more than arguments and results."""

    def __init__(self):
        super().__init__()
        self.lin, self.cond, self.losses = nn.Linear(8, 8), None, []

    def make(self, x):
        return torch.tanh(self.lin(x))

    def call(self, x, seen):
        return self(x)


class _Conditioned(_Plain):
    """The model sets an attribute, as OpenFlamingo does."""

    def forward(self, x):
        return x + self.make(x + self.cond)


class _ConditionedDeep(_Plain):
    """The model sets an attribute in a dict of the module."""

    def __init__(self):
        super().__init__()
        self.given = {}

    def forward(self, x):
        return x + self.make(x + self.given["cond"])

    def call(self, x, seen):
        self.given["cond"] = self.cond
        return self(x)


class _Aux(_Plain):
    """A loss is kept as an attribute."""

    def forward(self, x):
        y = self.make(x)
        self.aux = y.square().mean()
        return x + y

    def call(self, x, seen):
        x = self(x)
        seen.append(10 * self.aux)
        return x


class _AuxTwice(_Aux):
    """A loss that grows from call to call, and replaces what stood there."""

    aux = 0.0

    def forward(self, x):
        y = self.make(x)
        self.aux = self.aux + y.square().mean(0)
        return x + y

    def call(self, x, seen):
        return super().call(self(x), seen)


class _AuxList(_Plain):
    """Losses are appended to a list of the module, and put into a new dict."""

    def forward(self, x):
        y = self.make(x)
        self.losses.append(y.square().mean())
        self.stats = {"mean": y.mean(), "all": [y]}
        return x + y

    def call(self, x, seen):
        x = self(self(x))
        seen.extend([*self.losses, self.stats["mean"], self.stats["all"][0]])
        return x


class _AuxInside(_Plain):
    """A loss is kept in a dict that becomes an attribute of a module of torch's."""

    def forward(self, x):
        y = self.make(x)
        self.lin.stats = {"loss": y.square().mean()}
        return x + y

    def call(self, x, seen):
        x = self(x)
        seen.append(self.lin.stats["loss"])
        return x


class _Buffer(_Plain):
    """A buffer is registered anew, from what has a gradient."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x):
        y = self.make(x)
        self.mean = 0.5 * self.mean + y.mean(0)
        return x + y

    def call(self, x, seen):
        x = self(self(x))
        seen.append(self.mean)
        return x


class _Data(_Plain):
    """A dataclass goes in and another one comes out."""

    def forward(self, state):
        return _State(state.h + self.make(state.h), state.steps + 1)

    def call(self, x, seen):
        state = self(_State(x, 2))
        assert type(state) is _State
        assert state.steps == 3
        return state.h


class _DataWritten(_Plain):
    """A dataclass is written into and handed through."""

    def forward(self, state):
        state.h = state.h + self.make(state.h)
        return state

    def call(self, x, seen):
        state = _State(x)
        assert self(state) is state
        return state.h


class _DataFrozen(_Plain):
    """A frozen dataclass with slots, whose list is written into."""

    def forward(self, state):
        state.more.append(self.make(state.h))
        return _FrozenState(state.h + state.more[0], state.more)

    def call(self, x, seen):
        state = _FrozenState(x, seen)
        out = self(state)
        assert out.more is seen
        return out.h


class _Lists(_Plain):
    """The block appends to a list of the caller."""

    def forward(self, x, seen):
        y = self.make(x)
        seen.append(y)
        return x + y

    def call(self, x, seen):
        return self(x, seen)


class _Nested(_Plain):
    """The block writes into a dict in a dict, and into a list in a tuple, and hands them on."""

    def forward(self, x, notes):
        notes, (listed, _) = notes["inner"], notes["pair"]
        notes["first"] = self.make(x)
        listed.extend([notes["first"].square(), {"deep": notes["first"].sin()}])
        return x + notes["first"], notes

    def call(self, x, seen):
        listed, inner = [], {"old": x}
        x, same = self(x, notes={"inner": inner, "pair": (listed, None)})
        assert same is inner
        assert inner["old"] is not None
        seen.extend([inner["first"], listed[0], listed[1]["deep"]])
        return x


class _Escaping(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.enc, self.blocks = nn.Linear(8, 8), nn.ModuleList([kind(), kind()])

    def forward(self, x):
        x, seen = self.enc(x), []
        for block in self.blocks:
            block.cond = x.sin()
        for block in self.blocks:
            x = block.call(x, seen)
        return x + sum(k * y.square().sum() for k, y in enumerate(seen, 1))


WAYS = {
    kind.__name__.strip("_"): kind
    for kind in (
        _Conditioned,
        _ConditionedDeep,
        _Aux,
        _AuxTwice,
        _AuxList,
        _AuxInside,
        _Buffer,
        _Data,
        _DataWritten,
        _DataFrozen,
        _Lists,
        _Nested,
    )
}


@pytest.mark.parametrize("how", ["value_and_grad", "grad", "hessian", "jvp", "dual numbers", "vmap", "mixed"])
@pytest.mark.parametrize("kind", WAYS)
def test_gradients_that_pass_by_other_ways_than_arguments(kind, how):
    model, x = _Escaping(WAYS[kind]), torch.randn(4, 8)
    plain, remat = (ll.build(model, ll.LoRAConfig(r=2), remat=pattern) for pattern in (None, r"^blocks\.\d$"))
    params, found = move(plain.init()), []
    for adapt in (plain, remat, remat):  # the second time without the checks of a first run
        found.append(dict(_losses(adapt, params, x))[how]())
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found[2], found[1], rtol=0, atol=0)


@pytest.mark.parametrize("kind", WAYS)
def test_gradients_that_pass_by_other_ways_in_a_module(kind):
    model, x, found = _Escaping(WAYS[kind]), torch.randn(4, 8), []
    for pattern in (None, r"^blocks\.\d$"):
        adapt = ll.build(model, ll.LoRAConfig(r=2), remat=pattern)
        module = adapt.module(move(adapt.init()))
        module(x).square().sum().backward()
        found.append({name: p.grad for name, p in module.named_parameters() if p.requires_grad})
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)


def test_recomputed_blocks_in_recomputed_blocks(tiny):
    plain, remat, params, batch = pair(tiny, "swin", ll.LoRAConfig(r=2), pattern=r"layers\.\d+$|blocks\.\d+$")
    for how in (lambda f: ll.value_and_grad(f)(params)[1], lambda f: torch.func.grad(f)(params)):
        want, got = (how(lambda p, a=a: tensors_of(a(p, batch))[0].square().sum()) for a in (plain, remat))
        assert_trees_equal(got, want, 1e-5)


_ELSEWHERE = {}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("pattern", [r"layers\.\d+$", r"mlp$", r"layers\.0\.mlp\.up_proj$"])
@pytest.mark.parametrize("target", [r"^model$", r"^model\.layers$"])  # the second is read, and never called
def test_blocks_inside_a_module_that_is_trained_as_a_whole(tiny, target, pattern, how):
    plain, remat, params, batch = pair(tiny, "llama", ll.FullConfig(target_names=target), pattern)
    want = HOW[how](plain, params, batch)
    assert all(leaf.any() for name, leaf in want[target.strip("^$").replace("\\", "")].items() if "layers" in name)
    assert_trees_equal(HOW[how](remat, params, batch), want, 1e-6)


def test_blocks_inside_a_module_that_each_row_trains_for_itself(tiny):
    plain, remat, params, batch = pair(tiny, "llama", ll.FullConfig(target_names=r"layers\.1\.mlp$"), r"mlp\.up_proj$")
    stacked, ids = ll.stack([params, move(params, seed=1)]), batch["input_ids"]
    found = [ll.value_and_grad(lambda p, a=a: a.mixed(p, (ids,), [1, 0]).logits.square().sum())(stacked)[1] for a in (remat, plain)]
    assert_trees_equal(*found, 1e-5)


class _FromGlobal(_Plain):
    """The block reads a tensor of a global."""

    def forward(self, x):
        return x + self.make(x + _ELSEWHERE["cond"])

    def call(self, x, seen):
        _ELSEWHERE["cond"] = self.cond
        return self(x)


class _FromAside(_Plain):
    """The block reads a tensor in a dict of a module of torch, which keeps no state in one."""

    def forward(self, x):
        return x + self.make(x + self.lin.given["cond"])

    def call(self, x, seen):
        self.lin.given = {"cond": self.cond}
        return self(x)


class _FromObject(_Plain):
    """The block reads a tensor of an object that nobody takes apart."""

    def forward(self, x, holder):
        return x + self.make(x * holder.loc)

    def call(self, x, seen):
        return self(x, torch.distributions.Normal(self.cond, 1.0, validate_args=False))


class _InObject(_Plain):
    """The block returns an object that nobody takes apart."""

    def forward(self, x):
        return torch.distributions.Normal(x + self.make(x), 1.0, validate_args=False)

    def call(self, x, seen):
        return self(x).loc


FROM_ELSEWHERE = (
    r"expected tensors with a gradient to enter by its arguments or by attributes of its modules, found one of shape \(.*\) from "
    r"elsewhere.* in torch\.Tensor\.(add|mul)\. Its gradient would be lost\. Pass it as an argument, detach it"
)


class _ToGlobal(_Plain):
    """The block appends to a list of a global."""

    def forward(self, x):
        y = self.make(x)
        _KEPT.append(y)
        return x + y


_KEPT = []
TO_ELSEWHERE = r"expected what is computed inside a block to leave it by its result.*keeps the outcome of .*Return it, keep a detached copy"
REFUSED = {
    "ToGlobal": (_ToGlobal, TO_ELSEWHERE),
    "FromAside": (_FromAside, FROM_ELSEWHERE),
    "FromGlobal": (_FromGlobal, FROM_ELSEWHERE),
    "FromObject": (_FromObject, FROM_ELSEWHERE),
    "InObject": (_InObject, r"expected tensors to leave it by themselves or in lists.* found some inside of a Normal.*Return the tensors"),
}


@pytest.mark.parametrize("how", ["value_and_grad", "grad", "hessian", "jvp", "vmap", "mixed"])
@pytest.mark.parametrize("kind", REFUSED)
def test_gradients_that_would_be_lost_are_refused_by_name(kind, how):
    block, message = REFUSED[kind]
    model, x = _Escaping(block), torch.randn(4, 8)
    adapt = ll.build(model, ll.LoRAConfig(r=2), remat=r"^blocks\.\d$")
    for _ in range(2):  # a refusal is no check that was passed
        with pytest.raises(ValueError, match=rf'remat: block "blocks\.0" {message}.*without remat'):
            dict(_losses(adapt, move(adapt.init()), x))[how]()
    with torch.no_grad():
        adapt(adapt.init(), x)


class _Constant(_Plain):
    """The block reads tensors of a global that have no gradient."""

    def forward(self, x):
        y = self.make(x + _ELSEWHERE["constant"] + _ELSEWHERE["cond"].detach())
        _KEPT.append(y.detach().norm())
        return x + y


def test_constants_of_elsewhere_may_be_read():
    _ELSEWHERE.update(constant=torch.randn(8), cond=torch.randn(8, requires_grad=True))
    model, x = nn.Sequential(_Constant()), torch.randn(4, 8)
    plain, remat = (ll.build(model, ll.LoRAConfig(r=2), remat=pattern) for pattern in (None, "^0$"))
    params = move(plain.init())
    for (_, want), (_, got) in zip(_losses(plain, params, x), _losses(remat, params, x)):
        torch.testing.assert_close(got(), want(), rtol=1e-5, atol=1e-6)


def _losses(adapt, params, x, randomness="error"):
    """Every way to a gradient of `params`."""
    f = lambda p, x=x: adapt(p, x).square().sum()  # noqa: E731
    yield "value_and_grad", lambda: ll.value_and_grad(f)(params)
    yield "grad", lambda: torch.func.grad(f)(params)
    yield "hessian", lambda: ll.hvp(f)(params, params)
    yield "jvp", lambda: torch.func.jvp(f, (params,), (params,))
    yield "dual numbers", lambda: _dual(f, params, params)
    yield "vmap", lambda: torch.vmap(torch.func.grad(f), in_dims=(None, 0), randomness=randomness)(params, x[:, None])
    yield "mixed", lambda: ll.value_and_grad(lambda p: adapt.mixed(p, x).square().sum())(ll.stack([params, params]))


def test_hook_that_keeps_what_has_no_gradient_is_refused_by_name():
    model, x, kept = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))), torch.randn(4, 8), []
    model[0][1].register_forward_hook(lambda module, args, output: kept.append(output))
    adapt = ll.build(model, ll.LoRAConfig(r=2), remat="^0$")
    params = move(adapt.init())
    for name, run in _losses(adapt, params, x):
        if name == "dual numbers":  # blocks run as they are, and what is kept has its tangent
            plain = ll.build(model, ll.LoRAConfig(r=2))
            torch.testing.assert_close(run(), dict(_losses(plain, params, x))[name]())
            continue
        with pytest.raises(ValueError, match=r'a hook that keeps an output of "1", which would have no gradient.*without remat'):
            run()
    with torch.no_grad():
        adapt(params, x)


def test_hooks_that_look_on_change_nothing():
    model, x, norms = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))), torch.randn(4, 8), []
    for layer in model[0]:
        layer.register_forward_hook(lambda module, args, output: norms.append(output.detach().norm()))
        layer.register_forward_hook(lambda module, args, output: 2 * output)
    plain, remat = (ll.build(model, ll.LoRAConfig(r=2), remat=pattern) for pattern in (None, "^0$"))
    params = move(plain.init())
    for (_, want), (_, got) in zip(_losses(plain, params, x), _losses(remat, params, x)):
        torch.testing.assert_close(got(), want(), rtol=1e-5, atol=1e-6)


def test_losses_of_a_router_are_refused_or_whole(tiny):
    plain, remat, params, batch = pair(tiny, "qwen3_moe", ll.LoRAConfig(r=4), pattern=r"layers\.\d+$", experts_implementation="eager")
    with torch.no_grad():
        assert remat(params, {**batch, "output_router_logits": True}).aux_loss > 0
    with pytest.raises(ValueError, match=r'keeps an output of "mlp\.gate".*output_router_logits'):
        value_and_grad(remat, params, {**batch, "output_router_logits": True})
    for how in (value_and_grad, func_grad):  # the hooks are there, and nothing asks
        assert_trees_equal(how(remat, params, batch), how(plain, params, batch), 1e-6)


@pytest.mark.parametrize("use_cache", [None, True, False])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe", "gpt_neox", "opt"])
def test_cache_and_masks(tiny, name, masked, use_cache):
    plain, remat, params, batch = pair(tiny, name, ll.LoRAConfig(r=4), pattern=r"(layers|h)\.\d+$")
    batch = dict(batch) if masked else {key: value for key, value in batch.items() if key != "attention_mask"}
    batch |= {} if use_cache is None else {"use_cache": use_cache}
    assert_trees_equal(value_and_grad(remat, params, batch), value_and_grad(plain, params, batch), 1e-6)
    with torch.no_grad():
        cache = remat(params, {**batch, "use_cache": True}).past_key_values
    assert cache.get_seq_length() == 7, "without gradients the cache is the model's own affair"


def test_filled_cache_is_an_error_that_says_what_to_do(tiny):
    plain, remat, params, batch = pair(tiny, "llama", ll.LoRAConfig(r=4))
    ids = batch["input_ids"]
    with torch.no_grad():
        cache = plain(params, {"input_ids": ids, "use_cache": True}).past_key_values
    assert isinstance(cache, tf.Cache)
    with pytest.raises(ValueError, match=r"remat: expected no filled key-value cache.*use_cache=False"):
        value_and_grad(remat, params, {"input_ids": ids, "labels": ids, "past_key_values": cache})
    with torch.no_grad():
        assert remat(params, {"input_ids": ids[:, :1], "past_key_values": cache}).logits.shape[:2] == (2, 1)


def test_cache_of_states_alone_is_left_out_as_others_are():
    """Mamba's counts no tokens, and raised where it was asked how many it holds."""
    torch.manual_seed(0)
    config = tf.MambaConfig(vocab_size=64, hidden_size=16, state_size=4, num_hidden_layers=2, pad_token_id=0)
    model, batch = tf.MambaForCausalLM(config).eval(), {"input_ids": torch.randint(1, 64, (2, 6))}
    cfg = ll.LoRAConfig(r=2, target_names=r"(in|x|out)_proj$")
    plain, remat = ll.build(model, cfg), ll.build(model, cfg, remat=r"layers\.\d+$")
    params = move(plain.init())
    grads = [ll.value_and_grad(lambda p, adapt=adapt: adapt(p, batch).logits.square().sum())(params)[1] for adapt in (plain, remat)]
    assert_trees_equal(grads[1], grads[0], 1e-5)
    with torch.no_grad():
        cache = plain(params, {**batch, "use_cache": True}).cache_params
    with pytest.raises(ValueError, match=r"remat: expected no filled key-value cache.*use_cache=False"):
        ll.value_and_grad(lambda p: remat(p, {"input_ids": batch["input_ids"][:, :1], "cache_params": cache}).logits.sum())(params)


def test_pattern_that_matches_nothing_is_an_error(tiny):
    model, _ = tiny("llama")
    with pytest.raises(ValueError, match=r'build: expected remat="layrs.* to match a block, found none\. Closest: .*layers'):
        ll.build(model, ll.LoRAConfig(), remat=r"layrs\.\d+$")


def saved_bytes(model, loss):
    """Count the bytes that the backward pass of `loss()` keeps, without the model's own tensors and storage seen twice."""
    with saved_beside([*model.parameters(), *model.buffers()]) as seen:
        value = loss()
    value.backward()
    return sum(storage.nbytes() for storage in seen.values())


DEEP = {"num_hidden_layers": 12}


def deep_batch(device):
    ids = torch.randint(3, 64, (4, 32), device=device)
    return {"input_ids": ids, "labels": ids}


def loss_of(adapt, params, batch):
    leaves = {path: {name: leaf.clone().requires_grad_() for name, leaf in found.items()} for path, found in params.items()}
    return lambda: adapt(leaves, batch).loss


def test_activations_are_not_kept(tiny, device):
    model, _ = tiny("llama", **DEEP)
    batch = deep_batch(device)
    plain, remat = ll.build(model, ll.LoRAConfig(r=4)), ll.build(model, ll.LoRAConfig(r=4), remat=r"layers\.\d+$")
    params = move(plain.init())
    full, kept = (saved_bytes(model, loss_of(adapt, params, batch)) for adapt in (plain, remat))
    assert kept < 0.5 * full, f"{kept} bytes kept of {full}"


@pytest.mark.parametrize(
    ("name", "reentrant"),
    [*((n, None) for n in ("llama", "gpt2", "t5", "bert", "vit")), *(("llama", on) for on in (True, False)), ("t5", True)],
)
def test_gradient_checkpointing_of_the_model_is_honoured(tiny, device, name, reentrant):
    depth = {"num_layers": 12} if name == "t5" else DEEP
    model, batch = tiny(name, **depth)
    if name != "vit":
        batch = deep_batch(device)
    model.train()
    for module in model.modules():
        module.training = module.training and not isinstance(module, nn.Dropout)
    cfg = ll.LoRAConfig(r=4)
    plain = ll.build(model, cfg)
    params = move(plain.init())
    model.gradient_checkpointing_enable(**({} if reentrant is None else {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}))
    honoured = ll.build(model, cfg)
    torch.manual_seed(0)
    full = saved_bytes(model, loss_of(plain, params, batch))
    torch.manual_seed(0)
    kept = saved_bytes(model, loss_of(honoured, params, batch))
    assert kept < 0.5 * full, f"{kept} bytes kept of {full}"
    row = {key: value[:1] for key, value in batch.items()}
    for how in HOW.values():
        results = []
        for adapt in (plain, honoured):
            torch.manual_seed(7)
            results.append(how(adapt, params, row))
        assert_trees_equal(results[1], results[0], 1e-6)
    assert model.is_gradient_checkpointing


def test_input_gradients_hook_of_the_model_is_left_out_of_the_clone(tiny):
    model, batch = tiny("llama")
    model.train()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    adapt = ll.build(model, ll.LoRAConfig(r=4))
    params = move(adapt.init())
    want = value_and_grad(ll.build(tiny("llama")[0], ll.LoRAConfig(r=4)), params, batch)
    assert_trees_equal(func_grad(adapt, params, batch), want, 1e-6)
    assert model.get_input_embeddings()._forward_hooks, "the user's model lost its hook"


def _loss_of_ids(adapt):
    return lambda p, ids: adapt(p, {"input_ids": ids, "labels": ids}).loss


DERIVED = {
    "value_and_grad": lambda f, p, ids: ll.value_and_grad(f)(p, ids),
    "func_grad": lambda f, p, ids: torch.func.grad(f)(p, ids),
    "vmap": lambda f, p, ids: torch.vmap(torch.func.grad(f), in_dims=(None, 0))(p, ids[:, None]),
    "hvp": lambda f, p, ids: ll.hvp(lambda p: f(p, ids[:1]))(p, p),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # torch's fused attention has no rule for vmap
@pytest.mark.parametrize("how", DERIVED)
def test_peak_is_near_that_of_one_block(tiny, device, how):
    model, _ = tiny("llama", num_hidden_layers=6)
    ids = deep_batch(device)["input_ids"]
    plain, remat = (ll.build(model, ll.LoRAConfig(r=4), remat=pattern) for pattern in (None, r"layers\.\d+$"))
    params = move(plain.init())
    full, peak = (peak_bytes(functools.partial(DERIVED[how], _loss_of_ids(adapt), params, ids)) for adapt in (plain, remat))
    assert peak < 0.5 * full, f"{peak / full:.3f} of the peak without remat"


class Skip(nn.Module):
    """Hand an input through, return a number, a None and a tensor twice."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(6, 6)
        self.register_buffer("shift", torch.zeros(6))

    def forward(self, x, memory, flag=None):
        y = self.lin(x).tanh() + self.shift
        return {"y": y, "same": y, "memory": memory, "none": None, "number": 3}


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Skip() for _ in range(3))

    def forward(self, x):
        memory = x
        for block in self.blocks:
            out = block(x, memory=memory, flag=True)
            assert out["none"] is None
            assert out["number"] == 3
            x, memory = out["y"] * out["same"], out["memory"]
        return (x * memory).sum()


def test_block_with_an_output_of_many_parts(device):
    model = Stack().to(device)
    plain, remat = ll.build(model, ll.LoRAConfig(r=2)), ll.build(model, ll.LoRAConfig(r=2), remat=r"blocks\.\d+$")
    params = move(plain.init())
    x = torch.randn(4, 6, device=device)
    for transform in (ll.value_and_grad, lambda f: lambda p, x: (f(p, x), torch.func.grad(f)(p, x))):
        (value, grads), (want, want_grads) = transform(remat)(params, x), transform(plain)(params, x)
        assert torch.equal(value, want)
        assert_trees_equal(grads, want_grads, 1e-6)
    for_input = torch.func.grad(lambda x: remat(params, x))(x)
    assert torch.allclose(for_input, torch.func.grad(lambda x: plain(params, x))(x), atol=1e-6)


class Handing(nn.Module):
    """A block that hands gradients and tangents through, by a sum and by a view, and whose last output is an integer."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(6, 6)

    def forward(self, x, memory):
        return x + memory, x.flatten(), self.lin(memory).sin(), (x > 0).sum()


class Handed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.block = nn.Linear(6, 6), Handing()

    def forward(self, x):
        x = self.first(x)
        return sum(k * out.double().pow(3).sum() for k, out in enumerate(self.block(x, x.sin()), 1))


def _dot(a, b):
    return sum((x * y).sum() for x, y in zip(ll.tree_leaves(a), ll.tree_leaves(b)))


def _plain_hvp(f, p, v):
    leaves = ll.tree_map(lambda t: t.clone().requires_grad_(), p)
    grads = torch.autograd.grad(f(leaves), ll.tree_leaves(leaves), create_graph=True)
    return torch.autograd.grad(sum((g * t).sum() for g, t in zip(grads, ll.tree_leaves(v))), ll.tree_leaves(leaves))


def _dual(f, p, v):  # of torch.autograd.forward_ad, whose dual numbers torch.func.linearize has too
    with forward_ad.dual_level():
        return pytree.tree_map(lambda t: forward_ad.unpack_dual(t).tangent, f(ll.tree_map(forward_ad.make_dual, p, v)))


def _dual_of_gradient(f, p, v):
    def gradient(p):
        return torch.autograd.grad(f(p), ll.tree_leaves(p), create_graph=True)

    return [t.detach() for t in _dual(gradient, ll.tree_map(lambda t: t.clone().requires_grad_(), p), v)]


def _gradient_of_dual(f, p, v):
    p = ll.tree_map(lambda t: t.clone().requires_grad_(), p)
    return torch.autograd.grad(_dual(f, p, v), ll.tree_leaves(p))


HIGHER = {
    "dual numbers": _dual,
    "dual numbers of a gradient": _dual_of_gradient,
    "gradient of dual numbers": _gradient_of_dual,
    "jvp": lambda f, p, v: torch.func.jvp(f, (p,), (v,))[1],
    "forward over forward": lambda f, p, v: torch.func.jvp(lambda p: torch.func.jvp(f, (p,), (v,))[1], (p,), (v,))[1],
    "forward over reverse": lambda f, p, v: ll.hvp(f)(p, v),
    "reverse over forward": lambda f, p, v: torch.func.grad(lambda p: torch.func.jvp(f, (p,), (v,))[1])(p),
    "reverse over reverse": lambda f, p, v: torch.func.grad(lambda p: _dot(torch.func.grad(f)(p), v))(p),
    "plain autograd twice": _plain_hvp,
    "three times": lambda f, p, v: torch.func.grad(lambda p: _dot(ll.hvp(f)(p, v), v))(p),
    "jacfwd": lambda f, p, v: torch.func.jacfwd(f, randomness="same")(p),
}


@pytest.mark.parametrize("how", HIGHER)
@pytest.mark.parametrize("model", [Stack, Handed])
def test_derivatives_of_every_order(device, model, how):
    model, x = model().double().to(device), torch.randn(4, 6, dtype=torch.float64, device=device)
    cfg = ll.LoRAConfig(r=2, dropout=0.3, dtype=torch.float64)
    plain, remat = (ll.build(model, cfg, remat=pattern).train() for pattern in (None, r"^blocks\.\d+$|^block$"))
    params, along = move(plain.init()), move(plain.init(), seed=1)
    found = []
    for adapt in (plain, remat):
        torch.manual_seed(7)
        found.append(HIGHER[how](lambda p, adapt=adapt: adapt(p, x), params, along))
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-9)
    assert max(float(t.abs().max()) for t in torch.utils._pytree.tree_leaves(found[0])) > 1e-3


class _Viewing(nn.Module):
    """A block whose outputs are views of what it has made."""

    def __init__(self, views):
        super().__init__()
        self.mlp, self.views = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)), views

    def forward(self, x):
        return self.views(self.mlp(x))


class _Changing(nn.Module):
    """A model that changes the outputs of its block in place."""

    def __init__(self, views):
        super().__init__()
        self.block, self.first = _Viewing(views), nn.Linear(8, 8)

    def forward(self, x):
        outputs = self.block(self.first(x))
        for k, out in enumerate(outputs, 2):
            out *= k
        return sum(k * out.sin().sum() for k, out in enumerate(outputs, 1))


VIEWS = {
    "a linear layer's": lambda h: (h,),
    "the same twice": lambda h: (h, h),
    "two of one": lambda h: (h.view(-1), h),
    "a transpose": lambda h: (h.transpose(0, -1),),
    "a part": lambda h: (h[..., 1:4],),
    "another shape": lambda h: (h.unflatten(-1, (2, 4)),),
}


IN_PLACE = [(views, how) for views in VIEWS for how in ("value_and_grad", "grad", "hessian", "jvp", "vmap")]
IN_PLACE.remove(("two of one", "vmap"))  # a tensor of vmap does not know of what it is a view


@pytest.mark.parametrize(("views", "how"), IN_PLACE)
def test_outputs_may_be_changed_in_place(views, how):
    model, x, found = _Changing(VIEWS[views]), torch.randn(2, 3, 8), []
    for pattern in (None, "^block$"):
        adapt = ll.build(model, ll.LoRAConfig(r=2), remat=pattern)
        found.append(dict(_losses(adapt, move(adapt.init()), x))[how]())
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_products_of_the_hessian_with_dropout(tiny, name):
    plain, remat, params, batch = pair(tiny, name, ll.LoRAConfig(r=4, dropout=0.2), train=True)
    along, found = move(params, seed=1), []
    for adapt in (plain, remat):
        torch.manual_seed(7)
        found.append(ll.hvp(lambda p, adapt=adapt: adapt(p, batch).loss)(params, along))
    assert_trees_equal(found[1], found[0], 1e-5)


class _Writing(nn.Module):
    """A block that writes to its input, and returns it or something of it."""

    def __init__(self, how):
        super().__init__()
        self.how, self.inner = how, nn.Linear(8, 8)

    def forward(self, x):
        return {
            "relu": lambda: x.relu_(),
            "mul": lambda: self.inner(x.mul_(2)),
            "part": lambda: self.inner(x[:, :4].zero_().new_ones(8) * x),
        }[self.how]()


@pytest.mark.parametrize("transform", [ll.value_and_grad, torch.func.grad], ids=["plain", "transform"])
@pytest.mark.parametrize("how", ["relu", "mul", "part"])
@pytest.mark.parametrize("carries", [True, False], ids=["adapted before", "data"])
def test_block_that_writes_to_its_input_is_refused_and_the_way_out_works(how, transform, carries):
    """The gradient passed by a `relu_`, and a recomputation of `x.mul_(2)` began with `2 x`."""
    torch.manual_seed(0)
    first = nn.Linear(8, 8) if carries else nn.Identity()
    model = nn.Sequential(nn.Sequential(first, nn.Sequential(nn.Dropout(0.0).eval()), _Writing(how)), nn.Linear(8, 2))
    cfg, x = ll.LoRAConfig(r=2), torch.randn(3, 8)

    def gradient(remat):
        adapt = ll.build(model, cfg, remat=remat)
        return transform(lambda p: adapt(p, 1.0 * x).square().sum())(move(adapt.init()))

    with pytest.raises(ValueError, match=r'remat: block "0\.2" expected its inputs to stay .* in place.* Name a block around it'):
        gradient(r"^0\.2$")
    if carries:
        want, got = (found if isinstance(found, dict) else found[1] for found in (gradient(None), gradient(r"^0$")))
        assert_trees_equal(got, want, 1e-6)
