"""EVA: its directions against a PCA of the same tokens and against PEFT's, its options, and what it refuses."""

import copy

import peft
import pytest
import torch
from torch import nn

import lora_lite as ll
from lora_lite.variants.eva import EVAConfig

f64 = torch.float64


def pca(x, r, center=True):
    """Return the first right singular vectors `(r, i)` and singular values of the stacked tokens, in float64."""
    x = x.double()
    _, S, Vh = torch.linalg.svd(x - x.mean(0) if center else x, full_matrices=False)
    return Vh[:r], S[:r]


def cosine(A, B):
    """Return the smallest canonical cosine between the spans of the rows."""
    bases = [torch.linalg.qr(M.double().T).Q for M in (A, B)]
    return float(torch.linalg.svdvals(bases[0].T @ bases[1]).min())


def tokens(n=400, i=24):
    """Return tokens `(n, i)` whose mean is not zero and whose variances fall."""
    return torch.randn(n, i) * 0.8 ** torch.arange(i) @ torch.linalg.qr(torch.randn(i, i)).Q + torch.randn(i)


@pytest.mark.parametrize("center", [True, False])
def test_start_spans_the_principal_directions_of_all_tokens(center):
    x = tokens()
    adapt = ll.build(nn.Sequential(nn.Linear(24, 32)), EVAConfig(r=6, center=center), calibration=x.split(64))
    A = adapt.init(seed=0)["0"]["A"]
    want, _ = pca(x, 6, center)
    assert cosine(A, want) > 1 - 1e-4
    assert ((A.double() * want).sum(1).abs() > 1 - 1e-4).all()  # each direction in its place
    assert torch.allclose(A @ A.T, torch.eye(6), atol=1e-5)
    assert (A.gather(1, A.abs().argmax(1, keepdim=True)) > 0).all()
    other, _ = pca(x, 6, not center)
    assert cosine(A, other) < 0.99


def test_whitening_divides_by_the_root_of_the_singular_value():
    x = tokens().double()
    stats = ll.Statistics().add(x)
    W = ll.Frozen(torch.randn(8, 24, dtype=f64))
    plain, white = (EVAConfig(r=5, whiten=whiten).constants(W, torch.Generator(), stats)["A0"] for whiten in (False, True))
    assert torch.allclose(white * pca(x, 5)[1].sqrt()[:, None], plain, atol=1e-10)


class WithConstant(nn.Module):
    """A layer whose inputs vary beside one whose inputs are all the same, as those of a bias token."""

    def __init__(self):
        super().__init__()
        self.varied, self.same = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x):
        return self.varied(x) + self.same(torch.ones_like(x))


def test_layers_whose_inputs_never_vary_get_no_rank():
    data = [torch.randn(9, 6)]
    adapt = ll.build(WithConstant(), EVAConfig(r=2, rho=2.0), calibration=data)
    assert {path: len(leaves["A"]) for path, leaves in adapt.init().items()} == {"varied": 4}


def test_directions_without_variance_are_not_whitened():
    data = [torch.randn(9, 6)]
    with pytest.raises(ValueError, match=r"EVAConfig\.whiten: expected inputs that vary along r=2 directions.*found 0") as e:
        ll.build(WithConstant(), EVAConfig(r=2, whiten=True), calibration=data)
    assert any('at target "same"' in note for note in e.value.__notes__)
    params = ll.build(WithConstant(), EVAConfig(r=2, whiten=True, exclude_names="same"), calibration=data).init()
    assert params["varied"]["A"].isfinite().all()


@pytest.mark.parametrize("whiten", [False, True])
def test_start_is_pefts(tiny, whiten):
    model, _ = tiny("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(0.75 ** torch.arange(32)).mul_(20)  # PEFT's directions settle only where variances differ
    g = torch.Generator().manual_seed(0)
    mask = torch.ones(16, 40, dtype=torch.long)
    mask[::2, 30:] = 0
    ids = torch.randint(3, 64, (16, 40), generator=g)
    labels = ids.masked_fill(torch.arange(40) < 5, -100)
    batches = [{"input_ids": ids, "attention_mask": mask, "labels": labels}]
    cfg = EVAConfig(r=3, whiten=whiten, target_names=("_proj$",))
    starts = ll.build(model, cfg, calibration=batches).init(seed=0)
    theirs = peft.LoraConfig(r=3, target_modules="all-linear", init_lora_weights="eva", eva_config=peft.EvaConfig(rho=1.0, whiten=whiten))
    wrapped = peft.get_peft_model(model, theirs, low_cpu_mem_usage=True)
    peft.initialize_lora_eva_weights(wrapped, batches, show_progress_bar=False)
    for path, leaves in starts.items():
        want = wrapped.base_model.model.get_submodule(path).lora_A["default"].weight.detach()
        assert cosine(leaves["A"], want) > 0.9998, path
        # Whitening, PEFT divides once more for each layer that shares the input, and by what grows with each pass over the same data.
        if not whiten or path.endswith(("o_proj", "down_proj")):
            passes = round(float(leaves["A"][0].norm() / want[0].norm()) ** 4)
            assert passes in ((2, 3) if whiten else (1,)), path
            want = want * passes**0.25
            assert torch.allclose(leaves["A"], want, atol=0.02 * float(want.abs().max())), path  # each direction, with its sign


def test_redistributed_ranks_are_pefts(tiny, tmp_path):
    model, _ = tiny("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(0.75 ** torch.arange(32)).mul_(20)
    batches = [{"input_ids": torch.randint(3, 64, (16, 40), generator=torch.Generator().manual_seed(0))}]
    adapt = ll.build(model, EVAConfig(r=2, rho=2.0, alpha=4.0, target_names=(r"(o|down)_proj$", "gate_proj$")), calibration=batches)
    ours = {path: leaves["A"].shape[0] for path, leaves in adapt.init(seed=0).items()}
    theirs = peft.LoraConfig(
        **{
            "r": 2,
            "target_modules": ["o_proj", "down_proj", "gate_proj"],
            "init_lora_weights": "eva",
            "eva_config": peft.EvaConfig(rho=2.0),
        }
    )
    wrapped = peft.get_peft_model(copy.deepcopy(model), theirs, low_cpu_mem_usage=True)
    peft.initialize_lora_eva_weights(wrapped, batches, show_progress_bar=False)
    ranks = {path: m.r["default"] for path, m in wrapped.base_model.model.named_modules() if hasattr(m, "lora_A") and m.lora_A}
    assert len(set(ours.values())) > 1, "no rank has moved"
    assert ours == ranks
    assert sum(ours.values()) == 2 * 6
    assert {cfg.alpha / cfg.r for cfg in adapt.configs} == {2.0}
    ll.save(adapt, adapt.init(seed=0), tmp_path / "a.safetensors")
    again, params = ll.load(model, tmp_path / "a.safetensors")
    assert {path: leaves["A"].shape[0] for path, leaves in params.items()} == ours
    assert again.configs == adapt.configs
    ll.to_peft(adapt, adapt.init(seed=0), tmp_path / "theirs")
    read, _ = ll.from_peft(model, tmp_path / "theirs")
    assert {path: shapes["A"][0] for path, shapes in read.shapes.items()} == ours


def test_a_layer_left_without_rank_is_not_adapted():
    # The second layer sees two directions of very different size, the first many alike: the second's first one beats them, the rest do not.
    stats = {
        "a": ll.Statistics().add(torch.randn(400, 8)),
        "b": ll.Statistics().add(torch.randn(400, 8) * torch.tensor([9.0, *[0.01] * 7])),
    }
    found = EVAConfig(r=1, rho=2.0).allocate(stats)
    assert {path: cfg.r for path, cfg in found.items()} == {"a": 1, "b": 1}
    stats["a"] = ll.Statistics().add(torch.randn(400, 8))
    stats["b"] = ll.Statistics().add(torch.randn(400, 8) * torch.tensor([9.0, 9.0, *[0.01] * 6]))
    assert {path: cfg.r for path, cfg in EVAConfig(r=1, rho=2.0).allocate(stats).items()} == {"b": 2}


def test_label_mask_leaves_positions_out_unless_switched_off():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(24, 4)

        def forward(self, x, labels=None):
            return self.linear(x)

    x = tokens(120).view(2, 60, 24)
    labels = torch.full((2, 60), -100)
    labels[:, 20:] = 1
    for label_mask, used in ((True, x[:, 20:]), (False, x)):
        cfg = EVAConfig(r=4, label_mask=label_mask)
        A = ll.build(Layer(), cfg, calibration=[{"x": x, "labels": labels}]).init(seed=0)["linear"]["A"]
        assert cosine(A, pca(used.reshape(-1, 24), 4)[0]) > 1 - 1e-4


@pytest.mark.parametrize(("count", "center", "fits"), [(5, True, False), (6, True, True), (5, False, True), (4, False, False)])
def test_needs_as_many_tokens_as_directions(count, center, fits):
    model, cfg = nn.Sequential(nn.Linear(24, 8)), EVAConfig(r=5, center=center)
    if fits:
        assert ll.build(model, cfg, calibration=[tokens(count)]).num_params == 5 * 32
    else:
        with pytest.raises(ValueError, match=f"EVAConfig.r: expected at most 4, .*{count} tokens.*width 24, found 5. Lower r or"):
            ll.build(model, cfg, calibration=[tokens(count)])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rho": 0.5}, r"EVAConfig\.rho: expected a finite number >= 1, found 0\.5"),
        ({"r": 0}, r"EVAConfig\.r: expected an integer >= 1, found 0"),
        ({"center": 1}, r"EVAConfig\.center: expected True or False, found 1"),
        ({"label_mask": None}, r"EVAConfig\.label_mask: expected True or False, found None"),
    ],
)
def test_refuses_fields(fields, message):
    with pytest.raises((ValueError, TypeError), match=message):
        EVAConfig(**fields)


@pytest.mark.parametrize(
    "decay", [lambda k: 1 / (1 + k / 8), lambda k: (1 + k / 30) ** -0.5, torch.ones_like], ids=["fast", "slow", "flat"]
)
def test_directions_of_a_wide_layer_are_those_of_the_whole_decomposition(decay):
    i, r = 640, 12
    C = torch.linalg.qr(torch.randn(i, i, dtype=f64)).Q
    X = torch.randn(2000, i, dtype=f64) * decay(torch.arange(i, dtype=f64)) @ C
    stats = ll.Statistics().add(X)
    values, vectors = stats.directions(r)
    want, full = torch.linalg.eigh(stats.covariance)
    assert cosine(vectors.t(), full.flip(1)[:, :r].t()) > 1 - 1e-6
    torch.testing.assert_close(values, want.flip(0)[:r], rtol=1e-6, atol=0)
    few = ll.Statistics().add(X[:40])  # fewer tokens than the iteration has directions
    assert cosine(few.directions(r)[1].t(), pca(X[:40], r)[0]) > 1 - 1e-6
