"""The adapted model that `build` returns: calls, modules, modes, counts, starts, dtypes, transforms of a whole model."""

import copy
import pickle

import pytest
import torch
from torch import nn

import lora_lite as ll
from cases import FIVE, assert_trees_equal, by_name, move
from lora_lite.clone.params import dtypes
from lora_lite.variants.lora import lora

EVERY = pytest.mark.parametrize("cfg", FIVE, ids=by_name)


class Affine(nn.Module):
    """A model of two tensors and a keyword."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(6, 4)

    def forward(self, x, y=0.0, *, scale=1.0):
        return scale * self.lin(x) + y


def test_batch_may_be_mapping_tuple_list_or_tensor_with_keywords(device):
    model = Affine().to(device)
    adapt = ll.build(model, ll.LoRAConfig(r=2))
    params = move(adapt.init())
    x, y = torch.randn(3, 6, device=device), torch.randn(4, device=device)
    plain = adapt(params, x)
    calls = {
        "mapping": adapt(params, {"x": x, "y": y, "scale": 2.0}),
        "mapping and keyword": adapt(params, {"x": x}, y=y, scale=2.0),
        "keyword over mapping": adapt(params, {"x": x, "y": y, "scale": 3.0}, scale=2.0),
        "tuple": adapt(params, (x, y), scale=2.0),
        "list": adapt(params, [x, y], scale=2.0),
        "tensor": adapt(params, x, y=y, scale=2.0),
    }
    for name, got in calls.items():
        assert torch.equal(got, 2 * plain + y), name
    assert torch.equal(adapt.base((x, y), scale=2.0), model(x, y, scale=2.0))
    with pytest.raises(TypeError, match=r"expected batch as a mapping.*found str"):
        adapt(params, "text")


def test_output_is_the_models_own_type(tiny):
    model, batch = tiny("llama")
    adapt = ll.build(model, ll.LoRAConfig(r=2))
    assert type(adapt(adapt.init(), batch)) is type(model(**batch))


def test_module_is_the_models_class_and_reads_back(tiny):
    model, batch = tiny("llama")
    adapt = ll.build(model, ll.LoRAConfig(r=4))
    params = move(adapt.init())
    module = adapt.module(params)
    assert isinstance(module, type(model))
    assert torch.equal(module(**batch).logits, adapt(params, batch).logits)
    assert_trees_equal(adapt.params(module), params)
    assert sum(p.numel() for p in module.parameters() if p.requires_grad) == adapt.num_params
    with torch.no_grad():
        for leaves in params.values():
            leaves["B"].zero_()  # copies: the module keeps its own
    assert not torch.allclose(module(**batch).logits, adapt(params, batch).logits)


def test_training_the_module_changes_its_params_and_nothing_else(tiny):
    model, batch = tiny("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapt = ll.build(model, ll.LoRAConfig(r=4))
    params = move(adapt.init())
    start = {path: {name: leaf.clone() for name, leaf in leaves.items()} for path, leaves in params.items()}
    module = adapt.module(params)
    optimiser = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.5)
    module(**batch).loss.backward()
    grads = torch.func.grad(lambda p: adapt(p, batch).loss)(params)
    optimiser.step()
    assert_trees_equal(params, start)
    want = {path: {name: leaf - 0.5 * grads[path][name] for name, leaf in leaves.items()} for path, leaves in params.items()}
    assert_trees_equal(adapt.params(module), want, 1e-6)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(adapt(adapt.params(module), batch).logits, module(**batch).logits)


def test_params_of_a_foreign_module_is_an_error(tiny):
    model, _ = tiny("llama")
    adapt = ll.build(model, ll.LoRAConfig(r=4))
    with pytest.raises(ValueError, match=r"expected a module made by this adapt\.module\(params\), found LlamaForCausalLM"):
        adapt.params(model)


def test_generate_is_the_greedy_loop(tiny):
    model, batch = tiny("llama", eos_token_id=None)
    adapt = ll.build(model, ll.LoRAConfig(r=4))
    params = move(adapt.init(), scale=0.5)
    prompt = batch["input_ids"]
    ids = prompt
    with torch.no_grad():
        for _ in range(8):
            ids = torch.cat([ids, adapt(params, {"input_ids": ids}).logits[:, -1:].argmax(-1)], dim=1)
        settings = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
        assert torch.equal(adapt.module(params).generate(prompt, **settings), ids)
        assert not torch.equal(model.generate(prompt, **settings), ids)


def test_train_and_eval_return_another_and_leave_this_one():
    model = nn.Sequential(nn.Linear(6, 64)).eval()
    adapt = ll.build(model, ll.LoRAConfig(r=4, dropout=0.5))
    params = move(adapt.init())
    x = torch.randn(8, 6)
    calm = adapt(params, x)
    training = adapt.train()
    assert training is not adapt
    assert not torch.equal(training(params, x), training(params, x)), "dropout takes no part in training mode"
    assert torch.equal(adapt(params, x), calm)
    assert torch.equal(training.eval()(params, x), calm)
    assert torch.equal(adapt.train(False)(params, x), calm)
    torch.manual_seed(1)
    first = training(params, x)
    torch.manual_seed(1)
    assert torch.equal(training(params, x), first)
    assert torch.equal(training.base(x), model(x)), "the adapter's dropout reaches the base path"
    assert not model.training


def test_dropout_is_that_of_the_formula():
    W, x = torch.randn(5, 6), torch.randn(400, 6)
    layer = nn.Linear(6, 5, bias=False).train()
    layer.weight.data = W
    adapt = ll.build(layer, ll.LoRAConfig(r=2, dropout=0.25))
    params = move(adapt.init())
    torch.manual_seed(2)
    got = adapt(params, x) - adapt.base(x)
    torch.manual_seed(2)
    dropped = torch.nn.functional.dropout(x, 0.25)
    assert 0.2 < float((dropped == 0).float().mean()) < 0.3
    assert torch.allclose(got, 8.0 * dropped @ params[""]["A"].t() @ params[""]["B"].t(), atol=1e-5)


@EVERY
def test_steer_runs_from_base_to_adapter_with_a_gradient(tiny, cfg):
    model, batch = tiny("llama")
    adapt = ll.build(model, cfg)
    params = move(adapt.init())

    def loss(c):
        return adapt(adapt.steer(params, c), batch).loss

    with torch.no_grad():
        assert torch.allclose(adapt(adapt.steer(params, 0.0), batch).logits, adapt.base(batch).logits, atol=1e-6)
        assert torch.allclose(adapt(adapt.steer(params, 1.0), batch).logits, adapt(params, batch).logits, atol=1e-6)
    slope = torch.func.grad(loss)(torch.tensor(0.5))
    difference = (loss(torch.tensor(0.51)) - loss(torch.tensor(0.49))) / 0.02
    if cfg.name != "dora":  # DoRA holds its norm fixed in the gradient: differences see it move
        assert float((slope - difference).abs()) < 2e-3 * max(1.0, float(slope.abs()))
    assert float(slope.abs()) > 0


@pytest.mark.parametrize("cfg", [cfg for cfg in FIVE if cfg.name in ("lora", "ia3", "ia3_ff")], ids=by_name)
@pytest.mark.parametrize("c", [-1.0, 0.25, 2.0])
def test_steer_scales_an_update_that_is_linear(cfg, c):
    layer = nn.Linear(6, 4).double()
    adapt = ll.build(layer, cfg)
    params = move(adapt.init())
    x = torch.randn(5, 6, dtype=torch.float64)
    update = adapt(params, x) - layer(x)
    assert torch.allclose(adapt(adapt.steer(params, c), x) - layer(x), c * update, atol=1e-12)


FORMULAS = {  # params and multiply-adds of one layer, from the papers
    "lora": (lambda i, o: 4 * (i + o), lambda i, o: 4 * (i + o)),
    "pissa": (lambda i, o: 4 * (i + o), lambda i, o: 8 * (i + o)),
    "dora": (lambda i, o: 4 * (i + o) + o, lambda i, o: 4 * (i + o) + o),
    "ia3": (lambda i, o: o, lambda i, o: o),
    "ia3_ff": (lambda i, o: i, lambda i, o: i),
}


@EVERY
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_counts_are_the_formulas(tiny, name, cfg):
    model, _ = tiny(name)
    adapt = ll.build(model, cfg)
    params = adapt.init()
    trained, macs = FORMULAS[cfg.name]
    assert adapt.num_params == sum(trained(t.i, t.o) for t in adapt.targets)
    assert adapt.num_params == sum(leaf.numel() for leaves in params.values() for leaf in leaves.values())
    assert adapt.macs_per_token == sum(macs(t.i, t.o) for t in adapt.targets)


def test_full_summary_has_a_line_for_each_target_a_total_and_the_share_of_the_model(tiny):
    model, _ = tiny("llama")
    adapt = ll.build(model, [ll.LoRAConfig(r=4, target_names="q_proj", layers=(0,)), ll.IA3Config(target_names="up_proj", layers=(1,))])
    head, *rows, total, share = [line.split() for line in adapt.summary(full=True).splitlines()]
    assert head == ["path", "role", "(o,", "i)", "variant", "params", "MACs/token"]
    assert rows == [
        ["model.layers.0.self_attn.q_proj", "reader", "(32,", "32)", "lora", "256", "256"],
        ["model.layers.1.mlp.up_proj", "reader", "(64,", "32)", "ia3", "64", "64"],
    ]
    assert total == ["2", "targets", "320", "320"]
    size = sum(p.numel() for p in model.parameters())
    assert " ".join(share) == f"{32000 / size:.3g}% of the model's {size:,} params"
    assert repr(adapt) == str(adapt) == "Adapt(LlamaForCausalLM, ia3, lora, 2 targets, 320 params)"


def test_summary_has_a_line_for_the_same_layer_of_all_blocks(tiny):
    model, _ = tiny("llama", num_hidden_layers=12)
    adapt = ll.build(model, [ll.LoRAConfig(r=4, exclude_names="up_proj"), ll.IA3Config(target_names="up_proj", layers=1)])
    head, *rows, total, _ = [line.split() for line in adapt.summary().splitlines()]
    assert head == ["path", "role", "(o,", "i)", "variant", "count", "params", "MACs/token"]
    assert rows[0] == ["model.layers.*.self_attn.q_proj", "reader", "(32,", "32)", "lora", "12", "3,072", "3,072"]
    assert rows[-1] == ["model.layers.1.mlp.up_proj", "reader", "(64,", "32)", "ia3", "1", "64", "64"]
    assert len(rows) == 7
    assert total == ["73", "targets", "73", f"{adapt.num_params:,}", f"{adapt.macs_per_token:,}"]


def test_summary_keeps_layers_of_other_widths_apart_and_adds_other_ranks_up():
    widths = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4), nn.Linear(4, 8))
    rows = ll.build(widths, [ll.LoRAConfig(r=1, target_names="[01]$"), ll.LoRAConfig(r=2, target_names="2$")]).summary().splitlines()
    assert [line.split()[0] for line in rows[1:-2]] == ["*", "1"]
    assert rows[1].split()[-3:] == ["2", "36", "36"]


def test_constants_are_the_variants_frozen_tensors(tiny):
    model, _ = tiny("llama")
    adapt = ll.build(model, ll.PiSSAConfig(r=4, alpha=8.0, target_names="down_proj"))
    path = adapt.targets[1].path
    assert {name: tuple(c.shape) for name, c in adapt.constants[path].items()} == {"A0": (4, 64), "B0": (32, 4)}
    W = model.get_submodule(path).weight.detach()
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    start = 2.0 * adapt.constants[path]["B0"] @ adapt.constants[path]["A0"]
    assert torch.allclose(start, (U[:, :4] * S[:4]) @ Vh[:4], atol=1e-6)


# Init.


@EVERY
def test_init_is_fixed_by_its_seed_and_leaves_the_global_state(tiny, cfg):
    model, _ = tiny("llama")
    adapt = ll.build(model, cfg)
    state = torch.get_rng_state()
    first = adapt.init(seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert_trees_equal(adapt.init(seed=3), first)
    assert_trees_equal(ll.build(model, cfg).init(seed=3), first)
    assert {leaf.dtype for leaves in first.values() for leaf in leaves.values()} == {torch.float32}
    assert not any(leaf.requires_grad for leaves in first.values() for leaf in leaves.values())


def test_init_of_a_layer_does_not_depend_on_the_others(tiny):
    model, _ = tiny("llama")
    everything = ll.build(model, ll.LoRAConfig(r=4)).init(seed=1)
    some = ll.build(model, ll.LoRAConfig(r=4, target_names="v_proj")).init(seed=1)
    assert_trees_equal(some, {path: everything[path] for path in some})
    first, second = (some[f"model.layers.{k}.self_attn.v_proj"]["A"] for k in (0, 1))
    assert not torch.equal(first, second), "two layers start alike"
    other = ll.build(model, ll.LoRAConfig(r=4, target_names="v_proj")).init(seed=2)
    assert not torch.equal(other["model.layers.0.self_attn.v_proj"]["A"], first), "the seed is not used"


# Dtypes.


@EVERY
def test_bfloat16_model_with_float32_params(tiny, cfg):
    model, batch = tiny("llama")
    model.bfloat16()
    adapt = ll.build(model, cfg)
    start = adapt.init(seed=0)
    assert {leaf.dtype for leaves in start.values() for leaf in leaves.values()} == {torch.float32}
    params = move(start, scale=0.05)
    with torch.no_grad():
        assert torch.equal(adapt(start, batch).logits, model(**batch).logits)
        got = adapt(params, batch).logits
        exact = ll.build(copy.deepcopy(model).float(), cfg)
        want = exact(params, batch).logits
    assert got.dtype == torch.bfloat16
    assert float((got.float() - want).abs().max()) < 2e-2 * max(1.0, float(want.abs().max()))
    _, grads = ll.value_and_grad(lambda p: adapt(p, batch).loss)(params)
    assert {leaf.dtype for leaves in grads.values() for leaf in leaves.values()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_params_of_another_dtype_keep_the_models_output_dtype(tiny, dtype):
    model, batch = tiny("llama")
    adapt = ll.build(model, ll.LoRAConfig(r=4, dtype=dtype))
    params = move(adapt.init())
    assert {leaf.dtype for leaves in params.values() for leaf in leaves.values()} == {dtype}
    out = adapt(params, batch)
    assert out.logits.dtype == torch.float32
    same = {path: {name: leaf.float() for name, leaf in leaves.items()} for path, leaves in params.items()}
    assert torch.equal(out.logits, adapt(same, batch).logits)
    grads = torch.func.grad(lambda p: adapt(p, batch).loss)(params)
    assert {leaf.dtype for leaves in grads.values() for leaf in leaves.values()} == {dtype}


# Transforms of a whole model.


@EVERY
def test_vmap_over_params_of_a_whole_model_is_a_loop(tiny, cfg):
    model, batch = tiny("llama", attn_implementation="eager")
    batch = {"input_ids": batch["input_ids"]}
    adapt = ll.build(model, cfg)
    members = [move(adapt.init(seed=k), seed=k) for k in range(3)]
    stacked = {path: {name: torch.stack([m[path][name] for m in members]) for name in leaves} for path, leaves in members[0].items()}
    with torch.no_grad():
        got = torch.vmap(lambda p, b: adapt(p, b).logits, in_dims=(0, None))(stacked, batch)
        want = torch.stack([adapt(m, batch).logits for m in members])
    assert float((got - want).abs().max()) < 1e-5 * float(want.abs().max())


def _direction(params, seed):
    zeros = {path: {name: torch.zeros_like(leaf) for name, leaf in leaves.items()} for path, leaves in params.items()}
    return move(zeros, seed=seed, scale=1.0)


def _along(params, direction, step):
    return {path: {name: leaf + step * direction[path][name] for name, leaf in leaves.items()} for path, leaves in params.items()}


def two_layers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    adapt = ll.build(model, ll.LoRAConfig(r=2))
    return model, adapt, move(adapt.init()), torch.randn(3, 6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_each_leaf_and_each_call_may_have_a_dtype_of_its_own(dtype):
    _, adapt, params, x = two_layers()
    several = {path: {**leaves, "B": leaves["B"].to(dtype)} for path, leaves in params.items()}
    want = adapt(ll.tree_map(torch.Tensor.float, several), x)
    for _ in range(2):
        assert torch.equal(adapt(several, x), want)
        assert torch.equal(adapt(params, x), want) == (dtype == torch.float64)  # which rounds nothing away
    one = ll.tree_map(lambda p: p.to(dtype), params)
    assert [dtypes(tree, adapt.shapes) for tree in (params, several, one)] == [{torch.float32}, {torch.float32, dtype}, {dtype}]


@pytest.mark.parametrize("checks", [False, True])
def test_a_pure_function_casts_params_for_a_layer_that_no_call_reads(checks):
    model, adapt, params, x = two_layers()
    W = adapt.targets[0].kind.at(model, "0")
    halves = ll.tree_map(torch.Tensor.bfloat16, params)["0"]
    before = ll.set_typecheck(checks)
    try:
        got = lora(halves, W, x, scale=8.0)
    finally:
        ll.set_typecheck(before)
    assert torch.equal(got, lora({name: p.float() for name, p in halves.items()}, ll.Frozen(model[0].weight, model[0].bias), x, scale=8.0))


def test_a_call_inside_another_leaves_it_the_dtype_of_its_params():
    model, *_ = two_layers()
    inner = []
    model[1].register_forward_pre_hook(lambda *_: inner.append(again()) if not inner else None)
    adapt = ll.build(model, ll.LoRAConfig(r=2))
    params, x = move(adapt.init()), torch.randn(3, 6)
    halves = ll.tree_map(torch.Tensor.bfloat16, params)

    def again():
        inner.append(None)
        return adapt(params, x)

    before = ll.set_typecheck(False)  # which casts too
    try:
        got = adapt(halves, x)
    finally:
        ll.set_typecheck(before)
    assert torch.equal(inner[1], adapt(params, x))
    assert torch.equal(got, adapt(ll.tree_map(torch.Tensor.float, halves), x))


@pytest.mark.parametrize("cfg", [cfg for cfg in FIVE if cfg.name != "dora"], ids=by_name)  # its detached norm: see the kit's check
@pytest.mark.parametrize("name", ["gpt2", "bert"])  # others compute norms or softmax in float32 whatever their dtype
def test_derivatives_of_a_whole_model_are_finite_differences(tiny, name, cfg):
    model, batch = tiny(name, attn_implementation="eager")  # fused attention has no forward mode
    model.double()
    batch = {key: value.double() if value.is_floating_point() else value for key, value in batch.items() if key != "labels"}
    adapt = ll.build(model, type(cfg)(**{"r": 4} if hasattr(cfg, "r") else {}, dtype=torch.float64))
    params = move(adapt.init())
    direction = _direction(params, seed=4)

    def loss(p):
        return adapt(p, batch).logits.square().mean()

    step = 1e-5
    want = float(loss(_along(params, direction, step)) - loss(_along(params, direction, -step))) / (2 * step)
    bound = 1e-6 * max(1.0, abs(want))
    value, grads = ll.value_and_grad(loss)(params)
    reverse = sum(float((grads[path][name] * leaf).sum()) for path, leaves in direction.items() for name, leaf in leaves.items())
    forward = torch.func.jvp(loss, (params,), (direction,))
    assert abs(reverse - want) < bound
    assert abs(float(forward[1]) - want) < bound
    assert torch.allclose(forward[0], value, rtol=1e-12)


COPIES = {"copy": copy.copy, "deepcopy": copy.deepcopy, "pickle": lambda adapt: pickle.loads(pickle.dumps(adapt))}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("cfg", FIVE, ids=by_name)
def test_copies_compute_the_same_and_only_the_shallow_one_shares_the_weights(tiny, cfg, how):
    model, batch = tiny("llama")
    adapt = ll.build(model, cfg, remat=r"layers\.\d+$")
    params = move(adapt.init())
    again, want = COPIES[how](adapt), adapt(params, batch).logits
    assert torch.equal(again(params, batch).logits, want)
    assert_trees_equal(again.init(seed=3), adapt.init(seed=3))
    assert again.summary() == adapt.summary()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(again(params, batch).logits, want) == (how != "copy")


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("cfg", [*FIVE, ll.LoReFTConfig(r=4), ll.LNTuningConfig()], ids=by_name)
def test_a_module_can_be_copied_and_pickled(tiny, cfg, how):
    model, batch = tiny("llama")
    adapt = ll.build(model, cfg, remat=r"layers\.\d+$")
    params = move(adapt.init())
    module = adapt.module(params)
    again = COPIES[how](module)
    assert type(again) is type(module)
    assert torch.equal(again(**batch).logits, module(**batch).logits)
    assert_trees_equal(adapt.params(again), params)
    want = module(**batch).logits
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()  # the user's weights and this module's params
    assert torch.equal(again(**batch).logits, want)
    assert_trees_equal(adapt.params(again), params)


def test_params_without_data_are_refused(tiny):
    model, batch = tiny("llama", num_hidden_layers=1)
    adapt = ll.build(model, ll.LoRAConfig(r=2))
    empty = ll.tree_map(lambda p: p.to("meta"), adapt.init())
    with pytest.raises(RuntimeError, match=r'expected params with data at ".*q_proj", found them on meta.*remat='):
        adapt(empty, batch)
    with pytest.raises(RuntimeError, match="expected params with data at"):
        adapt.mixed(ll.stack([empty, empty]), batch)
