"""Rows of a mixed batch: each target's input is followed to the batch's rows, or the target is refused by name."""

import contextlib
import gc
import shutil
import tracemalloc
import weakref

import pytest
import torch
import transformers as tf
from torch import nn

import lora_lite as ll
from cases import COMPILE_ALL, move
from lora_lite.core.tracing import outside_transforms

REFUSED = "Leave .* out with exclude_names, or run the members one by one"


def members(adapt, n=2):
    return [move(adapt.init(), seed=k) for k in range(n)]


def one_by_one(adapt, params, batch):
    """Run each row alone with its own params."""
    return torch.cat([adapt(p, {name: t[k : k + 1] for name, t in batch.items()}).logits for k, p in enumerate(params)])


@pytest.mark.parametrize(("rows", "length"), [(2, 7), (2, 8), (4, 8), (8, 8)])
def test_table_of_relative_positions_is_refused_whatever_its_size(rows, length):
    torch.manual_seed(0)
    config = tf.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, decoder_start_token_id=0)
    adapt = ll.build(tf.T5ForConditionalGeneration(config).eval(), ll.LoRAConfig(r=2, target_names=("relative_attention_bias$", r"\.q$")))
    batch = {name: torch.randint(3, 64, (rows, length)) for name in ("input_ids", "decoder_input_ids")}
    params = members(adapt, rows)
    with pytest.raises(ValueError, match="relative_attention_bias.*" + REFUSED):
        adapt.mixed(ll.stack(params), batch, list(range(rows)))
    with pytest.raises(ValueError, match="relative_attention_bias.*" + REFUSED):
        ll.per_example_grad(adapt, lambda out, _: out.logits.square().flatten(1).mean(1))(params[0], batch)
    cfg = ll.LoRAConfig(r=2, target_names=r"\.q$", exclude_names="relative_attention_bias$")
    adapt = ll.build(tf.T5ForConditionalGeneration(config).eval(), cfg)
    params = members(adapt, rows)
    torch.testing.assert_close(adapt.mixed(ll.stack(params), batch, list(range(rows))).logits, one_by_one(adapt, params, batch))


def qwen(cfg):
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    text = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4, "spatial_merge_size": 2}
    config = tf.Qwen2VLConfig(
        image_token_id=60,
        vision_start_token_id=61,
        vision_end_token_id=62,
        text_config={**text, "num_key_value_heads": 2, "rope_parameters": rope},
        vision_config={**vision, "temporal_patch_size": 2, "in_channels": 3},
    )
    return ll.build(tf.Qwen2VLForConditionalGeneration(config).eval(), cfg)


def picture(h, w):
    """A prompt of 16 tokens with one image of `h x w` patches."""
    row = ([5, 61] + [60] * (h * w // 4) + [62] + [7] * 16)[:16]
    return torch.tensor([row]), torch.randn(h * w, 96), torch.tensor([[1, h, w]])


def pictures(rows):
    ids, pixels, grid = (torch.cat(part) for part in zip(*rows))
    mask = torch.ones_like(ids)
    batch = {"input_ids": ids, "mm_token_type_ids": (ids == 60).int(), "attention_mask": mask, "use_cache": False}
    return {**batch, "pixel_values": pixels, "image_grid_thw": grid}


@pytest.mark.parametrize("second", [(4, 4), (8, 4)])
def test_packed_patches_are_refused_and_the_text_is_right(second):
    rows = [picture(4, 4), picture(*second)]
    adapt = qwen(ll.LoRAConfig(r=2))
    with pytest.raises(ValueError, match=r"visual\..*" + REFUSED):
        adapt.mixed(ll.stack(members(adapt)), pictures(rows), [0, 1])
    adapt = qwen(ll.LoRAConfig(r=2, exclude_names="visual"))
    params = members(adapt)
    got = adapt.mixed(ll.stack(params), pictures(rows), [0, 1]).logits
    want = torch.cat([adapt(p, pictures([row])).logits for p, row in zip(params, rows)])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


class Toy(nn.Module):
    """Two layers, between which a batch `(b, t, d)` takes another form."""

    def __init__(self, form):
        super().__init__()
        self.form, self.first, self.second = form, nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x, mask=None):
        x = self.first(x).tanh()
        b, t, d = x.shape
        if self.form == "flat":
            return self.second(x.reshape(b * t, d)).reshape(b, t, d)
        if self.form == "time first":
            return self.second(x.transpose(0, 1)).transpose(0, 1)
        if self.form == "time first and flat":
            return self.second(x.transpose(0, 1).reshape(t * b, d)).reshape(t, b, d).transpose(0, 1)
        if self.form == "without padding":
            y = torch.zeros_like(x)
            y[mask.bool()] = self.second(x[mask.bool()])
            return y
        return x + self.second(torch.eye(6))[:t]  # a table


BROKEN = ["time first", "time first and flat", "without padding", "table"]


@pytest.mark.parametrize("form", BROKEN)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("length", [2, 4, 5, 6])
def test_forms_without_rows_are_refused(form, length, training):
    adapt = ll.build(Toy(form).train(training), ll.LoRAConfig(r=2))
    batch = {"x": torch.randn(2, length, 6), "mask": torch.ones(2, length, dtype=torch.long)}
    with pytest.raises(ValueError, match='at "second".*' + REFUSED):
        adapt.mixed(ll.stack(members(adapt)), batch, [0, 1])


@pytest.mark.parametrize("training", [False, True])
def test_flat_rows_are_followed(training):
    adapt, x = ll.build(Toy("flat").train(training), ll.LoRAConfig(r=2)), torch.randn(3, 5, 6)
    params = members(adapt, 3)
    want = torch.cat([adapt(p, x[k : k + 1]) for k, p in enumerate(params)])
    torch.testing.assert_close(adapt.mixed(ll.stack(params), x, [0, 1, 2]), want)


@pytest.mark.parametrize("form", ["time first and flat", "without padding"])
def test_batches_before_do_not_vouch_for_another(form):
    """Rows of length 1 prove nothing about longer ones."""
    adapt = ll.build(Toy(form).eval(), ll.LoRAConfig(r=2))
    stacked = ll.stack(members(adapt))
    short = {"x": torch.randn(2, 1, 6), "mask": torch.ones(2, 1, dtype=torch.long)}
    adapt.mixed(stacked, short, [0, 1])
    with pytest.raises(ValueError, match='at "second".*' + REFUSED):
        adapt.mixed(stacked, {"x": torch.randn(2, 4, 6), "mask": torch.ones(2, 4, dtype=torch.long)}, [0, 1])


def test_the_rows_are_those_of_the_index_whatever_comes_first():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(6, 6)

        def forward(self, positions, x):
            b, t, d = x.shape
            return self.lin((x + positions.sum(0)[..., None]).reshape(b * t, d)).reshape(b, t, d)

    adapt = ll.build(Positions().eval(), ll.LoRAConfig(r=2))
    params, x, positions = members(adapt), torch.randn(2, 4, 6), torch.randn(3, 1, 4)
    got = adapt.mixed(ll.stack(params), {"positions": positions, "x": x}, [0, 1])
    want = torch.cat([adapt(p, {"positions": positions, "x": x[k : k + 1]}) for k, p in enumerate(params)])
    torch.testing.assert_close(got, want)


def test_rows_are_tried_once_and_leave_no_trace():
    model = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.Linear(6, 6)).train()
    calls = []
    model[0].register_forward_hook(lambda module, args, y: calls.append(len(args[0])))
    adapt = ll.build(model, ll.LoRAConfig(r=2))
    stacked = ll.stack(members(adapt))
    torch.manual_seed(0)
    first = adapt.mixed(stacked, torch.ones(4, 6))
    tried = [1, 1, 2, 2]
    assert calls == [*tried, *tried, 4], "as the mode has it and in evaluation mode"
    torch.manual_seed(0)
    assert torch.equal(first, adapt.mixed(stacked, torch.ones(4, 6))), "the trial drew nothing from the global generator"
    adapt.mixed(stacked, torch.ones(8, 6))
    assert calls == [*tried, *tried, 4, 4, 8]


def test_equal_answers_for_many_lengths_are_kept_once():
    adapt = ll.build(nn.Sequential(*(nn.Linear(4, 4) for _ in range(50))), ll.LoRAConfig(r=1))
    stacked = ll.stack(members(adapt))
    adapt.mixed(stacked, torch.ones(2, 2, 4))
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for length in range(3, 23):
            adapt.mixed(stacked, torch.ones(2, length, 4))
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert grown < 20 * 4000, "a key for each length, and not what was found of 50 layers"


def patches(rows):
    """The row of each entry of the vision tower's inputs."""
    counts = torch.tensor([len(pixels) for _, pixels, _ in rows])
    return {r"visual\.blocks": torch.arange(len(rows)).repeat_interleave(counts), r"visual\.merger": _merged(counts)}


def _merged(counts):
    return torch.arange(len(counts)).repeat_interleave(counts // 4)  # four patches become one


@pytest.mark.parametrize("second", [(4, 4), (8, 4)])
@pytest.mark.parametrize("cfg", [ll.LoRAConfig(r=2), ll.IA3Config(), ll.DoRAConfig(r=2)], ids=lambda cfg: cfg.name)
def test_row_map_leads_packed_patches_to_their_rows(second, cfg):
    rows = [picture(4, 4), picture(*second)]
    adapt = qwen(cfg)
    params = members(adapt)
    got = adapt.mixed(ll.stack(params), pictures(rows), [0, 1], row_map=patches(rows)).logits
    want = torch.cat([adapt(p, pictures([row])).logits for p, row in zip(params, rows)])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)

    def loss(output, batch):
        return output.logits.square().flatten(1).mean(1)

    each = ll.per_example_grad(adapt, loss, row_map=lambda batch: patches(rows))(params[0], pictures(rows))
    norms = ll.per_example_norm(adapt, loss, row_map=lambda batch: patches(rows))(params[0], pictures(rows))
    for k, row in enumerate(rows):
        _, alone = ll.value_and_grad(lambda p, row=row: loss(adapt(p, pictures([row])), None).sum())(params[0])
        for got, want in zip(ll.tree_leaves(ll.unstack(each)[k]), ll.tree_leaves(alone)):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(norms[k], torch.cat([g.flatten() for g in ll.tree_leaves(alone)]).norm(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("index", [None, [1, 0, 1, 1]], ids=["groups", "index"])
@pytest.mark.parametrize(
    ("form", "places"),
    [("time first", 1), ("time first and flat", [0, 1, 2, 3] * 5), ("without padding", [0] * 5 + [1] * 3 + [2] * 4 + [3] * 2)],
)
def test_row_map_gives_the_forms_that_are_refused_without_it(form, places, index):
    torch.manual_seed(0)
    model, x = Toy(form), torch.randn(4, 5, 6)
    mask = torch.arange(5) < torch.tensor([5, 3, 4, 2])[:, None]
    adapt = ll.build(model, ll.LoRAConfig(r=2))
    params = members(adapt)
    batch = {"x": x, "mask": mask}
    with pytest.raises(ValueError, match="second"):
        adapt.mixed(ll.stack(params), batch, index)
    whose = [0, 0, 1, 1] if index is None else index
    want = torch.cat([adapt(params[k], {"x": x[n : n + 1], "mask": mask[n : n + 1]}) for n, k in enumerate(whose)])
    got = adapt.mixed(ll.stack(params), batch, index, row_map={"second": places})
    torch.testing.assert_close(got, want)
    if index is None and form != "without padding":  # whose entries are counted by their values, which the compiler cannot know
        compiled = torch.compile(lambda p, b: adapt.mixed(p, b, row_map={"second": places}), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(ll.stack(params), batch), want)


def test_recomputed_blocks_keep_the_row_map_of_their_own_call():
    torch.manual_seed(0)
    model, x, maps, grads = Toy("time first and flat"), torch.randn(2, 3, 6), [{"second": [0, 1] * 3}, {"second": [1, 0] * 3}], []
    for remat in (None, "second"):
        adapt = ll.build(model, ll.LoRAConfig(r=2, target_names="second"), remat=remat)
        stacked = ll.stack(members(adapt))
        both = lambda p, a=adapt: sum((k + 1) * a.mixed(p, x, [0, 1], row_map=own).square().sum() for k, own in enumerate(maps))  # noqa: E731
        grads.append(ll.value_and_grad(both)(stacked)[1])
    for a, b in zip(*map(ll.tree_leaves, grads)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("row_map", "error", "match"),
    [
        ({"third": 1}, ValueError, r"expected row_map to name targets, found none for 'third'"),
        ({"second": [0, 1, 2, 4] * 5}, ValueError, r"rows in 0\.\.3, found 4"),
        ({"second": [0, -1, 2, 3] * 5}, ValueError, r"rows in 0\.\.3, found -1"),
        ({"second": [0.5] * 20}, TypeError, r"vector of integers, found torch.float32"),
        ({"second": [[0, 1, 2, 3]] * 5}, TypeError, r"vector of integers, found torch.int64 of shape \(5, 4\)"),
        ({"second": [0, 1, 2, 3]}, ValueError, r'at "second" expected an input with 4 entries, as row_map has, found shape \(20, 6\)'),
    ],
)
def test_wrong_row_map_is_refused(row_map, error, match):
    adapt = ll.build(Toy("time first and flat"), ll.LoRAConfig(r=2))
    with pytest.raises(error, match=match):
        adapt.mixed(ll.stack(members(adapt)), torch.randn(4, 5, 6), row_map=row_map)


# Inside `torch.compile`, and inside transforms.


def compiled(f, backend="aot_eager"):
    torch.compiler.reset()
    return torch.compile(f, fullgraph=True, backend=backend)


def by_row(output, batch):
    return output.square().flatten(1).mean(1)


def two_rows(length):
    return {"x": torch.randn(2, length, 6), "mask": torch.ones(2, length, dtype=torch.long)}


def mixed_step(adapt):
    return lambda stacked, batch, index: ll.value_and_grad(lambda p: adapt.mixed(p, batch, index).square().sum())(stacked)


@pytest.mark.parametrize(("form", "length"), [("time first", 2), ("time first and flat", 4), ("table", 2), ("table", 6)])
def test_compiled_call_refuses_what_an_eager_one_does(form, length):
    adapt = ll.build(Toy(form), ll.LoRAConfig(r=2))
    with pytest.raises(ValueError, match='at "second".*' + REFUSED):
        compiled(adapt.mixed)(ll.stack(members(adapt)), two_rows(length))


def test_compiled_gradients_by_row_refuse_it_too():
    adapt = ll.build(Toy("time first"), ll.LoRAConfig(r=2))
    with pytest.raises(ValueError, match='at "second".*' + REFUSED):
        compiled(ll.per_example_grad(adapt, by_row))(adapt.init(), two_rows(2))


@pytest.mark.parametrize("backend", ["eager", "aot_eager", *(["inductor"] if COMPILE_ALL else [])])  # C++ takes half a minute
def test_compiled_call_is_tried_once_and_not_compiled_again(backend):
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("inductor compiles with g++, found none")
    adapt = ll.build(Toy("flat"), ll.LoRAConfig(r=2))
    params, tried = members(adapt), []
    adapt._followed._replicas.main.seen = count(adapt._followed._replicas.main.seen, tried)
    step = compiled(mixed_step(adapt), backend)
    for k, index in enumerate(([0, 1], [1, 0], [1, 1])):
        batch = two_rows(4)
        stance = torch.compiler.set_stance("fail_on_recompile" if k else "default")
        with stance, torch._inductor.config.patch({"cpp.simdlen": 1}):  # to look for vector units would compile programs of its own
            value, grads = step(ll.stack(params), batch, torch.tensor(index))
        want = sum(adapt(params[n], {name: t[row : row + 1] for name, t in batch.items()}).square().sum() for row, n in enumerate(index))
        torch.testing.assert_close(value, want)
        assert all(leaf.abs().max() > 0 for leaf in ll.tree_leaves(grads))
    assert len(tried) == 8, "two rows alone and together, as the mode has it and in evaluation mode"


def test_the_trial_leaves_the_recorder_alone_inside_of_a_compiled_graph():
    """The inductor's graphs run where torch lets nobody set the recorder of `torch.jit.trace`: each compiled mixed batch failed there."""
    recorder = torch._C.DispatchKeySet(torch._C._parse_dispatch_key("Tracer"))
    with torch._C._ExcludeDispatchKeyGuard(recorder), outside_transforms():
        assert torch.equal(torch.zeros(2), torch.zeros(2))
        with pytest.raises(RuntimeError, match="Cannot enable tracing"):
            torch._C._set_tracing_state(None)


def count(f, calls):
    return lambda *args: (calls.append(1), f(*args))[1]


def test_compiled_table_of_relative_positions_is_refused():
    config = tf.T5Config(vocab_size=64, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=4, decoder_start_token_id=0)
    adapt = ll.build(tf.T5EncoderModel(config).eval(), ll.LoRAConfig(r=2, target_names=("relative_attention_bias$", r"\.q$")))
    batch, stacked = {"input_ids": torch.randint(3, 64, (2, 8))}, ll.stack(members(adapt))
    with pytest.raises(ValueError, match="relative_attention_bias.*" + REFUSED):
        compiled(lambda p: adapt.mixed(p, batch, torch.tensor([0, 1])).last_hidden_state)(stacked)


class Regrouped(nn.Module):
    """A layer whose input has the rows in another order, twice, or without some of their tokens."""

    def __init__(self, how):
        super().__init__()
        self.how, self.lin = how, nn.Linear(6, 6)

    def forward(self, x, n):
        if self.how == "twice":
            first, second = self.lin(torch.cat([x, x])).tanh().chunk(2)
            return first * second
        if self.how == "sorted":
            order = n.argsort(descending=True)
            return self.lin(x[order]).tanh()[order.argsort()]
        keep = torch.arange(x.shape[1]) < n[:, None] if self.how == "packed" else x[..., 0] > 0  # the latter as tokens go to an expert
        return torch.zeros_like(x).masked_scatter(keep[..., None], self.lin(x[keep]).tanh())


@pytest.mark.parametrize("rows", [2, 3])
@pytest.mark.parametrize("how", ["twice", "sorted", "packed", "routed"])
def test_rows_in_another_order_or_in_part_are_refused(how, rows):
    adapt = ll.build(Regrouped(how), ll.LoRAConfig(r=2))
    x, n = torch.randn(rows, 5, 6), torch.tensor([5, 5, 3] if rows == 3 else [5, 3])
    x[0, 0, 0], x[1, :, 0] = 1.0, -1.0
    stacked = ll.stack([move(adapt.init(seed=k)) for k in range(rows)])
    for call in (
        lambda: adapt.mixed(stacked, (x, n)),
        lambda: ll.per_example_grad(adapt, lambda y, _: y.sum((1, 2)))(adapt.init(), (x, n)),
    ):
        with pytest.raises(ValueError, match='"lin".*' + REFUSED):
            call()


def test_a_call_with_other_numbers_of_tokens_than_were_tried_is_refused():
    adapt, n = ll.build(Regrouped("routed"), ll.LoRAConfig(r=2)), torch.tensor([4, 4])
    params = [move(adapt.init(seed=k)) for k in range(2)]
    x = torch.randn(2, 4, 6)
    x[..., 0] = torch.tensor([1.0, 1.0, -1.0, -1.0])
    want = torch.cat([adapt(p, (x[k : k + 1], n[k : k + 1])) for k, p in enumerate(params)])
    torch.testing.assert_close(adapt.mixed(ll.stack(params), (x, n)), want)
    x[0, 2:, 0] = 1.0  # six tokens in all: a multiple of the rows, and not two for each
    with pytest.raises(ValueError, match=r'"lin".*order is known'):
        adapt.mixed(ll.stack(params), (x, n))


class Fixed(nn.Module):
    """Two layers that take two rows and no others, of which the second sees them flat."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x, flat=True):
        if x.shape[0] != 2:
            raise RuntimeError("two rows, or none")
        x = self.first(x)
        return self.second(x.flatten(0, 1)).view_as(x) if flat else self.second(x)


def test_compiled_model_that_cannot_be_tried_needs_the_rows_on_each_first_axis():
    adapt, x = ll.build(Fixed(), ll.LoRAConfig(r=2)), torch.randn(2, 4, 6)
    stacked = ll.stack(members(adapt))
    for call in (adapt.mixed, compiled(lambda p, batch, index: adapt.mixed(p, batch, index))):
        with pytest.raises(ValueError, match='at "second" expected an input with a multiple of 2 rows whose order is known'):
            call(stacked, {"x": x, "flat": True}, torch.tensor([0, 1]))
    want = adapt.mixed(stacked, {"x": x, "flat": False}, [0, 1])
    got = compiled(lambda p, batch, index: adapt.mixed(p, batch, index))(stacked, {"x": x, "flat": False}, torch.tensor([0, 1]))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("wrap", [lambda f: f, compiled], ids=["eager", "compiled"])
def test_rows_are_tried_inside_transforms(wrap):
    many = torch.randn(3, 2, 2, 6)  # batches of two rows of length 2
    for form in ("time first", "flat"):
        adapt = ll.build(Toy(form), ll.LoRAConfig(r=2))
        stacked = ll.stack(members(adapt))
        calls = {
            "vmap": lambda adapt=adapt, stacked=stacked: torch.vmap(lambda x: adapt.mixed(stacked, x))(many),
            "of the batch": lambda adapt=adapt, stacked=stacked: torch.func.grad(lambda x: adapt.mixed(stacked, x).square().sum())(many[0]),
            "both": lambda adapt=adapt, stacked=stacked: torch.vmap(torch.func.grad(lambda x: adapt.mixed(stacked, x).sum()))(many),
            "jvp": lambda adapt=adapt, stacked=stacked: torch.func.jvp(lambda x: adapt.mixed(stacked, x), (many[0],), (many[0],))[1],
        }
        for name, call in calls.items():
            if form == "flat":
                wrap(call)()
            elif wrap is not compiled or name == "vmap":
                with pytest.raises(ValueError, match='at "second".*' + REFUSED):
                    wrap(call)()
                adapt._followed._known.clear()


def test_compiled_code_keeps_no_model_alive():
    adapt = ll.build(Toy("flat"), ll.LoRAConfig(r=2))
    step = compiled(mixed_step(adapt))
    step(ll.stack(members(adapt)), two_rows(4), torch.tensor([0, 1]))
    gone = weakref.ref(adapt._replicas.main.module)
    del adapt, step
    torch.compiler.reset()
    gc.collect()
    assert gone() is None
    with pytest.raises(RuntimeError, match="expected compiled code to run in the process that compiled it, while its adapt is alive"):
        torch.ops.lora_lite.see_rows([], [], [], 2, "no graph of this name")


@pytest.mark.parametrize("name", [r"block\.0$", r"block\.0\.layer\.0$", r"block\.0\..*SelfAttention$"])
def test_module_trained_whole_may_return_what_all_rows_share(name):
    """A bias of positions is one entry for all rows; it is repeated for each."""
    torch.manual_seed(0)
    config = tf.T5Config(vocab_size=50, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4, num_decoder_layers=2)
    config._attn_implementation = "eager"
    adapt = ll.build(tf.T5EncoderModel(config).eval(), ll.FullConfig(target_names=name))
    params, ids, index = members(adapt), torch.randint(2, 50, (3, 7)), [0, 1, 0]
    got = adapt.mixed(ll.stack(params), {"input_ids": ids}, torch.tensor(index)).last_hidden_state
    rows = [adapt(params[k], {"input_ids": ids[n : n + 1]}).last_hidden_state for n, k in enumerate(index)]
    torch.testing.assert_close(got, torch.cat(rows))
    assert not torch.allclose(rows[0], adapt(params[1], {"input_ids": ids[:1]}).last_hidden_state, atol=1e-2)


# Whole modules that are called with several tensors


def t5(attention):
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 3, "num_heads": 4, "decoder_start_token_id": 0}
    return tf.T5ForConditionalGeneration(tf.T5Config(**sizes, attn_implementation=attention)).eval()


def loop(adapt, members, index, batch):
    """Run each row alone with the params of its member."""
    return torch.cat([adapt(members[k], {a: t[n : n + 1] for a, t in batch.items()}, use_cache=False).logits for n, k in enumerate(index)])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    ("name", "index"),
    [(r"Attention$", [0, 1, 0]), (r"block\.\d$", None), (r"block\.[12]$", [0, 1, 0]), ("encoder$", None), ("Attention$", [1, 1])],
)
def test_bias_that_a_module_makes_for_each_row_reaches_the_next_as_rows(attention, name, index):
    """One entry stood for all rows in the trial; moved by each member, it is one for each row. Torch's own error came of it."""
    adapt = ll.build(t5(attention), ll.FullConfig(target_names=name))
    own = [0, 0, 1, 1] if index is None else index
    tokens, params = torch.randint(2, 50, (len(own), 7), generator=torch.Generator().manual_seed(1)), members(adapt)
    for cut in (7, 5):
        mask = torch.ones_like(tokens)
        mask[0, cut:] = 0
        batch = {"input_ids": tokens, "decoder_input_ids": tokens[:, 2:], "attention_mask": mask}
        want, got = loop(adapt, params, own, batch), adapt.mixed(ll.stack(params), batch, index, use_cache=False).logits
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(adapt.module(ll.stack(params), index=index)(**batch, use_cache=False).logits, want)
        assert not torch.allclose(want, adapt.base(batch, use_cache=False).logits, atol=1e-2)


@pytest.mark.parametrize("name", [r"self_attn$", r"layers\.\d$"])
def test_masks_that_are_added_are_followed(name):
    """They hold the lowest number of their dtype, and the trial's sums of it were infinite: such a module was refused."""
    torch.manual_seed(0)
    config = tf.LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    config._attn_implementation = "eager"
    adapt, tokens = ll.build(tf.LlamaForCausalLM(config).eval(), ll.FullConfig(target_names=name)), torch.randint(3, 60, (3, 6))
    params, mask = members(adapt), torch.ones_like(tokens)
    mask[2, :2] = 0
    batch = {"input_ids": tokens, "attention_mask": mask}
    got = adapt.mixed(ll.stack(params), batch, [1, 0, 0], use_cache=False).logits
    kept = mask.bool()
    torch.testing.assert_close(got[kept], loop(adapt, params, [1, 0, 0], batch)[kept])


def test_attention_has_a_gradient_to_a_bias_that_each_row_has():
    """Under vmap torch took a kernel that has none."""
    torch.manual_seed(0)
    config = tf.SwinConfig(image_size=16, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=4, num_labels=8)
    adapt = ll.build(tf.SwinForImageClassification(config).eval(), ll.FullConfig(target_names="attention$"))
    params, images = members(adapt)[0], torch.randn(3, 3, 16, 16)
    found = ll.per_example_grad(adapt, lambda out, _: out.logits.square().mean(1))(params, {"pixel_values": images})
    for row in range(3):
        want = ll.value_and_grad(lambda p, row=row: adapt(p, {"pixel_values": images[row : row + 1]}).logits.square().mean())(params)[1]
        for path, leaves in want.items():
            for name, leaf in leaves.items():
                torch.testing.assert_close(found[path][name][row], leaf, msg=f"{path} {name}")
        assert all(leaf.any() for leaves in want.values() for name, leaf in leaves.items() if "relative_position" in name)


@pytest.mark.parametrize("name", [r"layers\.0$", r"self_attn$", r"layers\.\d$", r"^model$"])
@pytest.mark.parametrize("index", [[0, 1], [1, 0, 1], None])
def test_each_member_of_a_whole_module_writes_its_rows_to_the_cache(name, index):
    """Members wrote to one cache, one after the other, or vmap left its tensors there."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2}
    adapt = ll.build(tf.LlamaForCausalLM(tf.LlamaConfig(**sizes)).eval(), ll.FullConfig(target_names=name))
    params, own = members(adapt), [0, 1] if index is None else index
    tokens = torch.randint(3, 60, (len(own), 7))
    batch = {"input_ids": tokens[:, :6]}
    got = adapt.mixed(ll.stack(params), batch, index)
    torch.testing.assert_close(got.logits, loop(adapt, params, own, batch))
    assert got.past_key_values.get_seq_length() == 6
    for n, k in enumerate(own):
        alone = adapt(params[k], {"input_ids": batch["input_ids"][n : n + 1]}).past_key_values
        for layer, one in zip(got.past_key_values.layers, alone.layers, strict=True):
            torch.testing.assert_close(layer.keys[n : n + 1], one.keys)
            torch.testing.assert_close(layer.values[n : n + 1], one.values)
    more = adapt.mixed(ll.stack(params), {"input_ids": tokens[:, 6:], "past_key_values": got.past_key_values}, index)
    torch.testing.assert_close(more.logits[:, -1], loop(adapt, params, own, {"input_ids": tokens})[:, -1])
    module = adapt.module(ll.stack(params), index=index)
    told = module.generate(batch["input_ids"], max_new_tokens=4, do_sample=False, use_cache=False, eos_token_id=63, pad_token_id=0)
    for n, k in enumerate(own):
        alone = adapt.module(params[k]).generate(batch["input_ids"][n : n + 1], max_new_tokens=4, do_sample=False, eos_token_id=63)
        assert torch.equal(told[n, : alone.shape[1]], alone[0])


def test_cache_of_an_encoder_and_a_decoder_has_the_rows_of_each_member():
    adapt = ll.build(t5("sdpa"), ll.FullConfig(target_names="decoder$"))
    params, tokens = members(adapt), torch.randint(2, 50, (3, 6))
    mask = torch.ones_like(tokens)
    mask[1, 4:] = 0
    for beams in (1, 2):
        told = adapt.module(ll.stack(params), index=[1, 0, 1]).generate(tokens, attention_mask=mask, max_new_tokens=5, num_beams=beams)
        for n, k in enumerate([1, 0, 1]):
            row = slice(n, n + 1)
            alone = adapt.module(params[k]).generate(tokens[row], attention_mask=mask[row], max_new_tokens=5, num_beams=beams)
            assert torch.equal(told[n, : alone.shape[1]], alone[0])


class Beside(nn.Module):
    """A part that is called with what all rows share, and with what each has; it may write to the latter."""

    def __init__(self, writes=False):
        super().__init__()
        self.part, self.writes = Scored(), writes

    def forward(self, x, bias=None):
        scores = torch.zeros_like(x) if bias is None else bias.clone()
        y = self.part(x, torch.arange(x.shape[1] * x.shape[2]).view(x.shape[1:]) / 10, scores, self.writes)
        return y + scores


class Scored(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(8, 8)

    def forward(self, x, table, scores, writes):
        y = self.lin(x) + table + scores
        if writes:
            scores += y
        return y


class ByValue(nn.Module):
    """Looks at values, as the loop over experts of a mixture does."""

    def __init__(self):
        super().__init__()
        self.lin, self.more = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        y = self.lin(x)
        hit = y[..., :1] > 0
        return torch.where(hit, self.more(y), y) if hit.any() else y


@pytest.mark.parametrize("index", [[0, 1, 1, 0], None])
def test_module_that_torch_cannot_map_runs_member_by_member(index):
    """Torch's own error about control flow came of it."""
    torch.manual_seed(0)
    adapt = ll.build(nn.Sequential(ByValue()), ll.FullConfig(target_names="^0$"))
    params, x = members(adapt), torch.randn(4, 3, 8)
    own = index or [0, 0, 1, 1]
    for _ in range(2):
        got = adapt.mixed(ll.stack(params), x, index)
        torch.testing.assert_close(got, torch.cat([adapt(params[k], x[n : n + 1]) for n, k in enumerate(own)]))
    with pytest.raises(RuntimeError, match="shape"):
        adapt.mixed(ll.stack(params), x[..., :5], index)


def test_one_row_needs_no_telling_of_its_tensors():
    """A table as all rows share it was refused for a batch of one row, which no trial can cut."""
    adapt = ll.build(Beside().eval(), ll.FullConfig(target_names="part$"))
    params, x = members(adapt), torch.randn(1, 3, 8)
    got = adapt.mixed(ll.stack(params), x, [1])
    torch.testing.assert_close(got, adapt(params[1], x))
    assert not torch.allclose(got, adapt(params[0], x), atol=1e-2)


@pytest.mark.parametrize("index", [[0, 1, 0], [1, 0, 1]])
def test_module_that_writes_to_what_it_is_called_with_is_refused(index):
    """Members wrote to copies of their rows, and the module around read what had not been written."""
    x, bias = torch.randn(3, 3, 8), torch.randn(3, 3, 8)
    for writes in (False, True):
        adapt = ll.build(Beside(writes).eval(), ll.FullConfig(target_names="part$"))
        params = members(adapt)
        refused = pytest.raises(ValueError, match="leaves its arguments as they are, found that it writes to")
        with refused if writes else contextlib.nullcontext():
            got = adapt.mixed(ll.stack(params), (x, bias), index)
            torch.testing.assert_close(got, torch.cat([adapt(params[k], (x[n : n + 1], bias[n : n + 1])) for n, k in enumerate(index)]))


FULL = [ll.FullConfig(target_names=name) for name in ("up_proj$", "mlp$")]


@pytest.mark.parametrize("cfg", [ll.LNTuningConfig(), ll.LoReFTConfig(r=2), *FULL])
def test_mixed_batch_of_modules_trained_whole_compiles_in_one_graph(cfg):
    """A lock of Python's was in its way, and the device of the params' placeholders, which passed for the module's.

    A block whose output is edited is called with a mask while it is traced, where an eager call has none.
    """
    torch.manual_seed(0)
    config = tf.LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    adapt, batch = ll.build(tf.LlamaForCausalLM(config).eval(), cfg), {"input_ids": torch.randint(3, 60, (4, 5)), "use_cache": False}

    def step(stacked):
        return ll.value_and_grad(lambda p: adapt.mixed(p, batch, [0, 1, 1, 0]).logits.square().mean())(stacked)

    stacked = ll.stack(members(adapt))
    want = step(stacked)
    torch.testing.assert_close(torch.compile(step, fullgraph=True, backend="aot_eager")(stacked), want)


class Scaled(nn.Module):
    """A layer that is called with a mask of its rows and with what all rows share."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x, mask, table=None):
        return (self.inner(x.to(self.inner.weight.dtype)) * mask[..., None]).tanh() * table.sum(), None


class AroundScaled(nn.Module):
    def __init__(self, length):
        super().__init__()
        self.layer, self.length = Scaled(), length

    def forward(self, x, mask):
        return self.layer(x, mask, table=torch.linspace(0.5, 1.0, self.length))[0]


@pytest.mark.parametrize("index", [torch.tensor([0, 1, 1, 0]), None], ids=["index", "groups"])
def test_compiled_mixed_batch_of_modules_that_are_called_with_several_tensors(index):
    """Their rows are taken by the shapes, and a trial says whether that was right. A table as long as the batch has none."""
    torch.manual_seed(0)
    x, mask = torch.randn(4, 3, 8), (torch.rand(4, 3) > 0.4).float()
    for length in (5, 4):
        adapt = ll.build(AroundScaled(length), ll.FullConfig(target_names="layer$"))
        stacked = ll.stack(members(adapt))

        def step(stacked, mask, adapt=adapt):
            return ll.value_and_grad(lambda p: adapt.mixed(p, (x, mask), index).square().sum())(stacked)

        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        refused = pytest.raises(ValueError, match=r'at "layer" expected arguments whose rows show in their shapes .* "\[1\]\[\'table\'\]"')
        with refused if length == 4 else contextlib.nullcontext():
            torch.testing.assert_close(compiled(stacked, mask), step(stacked, mask))
