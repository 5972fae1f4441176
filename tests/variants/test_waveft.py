"""WaveFT: the closed form against PEFT's inverse transform, widths of both parities, both ways to the product, the refused wavelets."""

import json

import peft
import pytest
import torch
from peft_layer import LAYERS, compare, matrix
from torch import nn

import lora_lite as ll
from lora_lite.testing import check_variant
from lora_lite.variants import _sparse
from lora_lite.variants.waveft import waveft


@pytest.fixture(params=["gathered", "dense"])
def form(request, monkeypatch):
    """Choose one of the two forms for layers of any width."""
    monkeypatch.setattr(_sparse, "DENSE", 10**9 if request.param == "dense" else 0)


def _inverse(C):
    """Compute the inverse of one level of the Haar transform along rows and columns, as products with orthogonal matrices."""

    def analysis(width):
        H = torch.zeros(width, width, dtype=C.dtype)
        for k in range(width // 2):
            H[k, 2 * k], H[k, 2 * k + 1] = 0.5**0.5, 0.5**0.5
            H[width // 2 + k, 2 * k], H[width // 2 + k, 2 * k + 1] = 0.5**0.5, -(0.5**0.5)
        return H

    o, i = C.shape
    padded = nn.functional.pad(C, (0, i % 2, 0, o % 2))
    # PEFT puts differences of rows beside the averages, and differences of columns below them: the quadrants are transposed.
    h, w = padded.shape[0] // 2, padded.shape[1] // 2
    a, r, c, d = padded[:h, :w], padded[:h, w:], padded[h:, :w], padded[h:, w:]
    usual = torch.cat([torch.cat([a, c], 1), torch.cat([r, d], 1)])
    return (analysis(2 * h).t() @ usual @ analysis(2 * w))[:o, :i]


@pytest.mark.parametrize(("o", "i"), [(6, 8), (5, 8), (8, 5), (7, 3), (1, 1)])
def test_the_closed_form_is_the_inverse_transform(o, i, form):
    c, at = torch.randn(o * i, dtype=torch.float64), torch.randperm(o * i)
    W = ll.Frozen(torch.zeros(o, i).double(), None, {"places": at})
    C = torch.zeros(o * i).double().scatter(0, at, c).view(o, i)
    got = waveft({"c": c}, W, torch.eye(i).double(), scaling=3.0).t()
    assert torch.allclose(got, 3.0 * _inverse(C), rtol=0, atol=1e-14)
    assert torch.allclose(waveft({"c": c}, W, torch.eye(i).double(), scaling=3.0, use_idwt=False).t(), 3.0 * C, rtol=0, atol=1e-14)


@pytest.mark.parametrize("idwt", [True, False])
def test_passes_the_kit(form, idwt):
    check_variant(ll.WaveFTConfig(n_frequency=60, use_idwt=idwt), skip=["counts"])


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("idwt", [True, False])
def test_is_pefts(layer, idwt, form):
    theirs = peft.WaveFTConfig(n_frequency=90, scaling=4.0, random_loc_seed=5, use_idwt=idwt, target_modules=["0"])
    cfg = ll.WaveFTConfig(n_frequency=90, scaling=4.0, seed=5, use_idwt=idwt)
    compare(layer, cfg, theirs, {"c": ("waveft_spectrum", 0.0)})


def test_a_coefficient_moves_two_by_two_entries():
    update = matrix(waveft, {"c": torch.ones(1, dtype=torch.float64)}, 16) - torch.eye(16)
    rows, cols = update.nonzero().t()
    assert len(rows) == 4
    assert (rows.max() - rows.min(), cols.max() - cols.min()) == (1, 1)
    assert torch.allclose(update[rows, cols].abs(), torch.tensor(12.5, dtype=torch.float64))


def test_other_wavelets_are_refused_by_name(tmp_path):
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'wavelet_family'.*Haar"):
        ll.WaveFTConfig(wavelet_family="db2")
    model = nn.Sequential(nn.Linear(12, 20))
    theirs = peft.get_peft_model(
        nn.Sequential(nn.Linear(12, 20)), peft.WaveFTConfig(n_frequency=9, wavelet_family="sym3", target_modules=["0"])
    )
    theirs.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"wavelet_family in .* to be 'db1'.*found 'sym3'.*filters.*merge_and_unload"):
        ll.from_peft(model, tmp_path)
    place = tmp_path / "adapter_config.json"
    place.write_text(json.dumps({**json.loads(place.read_text()), "use_idwt": False}))
    assert ll.from_peft(model, tmp_path)[0].configs[0] == ll.WaveFTConfig(
        n_frequency=9, use_idwt=False, target_names="^0$", exclude_names=()
    )


def test_more_coefficients_than_the_weight_has_are_refused():
    with pytest.raises(ValueError, match=r"WaveFTConfig\.n_frequency: expected at most i o = 240, found 2592"):
        ll.build(nn.Sequential(nn.Linear(12, 20)), ll.WaveFTConfig())
