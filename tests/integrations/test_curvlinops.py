"""curvlinops: products with the Hessian and the Gauss-Newton matrix of `adapt.module`, beside `hvp` and `ggn_vp`."""

import pytest
import torch
from subjects import EACH

import lora_lite as ll

curvlinops = pytest.importorskip("curvlinops", reason="curvlinops is not installed: pip install curvlinops-for-pytorch")


def products(case):
    """The operators' products with a vector are those of `hvp` and `ggn_vp` with it as a tree."""
    s = case()
    adapt, params, x, y = s.adapt, s.params, s.x, s.y
    module = adapt.module(params)
    module.eval()
    leaves = {name: p for name, p in module.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(1)
    along = ll.tree_map(lambda p: torch.randn(p.shape, generator=generator, dtype=p.dtype), params)
    vector = [p.detach() for p in adapt.module(along).parameters() if p.requires_grad]
    mse = torch.nn.MSELoss()

    def squares(output):  # torch's mse_loss has no forward-mode derivative of its gradient
        return (output - y).square().mean()

    ours = {
        curvlinops.HessianLinearOperator: s.hvp(lambda p: squares(adapt(p, x)), along),
        curvlinops.GGNLinearOperator: s.ggn_vp(squares, along),
    }
    for operator, tree in ours.items():
        made = operator(module, mse, list(leaves.values()), [(x, y)], check_deterministic=False)
        got = made @ vector
        want = [p.detach() for p in adapt.module(tree).parameters() if p.requires_grad]
        largest = max(float(w.abs().max()) for w in want)
        assert largest > 0
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-6, atol=1e-9 * largest)


CHECKS = {"curvlinops": (products,)}


@EACH
def test_curvlinops(case):
    products(case)
