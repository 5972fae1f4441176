"""Tensors that all targets of a config train together: they stand once in the tree and take part in everything."""

import copy
from dataclasses import dataclass
from typing import TypedDict

import pytest
import torch
from jaxtyping import Float
from torch import Tensor, nn

import lora_lite as ll
from cases import assert_trees_equal, move


class BankParams(TypedDict):
    bank: Float[Tensor, "n r"]
    A: Float[Tensor, "r i"]
    pick: Float[Tensor, "o n"]


@ll.checked
def bank(params: BankParams, W: ll.Frozen, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
    """Return `W x + b + pick bank A x`: every layer's `B` is mixed from the rows of one bank."""
    return ll.linalg.add_low_rank(W(x), W.project(x, params["A"]), params["pick"] @ params["bank"])


@dataclass(frozen=True, kw_only=True)
class BankConfig(ll.AdapterConfig):
    """LoRA whose `B` is mixed from a bank that all layers train together."""

    name = "bank"
    uses = frozenset({"output", "project"})
    steered = ("pick",)
    r: ll.Rank = 2
    n: ll.Size = 3

    def share_init(self, layers, generator):
        return {"bank": torch.randn(self.n, self.r, generator=generator)}

    def init(self, W, generator):
        return {"A": ll.linalg.kaiming(self.r, W.in_features, generator), "pick": torch.zeros(W.out_features, self.n)}

    def forward(self, params, W, x):
        return bank(params, W, x)


@pytest.fixture
def built():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double().eval().requires_grad_(False), torch.randn(5, 6).double()
    adapt = ll.build(model, BankConfig(dtype=torch.float64))
    return model, adapt, move(adapt.init(seed=0)), x


def by_hand(model, params, x):
    for k, layer in enumerate(model):
        delta = x @ (params[str(k)]["pick"] @ params["bank"]["bank"] @ params[str(k)]["A"]).T if str(k) in params else 0
        x = layer(x) + delta
    return x


def test_the_kit_and_the_tree(built):
    ll.testing.check_variant(BankConfig())
    model, adapt, params, x = built
    assert {path: list(leaves) for path, leaves in params.items()} == {"0": ["A", "pick"], "2": ["A", "pick"], "bank": ["bank"]}
    assert adapt.num_params == 2 * 6 + 3 * 8 + 2 * 8 + 3 * 4 + 6
    assert torch.equal(adapt(adapt.init(), x), model(x))
    torch.testing.assert_close(adapt(params, x), by_hand(model, params, x))
    assert_trees_equal(adapt.init(seed=3), adapt.init(seed=3))
    assert not torch.equal(adapt.init(seed=3)["bank"]["bank"], adapt.init(seed=4)["bank"]["bank"])


def test_gradients_add_up_over_the_layers(built):
    model, adapt, params, x = built
    got = ll.value_and_grad(lambda p: adapt(p, x).square().sum())(params)[1]
    want = torch.func.grad(lambda p: by_hand(model, p, x).square().sum())(params)
    assert_trees_equal(got, want, 1e-12)
    recomputed = ll.build(model, adapt.configs[0], remat=r"^0$")
    assert_trees_equal(ll.value_and_grad(lambda p: recomputed(p, x).square().sum())(params)[1], want, 1e-12)


def test_mixed_batches_and_rows(built):
    model, adapt, params, x = built
    members = [params, move(params, seed=5)]
    index = [0, 1, 1, 0, 1]
    mixed = adapt.mixed(ll.stack(members), x, index)
    for row, k in enumerate(index):
        torch.testing.assert_close(mixed[row], by_hand(model, members[k], x[row : row + 1])[0])
    rows = ll.per_example_grad(adapt, lambda out, batch: out.square().sum(-1))(params, x)
    for k in range(5):
        want = ll.value_and_grad(lambda p, k=k: adapt(p, x[k : k + 1]).square().sum())(params)[1]
        assert_trees_equal(ll.tree_map(lambda g, k=k: g[k], rows), want, 1e-12)


def test_steering_merging_and_converting(built):
    model, adapt, params, x = built
    torch.testing.assert_close(adapt(adapt.steer(params, 0.0), x), model(x))
    torch.testing.assert_close(adapt(adapt.steer(params, 1.0), x), adapt(params, x))
    merged = copy.deepcopy(model)
    assert not merged.load_state_dict(adapt.merge(params), strict=False).unexpected_keys
    torch.testing.assert_close(merged(x), adapt(params, x))
    lora, tree, errors = ll.to_lora(adapt, params, r=2)
    assert max(errors.values()) < 1e-6
    torch.testing.assert_close(lora(tree, x), adapt(params, x), rtol=1e-5, atol=1e-6)


def test_modules_and_files(built, tmp_path):
    model, adapt, params, x = built
    module = adapt.module(params)
    torch.testing.assert_close(module(x), adapt(params, x))
    assert sum(p.numel() for p in module.parameters() if p.requires_grad) == adapt.num_params
    module(x).square().sum().backward()
    want = ll.value_and_grad(lambda p: adapt(p, x).square().sum())(params)[1]
    assert any(torch.allclose(p.grad, want["bank"]["bank"]) for p in module.parameters() if p.grad is not None and p.shape == (3, 2))
    assert_trees_equal(adapt.params(module), params)
    assert_trees_equal(adapt.params(copy.deepcopy(module)), params)
    ll.save(adapt, params, tmp_path / "bank.safetensors")
    again, read = ll.load(copy.deepcopy(model), tmp_path / "bank.safetensors", variants=[BankConfig])
    assert_trees_equal(read, params)
    assert torch.equal(again(read, x), adapt(params, x))
    assert_trees_equal(again.init(seed=2), adapt.init(seed=2))


def test_faults_of_a_tree_are_named(built):
    _, adapt, params, x = built
    without = {path: leaves for path, leaves in params.items() if path != "bank"}
    with pytest.raises(ValueError, match=r'"bank": expected a mapping with "bank", found nothing'):
        adapt(without, x)


class NumberedConfig(BankConfig):
    """The same, and each layer knows its number among all."""

    name = "numbered"

    def allot(self, layers):
        return {path: {"number": torch.tensor([n, len(layers)])} for n, path in enumerate(layers)}

    def constants(self, W, generator, stats=None):
        return {"next": W.constants["number"] + 1}


def test_constants_that_depend_on_all_targets_reach_each(tmp_path):
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    adapt = ll.build(model, NumberedConfig())
    assert {path: c["number"].tolist() for path, c in adapt.constants.items()} == {"0": [0, 2], "2": [1, 2]}
    assert adapt.constants["2"]["next"].tolist() == [2, 3]
    ll.testing.check_variant(NumberedConfig())
    ll.save(adapt, adapt.init(), tmp_path / "file.safetensors")
    again, _ = ll.load(model, tmp_path / "file.safetensors", variants=[NumberedConfig])
    assert again.constants["2"]["number"].tolist() == [1, 2]


class PairsConfig(ll.LoRAConfig):
    """LoRA whose `A` each two layers in a row share, where they have one shape."""

    name = "pairs"

    def share_groups(self, layers):
        paths = list(layers)
        return {path: {"A": paths[n // 2 * 2]} for n, path in enumerate(paths)}


@pytest.fixture
def paired():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(3))).double().eval()
    adapt = ll.build(model, PairsConfig(r=2, dtype=torch.float64))
    return model, adapt, move(adapt.init()), torch.randn(5, 6).double()


def untied(model, params, x):
    of = {"0": "0", "1": "0", "2": "2"}
    lora = ll.build(model, ll.LoRAConfig(r=2, dtype=torch.float64))
    return lora({path: {"A": params["pairs"][f"{first}.A"], **params[path]} for path, first in of.items()}, x)


def test_groups_share_what_they_name(paired, tmp_path):
    model, adapt, params, x = paired
    assert {path: list(leaves) for path, leaves in params.items()} == {"0": ["B"], "1": ["B"], "2": ["B"], "pairs": ["0.A", "2.A"]}
    assert adapt.num_params == 2 * 2 * 6 + 3 * 2 * 6
    torch.testing.assert_close(adapt(params, x), untied(model, params, x))
    want = torch.func.grad(lambda p: untied(model, p, x).square().sum())(params)
    assert_trees_equal(ll.value_and_grad(lambda p: adapt(p, x).square().sum())(params)[1], want, 1e-12)
    recomputed = ll.build(model, adapt.configs[0], remat=r"^1$")
    assert_trees_equal(ll.value_and_grad(lambda p: recomputed(p, x).square().sum())(params)[1], want, 1e-12)
    ll.save(adapt, params, tmp_path / "pairs.safetensors")
    again, read = ll.load(model, tmp_path / "pairs.safetensors", variants=[PairsConfig])
    assert_trees_equal(read, params)
    assert torch.equal(again(read, x), adapt(params, x))
    assert_trees_equal(again.init(seed=2), adapt.init(seed=2))


def test_groups_take_part_in_everything(paired):
    model, adapt, params, x = paired
    module = adapt.module(params)
    module(x).square().sum().backward()
    want = ll.value_and_grad(lambda p: adapt(p, x).square().sum())(params)[1]
    assert sum(p.numel() for p in module.parameters() if p.requires_grad) == adapt.num_params
    grads = [p.grad for p in module.parameters() if p.requires_grad]
    assert all(any(g.shape == leaf.shape and torch.allclose(g, leaf) for g in grads) for leaf in ll.tree_leaves(want))
    assert_trees_equal(adapt.params(copy.deepcopy(module)), params)
    members = [params, move(params, seed=5)]
    mixed = adapt.mixed(ll.stack(members), x, [0, 1, 1, 0, 1])
    torch.testing.assert_close(mixed, torch.stack([adapt(members[k], x[n : n + 1])[0] for n, k in enumerate([0, 1, 1, 0, 1])]))
    torch.testing.assert_close(adapt(adapt.steer(params, 0.0), x), model(x))
    torch.testing.assert_close(adapt(adapt.steer(params, 0.5), x), untied(model, adapt.steer(params, 0.5), x))
    merged = copy.deepcopy(model)
    merged.load_state_dict(adapt.merge(params), strict=False)
    torch.testing.assert_close(merged(x), adapt(params, x))
    lora, _, errors = ll.to_lora(adapt, params, r=2)
    assert max(errors.values()) < 1e-6
    assert "60" in str(adapt)
    assert [type(cfg) for cfg in lora.configs] == [ll.LoRAConfig] * 3


def test_two_configs_cannot_share_one_name():
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
    with pytest.raises(ValueError, match='the name "bank" to themselves'):
        ll.build(model, [BankConfig(target_names="0"), BankConfig(target_names="1")])
