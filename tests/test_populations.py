"""A population trained in one step equals its members trained alone; params may come from a network."""

import dataclasses

import pytest
import torch
from torch import nn

import lora_lite as ll
from cases import assert_trees_equal, by_name, move, padded, row_of

CONFIGS = (ll.LoRAConfig(r=2), ll.DoRAConfig(r=2), ll.IA3Config(), ll.OFTConfig(block_size=8), ll.DeLoRAConfig(r=2))
DTYPES = ("float32", "float64")
LRS = (3e-3, 1e-3, 3e-4)


def losses(output, batch):
    """Return each row's loss."""
    logits, labels = output.logits[:, :-1], batch["input_ids"][:, 1:]
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape).mean(1)


def data(member: int, step: int):
    """Draw the rows that a member sees at a step: each has an order of its own."""
    generator = torch.Generator().manual_seed(100 * member + step)
    return torch.randint(3, 64, (2, 6), generator=generator)


def alone(adapt, member: int, steps: int):
    params = adapt.init(seed=member)
    optimizer = torch.optim.AdamW(ll.tree_leaves(params), lr=LRS[member])
    for step in range(steps):
        batch = {"input_ids": data(member, step)}
        _, grads = ll.value_and_grad(lambda p, batch=batch: losses(adapt(p, batch), batch).mean())(params)
        ll.set_grads(params, grads)
        optimizer.step()
    return params


def together(adapt, steps: int, dropped: dict[int, int]):
    """Train the members as docs/populations.md does; `dropped` maps a member to the step at which it leaves."""
    stacked = ll.stack([adapt.init(seed=k) for k in range(len(LRS))])
    members = ll.unstack(stacked)  # views: what the optimiser writes to a member, the stack holds
    optimizer = torch.optim.AdamW([{"params": ll.tree_leaves(m), "lr": lr} for m, lr in zip(members, LRS)])

    def loss(stacked, batch, index):
        return losses(adapt.mixed(stacked, batch, index), batch).sum() / 2

    for step in range(steps):
        alive = [k for k in range(len(LRS)) if step < dropped.get(k, steps)]
        batch = {"input_ids": torch.cat([data(k, step) for k in alive])}
        _, grads = ll.value_and_grad(loss)(stacked, batch, torch.tensor(alive).repeat_interleave(2))
        for k, grad in enumerate(ll.unstack(grads)):
            ll.set_grads(members[k], grad if k in alive else None)
        optimizer.step()
    return stacked


@pytest.mark.parametrize(("name", "dtype", "tolerance"), [("llama", torch.float32, 1e-6), ("gpt2", torch.float64, 1e-11)], ids=DTYPES)
@pytest.mark.parametrize("cfg", CONFIGS, ids=by_name)
def test_members_train_as_if_alone(tiny, cfg, name, dtype, tolerance):
    model, _ = padded(tiny, name, num_hidden_layers=1)
    adapt = ll.build(model.to(dtype), dataclasses.replace(cfg, dtype=dtype))
    got = ll.unstack(together(adapt, 20, dropped={1: 8}))
    for k, member in enumerate(got):
        want = alone(adapt, k, 8 if k == 1 else 20)
        assert_trees_equal(member, want, tolerance)
        moved = ll.tree_map(lambda a, b: (a - b).abs().max(), want, adapt.init(seed=k))
        assert max(float(step) for step in ll.tree_leaves(moved)) > 1e-3


def network(adapt, features: int) -> nn.Module:
    """Make a network that gives the params of one adapter for a vector of features."""
    return nn.Sequential(nn.Linear(features, 16), nn.Tanh(), nn.Linear(16, adapt.num_params)).double()


def tree_of(adapt, vector: torch.Tensor, start):
    """Cut the last axis into a params tree, as displacements from a start."""
    pieces = iter(vector.split([leaf.numel() for leaf in ll.tree_leaves(start)], -1))
    return ll.tree_map(lambda p: p + 0.1 * next(pieces).reshape(*vector.shape[:-1], *p.shape), start)


@pytest.mark.parametrize("cfg", CONFIGS, ids=by_name)
def test_params_of_each_row_come_from_a_network(tiny, cfg):
    model, batch = padded(tiny, "gpt2", num_hidden_layers=1)
    adapt = ll.build(model.double(), cfg)
    start = ll.tree_map(lambda p: p.double(), adapt.init())
    hyper, features = network(adapt, 3), torch.randn(4, 3, dtype=torch.float64)

    adapt.mixed(tree_of(adapt, hyper(features), start), batch).logits.square().sum().backward()
    got = [p.grad.clone() for p in hyper.parameters()]
    hyper.zero_grad()
    for n in range(4):
        adapt(tree_of(adapt, hyper(features[n]), start), row_of(batch, n)).logits.square().sum().backward()
    for a, p in zip(got, hyper.parameters()):
        torch.testing.assert_close(a, p.grad, rtol=1e-9, atol=1e-12)
        assert p.grad.abs().max() > 0


def test_a_network_under_torch_func(tiny):
    model, batch = padded(tiny, "gpt2", num_hidden_layers=1)
    adapt = ll.build(model.double(), ll.LoRAConfig(r=2))
    start = ll.tree_map(lambda p: p.double(), move(adapt.init()))
    hyper, features = network(adapt, 3), torch.randn(4, 3, dtype=torch.float64)
    weights = {name: p.detach() for name, p in hyper.named_parameters()}

    def loss(weights):
        vectors = torch.func.functional_call(hyper, weights, (features,))
        return adapt.mixed(tree_of(adapt, vectors, start), batch).logits.square().mean()

    value, grads = ll.value_and_grad(loss)(weights)
    want, _ = torch.func.grad_and_value(loss)(weights)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, want[name], rtol=1e-9, atol=1e-14)
    assert value > 0
    assert max(g.abs().max() for g in grads.values()) > 1e-6
