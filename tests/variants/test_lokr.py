"""LoKr: either order of the products, of whole and of factored matrices, is the Kronecker product; widths are divided as in PEFT."""

import copy

import peft
import pytest
import torch
from peft.tuners.lokr.layer import factorization

import lora_lite as ll
from lora_lite.variants.lokr import divided, lokr

# (o1, i1), (o2, i2), ranks of both or None
SIZES = {
    "w2 first": ((2, 3), (8, 5), None, None),
    "w1 first": ((3, 7), (2, 9), None, None),
    "large w1": ((12, 10), (2, 3), None, None),
    "factored w2": ((2, 3), (12, 10), None, 1),
    "both factored": ((9, 8), (12, 10), 2, 2),
    "ranks too large to pay": ((4, 3), (6, 5), 3, 3),
}


def _side(name, shape, rank, draw):
    if rank is None:
        w = draw(*shape)
        return {name: w}, w
    a, b = draw(shape[0], rank), draw(rank, shape[1])
    return {f"{name}_a": a, f"{name}_b": b}, a @ b


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_both_orders_are_the_kronecker_product(sizes):
    g = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    first, second, r1, r2 = sizes
    (p1, w1), (p2, w2) = _side("w1", first, r1, draw), _side("w2", second, r2, draw)
    o, i = first[0] * second[0], first[1] * second[1]
    W, x = ll.Frozen(draw(o, i), draw(o)), draw(2, 3, i)
    got = lokr({**p1, **p2}, W, x, scale=1.5)
    torch.testing.assert_close(got, W(x) + 1.5 * x @ torch.kron(w1, w2).t(), rtol=1e-12, atol=1e-11)


def test_widths_are_divided_as_peft_divides_them():
    for n in (*range(1, 130), 768, 1024, 2816, 4096, 11008):
        for factor in (-1, *range(1, 20), 64, 5000):
            assert divided(n, factor) == factorization(n, factor), (n, factor)


@pytest.mark.parametrize("start", ["zeros", "lycoris"])
@pytest.mark.parametrize("both", [True, False])
def test_shapes_and_starts_are_those_of_peft(start, both):
    model = torch.nn.Sequential(torch.nn.Linear(90, 64))
    given = {"r": 3, "decompose_both": both}
    theirs = peft.get_peft_model(
        copy.deepcopy(model), peft.LoKrConfig(target_modules=["0"], init_weights=True if start == "zeros" else start, **given)
    )
    params = ll.build(model, ll.LoKrConfig(start=start, **given)).init()["0"]
    found = {name.split(".")[-2].removeprefix("lokr_"): p for name, p in theirs.named_parameters() if "lokr" in name}
    assert {name: p.shape for name, p in found.items()} == {name: p.shape for name, p in params.items()}
    for name, p in found.items():
        assert bool(p.any()) == bool(params[name].any())
        assert 0.8 < params[name].abs().max() / p.abs().max() < 1.25 or not p.any()  # the same bounds


def test_pefts_kernels_are_refused_by_name(tmp_path):
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 6, 3), torch.nn.Flatten())
    for effective, message in ((False, "another definition|axes"), (True, "use_effective_conv2d: expected it off")):
        config = peft.LoKrConfig(r=1, target_modules=["0"], use_effective_conv2d=effective)
        peft.get_peft_model(copy.deepcopy(model), config).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=message):
            ll.from_peft(model, tmp_path)
