"""Starts from leading singular vectors: the stated bounds hold against float64, and where they are not met the exact path is taken."""

import dataclasses
import math

import pytest
import torch
from torch import nn

import lora_lite as ll
from cases import FIRST, Blocks, build_any, named
from lora_lite.core import certificate, filtered, krylov, leading
from lora_lite.core.certificate import certified
from lora_lite.core.leading import leading_eigenpairs, leading_svd
from lora_lite.core.linalg import truncated_svd
from lora_lite.layers.identity import laid_out_as

f64 = torch.float64
SPECTRA = {
    "power": lambda j: 1 / j,
    "slow power": lambda j: j**-0.4,
    "exponential": lambda j: 0.8**j,
    "steep": lambda j: 0.2**j,
    "flat": torch.ones_like,
    "nearly flat": lambda j: 1 - 1e-3 * j / len(j),
    "clustered at the cut": lambda j: torch.where((j > 4) & (j < 14), 0.5 + 1e-9 * j, 1 / j),
    "close at the cut": lambda j: torch.where((j > 4) & (j < 14), 0.5 - 1e-4 * j, 1 / j),
    "clustered at the top": lambda j: torch.where(j <= 7, 1.0, 0.3 / j),
    "a floor": lambda j: torch.where(j <= 8, 1 / j, 1e-3),
    "of a lower rank": lambda j: torch.where(j <= 5, 1 / j, 0.0),
    "of that rank": lambda j: torch.where(j <= 8, 1 / j, 0.0),
}


def matrix_of(spectrum, o, i, seed=0):
    g = torch.Generator().manual_seed(seed)
    n = min(o, i)
    U, V = (torch.linalg.qr(torch.randn(k, n, generator=g, dtype=f64)).Q for k in (o, i))
    return U * SPECTRA[spectrum](torch.arange(1, n + 1, dtype=f64)) @ V.t()


def sine(A, B):
    """Return the Frobenius norm of the sines between the columns' spans."""
    return float((A - B @ (B.t() @ A)).norm())


@pytest.mark.parametrize("shape", [(256, 256), (256, 420), (400, 256)], ids=["square", "wide", "tall"])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_stated_bounds_hold_against_float64(spectrum, shape):
    for r, seed in ((8, 0), (3, 1), (20, 2)):
        W = matrix_of(spectrum, *shape, seed).float()
        found = certified(W, r)
        if r == 8:  # float64 tells all but equal values apart
            assert spectrum == "flat" or found is not None
        if found is None:
            continue
        start, (U, S, Vh) = found
        exact_U, exact_S, exact_Vh = torch.linalg.svd(W.double(), full_matrices=False)
        best = exact_U[:, :r] * exact_S[:r] @ exact_Vh[:r]
        true = float((U.double() * S.double() @ Vh.double() - best).norm() / best.norm())
        assert true <= start.error <= certificate.TOLERANCE
        if math.isfinite(start.angle):
            assert sine(U.double(), exact_U[:, :r]) <= start.angle + 1e-6  # of float32's rounding, against vectors of norm 1
            assert sine(Vh.double().t(), exact_Vh[:r].t()) <= start.angle + 1e-6


@pytest.mark.parametrize("spectrum", ["power", "flat", "slow power"])
def test_bounds_do_not_depend_on_the_size_of_the_numbers_or_their_dtype(spectrum):
    W = matrix_of(spectrum, 256, 300)
    for factor, dtype in ((1e-12, torch.float32), (1e12, torch.float32), (1.0, torch.bfloat16), (1.0, torch.float16), (1e-100, f64)):
        given = (W * factor).to(dtype)
        found = certified(given, 6)
        assert spectrum == "flat" or found is not None
        if found is not None:
            start, (U, S, Vh) = found
            assert U.dtype == S.dtype == Vh.dtype == torch.promote_types(dtype, torch.float32)
            exact_U, exact_S, exact_Vh = torch.linalg.svd(given.double(), full_matrices=False)
            best = exact_U[:, :6] * exact_S[:6] @ exact_Vh[:6]
            assert float((U.double() * S.double() @ Vh.double() - best).norm() / best.norm()) <= start.error


@pytest.mark.parametrize("shape", [(576, 576), (700, 576)])
def test_flat_spectra_of_wide_layers_are_within_the_bound_of_a_longer_iteration(shape):
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    U, S, Vh = torch.linalg.svd(drawn, full_matrices=False)
    W = U * torch.arange(1, len(S) + 1) ** -0.1 @ Vh
    start, (U16, S16, Vh16) = certified(W, 16)
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    best = U[:, :16] * S[:16] @ Vh[:16]
    assert float((U16.double() * S16.double() @ Vh16.double() - best).norm() / best.norm()) <= start.error <= certificate.TOLERANCE


def test_filters_take_less_than_half_of_the_products_of_plain_powers(monkeypatch):
    products = []
    for name in ("square", "chebyshev"):
        own = getattr(krylov.Square, name)
        monkeypatch.setattr(krylov.Square, name, lambda self, *given, own=own: products.append(1) or own(self, *given))
    U, _, Vh = torch.linalg.svd(torch.randn(576, 576, generator=torch.Generator().manual_seed(0)))
    values = torch.arange(1.0, 577) ** -0.1
    W = U * (values / values.norm()) @ Vh
    square, counts = krylov.Matrix(W, torch.float32).squared(), []
    for _ in range(2):
        products.clear()
        ritz = filtered.filtered(square, 16, W.device, 1e-3, 1e-3, lambda ritz: True)
        exact = torch.linalg.svd(W.double()).U[:, :16]
        assert sine(ritz.vectors(16).double().t(), exact) <= 2 * ritz.angle(16) < 1e-2
        counts.append(len(products))
        monkeypatch.setattr(filtered, "_degree", lambda *given: 1)
    assert 2 * counts[0] < counts[1]


@pytest.mark.parametrize("shape", [(900, 900), (830, 1000)])
def test_wide_layers_take_an_iteration_of_their_own(shape):
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    U, S, Vh = torch.linalg.svd(drawn, full_matrices=False)
    assert certified(U @ Vh, 4) is None  # all singular values are one
    W = U * torch.arange(1, len(S) + 1) ** -0.5 @ Vh
    start, (U4, S4, Vh4) = certified(W, 4)
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    best = U[:, :4] * S[:4] @ Vh[:4]
    assert float((U4.double() * S4.double() @ Vh4.double() - best).norm() / best.norm()) <= start.error <= certificate.TOLERANCE


@pytest.mark.parametrize("layout", ["wide", "tall", "in parts", "tall, in parts"])
def test_square_of_a_matrix_is_its_product_with_its_transpose(layout, monkeypatch):
    W = torch.randn(37, 100, generator=torch.Generator().manual_seed(0), dtype=f64)
    if "parts" in layout:
        monkeypatch.setattr(krylov, "WHOLE", 1000)
    given = (W.t() if "tall" in layout else W).contiguous()
    A = krylov.Matrix(given.float() if "parts" in layout else given, f64, 0.5)
    W = W.float().double() if "parts" in layout else W
    X = torch.randn(5, 37, dtype=f64)
    for square in (A.square, A.squared().square):
        torch.testing.assert_close(square(X), X @ (0.25 * W @ W.t()))


@pytest.mark.parametrize("gap", [3e-3, 3e-4, 1e-4, 1e-5])
def test_gap_too_small_for_float32_is_proved_by_a_wider_one_after_it(gap, monkeypatch):
    """Of the whole decompositions none is needed: the vectors up to the wider gap are known, and float64 tells them apart."""
    monkeypatch.setattr(krylov.Square, "whole", None)
    seen, bound = [], certificate._by_wider_gap
    monkeypatch.setattr(certificate, "_by_wider_gap", lambda *given: seen.append(given[-1]) or bound(*given))
    r = 9
    for wide, seed in ((0.3, 0), (0.1, 1)):
        values = torch.arange(1, 257, dtype=f64) ** -0.5
        values[r:] = values[r - 1] * (1 - gap)
        values[r + 3 :] *= (1 - wide) * torch.arange(1, 257 - r - 3) ** -0.2
        g = torch.Generator().manual_seed(seed)
        U, V = (torch.linalg.qr(torch.randn(k, 256, generator=g, dtype=f64)).Q for k in (256, 300))
        W = (U * values @ V.t()).float()
        start, (U, S, Vh) = certified(W, r)
        exact_U, exact_S, exact_Vh = torch.linalg.svd(W.double(), full_matrices=False)
        best = exact_U[:, :r] * exact_S[:r] @ exact_Vh[:r]
        assert float((U.double() * S.double() @ Vh.double() - best).norm() / best.norm()) <= start.error <= certificate.TOLERANCE
        assert sine(U.double(), exact_U[:, :r]) <= start.angle + 1e-6
        assert sine(Vh.double().t(), exact_Vh[:r].t()) <= start.angle + 1e-6
    assert gap > 1e-3 or seen == [r, r]


@pytest.mark.parametrize("size", [1e-6, 1e-5, 3e-5])
def test_bound_by_a_wider_gap_holds_where_the_second_order_counts(size):
    """Vectors that are off by a known angle, which by the second order mixes the third and the fourth: their gap is a millionth."""
    n, r, p = 40, 3, 6
    values = torch.cat([torch.tensor([1.0, 0.9, 0.8, 0.8 - 1e-6, 0.7, 0.65], dtype=f64), torch.linspace(0.3, 0.01, n - p, dtype=f64)])
    A, exact = torch.diag(values), torch.eye(n, r, dtype=f64)
    best = torch.diag(torch.where(torch.arange(n) < r, values, 0.0))
    for seed in range(4):
        g = torch.Generator().manual_seed(seed)
        rows = torch.eye(n, dtype=f64)[:p] + size * torch.randn(p, n, generator=g, dtype=f64)
        U, S, V, residual = certificate._triplets(krylov.Matrix(A, f64), rows)
        rest = float(torch.linalg.matrix_norm(A - U * S @ V.t(), 2))
        start = certificate._by_wider_gap(S, residual, rest, r)
        assert float((U[:, :r] * S[:r] @ V[:, :r].t() - best).norm() / S[:r].norm()) <= start.error < 1
        assert max(sine(U[:, :r], exact), sine(V[:, :r], exact)) <= start.angle


@pytest.mark.parametrize("dtype", [torch.float32, f64])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_bound_of_the_rest_of_a_whole_decomposition_is_above_it(spectrum, dtype):
    """Where the rest is next to nothing, rounding gives the square of its norm any value, zero too."""
    for seed, r in ((0, 5), (1, 8), (2, 40)):
        W = matrix_of(spectrum, 200, 260, seed)
        W = (W / W.norm()).to(dtype)
        square = krylov.Matrix(W, dtype).squared()
        assert certificate._rest(square, square.whole(), W, r) >= torch.linalg.svdvals(W.double())[r]


@pytest.mark.parametrize("spectrum", sorted(SPECTRA.keys() - {"flat", "nearly flat"}))  # of these the iteration finds no end
def test_bound_of_the_rest_has_room_for_the_rounding_of_the_square(spectrum):
    W, r = matrix_of(spectrum, 200, 3000), 8
    W = (W / W.norm()).float()
    square = krylov.Matrix(W, torch.float32).squared()
    rounding = torch.linalg.matrix_norm(square.square(torch.eye(200)).double() - W.double() @ W.double().t(), 2)
    ritz = filtered.filtered(square, r, W.device, 1.0, 1.0, lambda ritz: True)
    rows = ritz.vectors(ritz.apart(r))
    rest, without = (certificate._rest(square, found, rows, r) for found in (ritz, ritz._replace(noise=0.0)))
    assert rest**2 >= without**2 + 2 * float(rounding)


def test_new_vectors_are_orthonormal_where_next_to_nothing_of_the_products_is_new():
    g = torch.Generator().manual_seed(0)
    rows = torch.linalg.qr(torch.randn(60, 20, generator=g)).Q.t()
    Y = torch.randn(4, 20, generator=g) @ rows + 1e-7 * torch.randn(4, 60, generator=g)
    Q, coefficients = krylov._across(rows, Y, Y @ rows.t())
    torch.testing.assert_close(torch.cat([rows, Q]) @ torch.cat([rows, Q]).t(), torch.eye(24), rtol=0, atol=1e-5)
    assert coefficients.norm() < 1e-5


def test_triplets_have_the_signs_and_the_layout_of_the_exact_ones():
    W = matrix_of("power", 300, 256).float()
    for got, want in zip(leading_svd(W, 5), truncated_svd(W, 5), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        assert got.is_contiguous()


def test_direction_that_the_iteration_missed_is_found_by_the_probes(monkeypatch):
    W = matrix_of("power", 256, 300).float()
    assert certified(W, 6) is not None
    whole = krylov.Ritz.vectors

    def blind(ritz, p):  # as if the start had had no part along the third vector
        return torch.cat([whole(ritz, 2), whole(ritz, p + 1)[3:]])

    def shifted(*given):
        ritz = filtered.filtered(*given)
        return krylov.Ritz(ritz.rows, ritz.inner, [*ritz.values[:2], *ritz.values[3:]], [*ritz.residuals[:2], *ritz.residuals[3:]])

    monkeypatch.setattr(krylov.Ritz, "vectors", blind)
    monkeypatch.setattr(certificate, "filtered", shifted)
    assert certified(W, 6) is None


@pytest.mark.parametrize(
    "W", [torch.zeros(256, 256), torch.full((256, 256), torch.nan), torch.eye(300)[:256], torch.diag(torch.rand(256) > 0.9).float()]
)
def test_matrices_without_leading_directions_take_the_exact_path(W):
    with leading.noted() as starts:
        if W.isnan().any():
            with pytest.raises(torch.linalg.LinAlgError):
                leading_svd(W, 4)
            return
        got = leading_svd(W, 4)
    assert starts == [certificate.EXACT]
    assert all(torch.equal(a, b) for a, b in zip(got, truncated_svd(W, 4), strict=True))


def test_start_draws_from_a_generator_of_its_own():
    W = matrix_of("power", 256, 256).float()
    torch.manual_seed(0)
    before, first = torch.get_rng_state(), leading_svd(W, 4)
    torch.randn(5)
    second = leading_svd(W, 4)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    torch.manual_seed(0)
    leading_svd(W, 4)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.autocast("cpu", torch.bfloat16):
        third = leading_svd(W, 4)
    assert all(torch.equal(a, b) for a, b in zip(first, third, strict=True))


def test_eigenpairs_are_those_of_the_whole_decomposition():
    V = torch.linalg.qr(torch.randn(300, 300, dtype=f64)).Q
    C = V * (1 / torch.arange(1, 301, dtype=f64) ** 2) @ V.t()
    values, vectors, start = leading_eigenpairs(C, 6)
    assert start.path == "krylov"
    torch.testing.assert_close(values, 1 / torch.arange(1, 7, dtype=f64) ** 2, rtol=1e-8, atol=0)
    assert sine(vectors, V[:, :6]) <= start.angle
    exact = leading_eigenpairs(C, 6, "exact")
    assert exact[2] == certificate.EXACT
    assert torch.equal(exact[1], torch.linalg.eigh(C).eigenvectors.flip(1)[:, :6])


# In an adapted model


def model_of(spectrum="power"):
    model = nn.Sequential(nn.Linear(256, 300, bias=False), nn.ReLU(), nn.Linear(300, 8))
    for p in model[2].parameters():
        p.data = 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    model[0].weight.data = matrix_of(spectrum, 300, 256).float()
    return model


X = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
CONFIGS = {
    "pissa": ll.PiSSAConfig(r=4),
    "lora_xs": ll.LoRAXSConfig(r=4),
    "ssvd": ll.SSVDConfig(r=4),
    "svft": ll.SVFTConfig(r=4),
    "psoft": ll.PSOFTConfig(r=4, svd="auto"),
    "antipasto": ll.AntiPaSTOConfig(r=4, core="gain"),
    "tinylora": ll.TinyLoRAConfig(r=2),
    "abba": ll.ABBAConfig(r1=4, r2=2),
    "asvd": ll.ASVDConfig(r=4),
    "corda": ll.CorDAConfig(r=4),
    "antipasto-asvd": ll.AntiPaSTOConfig(r=4, core="gain", basis="asvd"),
}


def built(cfg, spectrum="power"):
    calibration = [X] if cfg.calibrated or getattr(cfg, "basis", "svd") != "svd" else None
    return ll.build(model_of(spectrum), cfg, calibration=calibration)


@pytest.mark.parametrize("name", CONFIGS)
def test_variants_take_the_fast_path_and_say_so(name, tmp_path):
    cfg = dataclasses.replace(CONFIGS[name], target_names="^0$")
    adapt = built(cfg)
    assert adapt.starts["0"].path == "krylov"
    assert 0 < adapt.starts["0"].error <= certificate.TOLERANCE
    assert "1 by a Krylov iteration, each within" in adapt.summary()
    exact = built(dataclasses.replace(cfg, svd="exact"))
    assert exact.starts == {"0": certificate.EXACT}
    assert "SVD of the starts: 1 exact" in exact.summary(full=True)
    fast = {**adapt.constants["0"], **adapt.init()["0"]}
    for leaf, want in {**exact.constants["0"], **exact.init()["0"]}.items():
        signs = (fast[leaf] * want).sum(-1, keepdim=True).sign() if name == "psoft" and leaf == "A" else 1
        if name != "psoft" or leaf != "B":
            torch.testing.assert_close(fast[leaf] * signs, want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))
    params = adapt.init()
    params = ll.tree_map(lambda p: p + 0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)), params)
    ll.save(adapt, params, tmp_path / "a.safetensors")
    again, read = ll.load(model_of(), tmp_path / "a.safetensors")
    assert again.starts == adapt.starts
    assert again.configs == adapt.configs
    assert torch.equal(again(read, X), adapt(params, X))


def test_small_layers_and_flat_weights_take_the_exact_path():
    model = model_of()
    model[0].weight.data = torch.eye(300, 256)
    adapt = ll.build(model, ll.PiSSAConfig(r=4))
    assert adapt.starts == {"0": certificate.EXACT, "2": certificate.EXACT}
    assert "SVD of the starts: 2 exact" in adapt.summary()
    assert ll.build(model_of(), ll.LoRAConfig(r=4)).starts == {}
    assert "SVD" not in ll.build(model_of(), ll.OLoRAConfig(r=4)).summary()
    kept = built(ll.CorDAConfig(r=4, method="kpm", target_names="^0$"))
    assert kept.starts == {"0": certificate.EXACT}  # the smallest are not among the leading ones


def test_layers_that_share_a_statistic_each_have_their_start():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = nn.Linear(256, 16), nn.Linear(256, 8)

        def forward(self, x):
            return self.q(x).sum(-1) + self.k(x).sum(-1)

    inputs = torch.randn(600, 256) @ matrix_of("power", 256, 256).float()
    adapt = ll.build(Both(), ll.EVAConfig(r=4), calibration=[inputs])
    assert set(adapt.starts) == {"q", "k"}
    assert {start.path for start in adapt.starts.values()} == {"krylov"}
    exact = ll.build(Both(), ll.EVAConfig(r=4, svd="exact"), calibration=[inputs])
    assert {start.path for start in exact.starts.values()} == {"exact"}
    assert sine(adapt.constants["q"]["A0"].double().t(), exact.constants["q"]["A0"].double().t()) < 2e-3


def test_maps_of_one_layer_state_the_largest_bound():
    starts = [certificate.Start("krylov", 1e-4, 1e-3), certificate.EXACT, certificate.Start("krylov", 2e-5, math.inf)]
    assert leading.worst(starts) == certificate.Start("krylov", 1e-4, math.inf)


def test_conversion_to_lora_loses_nothing_on_the_fast_path():
    adapt = ll.build(model_of(), ll.LoRAConfig(r=4, target_names="^0$"))
    params = {"0": {leaf: torch.randn(p.shape) for leaf, p in adapt.init()["0"].items()}}
    _, _, errors = ll.to_lora(adapt, params, r=8)
    assert errors["0"] < 1e-5


def test_files_of_peft_rest_on_the_exact_factors(tmp_path):
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(model_of(), peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0"], init_lora_weights="pissa"))
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(0.02 * torch.randn(p.shape))
    theirs.save_pretrained(tmp_path / "pissa")
    adapt, params = ll.from_peft(model_of(), tmp_path / "pissa")
    assert adapt.starts == {"0": certificate.EXACT}
    assert adapt.configs[0].svd == "exact"
    update = theirs.eval()(X) - model_of()(X)
    assert update.detach().abs().max() > 1e-2
    torch.testing.assert_close(adapt(params, X) - adapt.base(X), update, rtol=1e-4, atol=1e-4 * float(update.detach().abs().max()))


def test_psoft_has_files_of_peft_for_the_exact_factors_alone(tmp_path):
    psoft = built(CONFIGS["psoft"])
    with pytest.raises(ValueError, match='svd="auto": the file holds R alone'):
        ll.to_peft(psoft, psoft.init(), tmp_path / "psoft")


def test_norm_of_a_large_matrix_has_the_digits_of_float32():
    matrix = torch.randn(2048, 2048)
    assert certificate.frobenius(matrix) == pytest.approx(float(matrix.double().norm()), rel=1e-7)


@pytest.mark.parametrize("row", FIRST, ids=named)
def test_constants_are_laid_out_as_a_file_gives_them(row):
    torch.manual_seed(0)
    adapt = build_any(Blocks().eval(), row.cfg, [torch.randn(40, 7, 48)])
    assert all(leaf.is_contiguous() for leaf in ll.tree_leaves(adapt.constants))


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (1, 0, 3, 2)], ids=["plain", "channels last", "transposed"])
def test_a_tensor_takes_the_layout_of_the_layers_own(order):
    own = torch.empty([(3, 4, 5, 6)[d] for d in order]).permute([order.index(d) for d in range(4)])
    t = torch.randn(6, 5, 4, 3).permute(3, 2, 1, 0)
    got = laid_out_as(own, t)
    assert got.stride() == own.stride()
    assert torch.equal(got, t)
    assert torch.equal(torch.func.vmap(lambda t: laid_out_as(own, t))(torch.stack([t, 2 * t]))[1], 2 * t)
