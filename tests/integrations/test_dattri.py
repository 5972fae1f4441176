"""dattri: the influence of training rows, by products of gradients and through the inverse Hessian, on `adapt.module`."""

import pytest
import torch
from subjects import LINEAR, flat

import lora_lite as ll

dattri = pytest.importorskip("dattri", reason="dattri is not installed: pip install dattri")
from dattri.algorithm.influence_function import IFAttributorExplicit  # noqa: E402  # after the skip
from dattri.algorithm.tracin import TracInAttributor  # noqa: E402
from dattri.task import AttributionTask  # noqa: E402

LARGE = 150
"""Params from which on the Hessian is too large for a test."""
PARTS = (slice(0, 4), slice(4, 6))
DAMPING = 1.0


def _setting(case):
    """Return a subject, dattri's task, loaders of training rows and of queries, and the gradients of both as vectors."""
    if not case.cfg.rowwise:
        pytest.skip("influence is of single rows, and this variant couples those of a batch")
    s = case(rows=6)
    module = s.adapt.module(s.params)

    def loss(params, data):
        rows, wanted = (t.reshape(-1, *shape) for t, shape in zip(data, (s.x.shape[1:], s.y.shape[1:])))
        return 0.5 * (torch.func.functional_call(module, params, (rows,)) - wanted).square().sum()

    task = AttributionTask(loss, module, module.state_dict())
    data = [torch.utils.data.TensorDataset(s.x[part], s.y[part]) for part in PARTS]
    loaders = [torch.utils.data.DataLoader(part, batch_size=4) for part in data]
    rows = [s.by_row(lambda output, rows: 0.5 * (output - s.y[rows]).square().sum(-1), part) for part in PARTS]
    return s, task, loaders, rows


def gradients(case):
    """Of one checkpoint TracIn's score is the product of a training row's gradient and a query's."""
    _, task, loaders, (trained, asked) = _setting(case)
    attributor = TracInAttributor(task, weight_list=torch.ones(1), normalized_grad=False)
    attributor.projector_kwargs = None  # by default gradients are projected at random
    got = attributor.attribute(*loaders).double()
    want = sum(g.flatten(1) @ q.flatten(1).t() for g, q in zip(map(_rows, ll.tree_leaves(trained)), map(_rows, ll.tree_leaves(asked))))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6 * float(want.abs().max()))  # it keeps them in float32
    assert want.abs().min() > 0


def _rows(g):
    return g.reshape(len(g), -1)


def hessian(case):
    """Through the inverse Hessian of the training loss."""
    s, task, loaders, (trained, asked) = _setting(case)
    if flat(s.params).numel() > LARGE:
        pytest.skip(f"a matrix of more than {LARGE} columns")
    attributor = IFAttributorExplicit(task, regularization=DAMPING)
    attributor.cache(loaders[0])
    got = attributor.attribute(*loaders).double()
    H = s.hessian(lambda p: 0.5 * (s.adapt(p, s.x[PARTS[0]]) - s.y[PARTS[0]]).square().sum())
    trained, asked = (torch.cat([_rows(g) for g in ll.tree_leaves(tree)], 1) for tree in (trained, asked))
    want = trained @ torch.linalg.solve(H + DAMPING * torch.eye(len(H)).double(), asked.t())
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))


CHECKS = {"dattri": (gradients, hessian)}


@LINEAR
@pytest.mark.parametrize("check", CHECKS["dattri"], ids=lambda check: check.__name__)
def test_dattri(case, check):
    check(case)
