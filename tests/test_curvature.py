"""Second-order products: against differences of gradients, the definition, and each other."""

import pytest
import torch

import lora_lite as ll
from cases import CASES, build_any, move
from lora_lite.testing._case import float64

CONFIGS = {row.cfg.name: row.cfg for row in reversed(CASES)}
"""One configuration of each variant."""
SMOOTH = {name: cfg for name, cfg in CONFIGS.items() if name != "dora"}
"""DoRA holds its norm fixed in the gradient, whose derivative is then another function's."""


def _setup(tiny, cfg):
    model, batch = tiny("opt")
    adapt = build_any(model.double(), cfg, [batch])
    params = ll.tree_map(lambda p: p.double(), move(adapt.init()))
    along = move(ll.tree_map(torch.zeros_like, params), seed=5)
    return adapt, batch, params, along


def _dot(a, b):
    return sum((x * y).sum() for x, y in zip(ll.tree_leaves(a), ll.tree_leaves(b)))


def _close(got, want, tolerance):
    for a, b in zip(ll.tree_leaves(got), ll.tree_leaves(want)):
        assert (a - b).abs().max() <= tolerance * max(1.0, float(b.abs().max()))
    assert max(float(b.abs().max()) for b in ll.tree_leaves(want)) > 0


@pytest.mark.parametrize("cfg", SMOOTH.values(), ids=SMOOTH)
def test_hessian_product_is_a_difference_of_gradients(tiny, cfg):
    adapt, batch, params, along = _setup(tiny, cfg)

    def loss(p):
        return adapt(p, batch, use_cache=False).logits.square().mean()

    got = ll.hvp(loss)(params, along)
    sides = [ll.value_and_grad(loss)(ll.tree_map(lambda p, v, s=s: p + s * 1e-6 * v, params, along))[1] for s in (1, -1)]
    _close(got, ll.tree_map(lambda a, b: (a - b) / 2e-6, *sides), 1e-4)


@pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS)
def test_gauss_newton_is_symmetric_and_positive(tiny, cfg):
    adapt, batch, params, along = _setup(tiny, cfg)
    other = move(ll.tree_map(torch.zeros_like, params), seed=6)
    targets = batch["input_ids"].flatten()

    def loss(logits):
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets)

    product = ll.ggn_vp(lambda p: adapt(p, batch, use_cache=False).logits, loss)
    one, two = product(params, along), product(params, other)
    assert abs(_dot(one, other) - _dot(two, along)) <= 1e-10 * abs(_dot(one, other)) + 1e-14
    assert _dot(one, along) > 0


def test_gauss_newton_of_a_linear_model_is_its_hessian():
    torch.manual_seed(0)
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    adapt = ll.build(torch.nn.Sequential(torch.nn.Linear(4, 3)).double(), ll.BitFitConfig(dtype=torch.float64))
    params = adapt.init()
    along = move(params)
    hessian = ll.hvp(lambda p: (adapt(p, x) - y).square().sum())(params, along)
    gauss_newton = ll.ggn_vp(lambda p: adapt(p, x), lambda out: (out - y).square().sum())(params, along)
    _close(gauss_newton, hessian, 1e-12)


@pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS)
def test_fisher_diagonal_is_the_mean_of_squared_row_gradients(tiny, cfg):
    adapt, batch, params, _ = _setup(tiny, cfg)

    def rows(output, _):
        return output.logits.square().flatten(1).mean(1)

    got = ll.fisher_diag(adapt, rows)(params, batch)
    each = []
    for row in range(len(batch["input_ids"])):
        one = {k: v[row : row + 1] for k, v in batch.items()}
        each.append(ll.value_and_grad(lambda p, one=one: adapt(p, one).logits.square().mean())(params)[1])
    _close(got, ll.tree_map(lambda *g: torch.stack(g).square().mean(0), *each), 1e-10)


def test_attention_is_plain_for_the_call_only(tiny):
    model, batch = tiny("llama")
    adapt = ll.build(model, ll.LoRAConfig(r=2))
    params = move(adapt.init())
    before = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()
    product = ll.hvp(lambda p: adapt(p, batch, use_cache=False).logits.square().mean())(params, params)
    assert all(leaf.isfinite().all() for leaf in ll.tree_leaves(product))
    assert before == (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled())


def _smooth(row):
    return not row.draws and not getattr(row.cfg, "dropout", 0.0) and row.cfg.name not in {"full", "ln_tuning", "loreft", "tokens"}


@pytest.mark.parametrize("row", [row for row in CASES if _smooth(row)], ids=lambda row: row.id)
def test_forward_mode_over_jacrev_without_grad_mode_is_that_over_grad(row):
    """torch's own solve fails here in silence, so that no variant may use it: its derivative takes factors for constants."""
    case = float64(row.cfg)[0]
    along = {name: torch.randn(p.shape, generator=torch.Generator().manual_seed(1), dtype=p.dtype) for name, p in case.params.items()}

    def loss(params):
        return case(params).square().sum()

    want = torch.func.jvp(torch.func.grad(loss), (case.params,), (along,))[1]
    with torch.no_grad():
        got = torch.func.jvp(torch.func.jacrev(loss), (case.params,), (along,))[1]
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


VECTORS = {
    "a leaf less": (lambda v: {"0": {"A": v["0"]["A"]}}, r'missing "0.B"'),
    "another target": (lambda v: {**v, "2": v["0"]}, r'unexpected "2.A"'),
    "another shape": (lambda v: ll.tree_map(lambda t: t[:1], v), r'"0.A": expected torch.float32 of shape \(2, 4\).*found .*\(1, 4\)'),
    "another dtype": (lambda v: ll.tree_map(torch.Tensor.double, v), r'"0.B": expected torch.float32 .*found torch.float64'),
    "integers": (lambda v: ll.tree_map(torch.Tensor.long, v), r"found torch.int64"),
    "numbers": (lambda v: ll.tree_map(float, ll.tree_map(torch.sum, v)), r"found float"),
    "nothing": (lambda v: None, r"missing"),
}


@pytest.mark.parametrize("case", VECTORS)
@pytest.mark.parametrize("name", ["hvp", "ggn_vp"])
def test_vector_of_another_form_is_refused_by_name(name, case):
    torch.manual_seed(0)
    adapt, x = ll.build(torch.nn.Sequential(torch.nn.Linear(4, 3)), ll.LoRAConfig(r=2)), torch.randn(5, 4)
    params = ll.tree_map(lambda p: p + 0.1 * torch.randn_like(p), adapt.init())
    product = (
        ll.hvp(lambda p: adapt(p, x).square().sum()) if name == "hvp" else ll.ggn_vp(lambda p: adapt(p, x), lambda y: y.square().sum())
    )
    along = ll.tree_map(torch.randn_like, params)
    want = product(params, along)
    another_order = {"0": dict(reversed(along["0"].items()))}
    assert all(torch.equal(a, b) for a, b in zip(ll.tree_leaves(want), ll.tree_leaves(product(params, another_order))))
    change, found = VECTORS[case]
    with pytest.raises(ValueError, match=rf"(?s){name}: expected a vector v that fits the params.*{found}.*ll.tree_map\(torch.randn_like"):
        product(params, change(along))
