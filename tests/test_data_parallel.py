"""Replicas that `nn.DataParallel` makes of `adapt.module(params)` run copies of their own: of weights, params and constants."""

import copy
import importlib
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import lora_lite as ll
from cases import by_name, move

replicating = importlib.import_module("torch.nn.parallel.replicate")
TO_FLOAT64 = 1e-6  # the module computes in float32


def far(difference):
    return difference.detach().abs().max().item()


@pytest.fixture
def replicate(monkeypatch):
    """Replicate as DataParallel does, but for the copy to a second GPU: a copy to float64 shows a tensor left behind on a CPU too."""

    def copied(tensors, devices, detach=False):
        return [[t.double() if t.is_floating_point() else t.clone() for t in tensors] for _ in devices]

    monkeypatch.setattr(replicating, "_broadcast_coalesced_reshape", copied)
    return lambda module: replicating.replicate(module, [0, 1])[1]


class Reading(nn.Module):
    """Call a layer, read the weight of another one, and reach a third through a list in a list."""

    def __init__(self):
        super().__init__()
        self.called, self.read, self.hidden = (nn.Linear(8, 8) for _ in range(3))
        self.norm = nn.LayerNorm(8)
        self.stages = [[self.hidden]]

    def forward(self, x):
        x = self.norm(self.called(x)).tanh()
        x = nn.functional.linear(x, self.read.weight, self.read.bias).tanh()
        return self.stages[0][0](x)


CONFIGS = [
    *(ll.LoRAConfig(r=2), ll.PiSSAConfig(r=2), ll.DoRAConfig(r=2), ll.VeRAConfig(r=2), ll.IA3Config(), ll.OFTConfig(block_size=4)),
    *(ll.FullConfig(target_names="called|read|hidden"), ll.LNTuningConfig()),
]


@pytest.mark.parametrize("cfg", CONFIGS, ids=by_name)
def test_replica_runs_its_own_copies(replicate, cfg):
    model, x = Reading().eval().requires_grad_(False), torch.randn(3, 8)
    adapt = ll.build(model, cfg)
    params = move(adapt.init())
    module = adapt.module(params)
    want = module(x)
    assert far(want - model(x)) > 0.01
    replica = replicate(module)
    for _ in range(2):
        got = replica(x.double())
        assert got.dtype == torch.float64
        assert far(got - want) < TO_FLOAT64
    assert torch.equal(module(x), want), "the module itself is as it was"


def test_replica_of_a_tied_head_follows_its_own_table(replicate):
    model = nn.Sequential(nn.Embedding(11, 8), nn.Tanh(), nn.Linear(8, 11, bias=False)).eval()
    model[2].weight, ids = model[0].weight, torch.tensor([[3, 0, 7]])
    module = ll.build(model, ll.TokensConfig(token_ids=(7, 3), target_names="^0$")).module({"0": {"dE": torch.randn(2, 8)}})
    want = module(ids)
    got = replicate(module)(ids)
    assert got.dtype == torch.float64
    assert far(got - want) < TO_FLOAT64 < far(want - model(ids))


@pytest.mark.parametrize("cfg", CONFIGS[:4], ids=by_name)
def test_gradient_of_a_replica_reaches_the_module(replicate, cfg):
    adapt = ll.build(Reading().eval(), cfg)
    module, x = adapt.module(move(adapt.init())), torch.randn(3, 8)
    want = torch.autograd.grad(module(x).square().sum(), [p for p in module.parameters() if p.requires_grad])
    replicate(module)(x.double()).square().sum().backward()
    got = [p.grad for p in module.parameters() if p.requires_grad]
    for a, b in zip(got, want):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def test_layer_that_is_the_root(replicate):
    model, x = nn.Linear(8, 4), torch.randn(3, 8)
    adapt = ll.build(model, ll.LoRAConfig(r=2))
    module = adapt.module(move(adapt.init()))
    assert far(replicate(module)(x.double()) - module(x)) < TO_FLOAT64


def test_replicas_in_threads(replicate):
    adapt, x = ll.build(Reading().eval(), ll.LoRAConfig(r=2)), torch.randn(3, 8)
    module = adapt.module(move(adapt.init()))
    replicas = [replicate(module) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for y in pool.map(lambda replica: replica(x.double()), replicas):
            assert far(y - module(x)) < TO_FLOAT64


def test_module_within_another(replicate):
    model, x = nn.Sequential(nn.Linear(8, 4)), torch.randn(3, 8)
    adapt = ll.build(model, ll.LoRAConfig(r=2))
    outer = nn.Sequential(adapt.module(move(adapt.init())), nn.Tanh())
    assert far(replicate(outer)(x.double()) - outer(x)) < TO_FLOAT64


class Ternary(nn.Module):
    def __init__(self, o, i):
        super().__init__()
        self.in_features, self.out_features, self.bias = i, o, None
        self.register_buffer("q", torch.randint(-1, 2, (o, i), dtype=torch.int8))

    def forward(self, x):
        return x @ self.q.to(x.dtype).t()


class FrozenTernary(ll.FrozenQuantised):
    @classmethod
    def fits(cls, layer):
        return isinstance(layer, Ternary)

    def dequantise(self, dtype):
        return self.layer.q.to(dtype)


def test_quantised_layer(replicate):
    model, x = nn.Sequential(Ternary(8, 8), nn.Tanh(), nn.Linear(8, 4)), torch.randn(3, 8)
    adapt = ll.build(model, ll.LoRAConfig(r=2), kinds=(FrozenTernary,))
    module = adapt.module(move(adapt.init()))
    replica = replicate(module)
    replica[0].q.zero_()
    assert far(replica(x.double()) - module(x)) > 0.01, "the replica reads its own packed weight"
    assert far(replicate(module)(x.double()) - module(x)) < TO_FLOAT64


def test_module_can_be_copied_and_saved(tmp_path):
    model, x = Reading().eval().requires_grad_(False), torch.randn(3, 8)
    adapt = ll.build(model, ll.LoRAConfig(r=2))
    module = adapt.module(move(adapt.init()))
    assert torch.equal(copy.deepcopy(module)(x), module(x))
    torch.save(module, tmp_path / "module.pt")
    assert torch.equal(torch.load(tmp_path / "module.pt", weights_only=False)(x), module(x))
