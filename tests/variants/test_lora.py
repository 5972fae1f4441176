"""LoRA's options: its starts, and the bias of its update."""

import pytest
import torch
from torch import nn

import lora_lite as ll
from cases import move

f64 = torch.float64


def start(i=64, o=48, **fields):
    cfg = ll.LoRAConfig(**fields)
    return cfg, cfg.init(ll.Frozen(torch.zeros(o, i)), torch.Generator().manual_seed(0))


def test_orthogonal_start_has_factors_of_complementary_halves():
    _, params = start(r=8, start="orthogonal")
    A, B = params["A"].double(), params["B"].double()
    assert (B @ A).norm() < 1e-6 * B.norm() * A.norm()
    assert [int(torch.linalg.matrix_rank(factor, rtol=1e-5)) for factor in (A, B)] == [4, 4]
    assert A.std() == pytest.approx(0.5**0.5 / 10, rel=0.2)  # half of the squares of a row of a rotation


def test_gaussian_start_has_the_deviation_of_the_rank():
    _, params = start(r=8, start="gaussian")
    assert params["A"].std() == pytest.approx(1 / 8, rel=0.1)
    assert not params["B"].any()


def test_orthogonal_start_asks_for_an_even_rank():
    with pytest.raises(ValueError, match=r'LoRAConfig\.r: expected even with start="orthogonal", found 3'):
        ll.LoRAConfig(r=3, start="orthogonal")


def test_embedding_starts_where_it_always_does():
    model = nn.Sequential(nn.Embedding(9, 6))
    params = ll.build(model, ll.LoRAConfig(r=2, start="orthogonal", target_names="0")).init()
    assert not params["0"]["A"].any()
    assert params["0"]["B"].any()


def test_bias_of_the_update_is_scaled_steered_mixed_and_merged():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double().requires_grad_(False), torch.randn(5, 6, dtype=f64)
    adapt = ll.build(model, ll.LoRAConfig(r=2, alpha=6.0, lora_bias=True, dtype=f64))
    members = [move(adapt.init(), seed) for seed in (1, 2)]
    params = members[0]

    def by_hand(x, c=1.0):
        for k, layer in enumerate(model):
            p = params.get(str(k))
            x = layer(x) if p is None else layer(x) + c * 3.0 * (x @ p["A"].T @ p["B"].T + p["b"])
        return x

    torch.testing.assert_close(adapt(params, x), by_hand(x))
    torch.testing.assert_close(adapt(adapt.steer(params, -0.5), x), by_hand(x, -0.5))
    torch.testing.assert_close(adapt.mixed(ll.stack(members), x, [0, 1, 0, 0, 1])[2], by_hand(x)[2])
    merged = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    merged.load_state_dict(adapt.merge(params))
    torch.testing.assert_close(merged(x), by_hand(x))


def test_bias_of_the_update_needs_one_of_the_layer_to_merge():
    adapt = ll.build(nn.Sequential(nn.Linear(6, 4, bias=False)), ll.LoRAConfig(r=2, lora_bias=True))
    with pytest.raises(ValueError, match="the adapter moves the bias, and the layer has none to hold it"):
        adapt.merge(move(adapt.init()))
