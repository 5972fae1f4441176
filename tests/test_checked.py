"""`checked`: with the checks on every wrong shape is a TypeError that says which; with them off nothing is looked at."""

import re
from typing import NotRequired, TypedDict

import pytest
import torch
from jaxtyping import Float
from torch import Tensor, nn

import lora_lite as ll
from cases import CASES
from lora_lite import functional as lf
from lora_lite.testing._case import float64

I, O, R = 6, 5, 2  # noqa: E741


@pytest.fixture
def checks():
    """Return the switch, on, and put it back afterwards."""
    before = ll.set_typecheck(True)
    yield ll.set_typecheck
    ll.set_typecheck(before)


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def lora_params(**changes):
    return {"A": draw(R, I), "B": draw(O, R), **changes}


def without(params, name):
    return {key: value for key, value in params.items() if key != name}


class GainParams(TypedDict):
    g: Float[Tensor, " o"]


@ll.checked
def gain(params: GainParams, W: ll.Frozen, x: Float[Tensor, " i"], *, power: float = 1.0) -> Float[Tensor, " o"]:
    """Map one vector to one vector: a further axis is a fault."""
    return W(x) * (1 + params["g"]) ** power


@ll.checked
def wide(params: GainParams, W: ll.Frozen, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
    """A result of the wrong width."""
    return torch.cat([W(x), params["g"].expand(*x.shape[:-1], -1)], dim=-1)


def lora(params=None, W=None, x=None, **statics):
    return lf.lora(
        lora_params() if params is None else params, draw(O, I) if W is None else W, draw(3, I) if x is None else x, scale=2.0, **statics
    )


# id: (call, name of the function, field, what was expected, what was found)
WRONG = {
    "transposed A": (lambda: lora(lora_params(A=draw(I, R))), "lora", 'params["A"]', "r i", "[6, 2]"),
    "transposed B": (lambda: lora(lora_params(B=draw(R, O))), "lora", 'params["B"]', "o r", "[2, 5]"),
    "missing key": (lambda: lora(without(lora_params(), "B")), "lora", 'params["B"]', "o r", "nothing"),
    "int tensor": (lambda: lora(lora_params(A=torch.ones(R, I, dtype=torch.int64))), "lora", 'params["A"]', "Float", "int64[2, 6]"),
    "not a tensor": (lambda: lora(lora_params(A=[1.0])), "lora", 'params["A"]', "Float", "[1.0] (list)"),
    "another rank in B": (lambda: lora(lora_params(B=draw(O, R + 1))), "lora", 'params["B"]', "o r", "[5, 3]"),
    "a vector for B": (lambda: lora(lora_params(B=draw(O))), "lora", 'params["B"]', "o r", "[5]"),
    "an optional b by input": (lambda: lora(lora_params(b=draw(I))), "lora", 'params["b"]', '["o"]', "[6]"),
    "params a list": (lambda: lora([draw(R, I)]), "lora", "params", "a mapping with A, B", "list"),
    "W a vector": (lambda: lora(W=draw(I)), "lora", "W", "o i", "[6]"),
    "W an int tensor": (lambda: lora(W=torch.ones(O, I, dtype=torch.int8)), "lora", "W", "Float", "int8[5, 6]"),
    "W not a tensor": (lambda: lora(W="weight"), "lora", "W", "Float", "'weight' (str)"),
    "x of another width": (lambda: lora(x=draw(3, I + 1)), "lora", "x", "*b i", "[3, 7]"),
    "x of ids": (lambda: lora(x=torch.ones(3, I, dtype=torch.int64)), "lora", "x", "Float", "int64[3, 6]"),
    "a static of another type": (lambda: lora(dropout="0.1"), "lora", "dropout", "float", "'0.1' (str)"),
    "a result of another shape": (lambda: wide({"g": draw(O)}, draw(O, I), draw(3, I)), "wide", "the result", "*b o", "[3, 10]"),
    "dora's m by input": (lambda: lf.dora(lora_params(m=draw(I)), draw(O, I), draw(I), scale=1.0), "dora", 'params["m"]', '["o"]', "[6]"),
    "pissa's other names": (lambda: lf.pissa(lora_params(), draw(O, I), draw(I), scale=1.0), "pissa", 'params["dA"]', "r i", "nothing"),
    "ia3's gate by input": (lambda: lf.ia3({"g": draw(I)}, draw(O, I), draw(3, I)), "ia3", 'params["g"]', '["o"]', "[6]"),
    "ia3_ff's gate by output": (lambda: lf.ia3_ff({"g": draw(O)}, draw(O, I), draw(3, I)), "ia3_ff", 'params["g"]', '["i"]', "[5]"),
    "a function of one's own": (lambda: gain({"g": draw(O)}, draw(O, I), draw(3, I)), "gain", "x", '["i"]', "[3, 6]"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_value_is_a_type_error_that_says_which(checks, case):
    call, function, field, expected, found = WRONG[case]
    with pytest.raises(TypeError) as raised:
        call()
    message = str(raised.value)
    assert message.startswith(f"{function}: ")
    faults = re.findall(r"- (.*?): expected (.*), found (.*)", message)
    assert any(name == field and expected in want and found in got for name, want, got in faults), message


class ShiftParams(TypedDict):
    g: Float[Tensor, " o"]
    shift: NotRequired[Float[Tensor, " o"]]


@ll.checked
def shifted(params: ShiftParams, W: ll.Frozen, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
    """A field that only some params have."""
    return W(x) * (1 + params["g"]) + params.get("shift", 0.0)


def test_a_field_that_is_not_required_may_be_missing_and_is_tested_where_it_is_there(checks):
    assert shifted({"g": draw(O)}, draw(O, I), draw(3, I)).shape == (3, O)
    assert shifted({"g": draw(O), "shift": draw(O)}, draw(O, I), draw(3, I)).shape == (3, O)
    with pytest.raises(TypeError, match=r'params\["shift"\]: expected Float\["o"\], found float32\[6\]'):
        shifted({"g": draw(O), "shift": draw(I)}, draw(O, I), draw(3, I))
    with pytest.raises(TypeError, match=r'params\["g"\]: expected Float\["o"\], found nothing'):
        shifted({"shift": draw(O)}, draw(O, I), draw(3, I))


@pytest.mark.parametrize("extra", ["C", "scale"])
def test_an_extra_key_is_named(checks, extra):
    with pytest.raises(TypeError, match=rf'(?s)lora: .*params\["{extra}"\]: not expected'):
        lora(lora_params(**{extra: draw(2)}))


def test_every_fault_is_listed_with_all_that_was_given_and_where_to_read_on(checks):
    with pytest.raises(TypeError) as raised:
        lora({"A": draw(R, I).long(), "C": draw(1)}, dropout=None)
    for part in ('params["C"]: not expected', 'params["A"]: expected', 'params["B"]: expected', "dropout: expected float, found None"):
        assert part in str(raised.value)
    assert re.search(r"given: A int64\[2, 6\], C float32\[1\], W .*5, 6.*, x float32\[3, 6\]", str(raised.value))
    assert "lora_lite.functional.lora documents" in str(raised.value)


@pytest.mark.parametrize("W", [draw(I, O), ll.Frozen(draw(I, O))], ids=["tensor", "Frozen"])
def test_the_layer_is_believed_first_so_a_transposed_one_shows_at_all_that_meets_it(checks, W):
    with pytest.raises(TypeError) as raised:
        lora(W=W)
    for part in ('x: expected Float["*b i"], found float32[3, 6]', 'params["A"]: expected', 'params["B"]: expected'):
        assert part in str(raised.value)
    assert re.search(r"given: .*W \S*[\[(]6, 5[\])]", str(raised.value))


@pytest.mark.parametrize("statics", [{"dropout": 0}, {"dropout": 0.0}], ids=["int", "float"])
def test_an_integer_is_a_float(checks, statics):
    assert lora(**statics).shape == (3, O)
    model = nn.Linear(I, O)
    adapt = ll.build(model, ll.LoRAConfig(r=R, alpha=4, **statics))
    assert torch.equal(adapt(adapt.init(), draw(3, I)), model(draw(3, I)))


class Counted(type):
    """A class whose `isinstance` can be counted."""

    asked = 0

    def __instancecheck__(cls, instance):
        Counted.asked += 1
        return True


class Anything(metaclass=Counted):
    """A type that every value passes for."""


@ll.checked
def watched(params: GainParams, W: ll.Frozen, x: Float[Tensor, "*b i"], *, flag: Anything = None) -> Float[Tensor, "*b o"]:
    """Return whether its hints are looked at."""
    return W(x)


def test_the_switch_returns_what_it_was_and_off_nothing_is_looked_at(checks):
    given = {"g": draw(O)}, draw(O, I), draw(3, I)
    Counted.asked = 0
    watched(*given, flag=1)
    on = Counted.asked
    assert on > 0
    assert checks(False) is True
    watched(*given, flag=1)
    assert Counted.asked == on
    assert checks(True) is False


def test_off_what_only_the_checks_refuse_is_computed(checks):
    want = lora()
    checks(False)
    assert torch.equal(lora(), want)
    assert torch.equal(lora(lora_params(C=draw(1))), want)
    assert torch.equal(wide({"g": draw(O)}, draw(O, I), draw(3, I))[:, :O], draw(3, I) @ draw(O, I).t())


def test_the_result_with_the_checks_on_is_the_one_with_them_off(checks):
    on = lora()
    checks(False)
    assert torch.equal(on, lora())


def test_under_vmap_and_grad_the_checks_see_the_unmapped_shapes(checks):
    params, W, xs = {"g": draw(O)}, draw(O, I), draw(4, I)
    want = torch.stack([gain(params, W, x) for x in xs])
    torch.testing.assert_close(torch.vmap(lambda x: gain(params, W, x))(xs), want)
    stacked = {"g": draw(4, O)}  # as a plain call this tree is refused
    with pytest.raises(TypeError, match=r'params\["g"\]'):
        gain(stacked, W, xs[0])
    members = torch.vmap(lambda p: gain(p, W, xs[0]))(stacked)
    torch.testing.assert_close(members[1], gain({"g": stacked["g"][1]}, W, xs[0]))
    each = torch.vmap(torch.func.grad(lambda p, x: gain(p, W, x).sum()), in_dims=(None, 0))(params, xs)
    torch.testing.assert_close(each["g"], xs @ W.t())
    with pytest.raises(TypeError, match=r"x: expected .*found float32\[7\]"):
        torch.vmap(lambda x: gain(params, W, x))(draw(4, I + 1))


def test_under_compile_the_raw_function_runs_in_one_graph(checks):
    compiled = torch.compile(lambda params, W, x: lf.lora(params, W, x, scale=2.0), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(lora_params(), draw(O, I), draw(3, I)), lora())


def test_a_checked_function_keeps_its_name_signature_and_docstring():
    assert (gain.__name__, gain.__doc__) == ("gain", "Map one vector to one vector: a further axis is a fault.")
    assert str(lf.lora.__signature__).startswith("(params: lora_lite.variants.lora.LoRAParams, W: lora_lite.core.frozen.Frozen, x:")


@pytest.mark.parametrize(("on", "error"), [(True, TypeError), (False, RuntimeError)], ids=["checked", "raw"])
def test_an_error_inside_a_model_call_says_at_which_target(checks, on, error):
    checks(on)
    model = nn.Sequential(nn.Linear(I, O), nn.Sequential(nn.Tanh(), nn.Linear(O + 1, O)))  # the second layer does not fit the first
    adapt = ll.build(model, ll.LoRAConfig(r=R))
    with pytest.raises(error) as raised:
        adapt(adapt.init(), draw(3, I))
    assert raised.value.__notes__ == ['in LoRAConfig at target "1.1"']


def test_the_message_of_a_function_from_outside_does_not_send_to_ours(checks):
    with pytest.raises(TypeError) as raised:
        gain({"g": draw(O)}, draw(O, I), draw(3, I))
    assert "lora_lite.functional" not in str(raised.value)


def test_an_error_inside_an_init_says_at_which_target():
    model = nn.Sequential(nn.Linear(I, 8), nn.Linear(8, 3))
    with pytest.raises(ValueError, match=r"PiSSAConfig\.r") as raised:
        ll.build(model, ll.PiSSAConfig(r=4))
    assert raised.value.__notes__ == ['in PiSSAConfig.constants at target "1"']


NEED_CONSTANTS = {"adamss", "deft", "osf", "supertuning", "tokens"}


@pytest.mark.parametrize("row", [row for row in CASES if row.cfg.name in NEED_CONSTANTS], ids=lambda row: row.id)
def test_a_plain_weight_without_the_constants_that_a_variant_needs_is_named(row):
    case = float64(row.cfg)[0]
    missing = r"Frozen: expected the variant's constant '(\w+)' beside the weight, found a plain weight. Take it from config.constants"
    with pytest.raises(ValueError, match=missing) as refusal:
        case.cfg.forward(case.params, ll.Frozen(case.W.weight, case.W.bias), case.x)
    assert re.search(missing, str(refusal.value))[1] in case.W.constants
    again = ll.Frozen(case.W.weight, case.W.bias, case.W.constants)
    assert torch.equal(case.cfg.forward(case.params, again, case.x), case(case.params))  # the way out


@pytest.mark.parametrize("row", [row for row in CASES if row.cfg.name not in NEED_CONSTANTS], ids=lambda row: row.id)
def test_every_other_variant_does_with_a_plain_weight(row):
    case = float64(row.cfg)[0]
    y = case.cfg.forward(case.params, ll.Frozen(case.W.weight, case.W.bias), case.x)
    assert y.shape == case(case.params).shape
    assert y.isfinite().all()


@pytest.mark.parametrize("on", [True, False])
def test_statics_keep_their_names_and_defaults(checks, on):
    @ll.checked
    def f(params: GainParams, W: ll.Frozen, x: Float[Tensor, "*b i"], *, a: int, b: float = 2.0, **rest: int) -> Float[Tensor, "*b i"]:
        return x + a * b + sum(rest.values())

    checks(on)
    given = {"g": draw(O)}, draw(O, I), torch.zeros(1, I)
    assert f(*given, a=2).unique().tolist() == [4.0]
    assert f(*given, a=2, b=1.0, more=3, still=4).unique().tolist() == [9.0]
    with pytest.raises(TypeError, match=r"missing 1 required keyword-only argument: 'a'"):
        f(*given)
    with pytest.raises(TypeError, match=r"lora\(\) got an unexpected keyword argument 'scales'"):
        lf.lora(lora_params(), draw(O, I), draw(1, I), scales=1.0)


def test_statics_may_have_the_names_that_the_door_uses(checks):
    """`fn` took the place of the function itself."""

    @ll.checked
    def scaled(
        params: GainParams,
        W: ll.Frozen,
        x: Float[Tensor, "*b i"],
        *,
        fn: float,
        tested: float = 1.0,
        torch: float = 1.0,
        Frozen: float = 1.0,
    ) -> Float[Tensor, "*b o"]:
        return W(x) * fn * tested * torch * Frozen

    W, x = draw(O, I), draw(3, I)
    for on in (True, False):
        checks(on)
        assert torch.equal(scaled({"g": draw(O)}, W, x, fn=2.0), 2 * (x @ W.t()))


def test_function_without_annotations_is_refused_where_it_is_written():
    """It failed by a key, and with the checks on alone."""

    def bare(params: GainParams, W, x):
        return W(x)

    with pytest.raises(TypeError, match=r"bare\(params, W, x, \*, statics\) to annotate .*found nothing for x and return\. Write"):
        ll.checked(bare)
