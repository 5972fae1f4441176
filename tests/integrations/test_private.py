"""Opacus: gradients of single samples, and a step's clipped sum of them."""

import pytest
import torch
from subjects import LINEAR, THEIRS, require_seen

import lora_lite as ll

opacus = pytest.importorskip("opacus", reason="Opacus is not installed: pip install opacus")


def _samples(case):
    """Return a subject, its module after a backward pass, and the gradients of its rows by the module's names."""
    if not case.cfg.rowwise:
        pytest.skip("gradients of single samples are of single rows, and this variant couples those of a batch")
    s = case()
    shared = not case.of_peft and type(case.cfg).share_init is not ll.AdapterConfig.share_init
    inner = s.layers() if shared else s.adapt.module(s.params)  # tensors that layers share stand at a module that nothing calls
    module = opacus.GradSampleModule(inner.train(), loss_reduction="sum")  # it looks at modules in training mode; nothing here drops
    return s, module, s.by_row(lambda output, rows: (output - s.y[rows]).square().sum(-1))


def _backward(s, module):
    """Run a backward pass, in which each sample's gradient is found, and return the trained parameters."""
    (module(s.x) - s.y).square().sum().backward()
    found = {name for name, p in module.named_parameters() if getattr(p, "grad_sample", None) is not None}
    require_seen(module, found, "trained parameters without gradients of single samples")
    return [p for p in module.parameters() if p.requires_grad]


def _as_in(p, rows):
    """Return gradients `(rows, *leaf)` in the shape of a parameter that holds the leaf: `LinearLayers` has a matrix or its transpose."""
    high = rows.reshape(len(rows), rows.shape[1] if rows.dim() > 1 else 1, -1)
    return rows if rows.shape[1:] == p.shape else high if high.shape[1:] == p.shape else high.transpose(1, 2)


def samples(case):
    """The gradient of each sample is that of a batch of it alone."""
    s, module, rows = _samples(case)
    for p, want in zip(_backward(s, module), ll.tree_leaves(rows), strict=True):
        torch.testing.assert_close(p.grad_sample, _as_in(p, want), rtol=1e-6, atol=1e-9 * float(want.abs().max()))
        assert want.any()


def clipped(case):
    """A step without noise follows the sum of the gradients, each clipped to a norm."""
    s, module, rows = _samples(case)
    norms = sum(g.reshape(len(g), -1).square().sum(1) for g in ll.tree_leaves(rows)).sqrt()
    bound = float(norms.median())  # some rows are clipped, others not
    want = ll.tree_map(lambda g: torch.einsum("n,n...->...", (bound / (norms + 1e-6)).clamp(max=1.0), g), rows)
    plain = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1)
    private = opacus.optimizers.DPOptimizer(
        plain, noise_multiplier=0.0, max_grad_norm=bound, expected_batch_size=len(s.x), loss_reduction="sum"
    )
    trained = _backward(s, module)
    private.clip_and_accumulate()
    for p, leaf in zip(trained, ll.tree_leaves(want), strict=True):
        torch.testing.assert_close(p.summed_grad, _as_in(p, leaf[None])[0], rtol=1e-5, atol=1e-9 * float(leaf.abs().max()))


CHECKS = {"Opacus": (samples, clipped)}


@LINEAR
@pytest.mark.parametrize("check", CHECKS["Opacus"], ids=lambda check: check.__name__)
def test_opacus(case, check):
    check(case)


@pytest.mark.parametrize("case", [case for case in THEIRS if case.cfg.name == "lora"], ids=lambda case: case.cfg.name)
def test_opacus_with_pefts(case):
    samples(case)
