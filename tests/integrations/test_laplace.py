"""laplace-torch: its diagonal and full curvature on `adapt.module`, its Kronecker factors on `LinearLayers`."""

import pytest
import torch
from subjects import LINEAR, flat, subject

import lora_lite as ll
from lora_lite.integrations.linear_layers import LinearLayers

laplace = pytest.importorskip("laplace", reason="laplace-torch is not installed: pip install laplace-torch")
from laplace.curvature import CurvlinopsGGN  # noqa: E402  # after the skip

LARGE = 150
"""Params from which on the full matrix takes a second or more: a pass for each column."""


def _fit(module, structure, x, y):
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=2)
    fitted = laplace.Laplace(module, "regression", subset_of_weights="all", hessian_structure=structure, backend=CurvlinopsGGN)
    fitted.fit(loader)
    return fitted


def _rowwise(cfg):
    """Return what is measured: a variant whose rows' outputs do not depend on the other rows of their batch."""
    if not cfg.rowwise:
        pytest.skip("curvature is a sum over rows, and this variant couples those of a batch")
    return subject(cfg)


def _jacobian(adapt, params, x):
    """Return the outputs' gradients by each leaf, `(rows, outputs, *leaf)`."""
    return torch.func.jacrev(lambda p: adapt(p, x))(params)


def _as_vectors(leaves):
    return torch.cat([leaf.reshape(*leaf.shape[:2], -1) for leaf in leaves], 2).flatten(0, 1)


def diagonal(cfg):
    """The diagonal of the Gauss-Newton matrix is the sum of the squared Jacobian."""
    adapt, params, x, y = _rowwise(cfg)
    module = adapt.module(params)
    want = ll.tree_map(lambda j: j.square().sum((0, 1)), _jacobian(adapt, params, x))
    named = dict(
        zip((name for name, p in module.named_parameters() if p.requires_grad), _fit(module, "diag", x, y).H.split(_sizes(module)))
    )
    _assert_same(named, {name: leaf.flatten() for name, leaf in _in_order(adapt, module, want).items()})


def full(cfg):
    """The full matrix is the Gauss-Newton matrix of `torch.func`'s Jacobian."""
    adapt, params, x, y = _rowwise(cfg)
    module = adapt.module(params)
    if sum(_sizes(module)) > LARGE:
        pytest.skip("a matrix whose columns take a second or more")
    ordered = _in_order(adapt, module, _jacobian(adapt, params, x), leading=2)
    J = _as_vectors(ordered.values())
    largest = float(J.square().sum(0).max())
    torch.testing.assert_close(_fit(module, "full", x, y).H, J.t() @ J, rtol=1e-6, atol=1e-6 * largest)  # it passes through float32 there
    assert J.any()


def kronecker(cfg):
    """Each leaf's factor is the covariance of the gradients of its longer axis, for a vector the exact block; predictions have a spread."""
    adapt, params, x, y = _rowwise(cfg)
    module = LinearLayers(adapt, params)
    torch.testing.assert_close(module(x), adapt(params, x))
    fitted = _fit(module, "kron", x, y)
    jacobian = _jacobian(adapt, params, x)
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
    mean, variance = fitted(x)
    torch.testing.assert_close(mean, adapt(params, x))
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


CHECKS = {"Laplace diag, full": (diagonal, full), "Laplace kron": (kronecker,)}


@LINEAR
@pytest.mark.parametrize("check", [diagonal, full, kronecker], ids=lambda check: check.__name__)
def test_laplace(row, check, request):
    if check is diagonal and any(leaf.dim() == 0 for leaf in ll.tree_leaves(subject(row.cfg)[1])):
        why = "laplace-torch flattens a parameter's axes from start_dim=-p.dim() on, which for a number are those of the rows"
        request.applymarker(pytest.mark.xfail(reason=why, raises=RuntimeError, strict=True))
    check(row.cfg)


def test_the_factors_of_a_vector_are_its_whole_block():
    adapt, params, x, y = subject(ll.IA3Config())
    fitted = _fit(LinearLayers(adapt, params), "kron", x, y)
    J = _as_vectors(ll.tree_leaves(_jacobian(adapt, params, x)))
    blocks = torch.block_diag(*(f[0] * f[1] if len(f) == 2 else f[0] for f in fitted.H_facs.kfacs))
    whole = J.t() @ J
    torch.testing.assert_close(blocks, whole * (blocks != 0), rtol=1e-6, atol=1e-9)
    assert flat(params).numel() == len(blocks)
