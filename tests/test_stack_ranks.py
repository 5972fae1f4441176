"""Stacks of trees of several ranks: each member computes and trains as it does by itself, or is refused by name."""

import dataclasses

import pytest
import torch
from torch import nn

import lora_lite as ll
from cases import FIRST, Blocks, assert_trees_equal, build_any, in_dtype, move, named, padded, row_of

INDEX = [1, 0, 1, 0]


def of_ranks(cfg, *ranks, **fields):
    return [dataclasses.replace(cfg, r=r, **{name: values[k] for name, values in fields.items()}) for k, r in enumerate(ranks)]


def trees_of(adapts, dtype=torch.float64):
    return [in_dtype(move(adapt.init(seed=k), seed=k), dtype) for k, adapt in enumerate(adapts)]


def loss_of(output):
    return output.square().sum()


def assert_as_alone(host, stacked, adapts, trees, x, index=INDEX, tolerance=1e-10):
    """Compare rows, and the gradients of the trees, with those that each adapt gives for its own rows."""
    got = host.mixed(stacked, x, index)
    for n, k in enumerate(index):
        want, base = adapts[k](trees[k], x[n : n + 1])[0], host.base(x[n : n + 1])[0]
        assert (got[n] - want).abs().max() <= tolerance * (want - base).abs().max()
        assert (want - base).abs().max() > 1e-3


@pytest.mark.parametrize(
    "cfg",
    [ll.LoRAConfig(), ll.LoRAConfig(lora_bias=True), ll.DoRAConfig(), ll.LoHaConfig(), ll.HiRAConfig(), ll.PEANuTConfig(r=2)],
    ids=lambda cfg: cfg.name,
)
def test_bare_trees_of_one_scale_are_padded(cfg):
    fields = {"alpha": (8.0, 16.0)} if hasattr(cfg, "alpha") else {}
    model, x = Blocks().eval().double(), torch.randn(4, 5, 48).double()
    adapts = [ll.build(model, one) for one in of_ranks(cfg, 2, 4, **fields)]
    trees = trees_of(adapts)
    stacked = ll.stack(trees, pad=True)
    assert_as_alone(adapts[1], stacked, adapts, trees, x)
    _, grads = ll.value_and_grad(lambda p: loss_of(adapts[1].mixed(p, x, INDEX)))(stacked)
    for k, member in enumerate(ll.unstack(grads, like=trees)):  # which refuses gradients of the padding
        rows = x[[n for n, own in enumerate(INDEX) if own == k]]
        _, want = ll.value_and_grad(lambda p, k=k, rows=rows: loss_of(adapts[k](p, rows)))(trees[k])
        assert_trees_equal(member, want, 1e-9)
    for tree, again in zip(trees, ll.unstack(stacked, like=trees)):
        assert_trees_equal(tree, again)


def test_members_of_several_ranks_train_as_alone(tiny):
    model, batch = padded(tiny, "llama", num_hidden_layers=1)
    adapts = [ll.build(model.double(), cfg) for cfg in of_ranks(ll.DoRAConfig(), 2, 8, alpha=(4.0, 16.0))]
    trees = trees_of(adapts)

    def trained(params, loss, steps=3):
        for _ in range(steps):
            params = ll.tree_map(lambda p, g: p - 1e-3 * g, params, ll.value_and_grad(loss)(params)[1])
        return params

    host, stacked = ll.stack(zip(adapts, trees), pad=True)
    together = trained(stacked, lambda p: host.mixed(p, batch, [0, 1, 0, 1]).logits.square().sum())
    for k, member in enumerate(ll.unstack(together, like=trees)):
        own = {name: t[k::2] for name, t in batch.items()}
        want = trained(trees[k], lambda p, k=k, own=own: adapts[k](p, own).logits.square().sum())
        assert_trees_equal(member, want, 1e-9)
        assert max(float((a - b).abs().max()) for a, b in zip(ll.tree_leaves(want), ll.tree_leaves(trees[k]))) > 1e-4


PAIRS = {
    "default-alpha": of_ranks(ll.LoRAConfig(), 4, 8),
    "rslora": of_ranks(ll.LoRAConfig(), 4, 8, rslora=(True, False)),
    "own-bias": of_ranks(ll.LoRAConfig(lora_bias=True, bias=True), 2, 4, alpha=(3.0, 5.0)),
    "dora": of_ranks(ll.DoRAConfig(), 2, 4),
    "loha": of_ranks(ll.LoHaConfig(), 2, 4),
    "adalora": [ll.AdaLoRAConfig(init_r=r, target_r=2) for r in (3, 6)],
    "same-rank": of_ranks(ll.LoRAConfig(), 4, 4, alpha=(2.0, 7.0)),
    "pissa-of-one-rank": of_ranks(ll.PiSSAConfig(), 4, 4),
    "eva": [ll.EVAConfig(r=4), ll.LoRAConfig(r=8)],
}


@pytest.mark.parametrize("configs", PAIRS.values(), ids=PAIRS)
def test_pairs_keep_the_scale_of_their_configs(configs):
    model, x = Blocks().eval().double(), torch.randn(4, 5, 48).double()
    adapts = [build_any(model, cfg, [torch.randn(40, 7, 48).double()]) for cfg in configs]
    trees = trees_of(adapts)
    host, stacked = ll.stack(zip(adapts, trees), pad=True)
    assert host is next(
        adapt for adapt in adapts if adapt.shapes == {p: {n: tuple(t.shape[1:]) for n, t in s.items()} for p, s in stacked.items()}
    )
    assert_as_alone(host, stacked, adapts, trees, x)
    for tree, again in zip(trees, ll.unstack(stacked, like=list(zip(adapts, trees)))):
        assert_trees_equal(tree, again, 1e-12)
    leaves = [ll.tree_map(lambda p: p.clone().requires_grad_(), tree) for tree in trees]  # the stack is differentiable
    loss_of(host.mixed(ll.stack(zip(adapts, leaves), pad=True)[1], x, INDEX)).backward()
    for k, (adapt, tree) in enumerate(zip(adapts, trees)):
        rows = x[[n for n, own in enumerate(INDEX) if own == k]]
        _, want = ll.value_and_grad(lambda p, adapt=adapt, rows=rows: loss_of(adapt(p, rows)))(tree)
        assert_trees_equal(ll.tree_map(lambda p: p.grad, leaves[k]), want, 1e-9)


NEUTRAL = {"alora", "lora", "dora", "eva", "loftq", "loha", "hira", "peanut", "glora", "supertuning-supra", "lokr"}
FROZEN = {"pissa", "corda-ipm", "asvd", "lora-xs", "antipasto-rotation", "svft"}
"""Whose zeros do nothing, and are trained."""


@pytest.mark.parametrize("row", [row for row in FIRST if hasattr(row.cfg, "r")], ids=named)
@pytest.mark.parametrize("pad", [True, "frozen"])
def test_every_variant_is_padded_rightly_or_refused_by_name(row, pad):
    torch.manual_seed(0)
    model, x = Blocks().eval().double(), torch.randn(4, 5, 48).double()
    batches = [torch.randn(40, 7, 48).double()]
    try:
        adapts = [build_any(model, cfg, batches) for cfg in of_ranks(row.cfg, 4, 8)]
    except ValueError:
        pytest.skip("its other options do not fit ranks 4 and 8")
    trees = trees_of(adapts)
    if row.id in NEUTRAL or (pad == "frozen" and row.id in FROZEN):
        host, stacked = ll.stack(zip(adapts, trees), pad=pad)
        assert_as_alone(host, stacked, adapts, trees, x)
    else:
        refused = r'stack: at ".*" (".*" expected a leaf whose padding|expected a config that computes)|stack: expected an adapt with room'
        with pytest.raises(ValueError, match=refused):
            ll.stack(zip(adapts, trees), pad=pad)


@pytest.mark.parametrize(
    "cfg", [ll.HRAConfig(), ll.PiSSAConfig(), ll.VeRAConfig(), ll.DeLoRAConfig(), ll.SSVDConfig()], ids=lambda cfg: cfg.name
)
def test_variants_whose_padding_is_not_neutral_are_refused(cfg):
    adapts = [ll.build(Blocks().eval(), one) for one in of_ranks(cfg, 4, 8)]
    trees = [adapt.init() for adapt in adapts]
    with pytest.raises(ValueError, match=r'stack: at "blocks.0.0" "\w+" expected a leaf whose padding by zeros changes nothing, found \('):
        ll.stack(trees, pad=True)
    with pytest.raises(ValueError, match=rf'stack: at "blocks.0.0" "\w+" .* under {type(cfg).__name__} the member would'):
        ll.stack(zip(adapts, trees), pad=True)


def test_blocks_of_two_sizes_are_refused():
    adapts = [ll.build(Blocks().eval(), ll.OFTConfig(block_size=size)) for size in (4, 8)]
    with pytest.raises(
        ValueError, match=r'stack: at "blocks.0.0" "\w+" expected a leaf whose padding .* no variant with such leaves is known'
    ):
        ll.stack([adapt.init() for adapt in adapts], pad=True)
    with pytest.raises(
        ValueError, match=r"stack: expected an adapt with room for all trees, found that none has it: .* Build one on all targets"
    ):
        ll.stack([(adapt, adapt.init()) for adapt in adapts], pad=True)


def test_padding_of_pissa_may_be_frozen():
    model, x = Blocks().eval().double(), torch.randn(4, 5, 48).double()
    adapts = [ll.build(model, cfg) for cfg in of_ranks(ll.PiSSAConfig(), 4, 8)]
    trees = trees_of(adapts)
    host, stacked = ll.stack(zip(adapts, trees), pad="frozen")
    assert_as_alone(host, stacked, adapts, trees, x)
    trained = ll.tree_map(lambda p: p + 0.1, stacked)
    with pytest.raises(ValueError, match=r'unstack: at "blocks.0.0" "dA" expected zeros beyond \(4, 48\) in member 0, found others'):
        ll.unstack(trained, like=list(zip(adapts, trees)))


def test_targets_that_a_pair_lacks_are_at_the_base_model():
    model, x = Blocks().eval().double(), torch.randn(4, 5, 48).double()
    adapts = [ll.build(model, cfg) for cfg in (ll.LoRAConfig(r=2, target_names=r"\.0$"), ll.LoRAConfig(r=4))]
    trees = trees_of(adapts)
    host, stacked = ll.stack(zip(adapts, trees), pad=True)
    assert_as_alone(host, stacked, adapts, trees, x)
    assert_trees_equal(ll.unstack(stacked, like=list(zip(adapts, trees)))[0], trees[0])
    few = ll.build(model, ll.LoRAConfig(r=4, target_names=r"\.0$"))
    with pytest.raises(ValueError, match=r'stack: at ".*" "A" expected leaves of one shape, found none in tree 0. Pass pad=True'):
        ll.stack([(few, few.init()), (adapts[1], trees[1])])


SAME_SHAPES = {
    "invocations": (ll.ALoRAConfig(invocation_tokens=(3,)), ll.ALoRAConfig(invocation_tokens=(4,)), r"=\(4,\) beside \(3,"),
    "invocation or none": (ll.LoRAConfig(), ll.ALoRAConfig(invocation_tokens=(4,)), "found ALoRAConfig beside LoRAConfig in tree 1"),
    "tokens": (ll.TokensConfig(token_ids=(3, 4)), ll.TokensConfig(token_ids=(4, 5)), r'TokensConfig of "token_ids=\(4, 5\) beside \(3, 4'),
    "rotations": (ll.OFTConfig(block_size=4), ll.OFTConfig(block_size=4, cayley="exact"), "cayley='exact' beside 'series'"),
    "methods": (ll.LoRAConfig(), ll.HiRAConfig(r=8), "found HiRAConfig beside LoRAConfig in tree 1"),
}


@pytest.mark.parametrize("pad", [False, True, "frozen"])
@pytest.mark.parametrize("case", SAME_SHAPES)
def test_trees_of_one_shape_that_mean_another_thing_are_refused_by_what_differs(tiny, case, pad):
    """Two aLoRAs ran from the invocation of the first, and other tokens were an error of torch's."""
    first, second, match = SAME_SHAPES[case]
    model, _ = padded(tiny, "llama", num_hidden_layers=1)
    pairs = [(adapt, move(adapt.init())) for adapt in (ll.build(model, first), ll.build(model, second))]
    with pytest.raises(ValueError, match=f'stack: at ".*" expected a config that computes the same .*{match}'):
        ll.stack(pairs, pad=pad)


BESIDE = {
    "gates": ll.IA3Config(target_names=r"v_proj$"),
    "norms": ll.LNTuningConfig(),
    "a module": ll.FullConfig(target_names=r"lm_head$"),
    "tokens": ll.TokensConfig(token_ids=(3, 4)),
}


@pytest.mark.parametrize("case", BESIDE)
def test_displacements_that_a_pair_lacks_are_zeros_which_training_would_move(tiny, case):
    """Gates that a member did not have were trained with it, and the others could not be left out."""
    model, batch = padded(tiny, "llama", num_hidden_layers=1)
    ids = batch["input_ids"][:1].clone()
    ids[0, 1] = 3
    lora = ll.LoRAConfig(r=2, target_names=r"q_proj$")
    pairs = [(adapt, move(adapt.init(seed=2))) for adapt in (ll.build(model, lora), ll.build(model, [lora, BESIDE[case]]))]
    with pytest.raises(ValueError, match=r'padding would be trained. .*pass pad="frozen" for a stack that is not trained'):
        ll.stack(pairs, pad=True)
    host, stacked = ll.stack(pairs, pad="frozen")
    logits = host.mixed(stacked, {"input_ids": ids.repeat(2, 1)}, [0, 1]).logits
    for n, (adapt, params) in enumerate(pairs):
        torch.testing.assert_close(logits[n : n + 1], adapt(params, {"input_ids": ids}).logits, rtol=1e-4, atol=1e-5)
    assert (logits[0] - logits[1]).abs().max() > 1e-3


def test_redistributed_ranks_take_a_host_of_the_largest():
    model, x = Blocks().eval().double(), torch.randn(4, 5, 48).double()
    adapts = [build_any(model, ll.EVAConfig(r=4, rho=2.0), [torch.randn(40, 7, 48).double() * scale]) for scale in (1.0, 5.0)]
    trees = trees_of(adapts)
    host = ll.build(model, ll.LoRAConfig(r=8))
    found, stacked = ll.stack(zip(adapts, trees), pad=True, adapt=host)
    assert found is host
    assert_as_alone(host, stacked, adapts, trees, x)


def test_loaded_files_are_stacked_as_they_come(tmp_path):
    model, x = Blocks().eval(), torch.randn(4, 5, 48)
    for k, cfg in enumerate(of_ranks(ll.LoRAConfig(), 4, 8)):
        adapt = ll.build(model, cfg)
        ll.save(adapt, move(adapt.init(seed=k), seed=k), tmp_path / f"{k}.safetensors")
    pairs = [ll.load(model, tmp_path / f"{k}.safetensors") for k in range(2)]
    host, stacked = ll.stack(pairs, pad=True)
    assert_as_alone(host, stacked, *zip(*pairs), x, tolerance=1e-4)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda a, b: ll.stack([a.init(), b.init()]), r'tree 1 to differ from tree 0 at "0" "A": found \(4, 8\), .* pad=True pads ranks'),
        (lambda a, b: ll.stack([a.init(), {}], pad=True), r"tree 1 to differ from tree 0"),
        (lambda a, b: ll.stack([a.init(), {"0": {"C": torch.ones(2)}}], pad=True), r"tree 1 to differ from tree 0"),
        (lambda a, b: ll.stack([a.init()], adapt=a), r"expected pairs \(adapt, params\) beside an adapt"),
        (lambda a, b: ll.stack([(a, b.init())]), r'stack: expected params that fit .*\n  - "0.A": expected shape \(2, 8\)'),
        (
            lambda a, b: ll.stack([(a, a.init()), (b, b.init())]),
            r'at "0" "A" expected leaves of one shape, found \(2, 8\) in tree 0 beside',
        ),
        (
            lambda a, b: ll.stack([(b, b.init())], pad=True, adapt=a),
            r'the given one lacks it: "0" "A" has the shape \(2, 8\), and \(4, 8\)',
        ),
        (lambda a, b: ll.unstack(ll.stack([a.init()]), like=[]), r"expected 1 trees in like, one for each member, found 0"),
        (lambda a, b: ll.unstack(ll.stack([a.init()]), like=[b.init()]), r'at "0" "A" expected tree 0 of like to lie within \(2, 8\)'),
    ],
)
def test_bad_input_is_refused(call, match):
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(ValueError, match=match):
        call(*(ll.build(model, ll.LoRAConfig(r=r)) for r in (2, 4)))


def test_experts_and_fused_layers_are_padded(tiny):
    model, batch = tiny("qwen3_moe", num_hidden_layers=1)
    configs = of_ranks(ll.LoRAConfig(target_names=r"experts\.(gate_up|down)_proj$"), 2, 4)
    adapts = [ll.build(model.double(), cfg) for cfg in configs]
    trees = trees_of(adapts)
    host, stacked = ll.stack(zip(adapts, trees), pad=True)
    rows = {name: t[:2] for name, t in batch.items() if name != "labels"}
    got = host.mixed(stacked, rows, [0, 1]).logits
    for k in range(2):
        want = adapts[k](trees[k], row_of(rows, k)).logits[0]
        torch.testing.assert_close(got[k], want, rtol=1e-9, atol=1e-9)


def test_trees_of_several_variants_at_a_layer_are_refused_and_the_way_out_works():
    model, x = torch.nn.Sequential(torch.nn.Linear(8, 6)), torch.randn(4, 8)
    pairs = [(adapt, move(adapt.init())) for adapt in (ll.build(model, cfg) for cfg in (ll.LoRAConfig(r=2), ll.LoKrConfig(r=2)))]
    with pytest.raises(ValueError, match=r'"0" has other leaves in each.*ll\.to_lora'):
        ll.stack(pairs, pad=True)
    host, stacked = ll.stack([ll.to_lora(*pair, r=8)[:2] for pair in pairs], pad=True)
    want = torch.cat([adapt(params, rows) for (adapt, params), rows in zip(pairs, x.split(2))])
    torch.testing.assert_close(host.mixed(stacked, x, [0, 0, 1, 1]), want)
