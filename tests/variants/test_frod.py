"""FRoD: one basis for the layers of a sort, in which each weight is what the paper says, and all forms of the update."""

import peft
import pytest
import torch
from torch import nn

import lora_lite as ll
from lora_lite.variants._sparse import DENSE
from lora_lite.variants.frod import category, frod


class Block(nn.Module):
    def __init__(self, i, o):
        super().__init__()
        self.up, self.down = nn.Linear(i, o), nn.Linear(o, i)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


def blocks(i=12, o=20):
    torch.manual_seed(0)
    return nn.Sequential(*(Block(i, o) for _ in range(3)))


@pytest.mark.parametrize(("i", "o"), [(12, 20), (40, 10)])
def test_weights_of_a_sort_are_decomposed_in_one_basis(i, o):
    model = blocks(i, o)
    adapt = ll.build(model, ll.FRoDConfig())
    for path, c in adapt.constants.items():
        weight = model.get_submodule(path).weight.detach()
        torch.testing.assert_close(c["U"] @ torch.diag(c["l"]) @ c["V"].T, weight, rtol=1e-4, atol=1e-5)
        length = c["U"].norm(dim=0)
        torch.testing.assert_close(length[c["l"] > 1e-6], torch.ones(int((c["l"] > 1e-6).sum())))
        assert not (c["index"][0] == c["index"][1]).any()
    assert adapt.constants["0.up"]["V"].data_ptr() == adapt.constants["2.up"]["V"].data_ptr()
    assert adapt.constants["0.up"]["V"].shape != adapt.constants["0.down"]["V"].shape


def test_bases_and_places_are_those_of_peft():
    theirs = peft.get_peft_model(blocks(), peft.FrodConfig(target_modules=["up", "down"], projection_prng_key=3, progressbar=False))
    adapt = ll.build(blocks(), ll.FRoDConfig(seed=3))
    for path, constants in adapt.constants.items():
        assert torch.equal(constants["V"], theirs.base_model.frod_V[category(path)]["default"])
        assert torch.equal(constants["index"].long(), theirs.base_model.frod_s_indices[category(path)]["default"])
        torch.testing.assert_close(constants["U"], theirs.base_model.model.get_submodule(path).frod_U["default"])


@pytest.mark.parametrize(
    ("path", "sort"),
    [
        ("lm_head", "lm_head"),
        ("model.layers.3.self_attn.q_proj", "self_attn_q_proj"),
        ("encoder.layer.0.attention.output.dense", "attention_output"),
        ("encoder.layer.0.output.dense", "output_dense"),
        ("blocks.1.proj", "proj"),
    ],
)
def test_sorts_are_told_by_the_path(path, sort):
    assert category(path) == sort


@pytest.mark.parametrize("tokens", [5, 100])
@pytest.mark.parametrize("n", [1, 40])
def test_all_forms_are_the_definition(n, tokens):
    i, o = 30, 7
    assert (i * i <= DENSE * n) == (n == 40)
    g = torch.Generator().manual_seed(0)
    weight, V, U, x = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in [(o, i), (i, i), (o, i), (tokens, i)])
    diagonal, s = (torch.randn(k, generator=g, dtype=torch.float64) for k in (i, n))
    place = torch.randperm(i * i, generator=g)[:n]
    S = torch.zeros(i * i, dtype=torch.float64)
    S[place] = s
    W = ll.Frozen(weight, constants={"V": V, "U": U, "index": torch.stack([place // i, place % i])})
    want = x @ (weight + U @ (torch.diag(diagonal) + S.view(i, i)) @ V.T).T
    torch.testing.assert_close(frod({"lambda_l": diagonal, "lambda_s": s}, W, x), want)


def test_update_may_have_full_rank():
    adapt = ll.build(blocks(), ll.FRoDConfig())
    params = ll.tree_map(lambda p: p + 0.1 * torch.randn(p.shape), adapt.init())
    merged, base = adapt.merge(params), blocks().state_dict()
    for path in ("0.up", "0.down"):
        assert torch.linalg.matrix_rank(merged[f"{path}.weight"] - base[f"{path}.weight"], tol=1e-4) == 12


@pytest.mark.filterwarnings("ignore:Specified to not")
@pytest.mark.parametrize("rate", [0.01, 0.0])
def test_bases_that_a_file_lacks_are_computed_again(rate, tmp_path):
    model, x = blocks(), torch.randn(4, 12)
    cfg = peft.FrodConfig(target_modules=["up"], save_projection=False, sparse_rate=rate, progressbar=False)
    theirs = peft.get_peft_model(blocks(), cfg).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.1 * torch.randn(p.shape)) if p.requires_grad else None
    theirs.save_pretrained(tmp_path)
    adapt, params = ll.from_peft(model, tmp_path)
    torch.testing.assert_close(adapt(params, x), theirs(x), rtol=1e-4, atol=1e-5)
