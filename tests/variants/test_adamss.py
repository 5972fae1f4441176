"""AdaMSS: scikit-learn's groups, both forms against the dense update, PEFT's freezing over a whole schedule."""

import copy
import io

import numpy as np
import peft
import pytest
import safetensors.torch
import torch
from torch import nn

import lora_lite as ll
from cases import derived, move
from lora_lite.variants._subspaces import clusters, first_rows
from lora_lite.variants.adamss import adamss
from sklearn_stand_in import stand_in

SCHEDULE = {"use_asa": True, "asa_target_subspaces": 3, "init_warmup": 2, "final_warmup": 12, "mask_interval": 3}


@pytest.mark.parametrize(
    ("n", "d", "k", "step", "labels"),
    [
        (40, 3, 4, 1.7, "0223102231102331022310223110233102231022"),
        (60, 5, 7, 0.9, "312064531206453120645312064531206453120645312064531206453120"),
    ],
)
def test_groups_are_those_of_scikit_learn(n, d, k, step, labels):
    rows = torch.sin(torch.arange(n * d, dtype=torch.float64) * step).view(n, d)
    assert "".join(map(str, clusters(rows, k).tolist())) == labels  # recorded from scikit-learn 1.9.1


@pytest.mark.parametrize(("n", "k", "labels"), [(12, 5, "222200001111"), (20, 6, "55552222000011114444"), (9, 4, "222200001")])
def test_more_groups_than_different_rows_are_those_of_scikit_learn(n, k, labels):
    rows = torch.arange(n).div(4, rounding_mode="floor").float()[:, None].repeat(1, 2)
    assert "".join(map(str, clusters(rows, k).tolist())) == labels  # recorded from scikit-learn 1.9.1


@pytest.mark.parametrize(("n", "k"), [(50, 7), (9, 9), (3, 1), (1000, 40)])
def test_first_rows_are_numpys_choice(n, k):
    want = np.random.RandomState(123456789).choice(n, size=k, replace=False, p=np.full(n, 1 / n))
    assert first_rows(n, k) == want.tolist()


def _layer(cfg, bias=True):
    generator = torch.Generator().manual_seed(2)
    W = ll.Frozen(torch.randn(20, 12, generator=generator), torch.randn(20, generator=generator) if bias else None)
    start, constants = derived(cfg, W)
    b = None if W.bias is None else W.bias.double()
    constants = {name: t.double() if t.is_floating_point() else t for name, t in constants.items()}
    return ll.Frozen(W.weight.double(), b, constants), move({"": {name: t.double() for name, t in start.items()}})[""]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("k", "rank"), [(3, 1), (10, 3)])  # the projections folded into one, and apart
def test_both_forms_are_the_papers_update_of_each_group(k, rank, bias):
    W, params = _layer(ll.AdaMSSConfig(r=4, num_subspaces=k, subspace_rank=rank), bias)
    n, cells, shapes = len(params["A"]), W.constants["cells"], W.constants["shapes"].tolist()
    assert (n * 12 <= 4 * (12 + n)) == (k == 3)
    x = torch.randn(5, 12, dtype=torch.float64)
    z = (torch.cat([x, torch.ones(5, 1, dtype=torch.float64)], dim=1) if bias else x) @ W.constants["V"].t()
    want, seen = W(x), []
    at_A, at_B = 0, 0
    for size, own in shapes:
        A, B = params["A"][at_A : at_A + own], params["B"][at_B : at_B + size * own].view(size, own)
        outputs = cells[at_B : at_B + size * own].view(size, own)[:, 0] // n
        want[:, outputs] += z @ A.t() @ B.t()
        at_A, at_B, seen = at_A + own, at_B + size * own, seen + outputs.tolist()
    assert sorted(seen) == list(range(20)), "each output is in one group"
    torch.testing.assert_close(adamss(params, W, x), want, rtol=0, atol=1e-12)


def test_the_start_is_orthonormal_in_each_group_and_ranks_may_follow_the_weight():
    W, _ = _layer(ll.AdaMSSConfig(r=6, num_subspaces=3, subspace_rank=4))
    for A in W.constants["A0"].split(W.constants["shapes"][:, 1].tolist()):
        torch.testing.assert_close(A @ A.t(), torch.eye(len(A), dtype=torch.float64), rtol=0, atol=1e-6)
    lower, _ = _layer(ll.AdaMSSConfig(r=6, num_subspaces=3, subspace_rank=4, use_dynamic_rank=True, svd_threshold=0.9))
    assert lower.constants["shapes"][:, 1].tolist() == [1, 1, 1]


def _trained(module, name):
    return [p.detach() for p in getattr(module, f"adamss_{name}")["default"]]


def _reloaded(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file)  # a tree of tensors: nothing that torch asks to be trusted


@pytest.mark.parametrize("optimiser", [lambda p: torch.optim.SGD(p, lr=0.05), lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1)])
def test_freezes_what_peft_freezes_over_a_whole_schedule(monkeypatch, optimiser):
    stand_in(monkeypatch)
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 8, bias=False)), torch.randn(30, 12)
    cfg = ll.AdaMSSConfig(r=5, num_subspaces=4, **SCHEDULE)
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.AdamssConfig(r=5, num_subspaces=4, target_modules=["0", "2"], **SCHEDULE))
    layers = {path: theirs.base_model.model.get_submodule(path) for path in ("0", "2")}
    adapt = ll.build(model, cfg)
    params = {path: {n: torch.cat([t.flatten() for t in _trained(m, n)]) for n in "AB"} for path, m in layers.items()}
    params = {path: {"A": leaves["A"].view(-1, 5), "B": leaves["B"]} for path, leaves in params.items()}
    params = ll.tree_map(lambda p: p.clone().requires_grad_(), params)
    opts, state = [optimiser([p for p in theirs.parameters() if p.requires_grad]), optimiser(ll.tree_leaves(params))], adapt.constants
    frozen = []
    for step in range(16):
        opts[0].zero_grad()
        theirs(x).square().sum().backward()
        opts[0].step()
        theirs.base_model.update_and_allocate(step)
        now = ll.tree_map(lambda p: p.detach().clone(), params)
        _, grads = ll.value_and_grad(lambda p: adapt(p, x).square().sum())(now)
        for p, g in zip(ll.tree_leaves(params), ll.tree_leaves(grads)):
            p.grad = g
        opts[1].step()
        new, state = cfg.update(ll.tree_map(lambda p: p.detach().clone(), params), grads, _reloaded(state))
        with torch.no_grad():
            for p, value in zip(ll.tree_leaves(params), ll.tree_leaves(new)):
                p.copy_(value)
        for path, module in layers.items():
            assert state["active"][path].tolist() == [p.requires_grad for p in module.adamss_A["default"]], step
            for name in "AB":
                want = torch.cat([t.flatten() for t in _trained(module, name)])
                torch.testing.assert_close(new[path][name].flatten(), want, rtol=0, atol=1e-4)
        frozen.append(sum(int((~active).sum()) for active in state["active"].values()))
    assert frozen[0] == 0 < frozen[5] < frozen[-1] == 5  # of eight, with three left


def test_what_it_is_not_for_is_passed_through_and_refused():
    tree = {"0": {"A": torch.ones(2, 2), "B": torch.ones(2)}}
    assert ll.AdaMSSConfig().update(tree, tree) == (tree, None)
    with pytest.raises(ValueError, match=r"AdaMSSConfig\.update: expected adapt\.constants as the first state, found None"):
        ll.AdaMSSConfig(use_asa=True).update(tree, tree)
    with pytest.raises(ValueError, match=r"AdaMSSConfig\.final_warmup: expected more than init_warmup=50, found 50"):
        ll.AdaMSSConfig(use_asa=True, final_warmup=50)


def test_a_file_of_other_groups_is_refused(monkeypatch, tmp_path):
    stand_in(monkeypatch)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20))
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.AdamssConfig(r=5, num_subspaces=2, target_modules=["0"]))
    theirs.save_pretrained(tmp_path)
    place = tmp_path / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(place)
    B = "base_model.model.0.adamss_B"
    tensors[f"{B}.0"], tensors[f"{B}.1"] = torch.zeros(len(tensors[f"{B}.0"]) - 1, 1), torch.zeros(len(tensors[f"{B}.1"]) + 1, 1)
    safetensors.torch.save_file(tensors, place)
    with pytest.raises(ValueError, match=r'expected shapes \[\[.*\]\] at "0", as its weight implies, found'):
        ll.from_peft(model, tmp_path)


@pytest.mark.parametrize("bias", [True, False])
def test_output_under_autocast_has_the_dtype_of_the_layer(bias):
    model = nn.Sequential(nn.Linear(24, 16, bias=bias))
    adapt = ll.build(model, ll.AdaMSSConfig(r=8, num_subspaces=3))
    params, x = move(adapt.init()), torch.randn(5, 24)
    with torch.autocast("cpu", torch.bfloat16):
        y, base = adapt(params, x), model(x)
    assert y.dtype == base.dtype == torch.bfloat16
    torch.testing.assert_close((y - base).float(), adapt(params, x) - model(x), rtol=0.1, atol=0.05)
