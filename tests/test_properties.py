"""Each pure function on a plain weight is the dense definition of its paper, written out in float64, for any size and dtype."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lora_lite as ll
from cases import TOLERANCE

SIZES = st.integers(1, 12)
SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)  # of the leading axes: none, several, empty ones
DTYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16])
CASE = {"i": SIZES, "o": SIZES, "r": SIZES, "batch": SHAPES, "dtype": DTYPES, "seed": st.integers(0, 2**31)}


def dense_lora(W, p, scale):
    return W + scale * p["B"] @ p["A"]


def dense_dora(W, p, scale):
    V = W + scale * p["B"] @ p["A"]  # eq. (5): a magnitude times the unit rows of V, whose norm is held in the gradient (sec. 4.3)
    return (W.norm(dim=1) + p["m"])[:, None] * V / V.norm(dim=1, keepdim=True).detach()


def dense_pissa(W, p, scale):
    r = p["dA"].shape[0]
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    signs = Vh[:r].gather(1, Vh[:r].abs().argmax(1, keepdim=True)).sign()
    A0 = (S[:r] / scale).sqrt()[:, None] * Vh[:r] * signs
    B0 = U[:, :r] * signs.t() * (S[:r] / scale).sqrt()
    return W - scale * B0 @ A0 + scale * (B0 + p["dB"]) @ (A0 + p["dA"])  # the residual form, eq. (2)-(5)


VARIANTS = {  # shapes of the params, the dense weight, whether the function takes a scale
    "lora": (lambda i, o, r: {"A": (r, i), "B": (o, r)}, dense_lora, True),
    "dora": (lambda i, o, r: {"A": (r, i), "B": (o, r), "m": (o,)}, dense_dora, True),
    "pissa": (lambda i, o, r: {"dA": (min(r, i, o), i), "dB": (o, min(r, i, o))}, dense_pissa, True),
    "ia3": (lambda i, o, r: {"g": (o,)}, lambda W, p, scale: (1 + p["g"])[:, None] * W, False),
    "ia3_ff": (lambda i, o, r: {"g": (i,)}, lambda W, p, scale: W * (1 + p["g"]), False),
}


def draw(i, o, r, batch, dtype, seed, shapes):
    generator = torch.Generator().manual_seed(seed)

    def make(*shape, scale=1.0):
        return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)

    params = {name: make(*shape, scale=0.3) for name, shape in shapes(i, o, r).items()}
    return params, make(o, i, scale=1 / math.sqrt(i)), make(*batch, i), make(o)


def assert_close(got, want, size, dtype, what):
    assert got.shape == want.shape
    assert got.dtype == dtype
    if want.numel():
        error = float((got.double() - want).abs().max())
        assert error <= TOLERANCE[dtype] * max(1.0, size), f"{what}: {error:.1e} off beside values of {size:.1e}"


def largest(*tensors):
    return max((float(t.abs().max()) for t in tensors if t.numel()), default=0.0)


@pytest.mark.parametrize("name", VARIANTS)
@settings(deadline=None, max_examples=20, derandomize=True, database=None)
@given(**CASE)
def test_update_is_that_of_the_dense_weight(name, i, o, r, batch, dtype, seed):
    shapes, dense, scaled = VARIANTS[name]
    params, W, x, _ = draw(i, o, r, batch, dtype, seed, shapes)
    y = getattr(ll.functional, name)(params, W, x, **({"scale": 1.5} if scaled else {}))
    exact = {key: value.double() for key, value in params.items()}
    base = x.double() @ W.double().t()
    update = x.double() @ (dense(W.double(), exact, 1.5) - W.double()).t()
    if dtype == torch.float64:
        assert_close(y - x @ W.t(), update, largest(base, update), dtype, "the update")
    else:  # the difference of rounded outputs is no better than they are
        assert_close(y, base + update, largest(base, update), dtype, "the output")


@pytest.mark.parametrize("name", VARIANTS)
@settings(deadline=None, max_examples=20, derandomize=True, database=None)
@given(i=SIZES, o=SIZES, r=SIZES, batch=SHAPES, seed=CASE["seed"])
def test_gradients_are_those_of_the_dense_weight(name, i, o, r, batch, seed):
    shapes, dense, scaled = VARIANTS[name]
    params, W, x, _ = draw(i, o, r, batch, torch.float64, seed, shapes)
    weights = torch.randn(*batch, o, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    statics = {"scale": 1.5} if scaled else {}
    function = getattr(ll.functional, name)
    got = torch.func.grad(lambda p, x: (function(p, W, x, **statics) * weights).sum(), argnums=(0, 1))(params, x)
    want = torch.func.grad(lambda p, x: (x @ dense(W, p, 1.5).t() * weights).sum(), argnums=(0, 1))(params, x)
    for key in params:
        assert_close(got[0][key], want[0][key], largest(*want[0].values()), torch.float64, f"the gradient of {key}")
    assert_close(got[1], want[1], largest(want[1]), torch.float64, "the gradient of x")


@pytest.mark.parametrize("name", VARIANTS)
@settings(deadline=None, max_examples=20, derandomize=True, database=None)
@given(**CASE)
def test_bias_is_scaled_by_an_output_gate_only(name, i, o, r, batch, dtype, seed):
    shapes, _, scaled = VARIANTS[name]
    params, W, x, bias = draw(i, o, r, batch, dtype, seed, shapes)
    statics = {"scale": 1.5} if scaled else {}
    function = getattr(ll.functional, name)
    double = {key: value.double() for key, value in params.items()}
    with_bias = function(double, ll.Frozen(W.double(), bias.double()), x.double(), **statics)
    without = function(double, W.double(), x.double(), **statics)
    want = bias.double() * (1 + double["g"]) if name == "ia3" else bias.double()
    assert_close(with_bias - without, want.expand(without.shape), largest(with_bias), torch.float64, "the bias")


@pytest.mark.parametrize("name", VARIANTS)
@settings(deadline=None, max_examples=20, derandomize=True, database=None)
@given(**CASE)
def test_zero_params_are_the_base_layer_to_the_bit(name, i, o, r, batch, dtype, seed):
    shapes, _, scaled = VARIANTS[name]
    params, W, x, bias = draw(i, o, r, batch, dtype, seed, shapes)
    zeros = {key: torch.zeros_like(value) for key, value in params.items()}
    frozen = ll.Frozen(W, bias)
    assert torch.equal(getattr(ll.functional, name)(zeros, frozen, x, **({"scale": 1.5} if scaled else {})), frozen(x))


@pytest.mark.parametrize("cfg", [ll.LoRAConfig, ll.PiSSAConfig, ll.DoRAConfig, ll.IA3Config, ll.IA3FFConfig], ids=lambda c: c.name)
@settings(deadline=None, max_examples=20, derandomize=True, database=None)
@given(i=SIZES, o=SIZES, r=SIZES, seed=st.integers(-(2**40), 2**40))
def test_build_starts_at_the_base_whatever_the_sizes(cfg, i, o, r, seed):
    fields = {"r": min(r, i, o)} if hasattr(cfg, "r") else {}
    model = torch.nn.Linear(i, o, bias=seed % 2 == 0)
    adapt = ll.build(model, cfg(**fields))
    x = torch.randn(3, i, generator=torch.Generator().manual_seed(seed))
    params = adapt.init(seed=seed)
    assert torch.equal(adapt(params, x), model(x))
    assert adapt.num_params == sum(leaf.numel() for leaf in params[""].values())
