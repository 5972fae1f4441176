"""Per-example gradients and their norms equal a loop over the rows, for every variant, on three families of transformers, with padding."""

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import lora_lite as ll
from cases import ACROSS, assert_gradients_equal, assert_trees_equal, build_any, in_dtype, move, named, padded, row_of
from common.measure import peak_bytes
from lora_lite.transforms import gradients


def losses(output, batch):
    return output.logits.square().flatten(1).mean(1)


def each_row(adapt, params, batch):
    rows = [row_of(batch, n) for n in range(len(batch["input_ids"]))]
    return [ll.value_and_grad(lambda p, b=b: losses(adapt(p, b), b).sum())(params)[1] for b in rows]


def norm(tree):
    return torch.cat([leaf.flatten().float() if leaf.dtype == torch.bfloat16 else leaf.flatten() for leaf in ll.tree_leaves(tree)]).norm()


@pytest.mark.parametrize(("row", "dtype", "name"), ACROSS, ids=named)
def test_gradients_and_norms_equal_a_loop(tiny, name, row, dtype):
    model, batch = padded(tiny, name)
    adapt = build_any(model.to(dtype), row.cfg, [batch])
    params = in_dtype(move(adapt.init()), dtype)
    want = each_row(adapt, params, batch)
    got = ll.per_example_grad(adapt, losses)(params, batch)
    assert_gradients_equal(got, ll.stack(want), dtype)
    norms = ll.per_example_norm(adapt, losses)(params, batch)
    assert norms.dtype == torch.promote_types(next(iter(ll.tree_leaves(params))).dtype, torch.float32)
    rounded = 1e-2 if row.cfg.dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(norms, torch.stack([norm(g) for g in want]), rtol=1e-10 if dtype == torch.float64 else rounded, atol=0)


@pytest.fixture
def gpt2(tiny):
    """A model that computes in float64 throughout, as those with an RMS norm do not."""
    model, batch = padded(tiny, "gpt2", num_hidden_layers=1)
    adapt = ll.build(model.double(), ll.LoRAConfig(r=2))
    return adapt, in_dtype(move(adapt.init()), torch.float64), batch


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 4, 9])
def test_chunks_change_nothing(gpt2, chunk_size):
    adapt, params, batch = gpt2
    batch = {**batch, "position_ids": torch.arange(7)[None]}  # not of the rows: passed whole
    want = ll.per_example_grad(adapt, losses)(params, batch)
    assert_trees_equal(ll.per_example_grad(adapt, losses, chunk_size=chunk_size)(params, batch), want, 1e-12)
    norms = ll.per_example_norm(adapt, losses, chunk_size=chunk_size)(params, batch)
    torch.testing.assert_close(norms, ll.per_example_norm(adapt, losses)(params, batch), rtol=1e-12, atol=0)
    fisher = ll.fisher_diag(adapt, losses, chunk_size=chunk_size)(params, batch)
    assert_trees_equal(fisher, ll.tree_map(lambda g: g.square().mean(0), want), 1e-12)


FORMS = {"tensor": lambda x: x, "tuple": lambda x: (x,), "list": lambda x: [x], "mapping": lambda x: {"input": x}}


@pytest.mark.parametrize("wrap", FORMS.values(), ids=FORMS)
def test_chunks_of_every_form_of_batch(wrap):
    torch.manual_seed(0)
    adapt = ll.build(nn.Sequential(nn.Linear(4, 3)), ll.LoRAConfig(r=2))
    params, x, seen = move(adapt.init()), torch.randn(5, 4), []

    def loss_rows(output, batch):
        seen.append(len(output))
        assert type(batch) is type(wrap(x))
        return output.square().sum(1)

    want = ll.per_example_grad(adapt, loss_rows)(params, wrap(x))
    assert_trees_equal(ll.per_example_grad(adapt, loss_rows, chunk_size=2)(params, wrap(x)), want, 1e-6)
    assert seen == [5, 2, 2, 1]


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_no_rows_have_no_gradients(gpt2, chunk_size):
    adapt, params, batch = gpt2
    none = {key: value[:0] for key, value in batch.items()}
    grads = ll.per_example_grad(adapt, losses, chunk_size)(params, none)
    assert all(g.shape == (0, *p.shape) for g, p in zip(ll.tree_leaves(grads), ll.tree_leaves(params)))
    assert ll.per_example_norm(adapt, losses, chunk_size)(params, none).shape == (0,)
    assert not any(f.any() for f in ll.tree_leaves(ll.fisher_diag(adapt, losses, chunk_size)(params, none)))


@pytest.mark.parametrize("make", [ll.per_example_grad, ll.per_example_norm])
def test_inference_mode_outside_does_not_matter(gpt2, make):
    adapt, params, batch = gpt2
    if not gradients._gradients_in_inference_mode():
        pytest.skip("this torch gives zeros there, which test_transforms finds refused")
    want = make(adapt, losses)(params, batch)
    with torch.inference_mode():
        got = make(adapt, losses)(params, batch)
    torch.testing.assert_close(got, want)


def test_norms_hold_no_gradients_of_all_targets():
    """While the backward pass runs, the per-example gradients of one layer at a time are alive."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(16)))
    adapt, x = ll.build(model, ll.LoRAConfig(r=32)), torch.randn(32, 32)
    params = move(adapt.init(), scale=0.01)

    def loss_rows(output, _):
        return output.square().sum(1)

    one_target = 32 * 4 * sum(leaf.numel() for leaf in params["0"].values())  # bytes
    grads, norms = (f(adapt, loss_rows) for f in (ll.per_example_grad, ll.per_example_norm))
    assert peak_bytes(lambda: grads(params, x)) >= 16 * one_target
    assert peak_bytes(lambda: norms(params, x)) <= 6 * one_target


def test_norms_inside_a_transform_and_compiled(gpt2):
    adapt, params, batch = gpt2
    batch.pop("attention_mask")
    norms = ll.per_example_norm(adapt, losses)
    want = norms(params, batch)

    def scaled(s):
        return norms(ll.tree_map(lambda p: s * p, params), batch)

    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no forward mode
        one = torch.ones((), dtype=torch.float64)
        value, slope = torch.func.jvp(scaled, (one,), (one,))
    torch.testing.assert_close(value, want, rtol=1e-10, atol=0)
    sides = [scaled(one + e) for e in (1e-5, -1e-5)]
    torch.testing.assert_close(slope, (sides[0] - sides[1]) / 2e-5, rtol=1e-5, atol=1e-8)
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(norms, fullgraph=True, backend="aot_eager")(params, batch), want, rtol=1e-10, atol=0)


def test_clipping_by_two_passes_is_the_sum_of_clipped_gradients(gpt2):
    adapt, params, batch = gpt2
    norms = ll.per_example_norm(adapt, losses)(params, batch)
    weights = (norms.median() / norms).clamp(max=1)
    assert weights.min() < 1
    _, got = ll.value_and_grad(lambda p: (weights * losses(adapt(p, batch), batch)).sum())(params)
    by_row = ll.per_example_grad(adapt, losses)(params, batch)
    want = ll.tree_map(lambda g: torch.einsum("n,n...->...", weights, g), by_row)
    assert_gradients_equal(got, want, torch.float64)


def test_params_are_left_alone_and_a_loss_without_them_gives_zeros(gpt2):
    adapt, params, batch = gpt2
    before = ll.tree_map(torch.clone, params)
    ll.per_example_norm(adapt, losses)(params, batch)
    assert_trees_equal(params, before)
    assert not any(leaf.requires_grad or leaf.grad is not None for leaf in ll.tree_leaves(params))
    assert torch.equal(ll.per_example_norm(adapt, lambda *_: torch.zeros(4))(params, batch), torch.zeros(4))


@pytest.mark.parametrize("make", [ll.per_example_grad, ll.per_example_norm, ll.fisher_diag])
@pytest.mark.parametrize("size", [0, -1, True, 2.0])
def test_chunk_sizes_that_are_none_are_refused(gpt2, make, size):
    with pytest.raises(ValueError, match=rf"{make.__name__}: expected chunk_size as an integer >= 1 or None, found {size}"):
        make(gpt2[0], losses, chunk_size=size)


@pytest.mark.parametrize("make", [ll.per_example_grad, ll.per_example_norm])
def test_labels_from_outside_of_the_batch_are_refused_in_chunks(gpt2, make):
    adapt, params, batch = gpt2
    labels = torch.zeros(4, dtype=torch.double)
    with pytest.raises((ValueError, RuntimeError)):
        make(adapt, lambda output, _: output.logits.sum((1, 2)) - labels, chunk_size=3)(params, batch)
    with pytest.raises(
        ValueError, match=r"loss_rows to return shape \(4,\), found \(\)\. Give each row its loss, with labels from the batch"
    ):
        make(adapt, lambda output, _: output.logits.mean())(params, batch)


def test_norms_inside_of_value_and_grad_have_gradients():
    adapt = ll.build(torch.nn.Sequential(torch.nn.Linear(8, 4)), ll.LoRAConfig(r=2))
    params, x = move(adapt.init()), torch.randn(3, 8)
    norms = ll.per_example_norm(adapt, lambda output, _: output.square().sum(-1))
    want = torch.func.grad(lambda p: norms(p, x).sum())(params)
    assert_trees_equal(ll.value_and_grad(lambda p: norms(p, x).sum())(params)[1], want, 1e-6)


class _OfDict(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 4)

    def forward(self, given, gain=1.0):
        return gain * self.linear(given["x"])


@pytest.mark.parametrize("wrap", [lambda x: ({"x": x}, 2.0), lambda x: {"gain": 2.0, "given": {"x": x}}], ids=["tuple", "dict"])
def test_rows_inside_of_what_a_batch_holds(wrap):
    adapt = ll.build(_OfDict(), ll.LoRAConfig(r=2))
    params, x = move(adapt.init()), torch.randn(3, 8)
    by_row = lambda output, _: output.square().sum(-1)  # noqa: E731
    want = ll.stack([ll.value_and_grad(lambda p, n=n: adapt(p, wrap(x[n])).square().sum())(params)[1] for n in range(3)])
    for size in (None, 2):
        found = ll.per_example_grad(adapt, by_row, chunk_size=size)(params, wrap(x))
        assert_trees_equal(found, want, 1e-5)
    with pytest.raises(ValueError, match=r"found none\. Pass tensors, by themselves or in dicts"):
        ll.per_example_grad(adapt, by_row)(params, {"given": {"x": 1.0}})
