"""LoRA-GA: the gradient that is gathered, the start against PEFT's own, the first step against full training, travel to PEFT."""

import copy

import peft
import pytest
import torch
from peft.tuners.lora import LoraGAConfig as TheirConfig
from peft.tuners.lora import preprocess_loraga
from torch import nn

import lora_lite as ll
from cases import move, tiny_models

TOLERANCE = 1e-5


def _model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 8, bias=False)).eval()


def _batches(n=3):
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(4, 5, 12, generator=g), torch.randn(4, 5, 8, generator=g)) for _ in range(n)]


def _loss(output, target):
    return (output - target).square().mean()


def _build(cfg, model=None):
    # The pairs hold input and target: the model takes the first.
    targets = iter([t for _, t in _batches()])
    return ll.build(model or _model(), cfg, calibration=[x for x, _ in _batches()], loss=lambda output, x: _loss(output, next(targets)))


def _gradients(model):
    model = copy.deepcopy(model)
    for x, target in _batches():
        (_loss(model(x), target) / 3).backward()
    return {path: layer.weight.grad for path, layer in model.named_modules() if isinstance(layer, nn.Linear)}


class Seen(ll.LoRAGAConfig):
    """LoRA-GA that keeps the gradient it is given."""

    def constants(self, W, generator, stats=None):
        return {**super().constants(W, generator, stats), "G": stats.gradient}


def test_the_gradient_is_the_mean_over_batches_of_the_weights_own():
    want = _gradients(_model())
    for path, constants in _build(Seen(r=2)).constants.items():
        torch.testing.assert_close(constants["G"], want[path], rtol=1e-5, atol=1e-7)


def test_calibration_leaves_the_model_alone_and_without_gradients():
    model = _model()
    before = copy.deepcopy(model.state_dict())
    _build(ll.LoRAGAConfig(r=2), model)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("scale", ["stable", "weight_svd", "gd_scale", "unit"])
@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr"])
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # PEFT counts backward passes by such hooks
def test_start_is_pefts(direction, scale):
    # Twice the rank is the smaller width: PEFT's randomised SVD is then exact, and the products A and B make can be compared.
    r, theirs = 4, _model()

    def step():
        for x, target in _batches():
            _loss(theirs(x), target).backward()

    settings = TheirConfig(direction=direction, scale=scale)
    config = peft.LoraConfig(r=r, lora_alpha=6, target_modules=["0", "2"], init_lora_weights="lora_ga", lora_ga_config=settings)
    preprocess_loraga(theirs, config, step)
    theirs = peft.get_peft_model(theirs, config)
    adapt = _build(ll.LoRAGAConfig(r=r, alpha=6.0, direction=direction, scale_start=scale))
    for path, constants in adapt.constants.items():
        layer = theirs.base_model.model.get_submodule(path)
        A, B = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
        # Signs of a pair are free, and A and B come of different pairs: compare row by row up to sign.
        for ours, want in ((constants["A0"], A), (constants["B0"].t(), B.t())):
            signs = (ours * want).sum(1).sign()[:, None]
            error = float((ours - signs * want).abs().max() / want.abs().max())
            assert error < 2e-3, f"{path}: {error:.1e}"  # PEFT's SVD is of four power iterations


def test_the_first_step_follows_full_training():
    # With A and B of the leading components, one small step of both moves W along the gradient's leading part: closer than LoRA's does.
    model, cfg = _model(), ll.LoRAGAConfig(r=2, direction="ArBr", scale_start="unit", recipe="official")
    gradients = _gradients(model)

    def cosine(adapt):
        params = adapt.init(seed=0)
        loss = ll.value_and_grad(lambda p: sum(_loss(adapt(p, x), t) for x, t in _batches()) / 3)
        stepped = ll.tree_map(lambda p, g: p - 1e-3 * g, params, loss(params)[1])
        change = adapt.merge(stepped)["0.weight"] - adapt.merge(params)["0.weight"]
        return float(torch.nn.functional.cosine_similarity(-change.flatten(), gradients["0"].flatten(), dim=0))

    ours, lora = cosine(_build(cfg)), cosine(ll.build(model, ll.LoRAConfig(r=2)))
    best = float(torch.linalg.svdvals(gradients["0"])[:4].square().sum().sqrt() / gradients["0"].norm())
    assert ours > lora + 0.1
    assert ours <= best + 1e-3  # rank 2 r at most


def test_random_components_are_disjoint_in_the_official_recipe_alone():
    from lora_lite.variants.lora_ga import components

    g = torch.Generator().manual_seed(0)
    a, b = components(4, "random", True, g)
    assert not set(a.tolist()) & set(b.tolist())
    a, b = components(4, "random", False, g)
    assert a.tolist() == b.tolist()


def test_loss_of_a_transformers_model_is_its_own(tmp_path):
    model, batch = tiny_models["llama"]()
    adapt = ll.build(model.eval(), ll.LoRAGAConfig(r=2), calibration=[batch])
    params = move(adapt.init(seed=0), scale=0.05)
    ll.save(adapt, params, tmp_path / "a.safetensors")
    again, read = ll.load(model, tmp_path / "a.safetensors")
    assert torch.equal(again(read, batch).logits, adapt(params, batch).logits)


def test_travels_to_peft_as_lora_of_twice_the_rank(tmp_path):
    model, x = _model(), _batches()[0][0]
    adapt = _build(ll.LoRAGAConfig(r=2), model)
    params = move(adapt.init(seed=0))
    ll.to_peft(adapt, params, tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "a").eval()
    update = (adapt(params, x) - model(x)).detach()
    assert float((theirs(x) - adapt(params, x)).detach().abs().max() / update.abs().max()) < TOLERANCE


def test_refusals():
    model, batches = _model(), [x for x, _ in _batches()]
    with pytest.raises(ValueError, match=r"expected the model's output to have a \.loss, found none.*loss=f"):
        ll.build(model, ll.LoRAGAConfig(r=2), calibration=batches)
    with pytest.raises(ValueError, match=r"expected loss\(output, batch\) to return a scalar tensor, found shape"):
        ll.build(model, ll.LoRAGAConfig(r=2), calibration=batches, loss=lambda output, batch: output)
    with pytest.raises(ValueError, match="expected a loss that depends on the calibrated layers"):
        ll.build(model, ll.LoRAGAConfig(r=2), calibration=batches, loss=lambda output, batch: batch.sum())
    with pytest.raises(ValueError, match='expected no loss, since none of "LoRAConfig" uses'):
        ll.build(model, ll.LoRAConfig(r=2), loss=lambda output, batch: output.sum())
    with pytest.raises(ValueError, match=r"expected at most half of min\(i, o\) = 8"):
        ll.build(model, ll.LoRAGAConfig(r=5), calibration=batches, loss=lambda output, batch: output.sum())
    with pytest.raises(ValueError, match="expected a gradient that is not zero"):
        ll.build(model, ll.LoRAGAConfig(r=2), calibration=batches, loss=lambda output, batch: 0 * output.sum())


@pytest.mark.parametrize("shape", [(300, 640), (640, 300), (12, 20)])
def test_leading_triplets_are_those_of_the_svd(shape):
    from lora_lite.core.leading import leading_svd
    from lora_lite.core.linalg import truncated_svd

    decay = 0.9 ** torch.arange(min(shape))
    matrix = torch.linalg.qr(torch.randn(shape[0], min(shape)))[0] * decay @ torch.linalg.qr(torch.randn(shape[1], min(shape)))[0].t()
    for got, want in zip(leading_svd(matrix, 6), truncated_svd(matrix, 6)):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    low = matrix[:, :3] @ matrix[:3]  # of rank 3: what lies beyond is the SVD's own choice
    assert all(t.isfinite().all() for t in leading_svd(low, 6))
