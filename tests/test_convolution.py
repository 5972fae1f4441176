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
OTHER_WAY = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = {
    "1d": (lambda **o: nn.Conv1d(3, 5, 3, stride=2, padding=1, **o), (2, 3, 11)),
    "2d": (lambda **o: nn.Conv2d(3, 5, (3, 2), stride=(1, 2), padding=(2, 1), **o), (2, 3, 7, 8)),
    "2d-pointwise": (lambda **o: nn.Conv2d(3, 5, 1, **o), (2, 3, 4, 5)),
    "2d-dilated": (lambda **o: nn.Conv2d(3, 5, 3, dilation=(2, 1), **o), (2, 3, 8, 7)),
    "2d-same": (lambda **o: nn.Conv2d(3, 5, (4, 3), padding="same", **o), (2, 3, 6, 5)),
    "2d-reflected": (lambda **o: nn.Conv2d(3, 5, 3, padding=(1, 2), padding_mode="reflect", **o), (2, 3, 6, 5)),
    "2d-circular": (lambda **o: nn.Conv2d(3, 5, 3, padding=1, padding_mode="circular", **o), (2, 3, 6, 5)),
    "3d": (lambda **o: nn.Conv3d(2, 4, 2, stride=(1, 2, 1), padding=(1, 0, 1), **o), (2, 2, 4, 5, 4)),
    "1d-groups": (lambda **o: nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2, **o), (2, 4, 11)),
    "2d-depthwise": (lambda **o: nn.Conv2d(4, 8, 3, padding=1, padding_mode="circular", groups=4, **o), (2, 4, 6, 5)),
    "3d-groups": (lambda **o: nn.Conv3d(4, 4, 2, stride=(1, 2, 1), padding=(1, 0, 1), groups=2, **o), (2, 4, 4, 5, 4)),
    "2d-transposed": (lambda **o: nn.ConvTranspose2d(3, 5, (3, 2), stride=(2, 1), output_padding=(1, 0), **o), (2, 3, 4, 5)),
    "3d-transposed": (
        lambda **o: nn.ConvTranspose3d(2, 4, 2, stride=(1, 2, 1), padding=(1, 0, 1), dilation=(2, 1, 1), **o),
        (2, 2, 4, 3, 4),
    ),
    "2d-transposed-groups": (lambda **o: nn.ConvTranspose2d(6, 9, 3, stride=2, padding=1, groups=3, **o), (2, 6, 4, 5)),
}
ONE_MAP = tuple(name for name in LAYERS if "groups" not in name and "depthwise" not in name and "transposed" not in name)
OTHERS = tuple(name for name in LAYERS if name not in ONE_MAP)
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
@pytest.mark.parametrize("name", ONE_MAP)
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


def _rows(conv):
    """Return a kernel as `(o, i)`: a row has all that an output sees."""
    if not isinstance(conv, OTHER_WAY):
        return conv.weight.flatten(1)
    parts = conv.weight.chunk(conv.groups)  # (i / groups, o / groups, *size)
    return torch.cat([part.transpose(0, 1).flatten(1) for part in parts])


def _kernel(conv, rows):
    if not isinstance(conv, OTHER_WAY):
        return rows.view(conv.weight.shape)
    channels, _, *size = conv.weight.shape
    return torch.cat([part.unflatten(1, (channels // conv.groups, *size)).transpose(0, 1) for part in rows.chunk(conv.groups)])


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("cfg", VARIANTS, ids=by_name)
@pytest.mark.parametrize("name", OTHERS)
def test_is_torchs_layer_with_the_kernel_that_the_variant_makes_of_a_linear_layers_weight(name, cfg, bias):
    """In groups and transposed: the linear layer has the kernel as `(o, i)`, and torch's own layer runs its merged weight."""
    model, x = _make(name, torch.float64, bias=bias)
    cfg = with_fields(cfg, dtype=torch.float64)
    linear = nn.Sequential()
    linear.add_module("conv", nn.Linear(*reversed(_rows(model.conv).shape), bias=bias).double())
    linear.conv.weight.data = _rows(model.conv).data
    if bias:
        linear.conv.bias.data = model.conv.bias.data
    adapt, dense = ll.build(model, cfg), ll.build(linear, cfg)
    assert_trees_equal(adapt.init(seed=0), dense.init(seed=0))
    params = move(adapt.init(seed=0))

    def by_torch(params):
        points = torch.eye(linear.conv.in_features, dtype=torch.float64)
        shift = dense(params, torch.zeros_like(points[:1]))
        kernel = _kernel(model.conv, (dense(params, points) - shift).T)
        tensors = {"conv.weight": kernel.contiguous(), **({"conv.bias": shift[0]} if bias else {})}
        return torch.func.functional_call(model, tensors, x)

    update = adapt(params, x) - model(x)
    if bias or cfg.name != "bitfit":
        assert update.abs().max() > 1e-3
        torch.testing.assert_close(update, by_torch(params) - model(x), rtol=1e-9, atol=1e-11)
        got = torch.func.grad(lambda p: adapt(p, x).square().sum())(params)
        assert_trees_equal(got, torch.func.grad(lambda p: by_torch(p).square().sum())(params), 1e-9)


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


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_dropout_drops_pixels_as_pefts_does(dora, tmp_path):
    """A variant of patches dropped each patch's entries by themselves, so that a pixel was missing in some of the patches that have it."""
    model, x = _make("2d")
    config = peft.LoraConfig(r=2, target_modules=["conv"], use_dora=dora, lora_dropout=0.5, init_lora_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    theirs.save_pretrained(tmp_path)
    adapt, params = ll.from_peft(model, tmp_path)
    torch.manual_seed(3)
    want = theirs.train()(x)
    torch.manual_seed(3)
    got = adapt.train()(params, x)
    torch.testing.assert_close(got - model(x), want - model(x), rtol=1e-4, atol=1e-5)
    assert (got - adapt(params, x)).abs().max() > 1e-2


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
@pytest.mark.parametrize("name", ["1d", "2d", "3d", *OTHERS])
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


@pytest.mark.parametrize("name", ["2d", "2d-depthwise", "2d-transposed"])
@pytest.mark.parametrize("cfg", [VARIANTS[0], VARIANTS[1]], ids=by_name)
def test_saves_compiles_and_takes_single_images(cfg, name, tmp_path):
    model, x = _make(name)
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


def test_depthwise_lora_has_few_params():
    model = nn.Sequential(nn.Conv2d(64, 64, 7, padding=3, groups=64))
    adapt = ll.build(model, ll.LoRAConfig(r=4, target_names="^0$"))
    assert {name: tuple(p.shape) for name, p in adapt.init()["0"].items()} == {"A": (4, 49), "B": (64, 4)}


@pytest.mark.parametrize("name", ["1d-groups", "2d-transposed"])
def test_dropped_inputs_and_variants_that_are_not_linear_are_refused(name):
    model, _ = _make(name)
    with pytest.raises(ValueError, match=r'LoRAConfig cannot adapt "conv".*drops inputs.*dropout=0\.0'):
        ll.build(model, ll.LoRAConfig(r=2, dropout=0.1, target_names="conv"))
    both = r'LoHaConfig cannot adapt "conv".*draws rank_dropout and module_dropout in a call.*: rank_dropout=0\.0, module_dropout=0\.0'
    with pytest.raises(ValueError, match=both):
        ll.build(model, ll.LoHaConfig(r=2, rank_dropout=0.1, module_dropout=0.1, target_names="conv"))
    with pytest.raises(ValueError, match=r'LilyConfig cannot adapt "conv".*is not linear in its input'):
        ll.build(model, ll.LilyConfig(target_names="conv"))


@pytest.mark.parametrize("make", [nn.Conv2d, nn.ConvTranspose2d])
def test_low_precision_keeps_the_digits_of_the_update(make):
    """Each input meets the same weight twice with opposite signs, so that the frozen layer gives zero and the update stands alone."""
    torch.manual_seed(0)
    model = Image(make(4, 4, 3, groups=2, bias=False)).bfloat16().eval()
    across = 0 if make is nn.ConvTranspose2d else 1
    for pair in model.conv.weight.data.split(2, across):
        drawn = torch.randint(-16, 17, pair.narrow(across, 0, 1).shape) / 64  # of few bits: sums in any order are exact
        pair.copy_(drawn.expand_as(pair))
    x = torch.randint(-16, 17, (2, 2, 1, 5, 5)) / 8 * torch.tensor([1.0, -1.0]).view(2, 1, 1)
    x = x.flatten(1, 2).bfloat16()
    assert not model(x).any()
    params = move(ll.build(model, VARIANTS[0]).init(seed=0))
    params["conv"]["B"] *= 1e-3
    got = ll.build(model, VARIANTS[0])(params, x)
    want = ll.build(copy.deepcopy(model).float(), VARIANTS[0])(params, x.float())
    assert got.dtype == torch.bfloat16
    assert (got - want).norm() < 0.02 * want.norm()


class Decoder(nn.Module):
    """A transposed convolution that is told the size of its output, as the halves of a U-Net are."""

    def __init__(self, groups):
        super().__init__()
        self.conv = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=groups)

    def forward(self, x, size):
        return self.conv(x, output_size=size)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("cfg", VARIANTS, ids=by_name)
def test_transposed_convolutions_take_the_size_of_their_output(cfg, groups):
    model, x = Decoder(groups).eval(), torch.randn(2, 4, 5, 5)
    adapt = ll.build(model, cfg)
    params = move(adapt.init(seed=0))
    merged = copy.deepcopy(model)
    merged.load_state_dict(adapt.merge(params), strict=False)
    for size in ((9, 9), (10, 9), [2, 6, 10, 10]):
        base = model(x, size)
        torch.testing.assert_close(adapt(params, (x, size)) - base, merged(x, size) - base, rtol=1e-4, atol=1e-5)


def test_calibrated_variants_are_refused():
    model, x = _make("2d")
    with pytest.raises(ValueError, match=r"is calibrated on .*does not see their patches"):
        ll.build(model, ll.EVAConfig(r=2, target_names="conv"), calibration=[x])


@pytest.mark.parametrize("cfg", [ll.LoRAConfig(r=2, target_names="0$"), ll.DoRAConfig(r=2, target_names="0$")], ids=["lora", "dora"])
@pytest.mark.parametrize("cls", [nn.Conv2d, nn.ConvTranspose2d])
def test_a_kernel_that_was_put_in_place_has_its_own_size(cls, cfg):
    """The layer computes by its weight, whatever `kernel_size` still says."""
    torch.manual_seed(0)
    model, x = nn.Sequential(cls(3, 3, 3)).eval(), torch.randn(2, 3, 6, 6)
    model[0].weight = nn.Parameter(torch.randn(3, 3, 5, 5))
    adapt = ll.build(model, cfg)
    params = move(adapt.init())
    merged = copy.deepcopy(model)
    merged.load_state_dict(adapt.merge(params))
    torch.testing.assert_close(adapt(params, x), merged(x), rtol=1e-4, atol=1e-4)
