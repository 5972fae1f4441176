"""The conformance kit itself: a variant that is wrong in one way fails, and the message names the check."""

import dataclasses
import random
from dataclasses import dataclass
from typing import ClassVar, TypedDict

import pytest
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

import lora_lite as ll
from lora_lite.testing import CHECKS


@dataclass(frozen=True, kw_only=True)
class _Base(ll.AdapterConfig):
    """LoRA without its door, to be broken."""

    name: ClassVar[str] = "broken"
    trained: ClassVar[str | None] = "2 * (i + o)"
    macs: ClassVar[str | None] = "2 * (i + o)"

    def init(self, W, generator, stats=None):
        return {"A": torch.randn(2, W.in_features, generator=generator), "B": torch.zeros(W.out_features, 2)}, {}

    def forward(self, params, W, x):
        return W(x) + F.linear(F.linear(x, params["A"]), params["B"])

    def steer(self, params, c):
        return {**params, "B": c * params["B"]}


class _WrongBackward(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return 2 * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return 3 * grad


def _wrong_gradient(self, params, W, x):
    return W(x) + F.linear(_WrongBackward.apply(F.linear(x, params["A"])), params["B"])


def _half_of_the_gradient(self, params, W, x):
    with torch.no_grad():  # not a detach of the formula's: finite differences see this term move
        direct = F.linear(F.linear(x, params["A"]), params["B"])
    return W(x) + direct + F.linear(F.linear(x, params["A"]), params["B"])


def _leaf_without_gradient(self, params, W, x):
    return W(x) + F.linear(F.linear(x, params["A"].detach()), params["B"])


def _leaf_without_effect(self, params, W, x):
    return W(x) + params["B"].sum(1) + 0 * params["A"].sum()


def _writes_its_input(self, params, W, x):
    y = W(x) + F.linear(F.linear(x, params["A"]), params["B"])
    x.add_(1e-3)
    return y


def _hidden_randomness(self, params, W, x):
    return W(x) + F.linear(F.linear(x, params["A"] * (1 + 0.1 * torch.rand(()))), params["B"])


def _unseeded_init(self, W, generator, stats=None):
    return {"A": torch.randn(2, W.in_features), "B": torch.zeros(W.out_features, 2)}, {}


def _hidden_state(self, W, generator, stats=None):
    made = {"A": torch.tensor([[random.random() for _ in range(W.in_features)] for _ in range(2)]), "B": torch.zeros(W.out_features, 2)}
    return made, {}


def _unseeded_constant(self, W, generator, stats=None):
    params, _ = _Base.init(self, W, generator)
    return params, {"c": torch.tensor(random.random())}


def _seeds_everything(self, W, generator, stats=None):
    torch.manual_seed(0)
    return _Base.init(self, W, generator)


def _other_names(self, W, generator, stats=None):
    params, _ = _Base.init(self, W, generator)
    return {**params, f"{random.random()}": torch.zeros(1)}, {}


def _nan_at_the_start(self, params, W, x):
    return W(x) + F.linear(F.linear(x, params["A"]), params["B"]) * (params["B"].norm() / params["B"].norm())


def _random_start(self, W, generator, stats=None):
    draw = torch.randn(2, W.in_features + W.out_features, generator=generator)
    return {"A": draw[:, : W.in_features].contiguous(), "B": draw[:, W.in_features :].t().contiguous()}, {}


def _overwrites_the_weight(self, W, generator, stats=None):
    params, constants = _Base.init(self, W, generator)
    W.weight.mul_(0.5)
    return params, constants


def _nonlinear(self, params, W, x):
    return W(x) + F.linear(torch.tanh(F.linear(x, params["A"])), params["B"])


def _steers_the_wrong_way(self, params, c):
    return {**params, "B": (1 - c) * params["B"]}


def _steer_ignores_strength(self, params, c):
    return dict(params)


def _scales_every_factor(self, params, c):
    return {name: c * p for name, p in params.items()}


def _steers_by_size(self, params, c):
    return {**params, "B": abs(c) * params["B"]}


def _keeps_the_weight(self, W, generator, stats=None):
    params, _ = _Base.init(self, W, generator)
    return params, {"first": W.weight[:2]}


def _mixes_rows(self, params, W, x):
    h = F.linear(x, params["A"])
    return W(x) + F.linear(h - h.mean(0, keepdim=True), params["B"])


def _branches_on_values(self, params, W, x):
    update = F.linear(F.linear(x, params["A"]), params["B"])
    return W(x) + update if bool(params["B"].abs().max() > 0) else W(x)


def _answers_in_float32(self, params, W, x):
    return (W(x) + F.linear(F.linear(x, params["A"]), params["B"])).float()


def _drops(of):
    """Return what a field `dropout` adds to a class whose forward drops `of`."""

    def forward(self, params, W, x):
        dropped = W.dropped(x, self.dropout)
        y = W(dropped if of == "base" else x) + F.linear(F.linear(dropped if of == "base" else x, params["A"]), params["B"])
        return W.dropped(y, self.dropout) if of == "output" else y

    return {"__annotations__": {"dropout": ll.Probability}, "dropout": 0.0, "forward": forward}


DROPPED = {
    "nothing": r"another output in training mode at dropout=0\.5",
    "base": "the base output at the start",
    "output": "the base output",
}


@pytest.mark.parametrize("of", DROPPED)
def test_dropout_that_does_not_drop_the_update_alone_is_named(of):
    """A field that acts nowhere, or on the frozen layer, passed."""
    broken = dataclasses.dataclass(frozen=True, kw_only=True)(type("BrokenConfig", (_Base,), _drops(of)))
    with pytest.raises(AssertionError, match=rf"expected {DROPPED[of]}.*Drop the input of the update"):
        CHECKS["training"](broken())


def _halves_in_place(self, params, grads, state=None):
    return ll.tree_map(lambda p: p.mul_(0.5), params), state


def _forgets_a_leaf(self, params, grads, state=None):
    return {path: {"A": leaves["A"]} for path, leaves in params.items()}, state


def _divides_by_zero(self, params, grads, state=None):
    return ll.tree_map(lambda p: p / 0.0, params), state


class _TransposedParams(TypedDict):
    A: Float[Tensor, "i r"]
    B: Float[Tensor, "o r"]


@ll.checked
def transposed(params: _TransposedParams, W: ll.Frozen, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
    """Declare `A` the wrong way round."""
    return W(x) + F.linear(F.linear(x, params["A"]), params["B"])


def _wrong_shapes(self, params, W, x):
    return transposed(params, W, x)


BROKEN = {
    "gradients": (("forward", _wrong_gradient), ("forward", _half_of_the_gradient), ("forward", _leaf_without_gradient)),
    "acts": (("forward", _leaf_without_effect),),
    "pure": (("forward", _writes_its_input), ("forward", _hidden_randomness)),
    "deterministic": tuple(
        ("init", f) for f in (_unseeded_init, _hidden_state, _unseeded_constant, _seeds_everything, _other_names, _keeps_the_weight)
    ),
    "identity": (("init", _random_start),),
    "parts": (("uses", {"output"}), ("uses", {"project", "vectors"})),
    "untouched": (("init", _overwrites_the_weight),),
    "merged": (("forward", _nonlinear),),
    "steered": (("steer", _steers_the_wrong_way), ("steer", _steer_ignores_strength)),
    "proportional": (("steer", _scales_every_factor), ("steer", _steers_by_size)),
    "positions": (("uses", {"output", "project", "vectors", "positions"}),),
    "rows": (("forward", _mixes_rows),),
    "vmapped": (("forward", _branches_on_values),),
    "compiles": (("forward", _branches_on_values),),
    "precision": (("forward", _answers_in_float32),),
    "shapes": (("forward", _wrong_shapes),),
    "stepped": (("update", _halves_in_place), ("update", _forgets_a_leaf), ("update", _divides_by_zero)),
    "counts": (("trained", "i + o"), ("macs", "r * i * o"), ("macs", "i + o")),
    "facts": (("uses", {"output", "everything"}), ("identity", 2.0)),
}
_ROWS = [(check, attribute, fault) for check, faults in BROKEN.items() for attribute, fault in faults]


@pytest.mark.parametrize(("check", "attribute", "fault"), _ROWS, ids=[f"{c}-{getattr(f, '__name__', a)}" for c, a, f in _ROWS])
def test_broken_variant_fails_its_check_by_name(check, attribute, fault):
    broken = dataclasses.dataclass(frozen=True, kw_only=True)(type("BrokenConfig", (_Base,), {attribute: fault}))
    others = [name for name in CHECKS if name != check]
    with pytest.raises(AssertionError, match=rf"BrokenConfig fails 1 of \d+ checks:\n  - {check}: "):
        ll.testing.check_variant(broken(), skip=others)


def test_nan_is_no_identity_to_a_tolerance():
    broken = dataclasses.dataclass(frozen=True, kw_only=True)(
        type("BrokenConfig", (_Base,), {"forward": _nan_at_the_start, "identity": 1e-3})
    )
    with pytest.raises(AssertionError, match=r"the base output to 0\.001 at init, found nan off"):
        CHECKS["identity"](broken())


LEAVES = {
    "nothing": (lambda self, W, generator: None, "expected a mapping from names to the tensors to train, found nothing"),
    "number": (lambda self, W, generator: {"g": 0.0}, 'expected "g" to be a tensor, found float'),
    "none": (lambda self, W, generator: {"g": None}, 'expected "g" to be a tensor, found NoneType'),
    "integers": (lambda self, W, generator: {"g": torch.zeros(2, dtype=torch.long)}, 'expected "g" to be a floating tensor'),
    "complex": (lambda self, W, generator: {"g": torch.zeros(2, dtype=torch.cfloat)}, "expected .*found torch.complex64"),
    "number for a name": (lambda self, W, generator: {0: torch.zeros(2)}, "expected names that are strings and not empty, found 0"),
    "no name": (lambda self, W, generator: {"": torch.zeros(2)}, "expected names that are strings and not empty, found ''"),
}


@pytest.mark.parametrize("case", LEAVES)
def test_leaves_that_are_no_tensors_are_refused_by_name(case):
    """A complex start lost its imaginary part, and one with a number for a name was saved to a file that could not be loaded."""
    init, message = LEAVES[case]
    forward = _Base.forward
    cls = dataclasses.dataclass(frozen=True, kw_only=True)(
        type("OddConfig", (ll.AdapterConfig,), {"name": "odd", "init": init, "forward": forward})
    )
    for refused in (lambda: ll.build(torch.nn.Linear(4, 4), cls()), lambda: ll.testing.check_variant(cls())):
        with pytest.raises(TypeError, match=rf"OddConfig\.init: {message}"):
            refused()


def test_names_that_a_file_could_not_tell_apart_are_refused_by_build():
    """`b.B` at "a" and `B` at "a.b": the file held one of them for both."""

    def init(self, W, generator):
        return {"B": torch.zeros(W.out_features), "b.B": torch.zeros(W.out_features)}

    outer = torch.nn.Sequential(torch.nn.Linear(4, 4))
    outer[0].b = torch.nn.Linear(4, 4)
    cls = dataclasses.dataclass(frozen=True, kw_only=True)(type("OddConfig", (ll.LoRAConfig,), {"name": "odd", "init": init}))
    with pytest.raises(ValueError, match=r'found two "0\.b\.B"\. Give the variant\'s tensors names without dots'):
        ll.build(outer, cls())


@pytest.mark.parametrize(
    ("method", "made", "message"),
    [
        ("constants", lambda self, W, generator, stats=None: None, "expected a mapping from names to tensors, found nothing"),
        ("constants", lambda self, W, generator, stats=None: {"c": 1.0}, 'expected "c" to be a tensor, found float'),
        ("share", lambda self, layers: {"c": 1.0}, 'expected "c" to be a tensor, found float'),
        ("share_init", lambda self, layers, generator: {"c": 1.0}, 'expected "c" to be a tensor, found float'),
        ("allot", lambda self, layers: {path: {"c": 1.0} for path in layers}, 'at "": expected "c" to be a tensor, found float'),
    ],
)
def test_constants_that_are_no_tensors_are_refused_by_name(method, made, message):
    cls = dataclasses.dataclass(frozen=True, kw_only=True)(type("OddConfig", (ll.LoRAConfig,), {"name": "odd", method: made}))
    with pytest.raises(TypeError, match=rf"OddConfig\.{method}.*{message}"):
        ll.build(torch.nn.Linear(4, 4), cls())


@pytest.mark.parametrize("made", [lambda y: (y, None), lambda y: None], ids=["tuple", "nothing"])
def test_output_that_is_no_tensor_is_named(made):
    forward = _Base.forward
    cls = dataclasses.dataclass(frozen=True, kw_only=True)(
        type("BrokenConfig", (_Base,), {"forward": lambda self, params, W, x: made(forward(self, params, W, x))})
    )
    with pytest.raises(
        AssertionError, match=r"  - identity: expected forward to return a tensor, the output \(\*b, o\), found (tuple|None)"
    ):
        ll.testing.check_variant(cls(), skip=("compiles",))


@pytest.mark.parametrize("formula", ["q * o", "r *", "r * name.q"])
def test_formula_that_cannot_be_read_is_quoted(formula):
    cls = dataclasses.dataclass(frozen=True, kw_only=True)(type("BrokenConfig", (_Base,), {"trained": formula}))
    with pytest.raises(ValueError, match=r"BrokenConfig\.trained: expected a formula in .*found "):
        CHECKS["counts"](cls())


def _makes_tensors_elsewhere(self, params, W, x):
    return W(x) + F.linear(F.linear(x, params["A"]) * torch.ones(2, dtype=x.dtype), params["B"])


def test_formula_that_does_not_run_on_shapes_is_told_so():
    """The kit and `adapt.summary` had torch's error, "Tensor on device cpu is not on the expected device meta!"."""
    cls = dataclasses.dataclass(frozen=True, kw_only=True)(type("BrokenConfig", (_Base,), {"forward": _makes_tensors_elsewhere}))
    for refused in (lambda: CHECKS["counts"](cls()), lambda: ll.build(torch.nn.Sequential(torch.nn.Linear(4, 4)), cls()).summary()):
        with pytest.raises(RuntimeError, match=r"BrokenConfig\.forward: expected .* on meta.*torch\.ones\(4, device=x\.device\)"):
            refused()


def _takes_three_axes(self, params, W, x):
    return W(x) + torch.einsum("bti,ri,or->bto", x, params["A"], params["B"])


def test_an_error_of_the_formula_is_told_with_its_input_and_a_written_input_by_name():
    others = [name for name in CHECKS if name not in ("pure", "rows")]
    for fault, told in (
        (_takes_three_axes, r"rows: .*\(in forward on x \(2, 24\), torch.float64\)"),
        (_writes_its_input, "pure: expected x "),
    ):
        cls = dataclasses.dataclass(frozen=True, kw_only=True)(type("BrokenConfig", (_Base,), {"forward": fault}))
        with pytest.raises(AssertionError, match=told):
            ll.testing.check_variant(cls(), skip=others)


@dataclass(frozen=True, kw_only=True)
class _Scaled(ll.AdapterConfig):
    """Scales the parameters of whole modules."""

    name: ClassVar[str] = "scaled"
    adapts: ClassVar[str] = "module"
    uses = frozenset({"output"})

    def init(self, W, generator):
        return {name: torch.zeros(()) for name in W.parameters}

    def forward(self, params, W, x):
        return W.moved({name: p * W.parameters[name] for name, p in params.items()})(x)


class _Added(_Scaled):
    """Does more than move parameters, which no state dict holds."""

    def forward(self, params, W, x):
        return super().forward(params, W, x) + params["weight"]


def test_variant_of_whole_modules_is_merged_by_what_it_moves():
    """A variant that reads the parameters was told that there is no bias."""
    CHECKS["merged"](_Scaled(target_names="^0$"))
    for adapts in ("module", "norm"):
        added = dataclasses.dataclass(frozen=True, kw_only=True)(type("AddedConfig", (_Added,), {"adapts": adapts}))
        with pytest.raises(ValueError, match="does more than move"):
            CHECKS["merged"](added(target_names="^0$"))


def test_unbroken_base_passes():
    ll.testing.check_variant(_Base())


def test_every_failure_is_listed_at_once():
    broken = dataclasses.dataclass(frozen=True, kw_only=True)(type("BrokenConfig", (_Base,), {"forward": _nonlinear, "trained": "i"}))
    with pytest.raises(AssertionError) as raised:
        ll.testing.check_variant(broken(), skip=("compiles",))
    assert {line.split(":")[0].strip(" -") for line in str(raised.value).splitlines()[1:] if line.startswith("  - ")} == {
        "merged",
        "counts",
    }


def test_kit_ignores_target_fields():
    ll.testing.check_variant(ll.LoRAConfig(r=2, target_names=("nowhere",), layers=(7,), exclude_names=(".*",)), skip=("compiles",))


def test_skip_must_name_checks():
    with pytest.raises(ValueError, match=r"expected skip to name checks among .*gradients.*found \['grads'\]"):
        ll.testing.check_variant(ll.LoRAConfig(), skip=("grads",))


def test_config_that_fits_no_layer_is_refused():
    with pytest.raises(ValueError, match=r"expected .*PiSSAConfig.* to fit a layer"):
        ll.testing.check_variant(ll.PiSSAConfig(r=4096))
