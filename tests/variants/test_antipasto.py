"""AntiPaSTO: every core against its weight written out, the angles and eigenvalues that the paper bounds, strengths, bases."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch

import lora_lite as ll
from cases import COSTLY, derived
from lora_lite.variants.antipasto import AntiPaSTOConfig, antipasto

f64 = torch.float64
SHAPES = [(14, 22), (22, 14)]  # (o, i)
ROTATIONS = [AntiPaSTOConfig(r=8, rotate_basis=b, angle_clamp=a) for b, a in itertools.product(("V", "U", "both"), ("element", "spectral"))]
CASES = [
    *ROTATIONS,
    AntiPaSTOConfig(r=8, rotate_basis="none"),
    AntiPaSTOConfig(r=8, block_size=2),
    AntiPaSTOConfig(r=8, block_size=8, max_rotation_angle=1.0),
    AntiPaSTOConfig(r=8, core="gain"),
    AntiPaSTOConfig(r=8, core="ablate"),
    AntiPaSTOConfig(r=8, core="ablate", k=3),
    AntiPaSTOConfig(r=8, core="arrow", block_size=3),
    AntiPaSTOConfig(r=8, core="dplr", k=2),
]


def name(cfg):
    options = {"rotation": f"{cfg.rotate_basis}-{cfg.angle_clamp}-{cfg.block_size}", "ablate": cfg.k}
    return f"{cfg.core}-{options.get(cfg.core, '')}" if isinstance(cfg, AntiPaSTOConfig) else None


def start(cfg, shape, stats=None):
    """Return a layer in float64 with the config's basis, and params moved off their start."""
    W = torch.randn(*shape, dtype=f64)
    params, constants = derived(cfg, ll.Frozen(W), stats)
    moved = {key: p.double() + 0.2 * torch.randn(p.shape, dtype=f64) for key, p in params.items()}
    return ll.Frozen(W, torch.randn(shape[0], dtype=f64), constants), moved


# The weights of the paper, written out.


def rotation(t, cfg, c):
    """Return the block-diagonal `R (r, r)` of eq. (7), an entry at a time; lora-lite's sign."""
    bound = 2 * math.tan(cfg.max_rotation_angle / 2)
    blocks = []
    for vector in t:
        A = torch.zeros(cfg.block_size, cfg.block_size, dtype=f64)
        for value, (k, l) in zip(vector, itertools.combinations(range(cfg.block_size), 2)):  # noqa: E741
            A[k, l], A[l, k] = value / 2, -value / 2
        norm = A.norm() / math.sqrt(2)
        A = bound * torch.tanh(A / bound) if cfg.angle_clamp == "element" else A * bound * torch.tanh(norm / bound) / norm
        eye = torch.eye(cfg.block_size, dtype=f64)
        blocks.append(torch.linalg.inv(eye - c * A / 2) @ (eye + c * A / 2))
    return torch.block_diag(*blocks)


def gains(g, c):
    return torch.diag(torch.where(c * g > 0, 1 + c * g, torch.exp(c * g)))


def core_matrix(cfg, params, S, c):
    """Return the matrix between `U` and `Vh` in the adapted weight, `(r, r)`."""
    r, S, eye = len(S), torch.diag(S), torch.eye(len(S), dtype=f64)
    if cfg.core == "rotation":
        sides = {"none": (), "both": params.get("t")}.get(cfg.rotate_basis, [params.get("t")])
        turns = dict(zip({"both": "VU"}.get(cfg.rotate_basis, cfg.rotate_basis), (rotation(t, cfg, c) for t in sides)))
        return turns.get("U", eye).T @ (S + c * torch.diag(params["delta_s"])) @ turns.get("V", eye)
    if cfg.core == "gain":
        return S @ gains(params["g"], c)
    if cfg.core == "ablate":
        Chat, _ = torch.linalg.qr(params["C"])
        return (eye - c * Chat @ torch.diag(params["alpha"]) @ Chat.T) @ S
    if cfg.core == "arrow":
        head = torch.eye(cfg.block_size, dtype=f64) + c * params["M"]
        return torch.block_diag(head, gains(params["g"], c)) @ S
    assert (cfg.core, r) == ("dplr", 8)
    return S @ gains(params["g"], c) + c * params["B"] @ params["A"]


@pytest.mark.parametrize("c", [1.0, -1.0, 0.0, 0.4, 1.6])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("cfg", CASES, ids=name)
def test_equals_the_dense_weight_at_every_strength(cfg, shape, c):
    W, params = start(cfg, shape)
    U, S, Vh = (W.constants[key] for key in ("U", "S", "Vh"))
    adapted = W.weight - U @ torch.diag(S) @ Vh + U @ core_matrix(cfg, params, S, c) @ Vh
    x = torch.randn(3, 2, shape[1], dtype=f64)
    got = cfg.forward(cfg.steer(params, c), W, x) - W(x)
    assert torch.allclose(got, x @ (adapted - W.weight).T, atol=1e-11)


@pytest.mark.parametrize("cfg", CASES, ids=name)
def test_passes_the_kit(cfg):
    ll.testing.check_variant(cfg, skip=COSTLY)


@pytest.mark.parametrize("cfg", CASES, ids=name)
def test_plain_weight_gives_the_same_and_the_zero_tree_nothing(cfg):
    W, params = start(cfg, (14, 22))
    x = torch.randn(3, 22, dtype=f64)
    options = {key: getattr(cfg, key) for key in ("core", "rotate_basis", "max_rotation_angle", "angle_clamp")}
    assert torch.allclose(antipasto(params, W.weight, x, **options) + W.bias, cfg.forward(params, W, x), atol=1e-12)
    assert torch.equal(cfg.forward({key: 0 * p for key, p in params.items()}, W, x), W(x))


def test_default_core_is_the_paper_rotation_of_inputs():
    cfg = AntiPaSTOConfig()
    params, constants = derived(cfg, ll.Frozen(torch.randn(260, 300)))
    assert {key: tuple(p.shape) for key, p in params.items()} == {"delta_s": (256,), "t": (64, 6)}
    assert {key: tuple(t.shape) for key, t in constants.items()} == {"U": (260, 256), "S": (256,), "Vh": (256, 300)}
    assert params["delta_s"].mean().item() == pytest.approx(4e-4, abs=1e-4)
    assert params["delta_s"].std().item() == pytest.approx(4e-4, rel=0.2)
    assert params["t"].abs().max() == 0


# Strengths.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("clamp", ["element", "spectral"])
@pytest.mark.parametrize("t", [0.0, 1e-6, 1e4])
def test_steering_is_finite_and_differentiable_at_the_extremes(t, clamp, dtype):
    cfg = AntiPaSTOConfig(r=8, angle_clamp=clamp)
    params, constants = derived(cfg, ll.Frozen(torch.randn(14, 22)))
    params = {key: p.to(dtype) for key, p in {**params, "t": torch.full_like(params["t"], t)}.items()}
    W, x = ll.Frozen(torch.randn(14, 22), None, constants), torch.randn(3, 22)

    def loss(params, c):
        return cfg.forward({key: p.float() for key, p in cfg.steer(params, c).items()}, W, x).square().sum()

    for c in (0.0, 0.5, 1.0, 2.0):
        grads = torch.func.grad(loss, argnums=(0, 1))(params, torch.tensor(c))
        assert all(g.isfinite().all() for g in (*grads[0].values(), grads[1]))


# Ablation and gains.


@pytest.mark.parametrize(("c", "eigenvalues"), [(1.0, (0.6, 0.1, 1.0)), (2.0, (0.2, -0.8, 1.0)), (-1.0, (1.4, 1.9, 1.0))])
def test_ablation_scales_its_directions_and_no_other(c, eigenvalues):
    cfg = AntiPaSTOConfig(r=8, core="ablate", k=2)
    W, params = start(cfg, (14, 22))
    params = {**params, "alpha": torch.tensor([0.4, 0.9], dtype=f64)}
    U, S, Vh = (W.constants[key] for key in ("U", "S", "Vh"))
    update = cfg.forward(cfg.steer(params, c), ll.Frozen(W.weight, None, W.constants), torch.eye(22, dtype=f64)).T - W.weight
    core = torch.eye(8, dtype=f64) + U.T @ update @ Vh.T @ torch.diag(1 / S)
    want = torch.tensor([*eigenvalues[:2], *[1.0] * 6], dtype=f64).sort().values
    assert torch.allclose(torch.linalg.eigvalsh((core + core.T) / 2), want, atol=1e-11)
    assert torch.allclose(core, core.T, atol=1e-11)
    if 0 <= c <= 2:  # no direction grows
        assert torch.linalg.matrix_norm(core, 2) <= 1 + 1e-12


def test_update_projects_alpha_and_nothing_else():
    cfg = AntiPaSTOConfig(r=8, core="ablate", k=3)
    tree = {"layer": {"C": torch.randn(8, 3), "alpha": torch.tensor([-0.2, 0.3, 1.7])}}
    new, state = cfg.update(tree, None, None)
    assert state is None
    assert new["layer"]["alpha"].tolist() == pytest.approx([0.0, 0.3, 1.0])
    assert new["layer"]["C"] is tree["layer"]["C"]
    assert tree["layer"]["alpha"].tolist() == pytest.approx([-0.2, 0.3, 1.7])


def test_gains_never_turn_a_singular_value_around():
    cfg = AntiPaSTOConfig(r=8, core="gain")
    W, _ = start(cfg, (8, 22))
    g = torch.linspace(-30, 3, 8, dtype=f64)
    adapted = cfg.forward({"g": g}, ll.Frozen(W.weight, None, W.constants), torch.eye(22, dtype=f64)).T
    values = torch.diagonal(W.constants["U"].T @ adapted @ W.constants["Vh"].T)
    assert torch.allclose(values, W.constants["S"] * torch.where(g > 0, 1 + g, g.exp()), atol=1e-11)
    assert values.min() > 0


# Bases.


def inputs(i):
    """Return correlated inputs with unequal scales, and their statistics."""
    x = torch.randn(400, i, dtype=f64) @ torch.randn(i, i, dtype=f64) * torch.linspace(0.1, 2.0, i, dtype=f64)
    return x, SimpleNamespace(second_moment=x.T @ x / len(x))


@pytest.mark.parametrize("core", ["rotation", "gain", "ablate", "arrow", "dplr"])
@pytest.mark.parametrize("basis", ["wanda", "corda", "asvd"])
def test_oriented_basis_serves_every_core(basis, core):
    cfg = AntiPaSTOConfig(r=8, core=core, basis=basis, block_size=4)
    _, stats = inputs(22)
    W, params = start(cfg, (14, 22), stats)
    U, S, P = (W.constants[key] for key in ("U", "S", "Vh"))
    assert torch.allclose(U * S @ P, U @ U.T @ W.weight, atol=1e-10)
    x = torch.randn(5, 22, dtype=f64)
    adapted = U @ (core_matrix(cfg, params, S, 1.0) - torch.diag(S)) @ P
    assert torch.allclose(cfg.forward(params, W, x) - W(x), x @ adapted.T, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_wanda_keeps_the_directions_of_the_largest_scores_in_order(shape):
    x, stats = inputs(shape[1])
    W, _ = start(AntiPaSTOConfig(r=4, core="gain", basis="wanda"), shape, stats)
    _, S, Vh = torch.linalg.svd(W.weight, full_matrices=False)
    scores = [S[j].item() * (x @ Vh[j]).square().mean().sqrt().item() for j in range(len(S))]
    keep = sorted(sorted(range(len(S)), key=lambda j: -scores[j])[:4])
    assert keep != [0, 1, 2, 3]
    assert torch.allclose(W.constants["S"], S[keep], atol=1e-10)
    assert torch.allclose((W.constants["Vh"] @ Vh[keep].T).abs(), torch.eye(4, dtype=f64), atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("basis", ["corda", "asvd"])
def test_whitened_basis_is_the_svd_of_the_weight_times_the_root_of_the_moments(basis, shape):
    _, stats = inputs(shape[1])
    W, _ = start(AntiPaSTOConfig(r=4, core="gain", basis=basis), shape, stats)
    C = stats.second_moment if basis == "corda" else torch.diag(stats.second_moment.diagonal())
    values, vectors = torch.linalg.eigh(C + 1e-3 * torch.eye(shape[1], dtype=f64))
    root, inverse = (vectors * values**power @ vectors.T for power in (0.5, -0.5))
    U, S, Vh = torch.linalg.svd(W.weight @ root, full_matrices=False)
    assert torch.allclose(W.constants["S"], S[:4], atol=1e-9)
    signs = torch.diagonal(U[:, :4].T @ W.constants["U"]).sign()
    assert torch.allclose(W.constants["U"], U[:, :4] * signs, atol=1e-9)
    assert torch.allclose(W.constants["Vh"], signs[:, None] * Vh[:4] @ inverse, atol=1e-9)


@pytest.mark.parametrize("basis", ["svd", "wanda", "corda", "asvd"])
def test_found_basis_is_kept_without_data_or_decomposition(basis, monkeypatch):
    cfg = AntiPaSTOConfig(r=8, basis=basis)
    W, _ = start(cfg, (14, 22), inputs(22)[1])
    monkeypatch.setattr(torch.linalg, "svd", None)
    assert set(cfg.init(W, torch.Generator())) == {"delta_s", "t"}
    assert cfg.calibrated == (basis != "svd")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"core": "rotate"}, r'AntiPaSTOConfig.core: expected one of "rotation", .*"dplr", found \'rotate\'. Use e.g. core="rotation"'),
        ({"basis": "pca"}, r'AntiPaSTOConfig.basis: expected one of "svd", .*found \'pca\''),
        ({"r": 9}, r"AntiPaSTOConfig.r: expected a multiple of block_size=4, found 9"),
        ({"r": 8, "block_size": 1}, r"AntiPaSTOConfig.block_size: expected an integer >= 2, found 1"),
        ({"max_rotation_angle": 3.2}, r"AntiPaSTOConfig.max_rotation_angle: expected a number in \(0.0, 3.14.*\), found 3.2"),
        ({"max_rotation_angle": 0.0}, r"AntiPaSTOConfig.max_rotation_angle: expected a number in \(0.0.*found 0.0"),
        ({"core": "ablate", "r": 2, "k": 3}, r"AntiPaSTOConfig.k: expected at most r=2, found 3"),
        ({"core": "arrow", "r": 8}, r"AntiPaSTOConfig.block_size: expected less than r=8, found 8"),
    ],
)
def test_config_errors_name_the_field(options, message):
    with pytest.raises(ValueError, match=message):
        AntiPaSTOConfig(**options)


@pytest.mark.parametrize("stats", [None, SimpleNamespace(second_moment=torch.eye(14))], ids=["none", "of-another-width"])
def test_calibrated_basis_asks_for_its_statistics(stats):
    found = "none" if stats is None else r"shape \(14, 14\)"
    with pytest.raises(
        ValueError, match=rf'basis: expected, for "corda", stats.second_moment of shape \(22, 22\).*found {found}.*basis="svd"'
    ):
        AntiPaSTOConfig(r=8, basis="corda").constants(ll.Frozen(torch.randn(14, 22)), torch.Generator(), stats)
    with pytest.raises(ValueError, match=r"AntiPaSTOConfig.r: expected at most min\(i, o\) = 14 .* found 256. Lower r"):
        AntiPaSTOConfig().constants(ll.Frozen(torch.randn(14, 22)), torch.Generator())
