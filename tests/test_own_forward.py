"""Subclasses of torch's layers with a forward of their own: every reader finds the adapted weight, and a product is a call of the layer."""

import copy

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lora_lite as ll
from architectures import loss, small
from cases import assert_trees_equal, move
from lora_lite.layers.own_forward import OwnForwardKind

ROUTERS = {"Llama4ForCausalLM": r"router$", "PhimoeForCausalLM": r"router$", "DeepseekV4ForCausalLM": r"o_a_proj$"}


class Rescaled(nn.Linear):
    """A product, and more."""

    def forward(self, x):
        return 2 * super().forward(x).tanh(), x


class Late(nn.Linear):
    """The bias added later: the product is not that of the layer."""

    def forward(self, x):
        return F.linear(x, self.weight) + 3 * self.bias, x


class Halves(nn.Linear):
    """The weight read and taken apart."""

    def forward(self, x):
        first, second = self.weight.chunk(2)
        y = torch.cat([x @ first.T, F.linear(x, second)], -1)
        return y if self.bias is None else y + self.bias, x


class Around(nn.Module):
    def __init__(self, cls, bias=True):
        super().__init__()
        self.odd, self.head = cls(6, 8, bias=bias), nn.Linear(8, 3)

    def forward(self, x):
        y, same = self.odd(x)
        return self.head(y) + same.sum(-1, keepdim=True)


def merged_copy(model, state):
    merged = copy.deepcopy(model)
    merged.load_state_dict(state, strict=False)
    return merged


@pytest.mark.parametrize(
    "cfg", [ll.LoRAConfig(r=2), ll.DoRAConfig(r=2), ll.IA3Config(), ll.BitFitConfig(), ll.HRAConfig(r=2)], ids=lambda c: c.name
)
@pytest.mark.parametrize("cls", [Rescaled, Late, Halves])
def test_is_the_model_with_merged_weights(cls, cfg):
    torch.manual_seed(0)
    model, x = Around(cls).eval(), torch.randn(4, 6)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    adapt = ll.build(model, cfg)
    assert adapt.targets[0].kind is OwnForwardKind
    torch.testing.assert_close(adapt(adapt.init(), x), model(x))
    assert adapt.unused() == []
    params = move(adapt.init(seed=0))
    want = merged_copy(model, adapt.merge(params))(x) - model(x)
    assert want.abs().max() > 1e-3
    torch.testing.assert_close(adapt(params, x) - model(x), want, rtol=1e-4, atol=1e-5)
    assert torch.equal(adapt.base(x), model(x))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    module = adapt.module(params)
    torch.testing.assert_close(module(x) - model(x), want, rtol=1e-4, atol=1e-5)


def test_a_product_has_rows_and_dropped_inputs():
    torch.manual_seed(0)
    model, x = Around(Rescaled).eval(), torch.randn(4, 6)
    adapt = ll.build(model, ll.LoRAConfig(r=2, dropout=0.5))
    members = [move(adapt.init(seed=k), seed=k) for k in range(2)]
    mixed = adapt.mixed(ll.stack(members), x, [1, 0, 0, 1])
    for row, k in enumerate([1, 0, 0, 1]):
        torch.testing.assert_close(mixed[row], adapt(members[k], x)[row], rtol=1e-4, atol=1e-5)
    by_row = ll.per_example_grad(adapt, lambda out, _: out.square().sum(1))(members[0], x)
    alone = torch.func.grad(lambda p: adapt(p, x[:1]).square().sum())(members[0])
    assert_trees_equal(ll.tree_map(lambda g: g[0], by_row), alone, 1e-4)
    training = adapt.train()
    assert not torch.equal(training(members[0], x), training(members[0], x))


def test_rows_of_a_weight_that_is_taken_apart_are_refused_by_name():
    adapt = ll.build(Around(Halves), ll.LoRAConfig(r=2))
    with pytest.raises(ValueError, match=r'adapt\.mixed: at "odd" .* reads: all rows see the same one'):
        adapt.mixed(ll.stack([adapt.init(seed=k) for k in range(2)]), torch.randn(2, 6))


def test_a_module_of_a_stack_refuses_them_too():
    """It has the stacked params as parameters, which the variant was given as those of one member."""
    adapt = ll.build(Around(Halves, bias=False), ll.LoRAConfig(r=2, target_names="odd"))
    module = adapt.module(ll.stack([adapt.init(seed=k) for k in range(2)]), index=[0, 1])
    with pytest.raises(ValueError, match=r'adapt\.module: at "odd" .* reads: all rows see the same one'):
        module(torch.randn(2, 6))


def test_calibration_is_refused():
    with pytest.raises(ValueError, match=r'EVAConfig cannot adapt "odd".*forward of its own'):
        ll.build(Around(Rescaled), ll.EVAConfig(r=2), calibration=[torch.randn(8, 6)])


def test_a_layer_without_a_bias_compiles_and_differentiates():
    torch.manual_seed(0)
    model, x = Around(Rescaled, bias=False).eval(), torch.randn(4, 6)
    adapt = ll.build(model, ll.LoRAConfig(r=2))
    params = move(adapt.init(seed=0))
    torch.compiler.reset()
    grad = torch.func.grad(lambda p: adapt(p, x).square().sum())
    assert_trees_equal(torch.compile(grad, fullgraph=True, backend="aot_eager")(params), grad(params), 1e-5)


@pytest.mark.parametrize("name", ROUTERS)
def test_routers_of_transformers(name, tmp_path):
    """Against the model with merged weights, and its gradient against that of the weights formed by hand."""
    model, batch = small(name)
    adapt = ll.build(model, ll.LoRAConfig(r=2, target_names=ROUTERS[name]))
    assert {t.kind for t in adapt.targets} == {OwnForwardKind}
    with torch.no_grad():
        base = model(**batch)[0]
        assert torch.equal(adapt(adapt.init(), batch)[0], base)
        params = move(adapt.init(seed=0))
        want = merged_copy(model, adapt.merge(params))(**batch)[0] - base
        got = adapt(params, batch)[0] - base
    assert want.abs().max() > 1e-4
    assert float((got - want).abs().max()) < 1e-3 * float(want.abs().max())
    grads = ll.value_and_grad(lambda p: loss(adapt(p, batch)))(params)[1]
    leaves = {path: {k: p.clone().requires_grad_() for k, p in tree.items()} for path, tree in params.items()}
    scale = adapt.configs[0].alpha / 2
    weights = {
        f"{path}.weight": model.get_parameter(f"{path}.weight").detach() + scale * tree["B"] @ tree["A"] for path, tree in leaves.items()
    }
    loss(torch.func.functional_call(model, weights, (), batch)).backward()
    assert_trees_equal(grads, ll.tree_map(lambda p: torch.zeros_like(p) if p.grad is None else p.grad, leaves), 1e-4)
    ll.save(adapt, params, tmp_path / "a.safetensors")
    again, read = ll.load(model, tmp_path / "a.safetensors")
    with torch.no_grad():
        assert torch.equal(again(read, batch)[0] - base, got)
    ll.to_peft(adapt, params, tmp_path / "peft")
    assert peft.PeftConfig.from_pretrained(tmp_path / "peft").r == 2


class Longer(nn.ConvTranspose1d):
    def _output_padding(self, *sizes):
        return [1]


class Halved(nn.Conv1d):
    """A step inside of the forward replaced, as Whisper's own repository does."""

    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight, bias) / 2


def tiled():
    """A step set on the layer itself, as for images without seams."""
    conv = nn.Conv1d(3, 4, 3, padding=1)
    conv._conv_forward = lambda x, weight, bias: F.conv1d(F.pad(x, (1, 1), mode="circular"), weight, bias)
    return conv


@pytest.mark.parametrize("make", [lambda: Halved(3, 4, 3), tiled, lambda: Longer(3, 4, 3, stride=2)], ids=["class", "instance", "size"])
def test_a_replaced_step_of_a_convolution_stays(make):
    torch.manual_seed(0)
    model, x = nn.Sequential(make(), nn.ReLU(), nn.Conv1d(4, 2, 1)).eval(), torch.randn(2, 3, 6)
    adapt = ll.build(model, ll.LoRAConfig(r=2, target_names=r"\d$"))
    assert adapt.targets[0].kind.keeps_forward
    torch.testing.assert_close(adapt(adapt.init(), x), model(x))
    params = move(adapt.init(seed=0))
    torch.testing.assert_close(adapt(params, x), merged_copy(model, adapt.merge(params))(x))


def test_peft_files_of_them_are_refused(tmp_path):
    """PEFT convolves by its factors as the layer would without its own forward."""
    adapt = ll.build(nn.Sequential(Halved(3, 4, 3)), ll.LoRAConfig(r=2, target_names="0"))
    with pytest.raises(ValueError, match=r"on a Halved, which has a forward of its own"):
        ll.to_peft(adapt, adapt.init(), tmp_path)


def test_positions_of_transformers():
    model, batch = small("OPTForCausalLM")
    adapt = ll.build(model, ll.LoRAConfig(r=2, target_names=r"decoder\.embed_positions$"))
    params = move(adapt.init(seed=0))
    with torch.no_grad():
        want, base = merged_copy(model, adapt.merge(params))(**batch)[0], model(**batch)[0]
        torch.testing.assert_close(adapt(params, batch)[0], want, rtol=1e-4, atol=1e-5)
    assert (want - base).abs().max() > 1e-3


class Rounding(torch.autograd.Function):
    """The weight in three levels, with the gradient of the weight itself, as training in few bits has it."""

    @staticmethod
    def forward(ctx, w):
        return w.sign() * w.abs().mean()

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


class CompiledRounding(Rounding):
    forward = staticmethod(torch.compile(lambda ctx, w: w.sign() * w.abs().mean(), backend="eager"))


class Rounded(nn.Linear):
    function = Rounding

    def forward(self, x):
        return F.linear(x, self.function.apply(self.weight), self.bias)


class CompiledRounded(Rounded):
    function = CompiledRounding


class RoundedConv(nn.Conv1d):
    def forward(self, x):
        return F.conv1d(x, Rounding.apply(self.weight), self.bias)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of the compiler, where it guards an input
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("make", [lambda: Rounded(6, 8), lambda: CompiledRounded(6, 8), lambda: RoundedConv(6, 8, 1)])
def test_a_weight_given_to_an_autograd_function_is_trained(make, training):
    torch.manual_seed(0)
    model = nn.Sequential(make()).train(training)
    x = torch.randn(4, 6) if isinstance(model[0], nn.Linear) else torch.randn(4, 6, 3)
    adapt = ll.build(model, ll.LoRAConfig(r=2, target_names="0"))
    params = ll.tree_map(lambda p: p.requires_grad_(), move(adapt.init(seed=0)))
    A, B = params["0"]["A"], params["0"]["B"]
    weight = Rounding.apply(model[0].weight.detach() + (adapt.configs[0].scale * B @ A).view(model[0].weight.shape))
    want_loss = (F.linear if x.dim() == 2 else F.conv1d)(x, weight, model[0].bias.detach()).square().sum()
    want = torch.autograd.grad(want_loss, (A, B))
    value, grads = ll.value_and_grad(lambda p: adapt(p, x).square().sum())(params)
    torch.testing.assert_close((value, grads["0"]["A"], grads["0"]["B"]), (want_loss.detach(), *want), rtol=1e-4, atol=1e-5)
    module = adapt.module(params)
    module(x).square().sum().backward()
    found = [p.grad for p in module.parameters() if p.requires_grad]
    torch.testing.assert_close(found, list(want), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match='"0" expected a target that is called with rows'):
        adapt.mixed(ll.stack([params, params]), x[:2], [0, 1])


def test_a_compiled_call_follows_such_a_function_once_it_is_known():
    torch.manual_seed(0)
    model, x = nn.Sequential(Rounded(6, 8)), torch.randn(4, 6)
    adapt = ll.build(model, ll.LoRAConfig(r=2))
    params = ll.tree_map(lambda p: p.requires_grad_(), move(adapt.init(seed=0)))
    loss = lambda: adapt(params, x).square().sum()  # noqa: E731
    compiled = torch.compile(loss, backend="eager")
    with pytest.raises(Exception, match=r"found it given to Rounding, .* Call adapt once before it is compiled"):
        compiled()
    want = torch.autograd.grad(loss(), ll.tree_leaves(params))
    torch._dynamo.reset()
    torch.testing.assert_close(torch.autograd.grad(compiled(), ll.tree_leaves(params)), want)
