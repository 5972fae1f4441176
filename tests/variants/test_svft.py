"""SVFT: the dense form in float64, its patterns as the paper defines them, both evaluations of a band, the official start."""

import pytest
import torch

import lora_lite as ll
from cases import COSTLY, derived
from lora_lite.derived.cost import macs_per_token
from lora_lite.testing import _case, check_variant
from lora_lite.variants import svft as module
from lora_lite.variants._entries import times_entries
from lora_lite.variants.svft import by_diagonals, entries, places, svft

SHAPES = [(12, 12), (9, 14), (14, 9)]
PATTERNS = ("plain", "banded", "random", "top_k")


def layer(o, i):
    g = torch.Generator().manual_seed(o)
    return ll.Frozen(torch.randn(o, i, generator=g, dtype=torch.float64), torch.randn(o, generator=g, dtype=torch.float64))


def moved(cfg, W):
    params, constants = derived(cfg, W)
    return {"m": 0.3 * torch.randn(params["m"].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))}, constants


@pytest.mark.parametrize(
    ("o", "i", "pattern"), [(o, i, pattern) for o, i in SHAPES for pattern in PATTERNS if pattern != "top_k" or o == i]
)
@pytest.mark.parametrize("r", [None, 6])
def test_is_the_papers_product(o, i, pattern, r):
    W, cfg = layer(o, i), ll.SVFTConfig(pattern=pattern, off_diag=2, r=r)
    params, constants = moved(cfg, W)
    U, S, Vh = torch.linalg.svd(W.weight, full_matrices=False)
    k = r or min(o, i)
    signs = torch.sign((Vh[:k] * constants["V"]).sum(1))  # each pair of singular vectors is free to change its sign
    M = torch.zeros(k, k, dtype=torch.float64)
    at = constants["at"] if pattern != "plain" else torch.arange(k) * (k + 1)
    M[at // k, at % k] = params["m"]
    changed = U @ torch.diag(S) @ Vh + (U[:, :k] * signs) @ M @ (signs[:, None] * Vh[:k])
    x = torch.randn(3, i, dtype=torch.float64)
    y = cfg.forward(params, W.with_constants(constants), x)
    torch.testing.assert_close(y, x @ changed.t() + W.bias, rtol=0, atol=1e-12)
    assert float(torch.linalg.norm(changed - W.weight)) == pytest.approx(float(params["m"].norm()))


def test_the_diagonal_moves_singular_values_alone():
    W = layer(9, 14)
    params, constants = moved(ll.SVFTConfig(), W)
    merged = svft(params, ll.Frozen(W.weight, None, constants), torch.eye(14, dtype=torch.float64)).t()
    want = (torch.linalg.svdvals(W.weight) + params["m"]).abs().sort(descending=True).values
    torch.testing.assert_close(torch.linalg.svdvals(merged), want, rtol=0, atol=1e-12)


def test_patterns_hold_as_many_entries_as_the_band_and_each_once():
    W = layer(12, 12)
    for pattern in ("banded", "random", "top_k"):
        _, constants = moved(ll.SVFTConfig(pattern=pattern, off_diag=3), W)
        at = constants["at"]
        assert len(at) == entries(12, pattern, 3) == 12 * 7 - 3 * 4
        assert (at[1:] > at[:-1]).all()
        if pattern == "banded":
            assert ((at // 12 - at % 12).abs() <= 3).all()


def test_top_entries_are_between_the_nearest_singular_vectors():
    W = layer(12, 12)
    _, constants = moved(ll.SVFTConfig(pattern="top_k", off_diag=1), W)
    U, V, at = constants["U"], constants["V"], constants["at"]
    cosines = torch.stack([(U[:, a] @ V[c]).abs() for a in range(12) for c in range(12)])
    rest = torch.ones(144, dtype=torch.bool).index_fill(0, at, False)
    assert cosines[at].min() >= cosines[rest].max()


def test_random_entries_are_those_of_the_seed():
    U = V = torch.eye(12)
    drawn = [places(U, V, "random", 1, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("off_diag", [1, 2, 6])
def test_both_evaluations_of_a_band_agree_with_their_gradients(off_diag):
    at = places(torch.eye(7), torch.eye(7), "banded", off_diag, torch.Generator())
    h, m, w = torch.randn(2, 3, 7).double(), torch.randn(len(at)).double(), torch.randn(2, 3, 7).double()
    first, second = (
        torch.func.grad_and_value(lambda h, m, f=f: (f(h, m) * w).sum(), argnums=(0, 1))(h, m)
        for f in (lambda h, m: by_diagonals(h, m, at, off_diag), lambda h, m: times_entries(h, m, at))
    )
    torch.testing.assert_close(first, second, rtol=0, atol=1e-12)


def test_a_narrow_band_passes_the_kit(monkeypatch):
    monkeypatch.setattr(module, "NARROW", 1)  # the kit's layers are small
    check_variant(ll.SVFTConfig(pattern="banded", off_diag=2), skip=["counts"])


@pytest.mark.parametrize("cfg", [ll.SVFTConfig(pattern="top_k"), ll.SVFTConfig(pattern="top_k", off_diag=2, r=7)], ids=["all", "r"])
def test_square_layers_pass_the_kit_with_the_top_entries(cfg, monkeypatch):
    monkeypatch.setattr(_case, "_SIZES", ((24, 24),))
    check_variant(cfg, skip=COSTLY)


def test_the_arithmetic_of_a_narrow_band_is_counted():
    cfg, W = ll.SVFTConfig(pattern="banded"), ll.Frozen(torch.empty(384, 400))
    constants = {"U": torch.empty(384, 384), "V": torch.empty(384, 400), "at": torch.zeros(entries(384, "banded", 1), dtype=torch.int64)}
    W = W.with_constants(constants)
    known = {"i": 400, "o": 384, "r": None, "off_diag": 1, "pattern": "banded"}
    assert macs_per_token(cfg, cfg.init(W, torch.Generator()), W) == eval(cfg.macs, known) == 384 * (784 + 3)


@pytest.mark.parametrize("pattern", PATTERNS[:3])
def test_the_official_start_is_of_one_size_for_every_pattern(pattern):
    W, cfg = layer(60, 80), ll.SVFTConfig(pattern=pattern, off_diag=4, start="random")
    params, constants = derived(cfg, W)
    assert cfg.identity is None
    assert 0.5 < float(params["m"].norm()) < 0.9
    update = cfg.forward({"m": params["m"].double()}, W.with_constants(constants), torch.eye(80).double()) - W.weight.t() - W.bias
    assert float(update.norm()) == pytest.approx(float(params["m"].norm()), rel=1e-5)


def test_what_does_not_fit_a_layer_is_refused():
    with pytest.raises(ValueError, match=r"SVFTConfig.pattern: expected one for a weight of 9 by 14, found 'top_k'. Use \"banded\""):
        derived(ll.SVFTConfig(pattern="top_k"), layer(9, 14))
    with pytest.raises(ValueError, match=r"SVFTConfig.off_diag: expected less than 9, the number of directions, found 9"):
        derived(ll.SVFTConfig(pattern="banded", off_diag=9), layer(9, 14))
    with pytest.raises(ValueError, match=r"SVFTConfig.r: expected"):
        derived(ll.SVFTConfig(r=10), layer(9, 14))


@pytest.mark.parametrize("pattern", ["plain", "banded", "random"])
def test_many_vectors_are_those_of_the_update_multiplied_out(pattern, monkeypatch):
    torch.manual_seed(0)
    adapt = ll.build(torch.nn.Sequential(torch.nn.Linear(24, 40)), ll.SVFTConfig(pattern=pattern))
    params = ll.tree_map(lambda p: p + torch.randn_like(p), adapt.init(seed=0))
    x = torch.randn(200, 24)
    built = []
    updated_by = ll.Frozen.updated_by
    monkeypatch.setattr(ll.Frozen, "updated_by", lambda self, *args, **kw: built.append(1) or updated_by(self, *args, **kw))
    whole, parts = adapt(params, x), torch.cat([adapt(params, part) for part in x.split(10)])
    assert len(built) == 1  # ten vectors pass through the factors
    torch.testing.assert_close(whole - adapt.base(x), parts - adapt.base(x), rtol=1e-4, atol=1e-5)
