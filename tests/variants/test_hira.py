"""HiRA: the definition, with one product and with two; an update of full rank that low precision keeps."""

import pytest
import torch

import lora_lite as ll
from lora_lite.variants.hira import hira


def _case(dtype=torch.float64, scale=1.0):
    g = torch.Generator().manual_seed(0)
    A, B, weight, x = (torch.randn(n, generator=g, dtype=torch.float64) for n in ((2, 9), (7, 2), (7, 9), (3, 4, 9)))
    params = {"A": A.to(dtype), "B": (scale * B).to(dtype)}
    return params, ll.Frozen(weight.to(dtype), torch.ones(7, dtype=dtype)), x.to(dtype)


class _Apart(ll.Frozen):
    """A layer that only its own call computes."""

    def __call__(self, x):
        return super().__call__(x)


def test_both_forms_are_the_definition():
    params, W, x = _case()
    delta = torch.tensor([[W.weight[k, j] * (params["B"][k] @ params["A"][:, j]) for j in range(9)] for k in range(7)])
    want = x @ (W.weight + delta).t() + 1
    apart = _Apart(W.weight, W.bias)
    assert (W.sums, apart.sums) == (True, False)
    for layer in (W, apart):
        torch.testing.assert_close(hira(params, layer, x), want, rtol=1e-12, atol=1e-12)


def test_update_has_the_rank_of_the_weight():
    params, W, _ = _case()
    delta = hira(params, ll.Frozen(W.weight), torch.eye(9, dtype=torch.float64)).t() - W.weight
    assert torch.linalg.matrix_rank(delta) == 7


@pytest.mark.parametrize("how", ["bfloat16", "autocast"])
def test_small_updates_are_not_rounded_away(how):
    params, W, x = _case(scale=1e-4)  # 1 + B A is 1 in bfloat16
    weight, x = torch.cat([W.weight, -W.weight], 1), torch.cat([x, x], -1)  # W x is 0: what is left is the update alone
    params = {"A": torch.cat([params["A"], -params["A"]], 1), "B": params["B"]}
    want = x @ (weight * (params["B"] @ params["A"])).t()
    dtype = torch.bfloat16 if how == "bfloat16" else torch.float32
    with torch.autocast("cpu", enabled=how == "autocast"):
        got = hira({name: p.to(dtype) for name, p in params.items()}, weight.to(dtype), x.to(dtype))
    assert (got.double() - want).norm() < 2e-2 * want.norm()


def test_dropout_falls_on_the_input_of_the_update_alone():
    params, W, x = _case()
    train = ll.Frozen(W.weight, W.bias, training=True)
    torch.manual_seed(0)
    got = hira(params, train, x, dropout=0.5)
    torch.manual_seed(0)
    dropped = torch.nn.functional.dropout(x, 0.5)
    torch.testing.assert_close(got - W(x), hira(params, W, dropped) - W(dropped), rtol=1e-12, atol=1e-12)
