"""posteriors: Laplace's approximation, SGHMC and variational inference over a tree of params, for every variant."""

import math

import pytest
import torch
from subjects import EACH, Case, flat

import lora_lite as ll
from cases import assert_trees_equal

posteriors = pytest.importorskip("posteriors", reason="posteriors is not installed: pip install posteriors")
torchopt = pytest.importorskip("torchopt", reason="torchopt is not installed: pip install torchopt")


def _log_posterior(adapt):
    def of(params, batch):
        output = adapt(params, batch[0])
        prior = sum(leaf.square().sum() for leaf in ll.tree_leaves(params))
        return -0.5 * (output - batch[1]).square().sum() - 0.05 * prior, output

    return of


def laplace(case):
    """The diagonal of the empirical Fisher, of the likelihood alone, is the sum of squared per-example gradients."""
    if not case.cfg.rowwise:
        pytest.skip("Laplace's diagonal is of single rows, and this variant couples those of a batch")
    s = case()
    adapt, params, x, y = s.adapt, s.params, s.x, s.y

    def log_rows(params, batch):
        output = adapt(params, batch[0])
        return -0.5 * (output - batch[1]).square().sum(-1), output

    transform = posteriors.laplace.diag_fisher.build(log_rows, per_sample=True)
    state, _ = transform.update(transform.init(params), (x, y))
    rows = s.by_row(lambda output, rows: 0.5 * (output - y[rows]).square().sum(-1))
    want = ll.tree_map(lambda g: g.square().sum(0), rows)
    assert any(leaf.any() for leaf in ll.tree_leaves(want))
    assert_trees_equal(state.prec_diag, want, 1e-9)


def sghmc(case):
    """Two steps without noise are Hamiltonian steps with friction."""
    s = case()
    adapt, params, x, y = s.adapt, s.params, s.x, s.y
    log_posterior = _log_posterior(adapt)
    lr, alpha = 1e-3, 0.1
    transform = posteriors.sgmcmc.sghmc.build(log_posterior, lr=lr, alpha=alpha, temperature=0.0, momenta=0.0)
    state = transform.init(params)
    p, m = params, ll.tree_map(torch.zeros_like, params)
    for _ in range(2):
        state, output = transform.update(state, (x, y))
        torch.testing.assert_close(output, adapt(p, x))
        grads = s.grad(lambda p: log_posterior(p, (x, y))[0])(p)
        p, m = (
            ll.tree_map(lambda p, m: p + lr * m, p, m),
            ll.tree_map(lambda m, g: m + lr * g - lr * alpha * m, m, grads),
        )
    assert_trees_equal(state.params, p, 1e-10)
    assert_trees_equal(state.momenta, m, 1e-10)
    assert any(leaf.any() for leaf in ll.tree_leaves(m))


def variational(case):
    """A step of the means and deviations follows the gradient of the bound at the sample that was drawn."""
    s = case()
    adapt, params, x, y = s.adapt, s.params, s.x, s.y
    log_posterior, lr = _log_posterior(adapt), 1e-3
    transform = posteriors.vi.diag.build(log_posterior, torchopt.sgd(lr=lr), init_log_sds=math.log(0.1), stl=False)
    torch.manual_seed(1)
    start = transform.init(params)
    state, _ = transform.update(start, (x, y))
    torch.manual_seed(1)
    deviations = ll.tree_map(lambda p: torch.full_like(p, 0.1), params)
    sample = ll.tree_map(lambda p: p[0], posteriors.utils.diag_normal_sample(params, deviations, (1,)))
    grads = s.grad(lambda p: log_posterior(p, (x, y))[0])(sample)
    assert flat(grads).any()
    means = ll.tree_map(lambda p, g: p + lr * g, params, grads)
    widths = ll.tree_map(lambda p, s, g: math.log(0.1) + lr * (g * (s - p) + 1), params, sample, grads)
    for got, want in ((state.params, means), (state.log_sd_diag, widths)):
        torch.testing.assert_close(flat(got), flat(want), rtol=0, atol=1e-8)  # a deviation is a float32 number there


CHECKS = {"posteriors": (laplace, sghmc, variational)}


@EACH
@pytest.mark.parametrize("check", CHECKS["posteriors"], ids=lambda check: check.__name__)
def test_posteriors(case, check):
    check(case)


@pytest.mark.parametrize("cfg", [ll.DoRAConfig(r=2), ll.OFTConfig(block_size=8)], ids=lambda cfg: cfg.name)
def test_dense_laplace_is_the_gauss_newton_matrix_and_samples_run_mixed(cfg):
    s = Case(cfg)()
    adapt, params, x, y = s.adapt, s.params, s.x, s.y
    params, y = ll.tree_map(torch.Tensor.float, params), y.float()  # posteriors draws in float32

    def outputs_of(params):
        return adapt(params, x).float()

    transform = posteriors.laplace.dense_ggn.build(
        lambda params, batch: (outputs_of(params), torch.tensor([])),
        lambda output, batch: -0.5 * (output - batch[1]).square().sum(),
        init_prec=torch.eye(flat(params).numel()),
    )
    state, _ = transform.update(transform.init(params), (x, y))
    jacobian = torch.func.jacrev(lambda p: outputs_of(p).flatten())(params)
    # posteriors sorts the keys of a tree, as optree does.
    J = torch.cat([jacobian[path][name].flatten(1) for path in sorted(jacobian) for name in sorted(jacobian[path])], 1)
    torch.testing.assert_close(state.prec, torch.eye(J.shape[1]) + J.t() @ J, rtol=1e-4, atol=1e-4)
    assert J.abs().max() > 1e-3
    diagonal = posteriors.laplace.diag_fisher.init(params, init_prec_diag=100.0)
    samples = posteriors.laplace.diag_fisher.sample(diagonal, (3,))  # a stack as it is
    outputs = adapt.mixed(samples, x.repeat(3, 1, 1)).unflatten(0, (3, -1))
    torch.testing.assert_close(outputs[1], adapt(ll.unstack(samples)[1], x))
    assert outputs.std(0).min() > 0
