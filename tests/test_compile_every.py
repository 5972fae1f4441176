"""Every variant under `torch.compile`: loss, step and mixed step, each in one graph that gives the eager result and is used again.

A fixed sample runs with the other tests; `LORA_LITE_COMPILE=every`, which `tox -e compiled` sets, runs them all.
"""

import pytest
import torch

import lora_lite as ll
from cases import COMPILE_ALL, FIRST, Blocks, assert_trees_equal, build_any, move, named

SAMPLE = ("hra", "oft", "vera", "boft", "shira")
"""A chain of products, blocks, constants, butterflies and a sparse update: what the tests of the core variants do not have."""
ROWS = [row for row in FIRST if COMPILE_ALL or row.id in SAMPLE]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def blocks(row):
    torch.manual_seed(0)
    model, x = Blocks().double().eval(), torch.randn(4, 5, 48, dtype=torch.float64)
    adapt = build_any(model, row.cfg, [x[:2], x[2:]])
    trees = [move(ll.tree_map(lambda leaf: leaf.double(), adapt.init(seed=k)), seed=k) for k in range(4)]
    return adapt, trees, x


def same_graph_again(f, *arguments):
    """Compile `f` in one graph, hold it against itself uncompiled, then for other arguments without another compilation."""
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    first, second = arguments
    assert_trees_equal(compiled(*first), f(*first), 1e-9)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert_trees_equal(compiled(*second), f(*second), 1e-9)


def as_tree(value, grads):
    return {**grads, "value": {"": value}}


@pytest.mark.parametrize("row", ROWS, ids=named)
def test_loss(row):
    adapt, trees, x = blocks(row)
    same_graph_again(lambda p, x: {"": {"": adapt(p, x).square().sum()}}, (trees[0], x), (trees[1], x.flip(0)))


@pytest.mark.parametrize("row", ROWS, ids=named)
def test_step(row):
    adapt, trees, x = blocks(row)
    step = ll.value_and_grad(lambda p, x: adapt(p, x).square().sum())
    same_graph_again(lambda p, x: as_tree(*step(p, x)), (trees[0], x), (trees[1], x.flip(0)))


@pytest.mark.parametrize("row", [row for row in ROWS if row.cfg.adapts != "module"], ids=named)
def test_mixed_step(row):
    adapt, trees, x = blocks(row)
    step = ll.value_and_grad(lambda p, x, index: adapt.mixed(p, x, index).square().sum())
    first = (ll.stack(trees[:2]), x, torch.tensor([0, 1, 1, 0]))
    second = (ll.stack(trees[2:]), x.flip(0), torch.tensor([1, 1, 0, 1]))
    same_graph_again(lambda *args: as_tree(*step(*args)), first, second)
