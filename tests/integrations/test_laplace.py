"""laplace-torch: its diagonal and full curvature on `adapt.module`, its Kronecker factors on `LinearLayers`."""

import dataclasses

import pytest
import torch
from subjects import LINEAR, THEIRS, Case, flat

import lora_lite as ll

laplace = pytest.importorskip("laplace", reason="laplace-torch is not installed: pip install laplace-torch")
from laplace.curvature import CurvlinopsGGN  # noqa: E402  # after the skip

LARGE = 150
"""Params from which on the full matrix takes a second or more: a pass for each column."""


def _fit(module, structure, x, y):
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=2)
    fitted = laplace.Laplace(module, "regression", subset_of_weights="all", hessian_structure=structure, backend=CurvlinopsGGN)
    fitted.fit(loader)
    return fitted


def _rowwise(case, **sizes):
    """Return what is measured: a variant whose rows' outputs do not depend on the other rows of their batch."""
    if not case.cfg.rowwise:
        pytest.skip("curvature is a sum over rows, and this variant couples those of a batch")
    return case(**sizes)


def _jacobian(s):
    """Return the outputs' gradients by each leaf, `(rows, outputs, *leaf)`."""
    return s.jacobian(lambda p: s.adapt(p, s.x), s.params)


def _as_vectors(leaves):
    return torch.cat([leaf.reshape(*leaf.shape[:2], -1) for leaf in leaves], 2).flatten(0, 1)


def diagonal(case):
    """The diagonal of the Gauss-Newton matrix is the sum of the squared Jacobian."""
    s = _rowwise(case)
    module = s.adapt.module(s.params)
    want = ll.tree_map(lambda j: j.square().sum((0, 1)), _jacobian(s))
    named = dict(
        zip((name for name, p in module.named_parameters() if p.requires_grad), _fit(module, "diag", s.x, s.y).H.split(_sizes(module)))
    )
    _assert_same(named, {name: leaf.flatten() for name, leaf in _in_order(s.adapt, module, want).items()})


def full(case):
    """The full matrix is the Gauss-Newton matrix of `torch.func`'s Jacobian."""
    s = _rowwise(case)
    module = s.adapt.module(s.params)
    if sum(_sizes(module)) > LARGE:
        pytest.skip(f"a matrix of more than {LARGE} columns")
    ordered = _in_order(s.adapt, module, _jacobian(s), leading=2)
    J = _as_vectors(ordered.values())
    largest = float(J.square().sum(0).max())
    torch.testing.assert_close(_fit(module, "full", s.x, s.y).H, J.t() @ J, rtol=1e-6, atol=1e-6 * largest)  # through float32 there
    assert J.any()


def kronecker(case):
    """Each leaf's factor is the covariance of the gradients of its longer axis, for a vector the exact block; predictions have a spread."""
    s = _rowwise(case)
    module = s.layers()
    torch.testing.assert_close(module(s.x), s.adapt(s.params, s.x))
    fitted = _fit(module, "kron", s.x, s.y)
    jacobian = _jacobian(s)
    factors = iter(fitted.H_facs.kfacs)
    for leaf in ll.tree_leaves(jacobian):
        rows = leaf.flatten(3) if leaf.dim() > 3 else leaf.reshape(*leaf.shape[:2], -1, 1)
        rows = rows.transpose(2, 3) if rows.shape[2] < rows.shape[3] else rows
        want = torch.einsum("noak,nobk->ab", rows, rows) / rows.shape[3]
        kfacs = next(factors)
        got = kfacs[0] * kfacs[1].diagonal().mean() if len(kfacs) == 2 else kfacs[0]
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9 * float(want.abs().max()))
        if len(kfacs) == 2:
            torch.testing.assert_close(kfacs[1], kfacs[1].diagonal().mean() * torch.eye(rows.shape[3]).double())
    _assert_spread(fitted, s)


def both_factors(case):
    """Of one input, a layer's two factors are its whole block; of several, predictions have a spread."""
    s = _rowwise(case)
    one = dataclasses.replace(s, x=s.x[:1, :1], y=s.y[:1])
    module = s.layers()
    fitted = _fit(module, "kron", one.x, one.y)
    jacobian = _in_order(s.adapt, module, _jacobian(one), leading=2)
    for leaf, kfacs in zip(jacobian.values(), fitted.H_facs.kfacs, strict=True):
        j = leaf.flatten(2).flatten(0, 1)
        got = torch.kron(*kfacs) if len(kfacs) == 2 else kfacs[0]
        torch.testing.assert_close(got, j.t() @ j, rtol=1e-6, atol=1e-9 * float(j.square().max()))
        assert j.any()
    _assert_spread(_fit(module, "kron", s.x, s.y), s)


def _assert_spread(fitted, s):
    mean, variance = fitted(s.x)
    torch.testing.assert_close(mean, s.adapt(s.params, s.x))
    assert variance.diagonal(dim1=1, dim2=2).min() > 0


def _sizes(module):
    return [p.numel() for p in module.parameters() if p.requires_grad]


def _in_order(adapt, module, tree, leading=0):
    """Return a tree's leaves by the names of the module's parameters: a module of other params, whose values tell the leaves apart."""
    numbers = iter(range(10**6))
    marks = ll.tree_map(lambda leaf: torch.full(leaf.shape[leading:], float(next(numbers)), dtype=leaf.dtype), tree)
    leaves = ll.tree_leaves(tree)
    marked = adapt.module(marks).named_parameters()
    return {name: leaves[int(p.flatten()[0])] for name, p in marked if p.requires_grad}


def _assert_same(got, want):
    assert set(got) == set(want)
    for name, leaf in want.items():
        torch.testing.assert_close(got[name], leaf, rtol=1e-6, atol=1e-9)
    assert any(leaf.any() for leaf in want.values())


CHECKS = {"Laplace diag": (diagonal,), "Laplace full": (full,), "Laplace kron": (kronecker,)}
OF_PEFT = {**CHECKS, "Laplace kron": (both_factors,)}


@LINEAR
@pytest.mark.parametrize("check", [diagonal, full, kronecker], ids=lambda check: check.__name__)
def test_laplace(case, check, request):
    if check is diagonal and any(leaf.dim() == 0 for leaf in ll.tree_leaves(case().params)):
        why = "laplace-torch flattens a parameter's axes from start_dim=-p.dim() on, which for a number are those of the rows"
        request.applymarker(pytest.mark.xfail(reason=why, raises=RuntimeError, strict=True))
    check(case)


@pytest.mark.parametrize("case", [case for case in THEIRS if case.cfg.name == "lora"], ids=lambda case: case.cfg.name)
def test_laplace_with_pefts_lora(case):
    both_factors(case)


def test_the_factors_of_a_vector_are_its_whole_block():
    s = Case(ll.IA3Config())()
    fitted = _fit(s.layers(), "kron", s.x, s.y)
    J = _as_vectors(ll.tree_leaves(_jacobian(s)))
    blocks = torch.block_diag(*(f[0] * f[1] if len(f) == 2 else f[0] for f in fitted.H_facs.kfacs))
    whole = J.t() @ J
    torch.testing.assert_close(blocks, whole * (blocks != 0), rtol=1e-6, atol=1e-9)
    assert flat(s.params).numel() == len(blocks)
