"""Convolutions as targets: against the dense map of patches, against PEFT, and against the merged kernel."""

import copy

import peft
import pytest
import torch
from torch import nn

import lora_lite as ll
from cases import assert_trees_equal, move
from lora_lite.core.config import with_fields
from lora_lite.layers.convolution import ConvKind

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")  # torch's own, of the layer itself
TOLERANCE = 1e-5
LAYERS = {
    "1d": (lambda **o: nn.Conv1d(3, 5, 3, stride=2, padding=1, **o), (2, 3, 11)),
    "2d": (lambda **o: nn.Conv2d(3, 5, (3, 2), stride=(1, 2), padding=(2, 1), **o), (2, 3, 7, 8)),
    "2d-pointwise": (lambda **o: nn.Conv2d(3, 5, 1, **o), (2, 3, 4, 5)),
    "2d-dilated": (lambda **o: nn.Conv2d(3, 5, 3, dilation=(2, 1), **o), (2, 3, 8, 7)),
    "2d-same": (lambda **o: nn.Conv2d(3, 5, (4, 3), padding="same", **o), (2, 3, 6, 5)),
    "2d-reflected": (lambda **o: nn.Conv2d(3, 5, 3, padding=(1, 2), padding_mode="reflect", **o), (2, 3, 6, 5)),
    "2d-circular": (lambda **o: nn.Conv2d(3, 5, 3, padding=1, padding_mode="circular", **o), (2, 3, 6, 5)),
    "3d": (lambda **o: nn.Conv3d(2, 4, 2, stride=(1, 2, 1), padding=(1, 0, 1), **o), (2, 2, 4, 5, 4)),
}
IN_PEFT = ("1d", "2d", "2d-pointwise", "3d")  # it forgets dilation and padding modes
VARIANTS = (
    ll.LoRAConfig(r=2, target_names="conv"),
    ll.DoRAConfig(r=2, target_names="conv"),
    ll.PiSSAConfig(r=2, target_names="conv"),
    ll.IA3Config(target_names="conv"),
    ll.BitFitConfig(target_names="conv"),
    ll.VeRAConfig(r=3, target_names="conv"),
    ll.DeLoRAConfig(r=2, target_names="conv"),
    ll.HRAConfig(r=2, target_names="conv"),
)


def by_name(cfg):
    return cfg.name


class Image(nn.Module):
    """A convolution whose output is viewed, as heads do."""

    def __init__(self, layer):
        super().__init__()
        self.conv = layer

    def forward(self, x):
        y = self.conv(x)
        return y.view(len(x), -1)


def _make(name, dtype=torch.float32, **options):
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    return Image(make(**options)).to(dtype).eval(), torch.randn(shape, dtype=dtype)


def test_convolutions_are_taken_only_where_they_are_named():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2))
    assert [t.path for t in ll.find_targets(model, ll.LoRAConfig())] == ["2"]
    first, second = ll.find_targets(model, ll.LoRAConfig(target_names=r"^\d$"))
    assert (first.kind, first.i, first.o, second.path) == (ConvKind, 27, 4, "2")


@pytest.mark.parametrize("cfg", VARIANTS, ids=by_name)
@pytest.mark.parametrize("name", LAYERS)
def test_is_the_variant_on_rows_of_patches(name, cfg):
    """A convolution is a linear layer on unfolded patches: the same params there give the same outputs and gradients."""
    model, x = _make(name, torch.float64)
    conv = model.conv
    rows = ConvKind(conv).patches(x)
    linear = nn.Sequential()
    linear.add_module("conv", nn.Linear(rows.shape[-1], conv.out_channels).double())
    linear.conv.weight.data, linear.conv.bias.data = conv.weight.data.flatten(1), conv.bias.data
    torch.testing.assert_close(linear(rows).movedim(-1, 1).flatten(1), model(x), rtol=1e-10, atol=1e-12)
    cfg = with_fields(cfg, dtype=torch.float64)
    adapt, dense = ll.build(model, cfg), ll.build(linear, cfg)
    params = move(adapt.init(seed=0))
    assert_trees_equal(adapt.init(seed=0), dense.init(seed=0))
    update = adapt(params, x) - model(x)
    assert update.abs().max() > 1e-3
    torch.testing.assert_close(update, (dense(params, rows).movedim(-1, 1).flatten(1) - model(x)), rtol=1e-9, atol=1e-11)
    got = torch.func.grad(lambda p: adapt(p, x).square().sum())(params)
    want = torch.func.grad(lambda p: dense(p, rows).square().sum())(params)
    assert_trees_equal(got, want, 1e-9)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("cfg", VARIANTS, ids=by_name)
@pytest.mark.parametrize("name", LAYERS)
def test_starts_at_the_layer_itself(name, cfg, bias):
    model, x = _make(name, bias=bias)
    adapt = ll.build(model, cfg)
    got, want = adapt(adapt.init(seed=0), x), model(x)
    if cfg.identity == 0.0 and cfg.name != "hra":  # which gives the layer other rows, whose sums have another order
        assert torch.equal(got, want)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("cfg", VARIANTS, ids=by_name)
@pytest.mark.parametrize("name", LAYERS)
def test_merges_into_the_kernel(name, cfg):
    model, x = _make(name)
    adapt = ll.build(model, cfg)
    params = move(adapt.init(seed=0))
    state = adapt.merge(params)
    assert state["conv.weight"].shape == model.conv.weight.shape
    merged = copy.deepcopy(model)
    merged.load_state_dict(state, strict=False)
    base = model(x)
    torch.testing.assert_close(merged(x) - base, adapt(params, x) - base, rtol=1e-4, atol=1e-5)


def _close(got, want):
    got = got.detach()
    assert want.abs().max() > 1e-4
    assert float((got - want).abs().max()) <= TOLERANCE * float(want.abs().max())


@pytest.mark.parametrize("name", IN_PEFT)
def test_lora_is_pefts(name):
    model, x = _make(name)
    adapt = ll.build(model, ll.LoRAConfig(r=2, alpha=3.0, target_names="conv"))
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2, lora_alpha=3, target_modules=["conv"]))
    layer = theirs.base_model.model.conv
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    nn.init.normal_(B)
    params = {"conv": {"A": A.detach().flatten(1), "B": B.detach().flatten(1)}}
    weights = torch.randn_like(model(x))
    out = theirs(x)
    (out * weights).sum().backward()
    _close(adapt(params, x) - model(x), (out - model(x)).detach())
    grads = torch.func.grad(lambda p: (adapt(p, x) * weights).sum())(params)["conv"]
    _close(grads["A"], A.grad.flatten(1))
    _close(grads["B"], B.grad.flatten(1))


@pytest.mark.parametrize("name", IN_PEFT)
def test_dora_is_pefts(name):
    model, x = _make(name)
    adapt = ll.build(model, ll.DoRAConfig(r=2, alpha=3.0, target_names="conv"))
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2, lora_alpha=3, use_dora=True, target_modules=["conv"]))
    layer = theirs.base_model.model.conv
    A, B, m = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.lora_magnitude_vector["default"].weight
    norms = m.detach().flatten().clone()
    with torch.no_grad():
        B.normal_(std=0.3)
        m.add_(0.3 * torch.rand_like(m))
    params = {"conv": {"A": A.detach().flatten(1), "B": B.detach().flatten(1), "m": m.detach().flatten() - norms}}
    weights = torch.randn_like(model(x))
    out = theirs(x)
    (out * weights).sum().backward()
    _close(adapt(params, x) - model(x), (out - model(x)).detach())
    grads = torch.func.grad(lambda p: (adapt(p, x) * weights).sum())(params)["conv"]
    for leaf, want in (("A", A.grad.flatten(1)), ("B", B.grad.flatten(1)), ("m", m.grad.flatten())):
        _close(grads[leaf], want)


@pytest.mark.parametrize("name", ["2d", "2d-pointwise", "3d"])
def test_ia3_is_pefts(name):
    model, x = _make(name)
    adapt = ll.build(model, ll.IA3Config(target_names="conv"))
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.IA3Config(target_modules=["conv"], feedforward_modules=[]))
    gate = theirs.base_model.model.conv.ia3_l["default"]
    with torch.no_grad():
        gate.add_(0.3 * torch.randn_like(gate))
    params = {"conv": {"g": gate.detach().flatten() - 1}}
    weights = torch.randn_like(model(x))
    out = theirs(x)
    (out * weights).sum().backward()
    _close(adapt(params, x) - model(x), (out - model(x)).detach())
    _close(torch.func.grad(lambda p: (adapt(p, x) * weights).sum())(params)["conv"]["g"], gate.grad.flatten())


@pytest.mark.parametrize("cfg", VARIANTS, ids=by_name)
@pytest.mark.parametrize("name", ["1d", "2d", "3d"])
def test_mixed_batch_is_a_loop_and_gives_gradients_by_row(name, cfg):
    model, x = _make(name)
    adapt = ll.build(model, cfg)
    members = [move(adapt.init(seed=k), seed=k) for k in range(2)]
    mixed = adapt.mixed(ll.stack(members), x, [1, 0])
    for row, k in enumerate([1, 0]):
        torch.testing.assert_close(mixed[row], adapt(members[k], x)[row], rtol=1e-4, atol=1e-5)
    by_row = ll.per_example_grad(adapt, lambda out, _: out.square().sum(1))(members[0], x)
    for row in range(2):
        alone = torch.func.grad(lambda p, row=row: adapt(p, x[[row]]).square().sum())(members[0])
        assert_trees_equal(ll.tree_map(lambda g, row=row: g[row], by_row), alone, 1e-4)


@pytest.mark.parametrize("cfg", [VARIANTS[0], VARIANTS[1]], ids=by_name)
def test_saves_compiles_and_takes_single_images(cfg, tmp_path):
    model, x = _make("2d")
    adapt = ll.build(model, cfg)
    params = move(adapt.init(seed=0))
    ll.save(adapt, params, tmp_path / "a.safetensors")
    again, read = ll.load(copy.deepcopy(model), tmp_path / "a.safetensors")
    assert torch.equal(again(read, x), adapt(params, x))
    torch.compiler.reset()
    compiled = torch.compile(torch.func.grad(lambda p: adapt(p, x).square().sum()), fullgraph=True, backend="aot_eager")
    assert_trees_equal(compiled(params), torch.func.grad(lambda p: adapt(p, x).square().sum())(params), 1e-5)
    single = nn.Sequential()
    single.add_module("conv", model.conv)
    one = ll.build(single, cfg)
    torch.testing.assert_close(one(params, x[0]).flatten(), adapt(params, x)[0], rtol=1e-5, atol=1e-5)


def test_counts_multiply_adds_of_one_place():
    model, _ = _make("2d")
    adapt = ll.build(model, ll.LoRAConfig(r=2, target_names="conv"))
    assert adapt.num_params == adapt.macs_per_token == 2 * (3 * 3 * 2 + 5)


def test_groups_take_what_reads_outputs_alone():
    model, x = Image(nn.Conv2d(4, 6, 3, groups=2)).eval(), torch.randn(2, 4, 5, 5)
    adapt = ll.build(model, ll.IA3Config(target_names="conv"))
    params = move(adapt.init(seed=0))
    want = (1 + params["conv"]["g"])[:, None, None] * model.conv(x)
    torch.testing.assert_close(adapt(params, x), want.flatten(1))
    merged = copy.deepcopy(model)
    merged.load_state_dict(adapt.merge(params), strict=False)
    torch.testing.assert_close(merged(x), adapt(params, x))
    with pytest.raises(ValueError, match=r'LoRAConfig cannot adapt "conv".*calls `W\.project.*in groups'):
        ll.build(model, ll.LoRAConfig(r=2, target_names="conv"))


def test_calibrated_variants_are_refused():
    model, x = _make("2d")
    with pytest.raises(ValueError, match=r"is calibrated on .*not their patches"):
        ll.build(model, ll.EVAConfig(r=2, target_names="conv"), calibration=[x])
