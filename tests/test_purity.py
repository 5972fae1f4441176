"""The user's model is never touched, whatever is done with `adapt`, and at its start `adapt` is the model, to the bit."""

from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from torch import nn

import lora_lite as ll
from cases import FIVE, by_name, move, tensors_of, tiny_models


def bytes_of(tensor):
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def snapshot(model):
    """Return everything of a model that building and calling could change, as values to compare."""
    facts = {}
    for path, module in model.named_modules():
        tables = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
        facts[path] = (id(module), type(module), module.training, sorted(vars(module)), [list(t.items()) for t in tables])
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        facts[f"tensor {name}"] = (id(tensor), tensor.data_ptr(), tensor._version, tensor.requires_grad, tensor.grad, bytes_of(tensor))
    facts["state_dict"] = [(name, tensor.data_ptr()) for name, tensor in model.state_dict().items()]
    return facts


def mark(model):
    """Make a model with every other flag set, and hooks that count: `(modules seen, switch)`; the switch makes the last one fail."""
    seen, switch = [], {"fail": False}

    def note(module, args, output):
        seen.append(module)
        if switch["fail"]:
            raise ArithmeticError("from a hook of the user's")

    def note_before(module, args):
        seen.append(module)

    layers = [module for module in model.modules() if isinstance(module, nn.Linear)] or list(model.children())
    layers[0].register_forward_pre_hook(note_before)
    layers[-1].register_forward_hook(note)
    for k, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(k % 2 == 0)
    for k, module in enumerate(m for m in model.modules() if isinstance(m, nn.LayerNorm | nn.Embedding)):
        module.training = k % 2 == 0  # these compute the same in both modes
    return seen, switch


def score(output):
    return sum(tensor.float().square().mean() for tensor in tensors_of(output) if tensor.is_floating_point())


@pytest.mark.parametrize("cfg", FIVE, ids=by_name)
@pytest.mark.parametrize("name", list(tiny_models))
def test_start_is_the_model_to_the_bit(tiny, name, cfg):
    model, batch = tiny(name)
    adapt = ll.build(model, cfg)
    with torch.no_grad():  # else torch picks another attention kernel where the model's own position bias requires a gradient
        want = tensors_of(model(**batch))
        got = tensors_of(adapt(adapt.init(seed=0), batch))
        base = tensors_of(adapt.base(batch))
        moved = tensors_of(adapt(move(adapt.init(seed=0)), batch))
    assert len(want) == len(got) > 0
    assert all(torch.equal(a, b) for a, b in zip(got, want))
    assert all(torch.equal(a, b) for a, b in zip(base, want))
    assert any(not torch.allclose(a, b) for a, b in zip(moved, want)), "params off their start change nothing"


@pytest.mark.parametrize("cfg", FIVE, ids=by_name)
@pytest.mark.parametrize("name", list(tiny_models))
def test_model_is_unchanged_by_everything(tiny, name, cfg):
    model, batch = tiny(name)
    seen, switch = mark(model)
    before = snapshot(model)

    adapt = ll.build(model, cfg)
    params = move(adapt.init(seed=0))
    adapt(params, batch)
    adapt.base(batch)
    torch.func.grad(lambda p: score(adapt(p, batch)))(params)
    ll.value_and_grad(lambda p: score(adapt(p, batch)))(params)
    score(adapt.module(params)(**batch)).backward()
    adapt.train()(params, batch)
    adapt.steer(params, 0.5)
    adapt.summary()

    assert snapshot(model) == before
    own = {id(module) for module in model.modules()}
    assert seen, "the user's hooks do not run in the clone"
    assert not [module for module in seen if id(module) in own], "the user's own layers ran"

    switch["fail"] = True
    with pytest.raises(ArithmeticError, match="from a hook of the user's"):
        adapt(params, batch)
    with pytest.raises(ArithmeticError, match="from a hook of the user's"):
        torch.func.grad(lambda p: score(adapt(p, batch)))(params)
    switch["fail"] = False
    assert snapshot(model) == before

    seen.clear()
    model(**batch)
    assert seen
    assert all(id(module) in own for module in seen), "the user's model runs layers of the clone"


def test_a_call_after_an_exception_is_exact(tiny):
    model, batch = tiny("llama")
    _, switch = mark(model)
    adapt = ll.build(model, ll.LoRAConfig(r=4))
    params = move(adapt.init(seed=0))
    want = adapt(params, batch).logits
    switch["fail"] = True
    with pytest.raises(ArithmeticError):
        adapt(move(params, seed=1), batch)
    switch["fail"] = False
    assert torch.equal(adapt(params, batch).logits, want)


def test_hook_that_changes_an_output_does_so_in_the_clone(device):
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4)).to(device).eval()
    model[0].register_forward_hook(lambda module, args, output: 2 * output)
    model[2].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    x = torch.randn(3, 6, device=device)
    adapt = ll.build(model, ll.LoRAConfig(r=2))
    assert torch.equal(adapt(adapt.init(), x), model(x))
    params = move(adapt.init())
    first, last = params["0"], params["2"]
    hidden = 2 * ll.functional.lora(first, ll.Frozen(model[0].weight, model[0].bias), x, scale=8.0)
    want = ll.functional.lora(last, ll.Frozen(model[2].weight, model[2].bias), hidden.relu() + 1, scale=8.0)
    assert torch.equal(adapt(params, x), want)


def test_hook_added_to_the_model_after_build_is_not_in_the_clone(device):
    model = nn.Sequential(nn.Linear(6, 4)).to(device)
    adapt = ll.build(model, ll.LoRAConfig(r=2))
    x = torch.randn(3, 6, device=device)
    want = adapt(adapt.init(), x)
    model[0].register_forward_hook(lambda module, args, output: 2 * output)
    assert torch.equal(adapt(adapt.init(), x), want)


def conv_net(momentum):
    return nn.Sequential(
        *(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=momentum), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8)),
        *(nn.BatchNorm1d(8, momentum=momentum), nn.Dropout(0.5), nn.Linear(8, 4)),
    )


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("cfg", FIVE, ids=by_name)
def test_statistics_of_batchnorm_do_not_move_in_training_mode(cfg, momentum, device):
    model = conv_net(momentum).to(device).train()
    x = torch.randn(5, 3, 6, 6, device=device)
    before = snapshot(model)
    adapt = ll.build(model, cfg)
    params = adapt.init(seed=0)

    def run(f):
        torch.manual_seed(3)
        return f()

    first = run(lambda: adapt(params, x))
    again = run(lambda: adapt(params, x))
    base = run(lambda: adapt.base(x))
    torch.func.grad(lambda p: adapt(p, x).square().sum())(params)
    adapt.eval()(params, x)
    adapt.eval().train()(params, x)
    assert snapshot(model) == before
    want = run(lambda: model(x))  # now the user's own call moves them
    assert torch.equal(first, want)
    assert torch.equal(again, want)
    assert torch.equal(base, want)
    assert snapshot(model) != before


def test_module_keeps_its_own_statistics(device):
    model = conv_net(0.1).to(device).train()
    before = snapshot(model)
    adapt = ll.build(model, ll.LoRAConfig(r=2))
    module = adapt.module(adapt.init())
    module(torch.randn(5, 3, 6, 6, device=device))
    assert snapshot(model) == before


def test_dropout_of_the_model_falls_as_the_model_draws_it(tiny):
    model, batch = tiny("bert")
    model.train()
    adapt = ll.build(model, ll.LoRAConfig(r=4))
    params = adapt.init(seed=0)
    with torch.no_grad():
        torch.manual_seed(5)
        want = model(**batch).logits
        torch.manual_seed(5)
        got = adapt(params, batch).logits
        still = adapt.eval()(params, batch).logits
        calm = model.eval()(**batch).logits
    assert torch.equal(got, want)
    assert torch.equal(still, calm)
    assert not torch.equal(still, got)


def test_weights_are_shared_not_copied(tiny):
    model, batch = tiny("gpt2")
    adapt = ll.build(model, ll.LoRAConfig(r=4))
    module = adapt.module(adapt.init())
    own = {tensor.data_ptr() for tensor in model.state_dict().values()}
    frozen = [p for name, p in module.named_parameters() if not p.requires_grad]
    assert frozen
    assert {p.data_ptr() for p in frozen} <= own
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight.mul_(2)  # the user trains on: the adapter sees it
        assert torch.equal(adapt.base(batch).logits, model(**batch).logits)


class Counting(nn.Module):
    """Write a buffer in place in every forward, as load counters and static caches do."""

    def __init__(self, dtype):
        super().__init__()
        self.lin = nn.Linear(6, 6)
        self.register_buffer("seen", torch.zeros(3, dtype=dtype))

    def forward(self, x):
        self.seen += 1
        return self.lin(x) * self.seen.sum().to(x.dtype)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64], ids=str)
def test_buffer_written_in_the_forward_is_a_copy(dtype, training, device):
    model = Counting(dtype).to(device).train(training)
    adapt = ll.build(model, ll.LoRAConfig(r=2))
    params = move(adapt.init())
    x = torch.randn(4, 6, device=device)
    before = snapshot(model)
    first = adapt(params, x)
    assert snapshot(model) == before
    assert torch.equal(adapt(params, x), first)


@pytest.mark.parametrize("names", ["^0$", "^1$"])
def test_weights_that_are_computed_are_read_without_a_trace(names):
    """To read the weight under a spectral norm moves its vectors, in training mode."""
    model = nn.Sequential(torch.nn.utils.parametrizations.spectral_norm(nn.Linear(6, 8)), nn.Linear(8, 3)).train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    cfg = ll.LoRAConfig(r=2, target_names=names)
    ll.find_targets(model, cfg)
    adapt = ll.build(model, cfg)
    params = adapt.init()
    adapt.summary()
    ll.value_and_grad(lambda p: adapt(p, torch.randn(4, 6)).square().sum())(params)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("name", ["lora", "dora", "ia3", "hra"])
def test_a_layer_may_have_the_name_of_its_variant(name):
    model = nn.Sequential(OrderedDict({name: nn.Linear(6, 6)}))
    adapt, x = ll.build(model, ll.VARIANTS[name](target_names=".")), torch.randn(3, 6)
    assert torch.equal(adapt(adapt.init(), x), model(x))


def test_a_layer_with_the_name_of_tensors_that_are_shared_is_refused():
    with pytest.raises(ValueError, match=r'"vera" to themselves, found it taken by a target of that name\. Rename'):
        ll.build(nn.Sequential(OrderedDict(vera=nn.Linear(6, 6))), ll.VeRAConfig(r=2))


def test_a_lookup_that_shortens_rows_does_so_in_a_copy():
    model, ids = nn.Sequential(nn.Embedding(10, 8, max_norm=0.5), nn.Linear(8, 4)), torch.arange(10)
    before = bytes_of(model[0].weight)
    adapt = ll.build(model, ll.LoRAConfig(r=2))
    params = move(adapt.init())
    got, module = adapt(params, ids), adapt.module(params)
    assert torch.equal(module(ids), got)
    assert len(list(module.parameters())) == 5
    assert bytes_of(model[0].weight) == before
    model(ids)
    assert bytes_of(model[0].weight) != before, "the model itself shortens them"
    torch.testing.assert_close(adapt(params, ids), got)


def test_a_forward_that_writes_to_weights_is_refused():
    """RWKV divides weights by powers of two, once, and notes it in an attribute, which a call puts back."""
    config = tf.RwkvConfig(vocab_size=32, hidden_size=16, num_hidden_layers=4, rescale_every=2)
    model, cfg, batch = tf.RwkvForCausalLM(config).eval(), ll.LoRAConfig(r=2, target_names="key$"), {"input_ids": torch.arange(6)[None]}
    adapt = ll.build(model, cfg)
    with pytest.raises(RuntimeError, match=r'wrote to "rwkv\.blocks\.0.*Load the weights again'):
        adapt(adapt.init(), batch, use_cache=False)
    model = tf.RwkvForCausalLM(config).eval()
    want = model(**batch, use_cache=False).logits
    adapt = ll.build(model, cfg)
    for _ in range(2):
        assert torch.equal(adapt(adapt.init(), batch, use_cache=False).logits, want)


def classifier():
    config = tf.BertConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_labels=3)
    return tf.BertForSequenceClassification(config).eval()


def of_labels(labels):
    return {"input_ids": torch.arange(6).view(2, 3), "labels": labels}


@pytest.mark.filterwarnings("ignore:build")
@pytest.mark.parametrize("calibrated", [False, True])
def test_what_a_forward_writes_into_the_config_is_gone_after_it(calibrated):
    """Classifiers of transformers note the kind of the labels that they saw first, and take all others to be of it."""
    classes, numbers = of_labels(torch.tensor([0, 2])), of_labels(torch.rand(2, 3))
    wanted = [classifier_loss(batch) for batch in (classes, numbers)]
    torch.manual_seed(0)
    model = classifier()
    cfg, data = (ll.LoRAGAConfig(r=2), {"calibration": [classes]}) if calibrated else (ll.LoRAConfig(r=2), {})
    adapt = ll.build(model, cfg, **data)
    params = adapt.init()
    for batch, loss in zip((classes, numbers, classes), (*wanted, wanted[0])):
        torch.testing.assert_close(adapt(params, batch).loss, loss, rtol=1e-4, atol=1e-5)
        assert model.config.problem_type is None
    adapt.module(params)(**classes)
    assert model.config.problem_type is None


def classifier_loss(batch):
    torch.manual_seed(0)
    return classifier()(**batch).loss


@pytest.mark.filterwarnings("ignore:build")
def test_what_the_user_writes_into_the_config_is_followed():
    model = classifier()
    adapt = ll.build(model, ll.LoRAConfig(r=2))
    params, batch = adapt.init(), of_labels(torch.rand(2, 3))
    adapt(params, batch)
    for problem, loss in (("regression", F.mse_loss), ("multi_label_classification", F.binary_cross_entropy_with_logits)):
        model.config.problem_type = problem
        for _ in range(2):
            out = adapt(params, batch)
            torch.testing.assert_close(out.loss, loss(out.logits, batch["labels"]))
        assert model.config.problem_type == problem
    model.config.output_hidden_states = True
    assert len(adapt(params, batch).hidden_states) == 2
    model.config.output_hidden_states = False
    assert adapt(params, batch).hidden_states is None
