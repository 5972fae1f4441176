"""FourierFT: both forms against each other and the inverse transform, PEFT's places and numbers, few coefficients in a full update."""

import peft
import pytest
import torch
from peft_layer import LAYERS, close, compare, matrix
from torch import nn

import lora_lite as ll
from lora_lite.testing import check_variant
from lora_lite.variants import _sparse
from lora_lite.variants.fourierft import fourierft


@pytest.fixture(params=["gathered", "dense"])
def form(request, monkeypatch):
    """Choose one of the two forms for layers of any width."""
    monkeypatch.setattr(_sparse, "DENSE", 10**9 if request.param == "dense" else 0)


@pytest.mark.parametrize(("o", "i"), [(6, 8), (8, 6), (5, 9), (7, 4), (1, 3), (2, 2), (3, 1)])
def test_the_update_is_the_real_part_of_the_inverse_transform(o, i, form):
    c, at = torch.randn(o * i, dtype=torch.float64), torch.randperm(o * i)  # every place, those that are their own negatives too
    W = ll.Frozen(torch.zeros(o, i).double(), None, {"places": at})
    got = fourierft({"c": c}, W, torch.eye(i).double(), scaling=3.0).t()
    want = 3.0 * torch.fft.ifft2(torch.zeros(o * i).double().scatter(0, at, c).view(o, i)).real
    assert torch.allclose(got, want, rtol=0, atol=1e-14)


def test_passes_the_kit(form):
    check_variant(ll.FourierFTConfig(n_frequency=60), skip=["counts"])


@pytest.mark.parametrize("layer", LAYERS)
def test_is_pefts(layer, form):
    theirs = peft.FourierFTConfig(n_frequency=90, scaling=40.0, random_loc_seed=5, target_modules=["0"])
    compare(layer, ll.FourierFTConfig(n_frequency=90, scaling=40.0, seed=5), theirs, {"c": ("fourierft_spectrum", 0.0)})


def test_places_are_pefts_and_layers_of_one_shape_have_the_same():
    model = nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 12), nn.Linear(12, 20))
    theirs = peft.get_peft_model(nn.Sequential(nn.Linear(12, 20)), peft.FourierFTConfig(n_frequency=50, target_modules=["0"]))
    rows, cols = theirs.base_model.model.get_submodule("0").indices["default"]
    constants = ll.build(model, ll.FourierFTConfig(n_frequency=50)).constants
    assert torch.equal(constants["0"]["places"], rows * 12 + cols)
    assert torch.equal(constants["0"]["places"], constants["2"]["places"])


def test_few_coefficients_fill_the_whole_matrix():
    update = matrix(fourierft, {"c": torch.randn(20, dtype=torch.float64)}, 16) - torch.eye(16)
    assert (update.abs() > 0).all()
    assert torch.linalg.matrix_rank(update) > 8


def test_a_large_layer_gathers_and_agrees_with_the_dense_form(monkeypatch):
    adapt, x = ll.build(nn.Sequential(nn.Linear(384, 256)), ll.FourierFTConfig(n_frequency=150)), torch.randn(3, 384)
    assert adapt.macs_per_token == 2 * 150
    params = ll.tree_map(torch.randn_like, adapt.init())
    got = adapt(params, x)
    monkeypatch.setattr(_sparse, "DENSE", 10**9)
    close(got, adapt(params, x), "the output")


def test_pefts_start_is_an_option_and_zeros_the_default():
    model = nn.Sequential(nn.Linear(32, 16))
    assert not ll.build(model, ll.FourierFTConfig(n_frequency=300)).init()["0"]["c"].any()
    assert 0.8 < ll.build(model, ll.FourierFTConfig(n_frequency=300, init="normal")).init()["0"]["c"].std() < 1.2
    assert (ll.FourierFTConfig().identity, ll.FourierFTConfig(init="normal").identity) == (0.0, None)


def test_more_coefficients_than_the_weight_has_are_refused():
    with pytest.raises(ValueError, match=r"FourierFTConfig\.n_frequency: expected at most i o = 240, found 241"):
        ll.build(nn.Sequential(nn.Linear(12, 20)), ll.FourierFTConfig(n_frequency=241))
