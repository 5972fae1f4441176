"""Kinds of layers: the grid of kinds and checks, kinds written outside the package, and what used to go wrong for them in silence.

`python tests/test_kinds.py --write` runs the grid into docs/kinds.json, from which the support page is made.
"""

import copy
import dataclasses
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers as tf
from torch import nn

import lora_lite as ll
from cases import CASES, FIRST, assert_trees_equal, move
from lora_lite.core.config import with_fields
from lora_lite.layers import kinds as table
from lora_lite.layers.block import BlockKind
from lora_lite.layers.convolution import ConvKind, GroupedConvKind
from lora_lite.layers.embedding import EmbeddingKind
from lora_lite.layers.experts import ExpertsKind
from lora_lite.layers.linear import Conv1DKind, FalconKind, LinearKind
from lora_lite.layers.module import ModuleKind
from lora_lite.layers.norm import NormKind
from lora_lite.layers.own_forward import OwnForwardConvKind, OwnForwardEmbeddingKind, OwnForwardKind, OwnForwardTransposedKind
from lora_lite.layers.parameter import ParameterKind
from lora_lite.layers.transposed import TransposedConvKind
from lora_lite.testing import KIND_CHECKS, check_kind, make_kind_case
from lora_lite.variants import adalora, kasa, osf, qgoft
from test_packed_kinds import KINDS as PACKED


class MyLinear(nn.Module):
    """y = x W + b with W `(i, o)`."""

    def __init__(self, i, o):
        super().__init__()
        self.W, self.b = nn.Parameter(torch.randn(i, o) / i**0.5), nn.Parameter(torch.randn(o))

    def forward(self, x):
        return x @ self.W + self.b


class MyKind(ll.Kind):
    """`MyLinear`, by the four lines that the documentation shows."""

    state = {"weight": "W", "bias": "b"}  # noqa: RUF012
    weight = property(lambda self: self.layer.W.t())
    bias = property(lambda self: self.layer.b)

    @classmethod
    def fits(cls, layer):
        return isinstance(layer, MyLinear)

    def to_weight(self, dense):
        return dense.t()


class FusedQKV(ll.FusedKind, LinearKind):
    """A fused q-k-v projection of grouped queries: three maps of unequal widths."""

    @classmethod
    def fits(cls, layer):
        return isinstance(layer, nn.Linear) and layer.out_features == 12

    def widths(self):
        return {"q": 8, "k": 2, "v": 2}


class Int8Linear(nn.Module):
    """A layer with codes of 8 bits and a scale a row."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        weight = linear.weight.detach()
        self.register_buffer("scale", weight.abs().amax(1) / 127)
        self.register_buffer("codes", (weight / self.scale[:, None]).round().to(torch.int8))

    def forward(self, x):
        return nn.functional.linear(x, self.codes * self.scale[:, None], self.bias)


class Int8Kind(ll.FrozenQuantised):
    """`Int8Linear`."""

    @classmethod
    def fits(cls, layer):
        return isinstance(layer, Int8Linear)

    def dequantise(self, dtype):
        return self.layer.codes.to(dtype) * self.layer.scale[:, None].to(dtype)


class Matrix(nn.Module):
    """A bare parameter that its module reads."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(8, 6))

    def forward(self, x):
        return x @ self.table.T


def experts():
    config = tf.Qwen3MoeConfig(
        hidden_size=16, moe_intermediate_size=8, num_experts=4, num_experts_per_tok=2, num_hidden_layers=1, vocab_size=8
    )
    return tf.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeSparseMoeBlock(config)


class Weights(nn.Module):
    """A mixture of experts with its router: the layer around the weights that are adapted."""

    def __init__(self):
        super().__init__()
        self.moe = experts()
        for p in self.moe.parameters():
            nn.init.normal_(p, std=0.3)

    def forward(self, x):
        out = self.moe(x)
        return out[0] if isinstance(out, tuple) else out


class Block(nn.Module):
    """A list of blocks that keep the width."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.LayerNorm(8)) for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


def normed():
    norm = nn.LayerNorm(8)
    nn.init.normal_(norm.weight)
    return norm


def conv1d():
    layer = tf.pytorch_utils.Conv1D(8, 6)
    nn.init.normal_(layer.bias)
    return layer


def falcon():
    return tf.models.falcon.modeling_falcon.FalconLinear(6, 8)


class OfItsOwn(nn.Linear):
    def forward(self, x):
        return super().forward(x)


class Offset(nn.Embedding):
    def forward(self, x):
        return super().forward(x + 1)


class Causal(nn.Conv1d):
    def forward(self, x):
        return super().forward(nn.functional.pad(x, (1, 0)))


class Cut(nn.ConvTranspose1d):
    def forward(self, x):
        return super().forward(x)[..., :-1]


GRID = {
    "linear": (LinearKind, lambda: nn.Linear(6, 8), {}),
    "linear without a bias": (LinearKind, lambda: nn.Linear(8, 6, bias=False), {}),
    "Conv1D": (Conv1DKind, conv1d, {}),
    "Falcon's": (FalconKind, falcon, {}),
    "own forward": (OwnForwardKind, lambda: OfItsOwn(6, 8), {}),
    "embedding, own forward": (
        OwnForwardEmbeddingKind,
        lambda: Offset(9, 6),
        {"make_input": lambda: torch.randint(0, 8, (4, 3))},
    ),
    "embedding": (EmbeddingKind, lambda: nn.Embedding(8, 6), {"make_input": lambda: torch.randint(0, 8, (4, 3))}),
    "Conv1d": (ConvKind, lambda: nn.Conv1d(3, 4, 2), {"make_input": lambda: torch.randn(4, 3, 5)}),
    "Conv2d": (ConvKind, lambda: nn.Conv2d(3, 4, 2, padding=1), {"make_input": lambda: torch.randn(4, 3, 5, 4)}),
    "Conv3d": (ConvKind, lambda: nn.Conv3d(2, 4, 2), {"make_input": lambda: torch.randn(4, 2, 3, 3, 3)}),
    "convolution, own forward": (OwnForwardConvKind, lambda: Causal(3, 4, 2), {"make_input": lambda: torch.randn(4, 3, 5)}),
    "transposed, own forward": (OwnForwardTransposedKind, lambda: Cut(3, 4, 2), {"make_input": lambda: torch.randn(4, 3, 5)}),
    "grouped": (GroupedConvKind, lambda: nn.Conv2d(4, 4, 2, groups=2), {"make_input": lambda: torch.randn(4, 4, 5, 4)}),
    "depthwise": (GroupedConvKind, lambda: nn.Conv1d(4, 8, 3, groups=4), {"make_input": lambda: torch.randn(4, 4, 5)}),
    "transposed": (TransposedConvKind, lambda: nn.ConvTranspose2d(3, 4, 2, stride=2), {"make_input": lambda: torch.randn(4, 3, 3, 4)}),
    "transposed in groups": (
        TransposedConvKind,
        lambda: nn.ConvTranspose1d(4, 6, 3, groups=2),
        {"make_input": lambda: torch.randn(4, 4, 5)},
    ),
    "parameter": (ParameterKind, Matrix, {"make_input": lambda: torch.randn(4, 3, 6), "names": r"table$"}),
    "experts": (ExpertsKind, Weights, {"make_input": lambda: torch.randn(4, 3, 16), "names": r"(gate_up|down)_proj$"}),
    "norm": (NormKind, normed, {"make_input": lambda: torch.randn(4, 3, 8)}),
    "module": (ModuleKind, lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh()), {"make_input": lambda: torch.randn(4, 3, 6)}),
    "block": (BlockKind, Block, {"make_input": lambda: torch.randn(4, 5, 8), "names": r"blocks\.\d$"}),
    "outside: other names": (MyKind, lambda: MyLinear(6, 8), {}),
    "outside: fused": (FusedQKV, lambda: nn.Linear(6, 12), {}),
    "outside: packed": (Int8Kind, lambda: Int8Linear(nn.Linear(6, 8)), {"skip": ("merged",)}),
}
"""A layer of every kind; `skip` names what has no meaning: a packed layer's merged weights are for a model that is not packed."""


PAGE = Path(__file__).parent.parent / "docs" / "kinds.json"


def outcome(name, check):
    """Run a check of the grid; return `ok`, or why a part of it is refused."""
    kind, make_layer, options = GRID[name]
    options = dict(options)
    if check in options.pop("skip", ()):
        return "A packed layer's merged weights are dense: they are for a model that is not packed."
    return KIND_CHECKS[check](make_kind_case(kind, make_layer, **options)) or "ok"


@pytest.mark.parametrize("check", KIND_CHECKS)
@pytest.mark.parametrize("name", GRID)
def test_grid(name, check):
    assert outcome(name, check) == json.loads(PAGE.read_text("utf-8"))[name][check], "as the support page says"


@pytest.mark.parametrize("name", GRID)
def test_rows_under_autocast_have_the_dtype_of_a_plain_call(name):
    """torch's vmap computes a product with a bias in float32 under autocast."""
    kind, make_layer, options = GRID[name]
    case = make_kind_case(kind, make_layer, **{key: value for key, value in options.items() if key != "skip"})
    model, x = case.model.float(), case.x.float() if case.x.is_floating_point() else case.x
    refused = 0
    for cfg in case.variants:
        adapt = ll.build(model, dataclasses.replace(case.config(cfg), dtype=torch.float32), kinds=(kind,), progress=False)
        params = [move(adapt.init(seed=k)) for k in range(2)]
        with torch.autocast("cpu", torch.bfloat16):
            want = torch.cat([adapt(p, x[2 * k : 2 * k + 2]) for k, p in enumerate(params)])
            try:
                got = adapt.mixed(ll.stack(params), x)
            except ValueError as e:
                refused += kind.why in str(e)
                continue
        assert got.dtype == want.dtype, cfg.name
        torch.testing.assert_close(got, want, rtol=0.03, atol=0.03)
    assert refused in (0, len(case.variants))


PLAIN = [row for row in CASES if row.cfg.adapts == "linear" and not row.cfg.calibrated and not row.cfg.original]
PLAIN = [row for row in PLAIN if not {"rows", "positions"} & set(row.cfg.uses)]


@pytest.mark.parametrize("tokens", [3, 2100])
@pytest.mark.parametrize("row", PLAIN, ids=lambda row: row.id)
def test_every_variant_has_the_dtype_of_a_plain_call_under_autocast(row, tokens):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(48, 64)).eval(), torch.randn(tokens, 48)
    adapt = ll.build(model, row.cfg)
    params = move(adapt.init(), scale=0.02)
    with torch.autocast("cpu", torch.bfloat16):
        found, own = adapt(params, x), model(x)
    assert found.dtype == own.dtype
    want = adapt(params, x)
    assert (found - want).abs().max() <= 3e-2 * want.abs().max()


@pytest.mark.parametrize("shape", [(0, 6), (0, 3, 6), (2, 0, 6)], ids=str)
@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 4), lambda: tf.pytorch_utils.Conv1D(4, 6)], ids=["linear", "conv1d"])
@pytest.mark.parametrize("cfg", [ll.LoRAConfig(r=2), ll.IA3Config()], ids=lambda cfg: cfg.name)
def test_a_batch_of_no_rows_passes(cfg, make, shape):
    model = nn.Sequential(make())
    adapt, x = ll.build(model, cfg), torch.zeros(shape)
    assert adapt(adapt.init(), x).shape == model(x).shape == (*shape[:-1], 4)


def test_every_kind_that_ships_is_in_the_grid():
    tried = {kind for kind, _, _ in GRID.values()}
    packed = set(PACKED.values()) | {"Linear4bitKind", "Linear8bitKind", "CompressedTensorsKind"}  # in tests of their own: no float64
    assert {kind.__name__ for kind in set(table.KINDS) - tried} == packed


@pytest.mark.parametrize("name", GRID)
def test_a_kind_that_may_not_fit_a_class_fits_no_layer_of_it(name):
    layer = GRID[name][1]()
    known = table.candidates(layer)
    assert [kind for kind in table.KINDS if kind.fits(layer) and kind not in known] == []
    assert LinearKind not in table.candidates(nn.ReLU()), "most are not asked"


def test_a_kind_whose_module_keeps_no_weight_under_its_name_says_so():
    class Elsewhere(MyKind):
        state = {"weight": "kernel"}  # noqa: RUF012
        weight = ll.Kind.weight

    with pytest.raises(AttributeError, match=r"Elsewhere: expected a weight at 'kernel', found none\. Set its state"):
        ll.build(nn.Sequential(MyLinear(6, 8)), ll.LoRAConfig(r=2), kinds=(Elsewhere,))


def test_a_wrong_kind_fails_the_kit_by_name():
    class Swapped(MyKind):
        state = {"weight": "b", "bias": "W"}  # noqa: RUF012

    class Unturned(MyKind):
        def to_weight(self, dense):
            return dense

    with pytest.raises(AssertionError, match="merged"):
        check_kind(Swapped, lambda: MyLinear(6, 8))
    with pytest.raises(AssertionError, match="merged"):
        check_kind(Unturned, lambda: MyLinear(6, 8))


def test_a_kind_that_moves_no_rows_or_draws_fails_the_kit_by_name():
    class Unmoved(MyKind):
        def add_rows(self, x, index, D):
            return self(x)

    class Drawing(MyKind):
        weight = property(lambda self: self.layer.W.t() + 0 * torch.rand(()))

    with pytest.raises(AssertionError, match="merged: expected the model with tokens merged"):
        check_kind(Unmoved, lambda: MyLinear(6, 8))
    with pytest.raises(AssertionError, match="untouched: expected the global random state as it was, found it moved"):
        check_kind(Drawing, lambda: MyLinear(6, 8))


@pytest.mark.parametrize(("fact", "value"), [("gives", {"outputs"}), ("site", "lin")])
def test_words_that_no_variant_uses_are_refused(fact, value):
    """No variant fitted such a kind, so that the kit had nothing to try and passed."""
    kind = type("Misspelt", (MyKind,), {fact: value, "why": "It is so."})
    for refused in (
        lambda: check_kind(kind, lambda: MyLinear(6, 8)),
        lambda: ll.build(nn.Sequential(MyLinear(6, 8)), ll.LoRAConfig(r=2), kinds=(kind,)),
    ):
        with pytest.raises(ValueError, match=rf"Misspelt\.{fact}: expected words among .*Change the class variable"):
            refused()


@pytest.mark.parametrize("value", [[MyLinear], (MyLinear(2, 2),), "MyLinear"], ids=["list", "layer", "string"])
def test_classes_that_are_none_are_refused(value):
    kind = type("OddKind", (MyKind,), {"classes": value})
    with pytest.raises(TypeError, match=r"OddKind\.classes: expected a tuple of classes, found .*Write classes = \(ItsLayer,\)"):
        ll.build(nn.Sequential(MyLinear(4, 4)), ll.LoRAConfig(r=2), kinds=(kind,))


@pytest.mark.parametrize("widths", [[3, 1], {"q.a": 3, "k": 1}, {"": 3, "k": 1}, {"q": 4, "k": 0}, None], ids=str)
def test_widths_of_another_form_are_refused(widths):
    kind = type("OddKind", (ll.FusedKind,), {"classes": (nn.Linear,), "widths": lambda self: widths})
    with pytest.raises(ValueError, match=r"OddKind\.widths: expected names without dots and widths of at least 1, found"):
        ll.build(nn.Sequential(nn.Linear(4, 4)), ll.LoRAConfig(r=2), kinds=(kind,))


class ScaledLinear(MyLinear):
    """A layer that is called with a scale, and returns its width beside the output."""

    def forward(self, x, scale=1.0):
        y = scale * super().forward(x)
        return y, {"width": y.shape[-1]}


class ScaledKind(MyKind):
    def call(self, run, own, args, kwargs):
        y = kwargs.get("scale", 1.0) * run(self, args[0])
        return y, {"width": y.shape[-1]}


class Doubling(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = ScaledLinear(4, 6)

    def forward(self, x):
        return self.layer(x, scale=2.0)[0]


def test_arguments_that_a_kind_would_drop_are_refused_and_the_way_out_works():
    """The default `call` handed on the first argument, so that the adapted model, and `adapt.base`, were those of another scale."""
    torch.manual_seed(0)
    model, x = Doubling().eval(), torch.randn(3, 4)
    for cfg in (ll.LoRAConfig(r=2), ll.BitFitConfig()):
        adapt = ll.build(model, cfg, kinds=(type("PlainKind", (MyKind,), {}),))
        with pytest.raises(ValueError, match=r"PlainKind: expected the model to call the layer with one argument, found 2.*Define call"):
            adapt(adapt.init(), x)
        torch.testing.assert_close(adapt.base(x), model(x))
        adapt = ll.build(model, cfg, kinds=(ScaledKind,))
        torch.testing.assert_close(adapt(adapt.init(), x), model(x))


def test_what_a_layer_returns_beside_its_output_is_checked():
    """The kit could not run on a layer that returns more than a tensor."""
    check_kind(ScaledKind, lambda: ScaledLinear(6, 8))
    for own in (
        lambda self, run, own, args, kwargs: run(self, args[0]),
        lambda self, run, own, args, kwargs: (run(self, args[0]), {"width": 3}),
    ):
        case = make_kind_case(type("WrongKind", (ScaledKind,), {"call": own}), lambda: ScaledLinear(6, 8))
        with pytest.raises(AssertionError, match="expected the layer to return"):
            KIND_CHECKS["base"](case)


def test_file_names_the_kinds_that_it_needs(tmp_path):
    model = nn.Sequential(MyLinear(4, 6))
    adapt = ll.build(model, ll.LoRAConfig(r=2), kinds=(MyKind,))
    ll.save(adapt, adapt.init(), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"made for, with the kinds that build was given, kinds=\(MyKind,\)"):
        ll.load(model, tmp_path / "a.safetensors")


class Gated(nn.Module):
    """A value times a gate, each a linear map with a weight of its own."""

    def __init__(self, i, o):
        super().__init__()
        self.value, self.gate = nn.Parameter(torch.randn(o, i) / i**0.5), nn.Parameter(torch.randn(o, i) / i**0.5)

    def forward(self, x):
        return nn.functional.linear(x, self.value) * nn.functional.linear(x, self.gate).sigmoid()


class GatedKind(ll.FusedKind):
    classes = (Gated,)
    bias = None
    weight = property(lambda self: torch.cat([self.layer.value, self.layer.gate]))

    def widths(self):
        return dict.fromkeys(("value", "gate"), self.layer.value.shape[0])

    def apply(self, f, params, x):
        value, gate = super().apply(f, params, x).chunk(2, -1)
        return value * gate.sigmoid()

    def merged(self, f, params):
        return dict(zip(("value", "gate"), self.adapted(f, params, "weight").chunk(2)))


def test_kind_that_merges_into_tensors_of_its_own_needs_no_more(tmp_path):
    """A kind with `merged` alone was refused for want of a "weight", and its file for PEFT failed on a name."""
    check_kind(GatedKind, lambda: Gated(6, 8))
    adapt = ll.build(nn.Sequential(nn.Sequential(Gated(6, 8))), ll.LoRAConfig(r=2), kinds=(GatedKind,))
    params = move(adapt.init())
    assert list(adapt.merge(params)) == ["0.0.value", "0.0.gate"]
    assert max(adapt.merge_error(params, adapt.merge(params)).values()) < 1e-6
    with pytest.raises(ValueError, match=r'LoRAConfig has tensors "value\.A", .*which PEFT\'s LORA has no names for'):
        ll.to_peft(adapt, params, tmp_path / "peft")


def test_kind_that_merges_into_a_name_of_nothing_is_refused():
    kind = type("OddKind", (MyKind,), {"merged": lambda self, f, params: {"zzz": self.adapted(f, params, "weight").t()}})
    adapt = ll.build(nn.Sequential(MyLinear(4, 6)), ll.LoRAConfig(r=2), kinds=(kind,))
    with pytest.raises(
        ValueError, match=r"OddKind\.merged returned 'zzz', which is none of \"W\", \"b\"\. Correct the name, or define kept"
    ):
        adapt.merge(move(adapt.init()))


def test_weight_that_a_function_makes_is_saved_and_not_merged(tmp_path):
    """A kind whose `state` names nothing could not be saved."""
    kind = type("MadeKind", (MyKind,), {"state": {}, "weight": property(lambda self: self.layer.W.t().tanh())})
    adapt = ll.build(nn.Sequential(MyLinear(4, 6)), ll.LoRAConfig(r=2), kinds=(kind,))
    ll.save(adapt, move(adapt.init()), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"MadeKind\.state names no weight of the module, found {}, so no state dict holds it"):
        adapt.merge(move(adapt.init()))


def test_rows_of_parameters_and_experts_are_trained():
    """They have no module of their own, where tied weights were looked for."""
    model = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    adapt = ll.build(model, ll.TokensConfig(token_ids=(1, 4), target_names="in_proj_weight"))
    params = move(adapt.init())
    x, merged = torch.randn(2, 3, 8), copy.deepcopy(model)
    merged.load_state_dict(adapt.merge(params), strict=False)
    torch.testing.assert_close(adapt(params, (x, x, x))[0], merged(x, x, x)[0])


def test_merging_a_kind_that_names_no_parameter_is_refused():  # D1
    class Nameless(MyKind):
        state = {"weight": "weight", "bias": "bias"}  # noqa: RUF012

    adapt = ll.build(nn.Sequential(MyLinear(6, 8)), ll.LoRAConfig(r=2), kinds=(Nameless,))
    with pytest.raises(ValueError, match=r'"0": its weight is .*kept in no parameter'):
        adapt.merge(adapt.init())


@dataclass(frozen=True, kw_only=True)
class GainNorm(ll.AdapterConfig):
    """y = norm(x) (1 + weight): a norm variant that is not Full's arithmetic."""

    name = "gain_norm"
    adapts = "norm"

    def init(self, W, generator):
        return {"weight": torch.zeros(W.out_features)}

    def forward(self, params, W, x):
        return W(x) * (1 + params["weight"])


class ScaledRows(nn.Module):
    def __init__(self):
        super().__init__()
        self.W, self.scale = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.rand(6) + 0.5)

    def forward(self, x):
        return x @ self.W * self.scale


@pytest.mark.parametrize(
    ("to_weight", "held"),
    [
        (lambda self, dense: dense.t() / self.layer.scale, True),
        (lambda self, dense: dense.t(), False),
        (lambda self, dense: dense / self.layer.scale, False),
        (lambda self, dense: (dense.t() / self.layer.scale).round(decimals=1), False),
    ],
    ids=["exact", "scale forgotten", "not transposed", "rounded"],
)
def test_a_kind_that_lays_a_weight_out_otherwise_than_it_reads_it_is_not_merged(to_weight, held):
    weight = property(lambda self: (self.layer.W * self.layer.scale).t())
    facts = {"classes": (ScaledRows,), "state": {"weight": "W"}, "weight": weight, "to_weight": to_weight}
    kind = type("ScaledRowsKind", (ll.Kind,), facts)
    model, x = nn.Sequential(ScaledRows()), torch.randn(3, 6)
    adapt = ll.build(model, ll.LoRAConfig(r=2), kinds=(kind,))
    params = move(adapt.init())
    if not held:
        with pytest.raises(ValueError, match=r'"0": ScaledRowsKind\.to_weight: expected a layout from which weight reads the same matrix'):
            adapt.merge(params)
        return
    merged = copy.deepcopy(model)
    merged.load_state_dict(adapt.merge(params), strict=False)
    torch.testing.assert_close(merged(x), adapt(params, x))


def test_a_norm_variant_that_does_more_than_move_is_not_merged_wrong():  # D2
    model = nn.Sequential(normed()).eval()
    adapt = ll.build(model, GainNorm())
    params = move(adapt.init())
    x = torch.randn(2, 8)
    torch.testing.assert_close(adapt(params, x), model(x) * (1 + params["0"]["weight"]))
    with pytest.raises(ValueError, match='"0": the adapter does more than move the module'):
        adapt.merge(params)


BESIDE = {
    "to the output": lambda self, params, W, x: W.moved(params)(x) + params["weight"],
    "to the input": lambda self, params, W, x: W.moved(params)(x + params["weight"]),
    "by a call": lambda self, params, W, x: W.moved(params)(x) + 0.5 * W(x),
    "twice": lambda self, params, W, x: W.moved(params)(W.moved(params)(x)),
}


@pytest.mark.parametrize("adapts", ["norm", "module"])
@pytest.mark.parametrize("case", BESIDE)
def test_a_variant_that_moves_parameters_and_does_more_is_not_merged_without_it(case, adapts):
    """All but the third were merged by the moved parameters alone, without a word."""
    members = {"adapts": adapts, "forward": BESIDE[case], "identity": None}
    cls = dataclass(frozen=True, kw_only=True)(type("MovesAndMore", (GainNorm,), members))
    adapt = ll.build(nn.Sequential(nn.LayerNorm(8)).eval(), cls(target_names="^0$"))
    with pytest.raises(ValueError, match='"0": the adapter does more than move the module'):
        adapt.merge(move(adapt.init()))


@dataclass(frozen=True, kw_only=True)
class SteerVec(ll.AdapterConfig):
    """A trained vector added to a block's output."""

    name = "steer_vec"
    adapts = "block"
    linear = False

    def init(self, W, generator):
        return {"v": torch.zeros(W.out_features)}

    def forward(self, params, W, x):
        return W(x) + params["v"]


def test_a_block_variant_from_outside():  # D3
    model, x = Block().eval(), torch.randn(2, 5, 8)
    adapt = ll.build(model, SteerVec())
    params = move(adapt.init())
    want = x
    for k, block in enumerate(model.blocks):
        want = want + block(want) + params[f"blocks.{k}"]["v"]
    torch.testing.assert_close(adapt(params, x), want)
    ll.testing.check_variant(SteerVec())


def test_kinds_are_known_wherever_an_adapt_goes(tmp_path):  # D5
    model = nn.Sequential(Int8Linear(nn.Linear(8, 16)), nn.ReLU(), Int8Linear(nn.Linear(16, 4))).eval()
    adapt = ll.build(model, ll.PiSSAConfig(r=2), kinds=(Int8Kind,))
    params, x = move(adapt.init()), torch.randn(3, 8)
    lora, tree, errors = ll.to_lora(adapt, params, r=4)
    assert max(errors.values()) < 1e-5
    torch.testing.assert_close(lora(tree, x), adapt(params, x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(adapt.train().eval()(params, x), adapt(params, x))
    ll.to_peft(lora, tree, tmp_path / "peft")
    back, read = ll.from_peft(model, tmp_path / "peft", kinds=(Int8Kind,))
    torch.testing.assert_close(back(read, x), adapt(params, x), rtol=1e-4, atol=1e-5)


STRENGTHS = (
    ll.LoRAConfig(r=2),
    ll.DeLoRAConfig(r=2),
    ll.HRAConfig(r=2),
    ll.ETHERConfig(),
    ll.ETHERPlusConfig(),
    ll.AntiPaSTOConfig(r=2, block_size=2, max_rotation_angle=0.2),
)


@pytest.mark.parametrize("cfg", STRENGTHS, ids=lambda cfg: cfg.name)
def test_each_map_of_a_layer_is_steered_by_itself(cfg):
    """The maps of a fused layer at half strength are those of layers of their own."""
    torch.manual_seed(0)
    fused, x = nn.Sequential(nn.Linear(6, 12)), torch.randn(3, 6)
    apart = nn.ModuleDict({name: nn.Linear(6, n) for name, n in FusedQKV(fused[0]).widths().items()})
    weights, biases = (torch.split(t.data, [len(m.bias) for m in apart.values()]) for t in (fused[0].weight, fused[0].bias))
    for layer, weight, bias in zip(apart.values(), weights, biases):
        layer.weight.data, layer.bias.data = weight, bias
    adapt = ll.build(fused, cfg, kinds=(FusedQKV,))
    params = move(adapt.init())
    found = adapt(adapt.steer(params, 0.5), x).split([len(m.bias) for m in apart.values()], dim=-1)
    for (name, layer), y in zip(apart.items(), found):
        one = ll.build(nn.Sequential(layer), cfg)
        own = {leaf.removeprefix(f"{name}."): p for leaf, p in params["0"].items() if leaf.startswith(f"{name}.")}
        torch.testing.assert_close(y, one(one.steer({"0": own}, 0.5), x), rtol=1e-5, atol=1e-6)
    two = ll.stack([params, move(adapt.init(), seed=1)])
    both = adapt.steer(two, torch.tensor([0.5, 1.0]))
    torch.testing.assert_close(adapt(ll.unstack(both)[0], x), adapt(adapt.steer(params, 0.5), x))


@pytest.mark.parametrize("cfg", STRENGTHS, ids=lambda cfg: cfg.name)
def test_each_matrix_of_a_stack_is_steered_by_itself(cfg):
    torch.manual_seed(0)
    model = nn.Bilinear(4, 4, 3, bias=False)  # its weight is a stack of three
    adapt = ll.build(model, with_fields(cfg, target_names=("weight$",)))
    params = move(adapt.init())
    found = adapt.merge(adapt.steer(params, 0.5))["weight"]
    for k in range(3):
        layer = nn.Linear(4, 4, bias=False)
        layer.weight.data = model.weight.data[k]
        one = ll.build(nn.Sequential(layer), cfg)
        own = {"0": {name: p[k] for name, p in params["weight"].items()}}
        torch.testing.assert_close(found[k], one.merge(one.steer(own, 0.5))["0.weight"], rtol=1e-5, atol=1e-6)


def renamed(tree):
    """Return the tree of a fused layer with a target for each map, and the tree of a stack with one for each matrix."""
    found = {}
    for name, leaf in tree["0"].items():
        of, _, own = name.rpartition(".")
        found.setdefault(of, {})[own] = leaf
    return found


def allocated(cfg, tree, state):
    """Run a few steps of a variant's allocation."""
    for _ in range(3):
        tree, state = cfg.update(ll.tree_map(lambda p: 0.9 * p, tree), ll.tree_map(torch.sin, tree), state)
    return tree


BUDGET = ll.AdaLoRAConfig(init_r=2, target_r=1, total_step=4)
SUBSPACES = ll.AdaMSSConfig(r=3, num_subspaces=2, use_asa=True, asa_target_subspaces=3, init_warmup=0, final_warmup=2, mask_interval=1)
OF_TREES = {
    "riemannian": (ll.LoRAConfig(r=2), lambda tree, _: ll.riemannian(tree, ll.tree_map(torch.sin, tree))),
    "lora_fa": (ll.LoRAConfig(r=2), lambda tree, _: ll.lora_fa(tree, ll.tree_map(torch.sin, tree), scale=2.0)),
    "osf": (ll.OSFConfig(effective_rank=1), osf.project),
    "antipasto": (ll.AntiPaSTOConfig(r=2, core="ablate"), lambda tree, _: ll.AntiPaSTOConfig(r=2, core="ablate").update(tree, None)[0]),
    "adalora": (ll.AdaLoRAConfig(init_r=2, target_r=1), lambda tree, _: {"": {"": adalora.orthogonality(tree)}}),
    "kasa": (ll.KaSAConfig(r=1), lambda tree, constants: {"": {"": kasa.regularisation(tree, constants, ll.KaSAConfig(r=1))}}),
    "a budget": (BUDGET, lambda tree, _: allocated(BUDGET, tree, None)),
    "subspaces": (SUBSPACES, lambda tree, constants: allocated(SUBSPACES, tree, constants)),
    "qgoft": (ll.QGOFTConfig(), lambda tree, _: {"": {"": qgoft.orthogonality(tree)}}),
}


@pytest.mark.parametrize("case", OF_TREES)
def test_functions_of_trees_see_each_map_of_a_fused_layer(case):
    cfg, function = OF_TREES[case]
    torch.manual_seed(0)
    adapt = ll.build(nn.Sequential(nn.Linear(6, 12)), cfg, kinds=(FusedQKV,))
    params = move(adapt.init(), scale=1.0)
    found = function(params, adapt.constants)
    want = function(renamed(params), renamed(adapt.constants))
    assert_trees_equal(renamed({"0": found["0"]}) if "0" in found else found, want, 1e-6)
    assert case in ("adalora", "kasa", "qgoft") or any(not torch.equal(params["0"][name], leaf) for name, leaf in found["0"].items())


def test_rates_of_fused_maps_are_those_of_the_paper():
    adapt = ll.build(nn.Sequential(nn.Linear(6, 12)), ll.LoRAConfig(r=2), kinds=(FusedQKV,))
    slow, fast = ll.lora_plus(adapt.init(), lr=1.0, ratio=4.0)
    assert [tuple(p.shape) for p in fast["params"]] == [(8, 2), (2, 2), (2, 2)]
    assert [tuple(p.shape) for p in slow["params"]] == [(2, 6)] * 3


@pytest.mark.parametrize("case", ["osf", "adalora", "kasa", "subspaces"])
def test_functions_of_trees_see_each_matrix_of_a_stack(case):
    cfg, function = OF_TREES[case]
    torch.manual_seed(0)
    adapt = ll.build(nn.Bilinear(4, 4, 3, bias=False), with_fields(cfg, target_names=("weight$",)))
    params, each = move(adapt.init(), scale=1.0), ({}, {})
    for k in range(3):
        for own, tree in zip(each, (params, adapt.constants)):
            own[str(k)] = {name: leaf[k] for name, leaf in tree["weight"].items()}
    found, want = function(params, adapt.constants), function(*each)
    if case not in ("adalora", "kasa"):
        want = {"weight": {name: torch.stack([want[str(k)][name] for k in range(3)]) for name in want["0"]}}
    assert_trees_equal(found, want, 1e-6)


SHARING = [row.cfg for row in FIRST if row.cfg.name in ("unilora", "vblora", "randlora", "frod")]


@pytest.mark.parametrize("maps", [1, 2])
@pytest.mark.parametrize("cfg", SHARING, ids=lambda cfg: cfg.name)
def test_stacks_have_no_part_of_tensors_that_layers_share(cfg, maps):
    model = nn.Bilinear(48, 64, maps, bias=False)
    with pytest.raises(ValueError, match=r'cannot adapt "weight": its layers share tensors, and this one holds (a stack of one|2) linear'):
        ll.build(model, with_fields(cfg, target_names=("weight$",)))


def test_fused_maps_merge_into_the_fused_weight():  # D6
    model = nn.Sequential(nn.Linear(6, 12)).eval()
    adapt = ll.build(model, ll.LoRAConfig(r=2), kinds=(FusedQKV,))
    params = move(adapt.init())
    assert {name: tuple(p.shape) for name, p in params["0"].items()} == {
        **{"q.A": (2, 6), "q.B": (8, 2), "k.A": (2, 6), "k.B": (2, 2)},
        **{"v.A": (2, 6), "v.B": (2, 2)},
    }
    delta = torch.cat([params["0"][f"{n}.B"] @ params["0"][f"{n}.A"] for n in "qkv"]) * adapt.configs[0].scale
    torch.testing.assert_close(adapt.merge(params)["0.weight"], model[0].weight + delta)
    assert adapt.macs_per_token == 2 * (3 * 6 + 12)


def test_nobody_else_asks_which_kind_it_is():  # R3
    source = Path(ll.__file__).parent
    asks = re.compile(r"(isinstance|issubclass)\([^\n]*(\w*Kind|FrozenQuantised)\b|\bkind (is|==) \w+Kind|\.(stacked|by_name|site)\b")
    found = {}
    for path in source.rglob("*.py"):
        name = path.relative_to(source).as_posix()
        if not name.startswith(("layers/", "testing/")) and name != "files/peft/layers.py":
            found[name] = sum(bool(asks.search(line)) for line in path.read_text("utf-8").splitlines())
    assert {name: n for name, n in found.items() if n} == {}


def test_the_type_of_every_module_is_kept_and_the_registry_holds_params_alone():  # R9
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4)).eval()
    adapt = ll.build(model, ll.PiSSAConfig(r=2))
    module = adapt.module(adapt.init())
    assert [type(module[k]) for k in range(3)] == [type(model[k]) for k in range(3)]
    assert set(module.state_dict()) - set(model.state_dict()) == {f"{k}.adapter.{n}" for k in (0, 2) for n in ("dA", "dB")}
    assert list(module.buffers()) == []
    assert [name for name, p in module.named_parameters() if p.requires_grad] == [f"{k}.adapter.{n}" for k in (0, 2) for n in ("dA", "dB")]


class Readers(nn.Module):
    """Layers whose weight is read and never called, called and read, and read from outside their module."""

    def __init__(self):
        super().__init__()
        self.read, self.both, self.embed = nn.Linear(8, 8), nn.Linear(8, 8), nn.Embedding(16, 8)
        self.mats = nn.ParameterList([nn.Parameter(torch.randn(8, 8)) for _ in range(2)])

    def forward(self, ids):
        x = self.embed(ids)
        x = x + nn.functional.linear(x, self.read.weight, self.read.bias).tanh()
        x = x + self.both(x) @ self.both.weight
        x = x @ self.mats[0] @ self.mats[1].T
        return x @ self.embed.weight.T


@pytest.mark.parametrize("cfg", [ll.LoRAConfig(r=2), ll.IA3Config(), ll.DoRAConfig(r=2), ll.HRAConfig(r=2), ll.OFTConfig(block_size=4)])
def test_the_weight_is_adapted_whoever_reads_it(cfg):  # law 2
    import dataclasses

    names = ("read$", "both$", r"mats\.0$", *(("embed$",) if cfg.uses <= {"output", "project"} and cfg.name == "lora" else ()))
    cfg = dataclasses.replace(cfg, target_names=names, exclude_names=(), dtype=torch.float64)
    model, ids = Readers().double().eval(), torch.randint(0, 16, (3, 5))
    adapt = ll.build(model, cfg)
    assert torch.equal(adapt(adapt.init(), ids), model(ids)) or cfg.name in ("hra", "oft")
    params = move(adapt.init())
    merged = copy.deepcopy(model)
    if cfg.name == "ia3":  # a gate on a bare parameter and on layers with biases
        assert set(adapt.merge(params)) >= {"read.weight", "read.bias", "mats.0"}
    assert not merged.load_state_dict(adapt.merge(params), strict=False).unexpected_keys
    want = merged(ids)
    for got in (adapt(params, ids), adapt.module(params)(ids), torch.vmap(adapt, (0, None))(ll.stack([params]), ids)[0]):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(want, model(ids))
    grads = ll.value_and_grad(lambda p: adapt(p, ids).square().sum())(params)[1]
    assert all(g.any() for g in ll.tree_leaves(grads))
    assert adapt.unused() == []
    torch.testing.assert_close(adapt.base(ids), model(ids), rtol=0, atol=0)


def test_reading_compiles_in_one_graph():
    model, ids = Readers().eval(), torch.randint(0, 16, (3, 5))
    adapt = ll.build(model, ll.LoRAConfig(r=2, target_names=("read$", "both$", "embed$"), exclude_names=()))
    params = move(adapt.init())
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(adapt, fullgraph=True, backend=backend)
    for k in range(2):
        other = move(params, seed=k)
        torch.testing.assert_close(compiled(other, ids), adapt(other, ids), rtol=1e-5, atol=1e-5)
    assert len(graphs) == 1


@pytest.mark.parametrize("name", ["wavlm", "mamba"])
def test_models_that_read_weights_train_and_merge(name):
    torch.manual_seed(0)
    if name == "wavlm":
        small = {"conv_dim": (16, 16), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_conv_pos_embeddings": 8}
        config = tf.WavLMConfig(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_labels=2,
            num_conv_pos_embedding_groups=4, **small,
        )  # fmt: skip
        model, batch = tf.WavLMForSequenceClassification(config).eval(), {"input_values": torch.randn(2, 400)}
        cfg = ll.LoRAConfig(r=2, target_names=r"((q|v)_proj|intermediate_dense)$")
    else:
        config = tf.MambaConfig(vocab_size=64, hidden_size=32, state_size=4, num_hidden_layers=2, time_step_rank=4)
        model, batch = tf.MambaForCausalLM(config).eval(), {"input_ids": torch.randint(0, 64, (2, 7))}
        cfg = ll.LoRAConfig(r=2, target_names=r"(dt_proj|x_proj|in_proj)$")
    adapt = ll.build(model, cfg)
    assert torch.equal(adapt(adapt.init(), batch).logits, adapt.base(batch).logits)
    params = move(adapt.init())
    merged = copy.deepcopy(model)
    assert not merged.load_state_dict(adapt.merge(params), strict=False).unexpected_keys
    want = merged(**batch).logits
    assert (want - model(**batch).logits).abs().max() > 1e-3
    torch.testing.assert_close(adapt(params, batch).logits, want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(adapt.module(params)(**batch).logits, want, rtol=1e-4, atol=1e-4)
    grads = ll.value_and_grad(lambda p: adapt(p, batch).logits.square().sum())(params)[1]
    assert all(g.any() for g in ll.tree_leaves(grads))
    assert adapt.unused() == []


@pytest.mark.parametrize("own", ["adapter", "prompt", "mixed_index", "adapter_A", "constant_A"])
def test_names_of_ours_never_meet_the_users(own):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)
            self.register_parameter(own, nn.Parameter(torch.ones(8)))

        def forward(self, x):
            return self.norm(self.lin(x)) * getattr(self, own)

    model, x = nn.Sequential(nn.ModuleList([Named()])[0]).eval(), torch.randn(2, 8)
    full = ll.build(model, ll.FullConfig(target_names="^0$"))
    assert set(full.shapes["0"]) == {name for name, _ in model[0].named_parameters()}
    for adapt in (full, ll.build(model, ll.LoRAConfig(r=2))):
        params = move(adapt.init())
        torch.testing.assert_close(adapt.module(params)(x), adapt(params, x))
        assert torch.equal(adapt(adapt.init(), x), model(x))


def test_a_shift_that_nothing_holds_is_refused_where_the_weight_is_read():
    class Read(nn.Module):
        def __init__(self, bias):
            super().__init__()
            self.lin = nn.Linear(6, 4, bias=bias)

        def forward(self, x):
            return nn.functional.linear(x, self.lin.weight, self.lin.bias)

    x = torch.randn(3, 6)
    adapt = ll.build(Read(bias=False), ll.BitFitConfig())
    with pytest.raises(ValueError, match=r'at "lin" expected a variant that changes the weight alone.*BitFitConfig.*exclude_names'):
        adapt(adapt.init(), x)
    model = Read(bias=True)
    adapt = ll.build(model, ll.BitFitConfig())
    params = move(adapt.init())
    torch.testing.assert_close(adapt(params, x), model(x) + params["lin"]["db"])


def test_words_of_version_0_1_0_are_translated():
    class Old(MyKind):
        offers = ("nothing", "product")
        reads = ("output", "projection")

    assert Old.gives == {"matmul", "output", "project", "inputs", "dropout"}
    model = nn.Sequential(MyLinear(6, 8))
    assert len(ll.build(model, ll.LoRAConfig(r=2), kinds=(Old,)).targets) == 1
    with pytest.raises(ValueError, match="DoRAConfig cannot adapt"):
        ll.build(model, ll.DoRAConfig(r=2), kinds=(Old,))


# A dense update of a linear layer


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_dense_update_of_a_linear_layer_is_added_to_its_output(dtype):
    layer, x, D = nn.Linear(64, 32).to(dtype), torch.randn(2, 3, 64, dtype=dtype), torch.randn(32, 64, dtype=dtype)
    got, want = LinearKind(layer).updated(x, D), ll.Frozen(layer.weight, layer.bias).updated(x, D)
    assert torch.allclose(got, want, rtol=0, atol={torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 0.5}[dtype])
    assert torch.equal(LinearKind(layer).updated(x, torch.zeros_like(D)), layer(x))


def test_a_small_dense_update_is_not_rounded_away_in_bfloat16():
    layer = nn.Linear(64, 1, bias=False, dtype=torch.bfloat16)
    layer.weight.data = torch.tensor([1.0, -1.0]).repeat(32)[None].bfloat16()
    x, D = torch.ones(1, 64, dtype=torch.bfloat16), torch.full((1, 64), 2.0**-10, dtype=torch.bfloat16)
    assert torch.equal(layer.weight.data + D, layer.weight.data)  # the sum would lose it
    assert LinearKind(layer).updated(x, D).item() == 2.0**-4


def test_a_linear_layer_of_a_kind_of_its_own_is_updated_through_its_own_call():
    class Doubled(LinearKind):
        def __call__(self, x):
            return 2 * super().__call__(x)

    layer, x, D = nn.Linear(6, 4), torch.randn(3, 6), torch.randn(4, 6)
    assert torch.allclose(Doubled(layer).updated(x, D), 2 * layer(x) + x @ D.t(), rtol=0, atol=1e-5)


if __name__ == "__main__" and "--write" in sys.argv:
    PAGE.write_text(json.dumps({name: {check: outcome(name, check) for check in KIND_CHECKS} for name in GRID}, indent=1) + "\n", "utf-8")


class ST(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class NoClassmethod(ll.Kind):
    def fits(self, layer):
        return isinstance(layer, ST)


class Takes2Kind(ll.Kind):
    classes = (nn.Bilinear,)


def test_kinds_that_no_build_could_ask_are_named():
    with pytest.raises(TypeError, match=r"NoClassmethod.fits: expected a classmethod.*Write @classmethod above it"):
        ll.build(nn.Sequential(ST(6, 8)), ll.LoRAConfig(r=2), kinds=(NoClassmethod,))


@pytest.mark.parametrize("given", [lambda: (torch.ones(4, 3), torch.ones(4, 3)), lambda: torch.ones(3, 3)], ids=["two", "three rows"])
def test_kit_says_which_input_it_takes(given):
    with pytest.raises(TypeError, match=r"expected make_input to return one tensor with 4 rows.*names="):
        check_kind(Takes2Kind, lambda: nn.Bilinear(3, 3, 4), given)


@pytest.mark.parametrize(
    ("made", "found"),
    [
        (lambda self, dtype: Int8Kind.dequantise(self, torch.float16), r"shape \(8, 6\) in torch.float16"),
        (lambda self, dtype: Int8Kind.dequantise(self, dtype).t(), r"shape \(6, 8\)"),
    ],
    ids=["dtype", "shape"],
)
def test_a_weight_that_is_dequantised_otherwise_is_named(made, found):
    """Torch's error about two dtypes named the variant."""
    kind = type("OddKind", (Int8Kind,), {"dequantise": made})
    model, message = nn.Sequential(Int8Linear(nn.Linear(6, 8))), rf"OddKind.dequantise\(.*\): expected the weight \(o, i\) .*{found}"
    with pytest.raises(ValueError, match=message):
        ll.build(model, ll.LoRAConfig(r=2), kinds=(kind,)).base(torch.randn(3, 6))
    with pytest.raises(ValueError, match=message):
        ll.build(model, ll.PiSSAConfig(r=2), kinds=(kind,))
