"""CLOVER: the paper's factors with the core between them, what of them must be stored, heads that have no core."""

import pytest
import torch

import lora_lite as ll
from cases import derived


def layer(o=12, i=10, bias=True, seed=0):
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(o, i, generator=g, dtype=torch.float64)
    return ll.Frozen(weight, torch.randn(o, generator=g, dtype=torch.float64) if bias else None)


def draw(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("h", [1, 4, 6])
def test_is_the_papers_core_between_its_factors(h, bias):
    W, cfg = layer(bias=bias), ll.CLOVERConfig(head_dim=h)
    _, constants = derived(cfg, W)
    dR, x = draw(12 // h, h, h), draw(3, 10, seed=2)
    ones = torch.cat([x, torch.ones(3, 1, dtype=x.dtype)], 1) if bias else x
    rows = torch.cat([W.weight, W.bias[:, None]], 1) if bias else W.weight
    want = []
    for head, core in zip(rows.split(h), dR):
        Q, R = torch.linalg.qr(head.t())
        signs = R.diagonal().sign()
        want.append(ones @ (Q * signs) @ (signs[:, None] * R + core))
    y = cfg.forward({"dR": dR}, W.with_constants(constants), x)
    torch.testing.assert_close(y, torch.cat(want, 1), rtol=0, atol=1e-10)


def test_free_cores_span_the_same_functions():
    W, x, dR = layer(), draw(3, 10, seed=2), draw(3, 4, 4)
    qr, free = ll.CLOVERConfig(head_dim=4), ll.CLOVERConfig(head_dim=4, core="free")
    _, constants = derived(qr, W)
    assert derived(free, W)[1] == {}
    want = qr.forward({"dR": dR}, W.with_constants(constants), x)
    torch.testing.assert_close(free.forward({"dR": constants["R_inv"] @ dR}, W, x), want, rtol=0, atol=1e-10)


def test_the_coordinates_are_orthonormal_ones_of_the_weight():
    W = layer(bias=False)
    R_inv = derived(ll.CLOVERConfig(head_dim=4), W)[1]["R_inv"]
    for head, inverse in zip(W.weight.split(4), R_inv):
        Q = head.t() @ inverse
        torch.testing.assert_close(Q.t() @ Q, torch.eye(4, dtype=Q.dtype), rtol=0, atol=1e-12)
        assert (inverse.diagonal() > 0).all()


def test_a_core_reaches_the_outputs_of_its_head_alone():
    W, cfg, x = layer(), ll.CLOVERConfig(head_dim=4), draw(3, 10, seed=2)
    params, constants = derived(cfg, W)
    dR = params["dR"].double().index_fill(0, torch.tensor([1]), 1.0)
    moved = cfg.forward({"dR": dR}, W.with_constants(constants), x) != W(x)
    assert moved[:, 4:8].all()
    assert not moved[:, :4].any()
    assert not moved[:, 8:].any()


def test_a_head_whose_rows_depend_on_each_other_trains_its_map_itself():
    weight = layer(bias=False).weight
    W, cfg, x, dR = ll.Frozen(torch.cat([weight[:1], weight[:11]])), ll.CLOVERConfig(head_dim=4), draw(3, 10, seed=2), draw(3, 4, 4)
    _, constants = derived(cfg, W)
    assert torch.equal(constants["R_inv"][0], torch.eye(4, dtype=dR.dtype))
    got, free = cfg.forward({"dR": dR}, W.with_constants(constants), x), ll.CLOVERConfig(head_dim=4, core="free").forward({"dR": dR}, W, x)
    assert torch.equal(got[:, :4], free[:, :4])
    assert (got[:, 4:] != free[:, 4:]).all()


def test_what_does_not_fit_a_layer_is_refused_with_a_way_out():
    with pytest.raises(ValueError, match=r"CLOVERConfig.head_dim: expected a divisor of o = 12, found 5. Use e.g. "):
        derived(ll.CLOVERConfig(head_dim=5), layer())
    with pytest.raises(ValueError, match=r'CLOVERConfig.head_dim: expected at most 10, .*found 12. Use core="free"'):
        derived(ll.CLOVERConfig(head_dim=12), layer(bias=False))
