"""Variants written outside the package, as their authors would: what they need write, and what they are given."""

import ast
import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal, TypedDict

import pytest
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

import lora_lite as ll
from cases import assert_trees_equal, move
from lora_lite.testing import check_variant

# LoHa (Hyeon-Woo, Ye-Bin, Oh, *FedPara*, 2021, arXiv:2108.06098), in full.


class LoHaParams(TypedDict):
    A1: Float[Tensor, "r i"]
    B1: Float[Tensor, "o r"]
    A2: Float[Tensor, "r i"]
    B2: Float[Tensor, "o r"]


@ll.checked
def loha(params: LoHaParams, W: ll.Frozen, x: Float[Tensor, "*b i"], *, scale: float) -> Float[Tensor, "*b o"]:
    """Return `W x + b + scale [(B1 A1) * (B2 A2)] x`."""
    delta = (params["B1"] @ params["A1"]) * (params["B2"] @ params["A2"])  # (o, i)
    return W(x) + scale * F.linear(x, delta)


@dataclass(frozen=True, kw_only=True)
class LoHaConfig(ll.AdapterConfig):
    """Config of LoHa."""

    name = "loha"
    steered = ("B2",)
    trained = "2 * r * (i + o)"
    macs = "i * o"

    r: int = 8
    alpha: float = 16.0

    def init(self, W, generator):
        i, o, r = W.in_features, W.out_features, self.r
        A1, B1, A2 = (torch.randn(shape, generator=generator) for shape in ((r, i), (o, r), (r, i)))
        return {"A1": A1, "B1": 0.1 * B1, "A2": A2, "B2": torch.zeros(o, r)}

    def forward(self, params, W, x):
        return loha(params, W, x, scale=self.alpha / self.r)


def _lines(*parts) -> int:
    """Count the lines of code, docstrings and blank ones left out."""
    count = 0
    for part in parts:
        text = inspect.getsource(part)
        tree = ast.parse(text)
        docs = {line for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef) for line in _docstring(n)}
        lines = enumerate(text.splitlines(), 1)
        count += sum(bool(line.strip()) and k not in docs for k, line in lines)
    return count


def _docstring(node) -> range:
    first = node.body[0]
    return range(first.lineno, first.end_lineno + 1) if ast.get_docstring(node) else range(0)


def test_a_published_method_is_a_page_of_code():
    imports = 7
    assert imports + _lines(LoHaParams, loha, LoHaConfig) <= 35


def test_it_passes_the_kit():
    ll.testing.check_variant(LoHaConfig(r=4))


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"r": 0}, ValueError, r"LoHaConfig\.r: expected an integer >= 1, found 0\. Set r to the rank of the update, e\.g\. r=8\."),
        ({"r": "4"}, TypeError, r"LoHaConfig\.r: expected an integer >= 1, found '4'\. Set r to the rank"),
        ({"r": True}, TypeError, r"LoHaConfig\.r: expected an integer >= 1, found True"),
        ({"alpha": float("nan")}, ValueError, r"LoHaConfig\.alpha: expected a finite number, found nan\. Use e\.g\. alpha=16\.0\."),
        ({"alpha": "16"}, TypeError, r"LoHaConfig\.alpha: expected a finite number, found '16'"),
    ],
)
def test_bad_fields_are_refused_without_a_line_of_its_own(fields, error, message):
    with pytest.raises(error, match=message):
        LoHaConfig(**fields)


# Fields of every sort.


@dataclass(frozen=True, kw_only=True)
class FieldsConfig(ll.AdapterConfig):
    """A field of each annotation."""

    name = "fields"

    count: ll.Count = 0
    even: ll.Even = 2
    size: ll.Size = 1
    share: ll.Probability = 0.0
    positive: ll.Positive = 1
    least: ll.NonNegative = 0.0
    angle: Annotated[float, ll.Within(0.0, 3.0, above=True)] = 1.0
    side: Literal["in", "out"] = "in"
    flag: bool = False
    text: str = ""
    steps: ll.Count | None = None
    late: "ll.Rank" = None  # type: ignore[assignment]
    unknown: "Nowhere" = 3  # type: ignore[name-defined]  # noqa: F821
    pair: tuple[int, ...] = (1,)


@pytest.mark.parametrize(
    ("field", "value", "error", "expected"),
    [
        ("count", -1, ValueError, r"an integer >= 0, found -1\. Use e\.g\. count=0"),
        ("even", 3, ValueError, "an even integer >= 2, found 3"),
        ("size", 1.0, TypeError, "an integer >= 1, found 1.0"),
        ("share", 1, ValueError, r"a number in \[0\.0, 1\.0\), found 1"),
        ("positive", 0, ValueError, "a finite number > 0, found 0"),
        ("positive", float("inf"), ValueError, "a finite number > 0, found inf"),
        ("least", -0.5, ValueError, "a finite number >= 0, found -0.5"),
        ("angle", 0.0, ValueError, r"a number in \(0\.0, 3\.0\), found 0\.0"),
        ("side", "left", ValueError, r'one of "in", "out", found \'left\'\. Use e\.g\. side="in"'),
        ("side", 1, TypeError, 'one of "in", "out", found 1'),
        ("flag", 1, TypeError, "True or False, found 1"),
        ("text", None, TypeError, "a string, found None"),
        ("steps", -2, ValueError, "an integer >= 0 or None, found -2"),
        ("steps", "2", TypeError, "an integer >= 0 or None, found '2'"),
        ("late", 0, ValueError, r"an integer >= 1, found 0\. Set late to the rank of the update, e\.g\. late=None"),
    ],
)
def test_each_annotation_is_checked(field, value, error, expected):
    with pytest.raises(error, match=rf"FieldsConfig\.{field}: expected {expected}"):
        FieldsConfig(**{field: value})


def test_values_that_fit_are_taken():
    cfg = FieldsConfig(count=3, even=4, share=0.5, positive=2, angle=2, side="out", steps=5, late=2, unknown="x", pair=(2, "y"))
    assert (cfg.positive, cfg.late, cfg.unknown) == (2, 2, "x")


@dataclass(frozen=True)
class Foreign:
    """A dataclass that owes the package nothing."""

    name: ClassVar[str] = "foreign"
    r: int = 4

    def init(self, W, generator):
        return {"d": torch.zeros(W.out_features)}

    def forward(self, params, W, x):
        return W(x) + params["d"]


def test_a_class_that_is_no_subclass_is_checked_when_it_is_used():
    ll.testing.check_variant(Foreign())
    with pytest.raises(ValueError, match=r"Foreign\.r: expected an integer >= 1, found 0"):
        ll.build(nn.Linear(4, 4), Foreign(r=0))


# Its config in a file.


@dataclass(frozen=True, kw_only=True)
class OwnConfig(ll.AdapterConfig):
    """A shift by a number that a field holds in one form or another."""

    name: ClassVar[str] = "own"
    held: Any = 2.0

    def init(self, W, generator):
        return {"s": torch.zeros(W.out_features)}

    def strength(self) -> float:
        return float(self.held)

    def forward(self, params, W, x):
        return W(x) + self.strength() * params["s"]


def saved_and_loaded(cfg, place, variants):
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(3, 4)
    adapt = ll.build(model, cfg)
    params = move(adapt.init())
    ll.save(adapt, params, place / "a.safetensors")
    again, loaded = ll.load(model, place / "a.safetensors", variants=variants)
    assert torch.equal(again(loaded, x), adapt(params, x))
    return again.configs[0]


@pytest.mark.parametrize("held", [{1: 3.0}, {"a": {2: 1.0}}, torch.float16])
def test_field_that_a_file_would_change_is_refused_by_save(held, tmp_path):
    """Keys came back as strings, and a dtype as its name: another function, without a word."""
    adapt = ll.build(nn.Sequential(nn.Linear(4, 4)), OwnConfig(held=held))
    with pytest.raises(TypeError, match=r"OwnConfig\.held: expected a value that comes back from a file, found .*Use strings"):
        ll.save(adapt, adapt.init(), tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("held", [3, float("inf"), float("nan"), ((1, 2), (3,)), [1, [2]], {"a": (1, 2)}, None, "1"])
def test_field_comes_back_as_it_was(held, tmp_path):
    cls = dataclass(frozen=True, kw_only=True)(type("QuietConfig", (OwnConfig,), {"strength": lambda self: 1.0}))
    found = saved_and_loaded(cls(held=held), tmp_path, [cls]).held
    assert repr(found) == repr(held).replace("[", "(").replace("2]]", "2,))").replace("]", ")")
    if not isinstance(held, dict):
        hash(found)


def test_fields_that_the_class_makes_itself_need_no_place_in_a_file(tmp_path):
    @dataclass(frozen=True, kw_only=True)
    class MadeConfig(OwnConfig):
        doubled: float = field(init=False, default=0.0)

        def __post_init__(self):
            super().__post_init__()
            object.__setattr__(self, "doubled", 2 * self.held)

        @functools.cached_property
        def tripled(self):
            return torch.tensor(3 * self.held)

        def strength(self):
            return self.doubled + float(self.tripled)

    cfg = MadeConfig(held=3.0)
    assert cfg.strength() == 15
    assert saved_and_loaded(cfg, tmp_path, [MadeConfig]).strength() == 15


def test_class_under_a_shipped_name_is_not_taken_for_the_shipped_one(tmp_path):
    class TwiceConfig(ll.LoRAConfig):
        def forward(self, params, W, x):
            return 2 * super().forward(params, W, x) - W(x)

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    saved_and_loaded(TwiceConfig(r=2), tmp_path, [TwiceConfig])
    shipped = ll.build(model, ll.LoRAConfig(r=2))
    with pytest.raises(ValueError, match=r'another config at "0": "TwiceConfig, LoRAConfig there"'):
        ll.build(model, TwiceConfig(r=2)).params(shipped.module(shipped.init()))
    with pytest.raises(ValueError, match=r'class TwiceConfig, whose .* has the name "lora" of LoRAConfig.*variants=\[TwiceConfig\]'):
        ll.load(model, tmp_path / "a.safetensors")
    both = ll.build(model, [ll.LoRAConfig(r=2, target_names="^0$"), TwiceConfig(r=2, target_names="^1$")])
    with pytest.raises(ValueError, match=r'found "lora" for LoRAConfig and TwiceConfig\. Give one of the classes another name'):
        ll.save(both, both.init(), tmp_path / "b.safetensors")


# The form of version 0.1.0.


@dataclass(frozen=True, kw_only=True)
class OldLoHaConfig(ll.AdapterConfig):
    """LoHa with a frozen `A1`, as it was written for version 0.1.0."""

    name: ClassVar[str] = "old_loha"
    needs: ClassVar[str] = "nothing"
    reads: ClassVar[str] = "rows"

    r: int = 8
    alpha: float = 16.0

    def init(self, W: ll.Frozen, generator: torch.Generator, stats: Any = None) -> tuple[Mapping[str, Tensor], dict[str, Tensor]]:
        i, o, r = W.in_features, W.out_features, self.r
        A1, B1, A2 = (torch.randn(shape, generator=generator) for shape in ((r, i), (o, r), (r, i)))
        return {"B1": 0.1 * B1, "A2": A2, "B2": torch.zeros(o, r)}, dict(W.constants) or {"A1": A1}

    def forward(self, params, W, x):
        return loha({**params, "A1": W.constants["A1"].to(x.dtype)}, W, x, scale=self.alpha / self.r)

    def steer(self, params, c):
        return {**params, "B2": c * params["B2"]}


class TestOldForm:
    def test_passes_the_kit(self):
        ll.testing.check_variant(OldLoHaConfig(r=4))

    def test_is_refused_its_fields_too(self):
        with pytest.raises(ValueError, match=r"OldLoHaConfig\.r: expected an integer >= 1, found 0"):
            OldLoHaConfig(r=0)

    def test_builds_starts_again_saves_and_loads(self, tmp_path):
        model, cfg = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 4)).eval(), OldLoHaConfig(r=2)
        adapt = ll.build(model, cfg)
        assert adapt.configs[0] == cfg
        assert cfg == adapt.configs[0]
        assert hash(adapt.configs[0]) == hash(cfg)
        assert set(adapt.constants["0"]) == {"A1"}
        params = move(adapt.init(seed=3))
        ll.save(adapt, params, tmp_path / "a.safetensors")
        again, read = ll.load(model, tmp_path / "a.safetensors", variants=[OldLoHaConfig])
        assert_trees_equal(read, params)
        assert_trees_equal(again.constants, adapt.constants)
        assert_trees_equal(again.init(seed=5), adapt.init(seed=5))
        assert replace(adapt.configs[0], r=3).init(ll.Frozen(torch.zeros(4, 6), constants=adapt.constants["0"]), torch.Generator())

    def test_words_for_what_it_needs_are_translated(self):
        with pytest.raises(ValueError, match=r'OldLoHaConfig cannot adapt "1" \(EmbeddingKind\): it takes the input'):
            ll.build(nn.Sequential(nn.Linear(4, 4), nn.Embedding(5, 4)), OldLoHaConfig(r=2, target_names=r"^1$"))

    def test_a_config_that_was_completed_is_pickled_by_its_own_class(self):
        import pickle

        adapt = ll.build(nn.Linear(6, 4), OldLoHaConfig(r=2))
        again = pickle.loads(pickle.dumps(adapt))
        assert_trees_equal(again.init(seed=1), adapt.init(seed=1))


def test_two_trees_in_the_new_form_are_refused_with_the_way_out():
    class Two(LoHaConfig):
        def init(self, W, generator):
            return super().init(W, generator), {}

    with pytest.raises(TypeError, match=r"Two\.init: expected a mapping .*found two trees\. Return frozen tensors from constants"):
        ll.build(nn.Linear(4, 4), Two())


# Constants that are no floats.


class FourierParams(TypedDict):
    c: Float[Tensor, " n"]


@ll.checked
def fourier_ft(params: FourierParams, W: ll.Frozen, x: Float[Tensor, "*b i"], *, scale: float) -> Float[Tensor, "*b o"]:
    """Return `W x + b + scale Re ifft2(spectrum(c)) x`."""
    o, i, c = W.out_features, W.in_features, params["c"]
    spectrum = c.new_zeros(o * i).index_copy(0, W.constants["places"], c).view(o, i)
    delta = torch.fft.ifft2(spectrum.float() if c.dtype != torch.float64 else spectrum).real * scale
    return W(x) + F.linear(x, delta.to(x.dtype))


@dataclass(frozen=True, kw_only=True)
class FourierFTConfig(ll.AdapterConfig):
    """FourierFT (Gao et al. 2024, arXiv:2405.03003): a trained sparse spectrum of the weight's update."""

    name = "fourier_ft"
    trained = "n"
    macs = "i * o"

    n: ll.Size = 64
    scale: ll.Positive = 100.0

    def constants(self, W, generator, stats=None):
        return {"places": torch.randperm(W.out_features * W.in_features, generator=generator)[: self.n]}

    def init(self, W, generator):
        return {"c": torch.zeros(self.n)}

    def forward(self, params, W, x):
        return fourier_ft(params, W, x, scale=self.scale)


def test_an_integer_constant_stays_one():
    ll.testing.check_variant(FourierFTConfig())
    places = ll.build(nn.Linear(16, 12), FourierFTConfig(n=8)).constants[""]["places"]
    assert (places.dtype, tuple(places.shape)) == (torch.int64, (8,))


# Trained tensors that all targets share reach the kit's cases.


def test_shared_params_are_among_those_of_a_case():
    @dataclass(frozen=True, kw_only=True)
    class BankConfig(ll.AdapterConfig):
        """A shift that is a mixture of vectors of one bank."""

        name = "bank"
        trained = "4"

        def share_init(self, layers, generator):
            return {"bank": torch.randn(4, max(W.out_features for W in layers), generator=generator)}

        def init(self, W, generator):
            return {"mix": torch.zeros(4)}

        def forward(self, params, W, x):
            return W(x) + params["mix"] @ params["bank"][:, : W.out_features]

    for case in ll.testing.make_cases(BankConfig(), torch.float32):
        assert set(case.start) == set(case.params) == {"mix", "bank"}
    for check in ("gradients", "acts", "counts", "identity"):
        ll.testing.CHECKS[check](BankConfig())


# What a person gets wrong, and what build says.


def broken(**members):
    return dataclass(frozen=True, kw_only=True)(type("BrokenConfig", (ll.LoRAConfig,), {"name": "broken", **members}))


WRONG = {
    "name": ({"name": None}, TypeError, r"BrokenConfig\.name: expected a string that is not empty, found None"),
    "site": ({"adapts": "linears"}, ValueError, r'BrokenConfig\.adapts: expected a word among "linear".*found \'linears\''),
    "uses": ({"uses": "output"}, TypeError, r"BrokenConfig\.uses: expected a set of words, found 'output'"),
    "steered": ({"steered": "bank_B"}, TypeError, r"BrokenConfig\.steered: expected a tuple of names or None, found 'bank_B'"),
    "steers nothing": ({"steered": ("b",)}, ValueError, r'BrokenConfig\.steered: expected names among "A", "B", .*found "b"'),
    "identity": ({"identity": "exact"}, TypeError, r"BrokenConfig\.identity: expected a tolerance or None"),
    "mask": ({"acts_at": "input_ids"}, TypeError, r"BrokenConfig\.acts_at: expected a function"),
    "positions": ({"acts_at": lambda self, model, given: None}, ValueError, r'BrokenConfig\.uses: expected "positions" among'),
    "merged at all positions": (
        {"acts_at": lambda self, model, given: None, "uses": frozenset({"output", "project", "positions"}), "linear": True},
        ValueError,
        r"BrokenConfig\.linear: expected False for a variant that acts at some positions only.*Write linear = False",
    ),
    "merged of coupled rows": (
        {"rowwise": False, "linear": True},
        ValueError,
        r"BrokenConfig\.linear: expected False for a variant that couples rows.*Write linear = False",
    ),
    "shared twice": (
        {"share_init": lambda self, layers, generator: {"A": torch.ones(8, 6)}},
        ValueError,
        r'BrokenConfig\.share_init and BrokenConfig\.init to return tensors of other names, found "A" in both at "0"',
    ),
    "shared with a dot": (
        {"share_init": lambda self, layers, generator: {"a.b": torch.ones(2)}},
        ValueError,
        r'BrokenConfig\.share_init: expected names without dots, found "a\.b"',
    ),
    "group of no name": (
        {"share_groups": lambda self, layers: {path: {"Z": "0"} for path in layers}},
        ValueError,
        r'BrokenConfig\.share_groups at "0": expected a name among those of init, "A", "B", found \'Z\'',
    ),
    "group of shapes": (
        {"share_groups": lambda self, layers: {path: {"B": "0"} for path in layers}},
        ValueError,
        r"share_groups at \"1\": expected 'B' of shape \(4, 8\) at the first target of its group too, \"0\", found shape \(6, 8\)",
    ),
    "group of no target": (
        {"share_groups": lambda self, layers: {"q": {"A": "0"}}},
        ValueError,
        r'BrokenConfig\.share_groups: expected paths of the config\'s targets, e\.g\. "0", "1", found "q"',
    ),
    "groups": ({"share_groups": lambda self, layers: None}, TypeError, r"share_groups: expected a mapping by the paths .*found nothing"),
    "allotted": ({"allot": lambda self, layers: [1]}, TypeError, r"allot: expected a mapping by the paths of targets, found list"),
    "allotted elsewhere": ({"allot": lambda self, layers: {"q": {}}}, ValueError, r'allot: expected paths .*found "q"'),
    "names": ({"default_names": lambda self, model: None}, TypeError, r"BrokenConfig\.target_names: expected a string or"),
}


@pytest.mark.parametrize("case", WRONG)
def test_mistake_is_named_by_build(case):
    """Most were taken without a word: `steered` was searched for letters, and a second "A" was trained without a use."""
    members, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        ll.build(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4)), broken(**members)())


@pytest.mark.parametrize("says", [{"rowwise": False}, {"acts_at": lambda self, model, given: None, "uses": frozenset({"positions"})}])
def test_a_variant_that_no_weight_can_hold_is_not_linear_though_it_does_not_say_so(says):
    assert broken().linear
    adapt = ll.build(nn.Sequential(nn.Linear(6, 4)), broken(**says)())
    with pytest.raises(ValueError, match=r"merge: (.|\n)*BrokenConfig is not linear"):
        adapt.merge(adapt.init())


@pytest.mark.parametrize(
    ("made", "error", "message"),
    [
        (lambda self, stats: None, TypeError, r"allocate: expected a mapping by the paths of targets, found nothing"),
        (lambda self, stats: dict.fromkeys(stats, 3), TypeError, r"expected a variant's config, found 3"),
        (lambda self, stats: {"q": self}, ValueError, r'BrokenConfig\.allocate: expected paths .*found "q"'),
    ],
)
def test_wrong_allocation_is_named_by_build(made, error, message):
    cls = broken(calibrated=True, allocate=made, constants=lambda self, W, generator, stats=None: {})
    with pytest.raises(error, match=message):
        ll.build(nn.Sequential(nn.Linear(6, 4)), cls(), calibration=[torch.randn(8, 6)])


def test_default_names_in_one_string_are_one_expression():
    """The string was taken letter by letter, of which "^" is everywhere."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4))
    assert [t.path for t in ll.find_targets(model, broken(default_names=lambda self, model: "^0$")())] == ["0"]


# A variant that acts at some positions.


class Text(nn.Module):
    """A layer on the embeddings of tokens."""

    def __init__(self):
        super().__init__()
        self.embed, self.linear = nn.Embedding(9, 6), nn.Linear(6, 5)

    def forward(self, input_ids):
        return self.linear(self.embed(input_ids))


def shift_at(masks):
    """Return a config that shifts the output where a function of masks says."""

    def forward(self, params, W, x):
        return W(x) + (1.0 if W.active is None else W.active[..., None].to(x.dtype)) * params["s"]

    members = {
        "name": "shift_at",
        "uses": frozenset({"output", "positions"}),
        "linear": False,
        "acts_at": masks,
        "init": lambda self, W, generator: {"s": torch.zeros(W.out_features)},
        "forward": forward,
    }
    return dataclass(frozen=True, kw_only=True)(type("ShiftAtConfig", (ll.AdapterConfig,), members))()


IDS = torch.tensor([[1, 7, 2], [8, 8, 0]])
MASKS = {
    "method": lambda self, model, given: given["input_ids"] > 4,
    "function": staticmethod(lambda model, given: given["input_ids"] > 4),
    "with a function of the output": staticmethod(lambda model, given: (given["input_ids"] > 4, lambda output: None)),
}


@pytest.mark.parametrize("case", MASKS)
def test_variant_acts_where_its_mask_says(case):
    """A mask alone was taken for a pair: its first row was everyone's, or the call failed."""
    adapt = ll.build(Text().eval(), shift_at(MASKS[case]))
    params, batch = move(adapt.init()), {"input_ids": IDS}
    want = adapt.base(batch) + (IDS > 4)[..., None] * params["linear"]["s"]
    torch.testing.assert_close(adapt(params, batch), want)
    torch.testing.assert_close(adapt.mixed(ll.stack([params, params]), batch, [1, 0]), want)


@pytest.mark.parametrize("made", [torch.ones(3), [1], (1, 2)])
def test_mask_of_another_form_is_refused(made):
    adapt = ll.build(Text().eval(), shift_at(staticmethod(lambda model, given: made)))
    with pytest.raises(TypeError, match=r"acts_at: expected a mask \(b, t\) of a call's positions, or None for all, found"):
        adapt(adapt.init(), {"input_ids": IDS})


def two_layers():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).eval()


class Low(ll.AdapterConfig):
    """A low-rank update, which the variants below get wrong."""

    name = "low"
    uses = frozenset({"output", "vectors"})
    steered = ("B",)

    def init(self, W, generator):
        return {"A": ll.linalg.kaiming(2, W.in_features, generator), "B": torch.zeros(W.out_features, 2)}

    def forward(self, params, W, x):
        return W(x) + F.linear(F.linear(x, params["A"]), params["B"])


class OneWide(Low):
    def forward(self, params, W, x):
        return super().forward(params, W, x).sum(-1, keepdim=True)


class Pair(Low):
    def forward(self, params, W, x):
        return super().forward(params, W, x), None


class Nothing(Low):
    def forward(self, params, W, x):
        super().forward(params, W, x)


class WritesWeight(Low):
    uses = Low.uses | {"dense"}

    def forward(self, params, W, x):
        W.weight.add_(params["B"] @ params["A"])
        return W(x)


class WritesInput(Low):
    def forward(self, params, W, x):
        y = W(x)
        return y + F.linear(F.linear(x.mul_(2.0), params["A"]), params["B"])


@pytest.mark.parametrize(
    ("cfg", "error", "found"),
    [
        (OneWide(), ValueError, r'OneWide.forward at "0": expected an output of shape \(3, 8\).*found \(3, 1\)\. Return W\(x\) \+ update'),
        (Pair(), TypeError, r'Pair.forward at "0": expected a tensor.*found tuple'),
        (Nothing(), TypeError, r'Nothing.forward at "0": expected a tensor.*found NoneType'),
        (WritesWeight(), RuntimeError, r'WritesWeight.forward at "0": expected a formula that writes nothing.*wrote to "weight"'),
        (WritesInput(), RuntimeError, r'WritesInput.forward at "0": expected a formula that writes nothing.*wrote to "x"'),
    ],
    ids=lambda part: type(part).__name__ if isinstance(part, Low) else "",
)
def test_formula_that_a_layer_cannot_run_is_named_at_each_first_call(cfg, error, found):
    """The model failed behind it, or went on with other weights and another residual stream."""
    adapt = ll.build(two_layers(), cfg)
    params = ll.tree_map(lambda p: p + 0.1, adapt.init())
    for _ in range(2):
        with pytest.raises(error, match=found):
            adapt(params, torch.ones(3, 6))


@pytest.mark.parametrize("cfg", [OneWide(), Pair(), Nothing()], ids=lambda cfg: type(cfg).__name__)
def test_outputs_of_another_width_are_not_merged(cfg):
    """One number for each row was spread over all outputs."""
    adapt = ll.build(two_layers(), cfg)
    with pytest.raises(ValueError, match=rf"{type(cfg).__name__}.forward: expected an output of shape \(1, 8\)"):
        adapt.merge(ll.tree_map(lambda p: p + 0.1, adapt.init()))


class WritesAtConstants(Low):
    uses = Low.uses | {"dense"}

    def constants(self, W, generator, stats=None):
        return {"row": W.dense().mul_(2.0)[0].clone()}


class WritesAtInit(Low):
    def init(self, W, generator):
        W.bias.zero_()
        return super().init(W, generator)


@pytest.mark.parametrize(
    ("cfg", "method", "name"), [(WritesAtConstants(), "constants", "weight"), (WritesAtInit(), "init", "bias")], ids=["constants", "init"]
)
def test_start_that_writes_to_the_users_weights_is_named(cfg, method, name):
    with pytest.raises(RuntimeError, match=rf'{type(cfg).__name__}.{method} at target "0".*wrote to "{name}"'):
        ll.build(two_layers(), cfg)


class OwnForward(nn.Linear):
    """Writes to its input, as routers with jitter do."""

    def forward(self, x):
        x *= 2.0
        return super().forward(x)


def test_layer_that_writes_to_its_input_is_no_fault_of_the_variant():
    model = nn.Sequential(nn.Linear(6, 8), OwnForward(8, 4))
    adapt, x = ll.build(model, ll.LoRAConfig(r=2)), torch.randn(3, 6)
    assert torch.equal(adapt(adapt.init(), x), model(x))


class Lacks(Low):
    steered = None

    def init(self, W, generator):
        return {"A": super().init(W, generator)["A"]}


class Wide(Low):
    def constants(self, W, generator, stats=None):
        return {"scale": torch.ones(W.in_features, dtype=torch.float64)}

    def forward(self, params, W, x):
        return W(x) + F.linear(F.linear(x * W.constants["scale"], params["A"]), params["B"])


@pytest.mark.parametrize(
    ("cfg", "found"),
    [
        (Lacks(), r"identity: expected forward to read params among \['A'\] and constants among \[\], found that it reads 'B'"),
        (Wide(), r"identity: expected constants cast where forward uses them, as by W.constants\['scale'\].to\(x.dtype\)"),
    ],
    ids=["params", "constants"],
)
def test_kit_says_which_tensor_a_formula_lacks_or_has_in_another_dtype(cfg, found):
    with pytest.raises(AssertionError, match=found):
        check_variant(cfg, skip=["compiles"])


class Trained(Low):
    def init(self, W, generator):
        return {name: nn.Parameter(p) for name, p in super().init(W, generator).items()}


def test_starts_that_are_parameters_pass_the_kit():
    """Its tensors had a graph, of which torch warned."""
    check_variant(Trained(), skip=["compiles"])


class Nested(Low):
    def init(self, W, generator):
        return {"in": super().init(W, generator)}


def test_nested_params_are_told_the_flat_name():
    with pytest.raises(TypeError, match=r'Nested.init: expected "in" to be a tensor, found dict. Put its tensors beside it, as "in.A"'):
        ll.build(two_layers(), Nested())


class Untrained(Low):
    steered = None

    def init(self, W, generator):
        return {}

    def forward(self, params, W, x):
        return 2.0 * W(x)


def test_variant_that_trains_nothing_is_a_module_and_is_steered():
    adapt, x = ll.build(two_layers(), Untrained()), torch.randn(3, 6)
    params = adapt.init()
    assert torch.equal(adapt.module(params)(x), adapt(params, x))
    assert adapt.steer(params, 0.5) == params
