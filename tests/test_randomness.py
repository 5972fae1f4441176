"""Dropout: off in evaluation, the same from a seed, another for each row and member, and the same again where a block is recomputed."""

import dataclasses

import pytest
import torch
from torch import nn

import lora_lite as ll
from cases import CASES, assert_trees_equal, build_any, move

FIRST = {row.cfg.name: row.cfg for row in reversed(CASES) if hasattr(row.cfg, "dropout")}  # other options of a variant may refuse it
WITH_DROPOUT = {name: dataclasses.replace(cfg, dropout=0.5) for name, cfg in FIRST.items()}
ROWS = 6


def by_row(output, _):
    return output.square().sum(1)


@pytest.fixture(params=WITH_DROPOUT.values(), ids=WITH_DROPOUT, name="cfg")
def _cfg(request):
    return request.param


def setup(cfg, **fields):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
    adapt = build_any(model, cfg, [torch.randn(32, 16)], **fields).train()
    return adapt, move(adapt.init()), torch.ones(ROWS, 16)


def seeded(f, seed=3):
    torch.manual_seed(seed)
    return f()


def transforms(adapt, params, x):
    """Return a call of every transform, with its result as a list of one tensor for each row."""
    stacked = ll.stack([params] * ROWS)

    def loss(p, one):
        return adapt(p, one[None]).square().sum()

    def leaves(tree):
        return torch.cat([leaf.flatten(1) for leaf in ll.tree_leaves(tree)], 1)

    return {
        "call": lambda: adapt(params, x),
        "mixed": lambda: adapt.mixed(stacked, x),
        "mixed with an index": lambda: adapt.mixed(stacked, x, [0] * ROWS),
        "gradient of mixed": lambda: leaves(ll.value_and_grad(lambda p: adapt.mixed(p, x).square().sum())(stacked)[1]),
        "func gradient of mixed": lambda: leaves(torch.func.grad(lambda p: adapt.mixed(p, x).square().sum())(stacked)),
        "per_example_grad": lambda: leaves(ll.per_example_grad(adapt, by_row)(params, x)),
        "per_example_grad in chunks": lambda: leaves(ll.per_example_grad(adapt, by_row, chunk_size=2)(params, x)),
        "per_example_norm": lambda: ll.per_example_norm(adapt, by_row)(params, x)[:, None],
        "vmap over rows": lambda: torch.vmap(lambda one: adapt(params, one[None])[0], randomness="different")(x),
        "vmap over members": lambda: torch.vmap(lambda p: adapt(p, x[:1])[0], randomness="different")(stacked),
        "vmap of grad": lambda: leaves(torch.vmap(torch.func.grad(loss), (None, 0), randomness="different")(params, x)),
    }


@pytest.mark.parametrize("remat", [None, r"^[02]$"], ids=["kept", "recomputed"])
@pytest.mark.parametrize("name", transforms(*setup(ll.LoRAConfig())))
def test_rows_differ_and_a_seed_repeats_them(cfg, name, remat):
    call = transforms(*setup(cfg, remat=remat))[name]
    got = seeded(call)
    assert torch.equal(got, seeded(call))
    assert not torch.equal(got, seeded(call, seed=4))
    assert len({tuple(row.tolist()) for row in got.detach()}) == ROWS  # equal rows, of which dropout left other entries


@pytest.mark.parametrize("name", transforms(*setup(ll.LoRAConfig())))
def test_evaluation_draws_nothing(cfg, name):
    adapt, params, x = setup(cfg)
    call = transforms(adapt.eval(), params, x)[name]
    before = torch.get_rng_state()
    got = call()
    assert torch.equal(before, torch.get_rng_state())
    assert (got - got[:1]).abs().max() <= 1e-5 * got.abs().max()


@pytest.mark.parametrize("name", ["gradient of mixed", "func gradient of mixed", "per_example_grad", "per_example_norm"])
def test_recomputed_blocks_drop_the_same_entries(cfg, name):
    kept, again = (transforms(*setup(cfg, remat=remat))[name] for remat in (None, r"^[02]$"))
    torch.testing.assert_close(seeded(again), seeded(kept), rtol=1e-5, atol=1e-6)


def test_recomputed_gradients_of_one_adapter(cfg):
    adapt, params, x = setup(cfg)
    lean, _, _ = setup(cfg, remat=r"^[02]$")

    def grads(adapt, transform):
        return seeded(lambda: transform(lambda p: adapt(p, x).square().sum())(params))

    want = grads(adapt, ll.value_and_grad)[1]
    assert_trees_equal(grads(lean, ll.value_and_grad)[1], want, 1e-5)
    assert_trees_equal(grads(lean, torch.func.grad), want, 1e-5)


def test_same_randomness_gives_every_member_the_same(cfg):
    adapt, params, x = setup(cfg)
    got = torch.vmap(lambda p: adapt(p, x[:1])[0], randomness="same")(ll.stack([params] * 3))
    torch.testing.assert_close(got[0], got[1])
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(lambda p: adapt(p, x[:1])[0])(ll.stack([params] * 3))
