"""OFT: PEFT's numbers with every option, orthogonality, the direction of each map, and COFT's bound."""

import peft
import pytest
import torch
from peft_layer import LAYERS, compare, matrix
from torch import nn

import lora_lite as ll
from cases import COSTLY
from lora_lite.testing import check_variant
from lora_lite.variants.oft import OFTConfig, oft, project

SERIES = (2, 3, 4, 5, 6, 7)


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize(("cayley", "terms"), [("series", 2), ("series", 5), ("series", 8), ("exact", 5)])
def test_passes_the_kit(cayley, terms, share):
    check_variant(OFTConfig(block_size=8, cayley=cayley, terms=terms, block_share=share), skip=COSTLY)


def _theirs(cfg, **fields):
    return peft.OFTConfig(
        oft_block_size=cfg.block_size,
        block_share=cfg.block_share,
        use_cayley_neumann=cfg.cayley == "series",
        num_cayley_neumann_terms=cfg.terms,
        target_modules=["0"],
        **fields,
    )


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize(("cayley", "terms"), [*(("series", n) for n in SERIES), ("exact", 5)])
def test_is_pefts(layer, cayley, terms, share):
    cfg = OFTConfig(block_size=4, cayley=cayley, terms=terms, block_share=share)
    compare(layer, cfg, _theirs(cfg), {"v": ("oft_R", 0.0)})


@pytest.mark.parametrize("share", [False, True])
def test_projected_params_are_those_of_pefts_coft(share):
    cfg = OFTConfig(block_size=8, block_share=share)
    theirs = peft.get_peft_model(nn.Sequential(nn.Linear(24, 32)), _theirs(cfg, coft=True, eps=0.5))
    v = theirs.base_model.model.get_submodule("0").oft_R["default"].weight
    with torch.no_grad():
        v.copy_(torch.randn(v.shape) * torch.tensor([[0.01], [0.1], [1.0]])[-v.shape[0] :])  # inside the bound and outside
    ours = project(v.detach(), 8, 0.5)
    before = v.detach().clone()
    theirs(torch.randn(2, 24))
    assert torch.allclose(ours, v, rtol=0, atol=1e-7)
    assert not torch.equal(ours, before)
    assert share or torch.equal(ours[0], before[0])


def test_zero_params_are_inside_every_bound():
    value, grad = torch.func.grad_and_value(lambda v: project(v, 4, 1e-3).sum())(torch.zeros(2, 6))
    assert value.isfinite().all()
    assert grad.isfinite().all()


def _draw(scale=0.2):
    return {"v": scale * torch.randn(3, 28, dtype=torch.float64)}


def test_the_two_maps_rotate_in_opposite_directions():
    params = _draw(0.01)
    exact = matrix(oft, params, 24, block_size=8, cayley="exact")
    series = matrix(oft, params, 24, block_size=8, cayley="series", terms=8)
    assert torch.allclose(series @ exact, torch.eye(24, dtype=torch.float64), rtol=0, atol=1e-8)
    assert (series - exact).abs().max() > 0.01


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_exact_map_is_orthogonal_and_the_opposite_strength_undoes_it(dtype):
    params = {"v": _draw(2.0)["v"].to(dtype)}
    R = matrix(oft, params, 24, block_size=8, cayley="exact")
    back = matrix(oft, OFTConfig(block_size=8, cayley="exact").steer(params, -1.0), 24, block_size=8, cayley="exact")
    bound = 50 * torch.finfo(dtype).eps
    assert (R @ R.t() - torch.eye(24, dtype=dtype)).abs().max() < bound
    assert (back - R.t()).abs().max() < bound


@pytest.mark.parametrize("terms", [4, 5, 6, 7])
def test_the_series_is_off_by_a_power_of_the_skew_matrix(terms):
    v = _draw()["v"][:1]
    R = matrix(oft, {"v": v}, 8, block_size=8, cayley="series", terms=terms)
    Q = torch.zeros(8, 8, dtype=v.dtype)
    Q[tuple(torch.triu_indices(8, 8, 1))] = v[0]
    Q = Q - Q.t()
    eye, power = torch.eye(8, dtype=v.dtype), torch.linalg.matrix_power(Q, terms - 1)
    want = (eye - power) @ (eye - (-1) ** (terms - 1) * power)
    assert torch.allclose(R @ R.t(), want, rtol=0, atol=1e-12)


def test_four_terms_are_nearer_to_orthogonal_than_five():
    def off(terms):
        R = matrix(oft, _small, 24, block_size=8, terms=terms)
        return float((R @ R.t() - torch.eye(24, dtype=R.dtype)).abs().max())

    _small = _draw(0.03)
    assert 10 * off(4) < off(5)
    assert 10 * off(6) < off(4)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        (
            {"cayley": "neumann"},
            r"OFTConfig.cayley: expected one of \"series\", \"exact\", found 'neumann'. Use e.g. cayley=",
        ),
        ({"terms": 1}, r"OFTConfig.terms: expected an integer >= 2, found 1"),
        ({"block_size": 1}, r"OFTConfig.block_size: expected an integer >= 2, found 1"),
    ],
)
def test_refuses_what_cannot_be(fields, match):
    with pytest.raises(ValueError, match=match):
        OFTConfig(**fields)


def test_names_block_sizes_that_fit():
    match = r"OFTConfig.block_size: expected a divisor of i = 100, found 32. Use e.g. 25 or 20 or 50\."
    with pytest.raises(ValueError, match=match):
        ll.build(nn.Sequential(nn.Linear(100, 8)), OFTConfig())
