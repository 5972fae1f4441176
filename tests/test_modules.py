"""Whole modules and norms as targets: full training and LN-tuning, against training the model itself and against PEFT."""

import copy

import peft
import pytest
import torch
import transformers as tf
from torch import nn

import lora_lite as ll
from cases import assert_trees_equal, move, tiny_models

TOLERANCE = 1e-5


def _classifier():
    torch.manual_seed(0)
    config = tf.BertConfig(
        **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_labels": 3}
    )
    ids = torch.randint(3, 64, (4, 7), generator=torch.Generator().manual_seed(1))
    return tf.BertForSequenceClassification(config).eval(), {"input_ids": ids, "labels": torch.tensor([0, 1, 2, 1])}


def _moved_copy(model, params):
    """The model itself with its parameters moved: what full training means."""
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for path, leaves in params.items():
            own = dict(moved.get_submodule(path).named_parameters())
            for name, delta in leaves.items():
                own[name].add_(delta)
    return moved


def _assert_equals_the_moved_model(model, adapt, params, batch):
    moved = _moved_copy(model, params)
    out = moved(**batch)
    out.loss.backward()
    value, grads = ll.value_and_grad(lambda p: adapt(p, batch).loss)(params)
    assert not torch.allclose(model(**batch).logits, out.logits), "the params do nothing"
    torch.testing.assert_close(value, out.loss.detach(), rtol=1e-6, atol=1e-6)
    for path, leaves in grads.items():
        own = dict(moved.get_submodule(path).named_parameters())
        for name, grad in leaves.items():
            torch.testing.assert_close(grad, own[name].grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("names", [r"^classifier$", r"pooler$", r"embeddings$", r"layer\.1$", r"word_embeddings$"])
def test_full_is_training_the_module_itself(names):
    model, batch = _classifier()
    adapt = ll.build(model, ll.FullConfig(target_names=names))
    assert len(adapt.targets) == 1
    assert torch.equal(adapt(adapt.init(seed=0), batch).logits, model(**batch).logits)
    _assert_equals_the_moved_model(model, adapt, move(adapt.init(seed=0)), batch)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt2", "bert", "t5"])
def test_ln_tuning_takes_the_norms_of_every_family(family):
    model, batch = tiny_models[family]()
    model.eval()
    adapt = ll.build(model, ll.LNTuningConfig())
    norms = [m for m in model.modules() if "norm" in type(m).__name__.lower()]
    assert len(adapt.targets) == len(norms) > 2
    with torch.no_grad():
        assert torch.equal(adapt(adapt.init(seed=0), batch).logits, model(**batch).logits)
    _assert_equals_the_moved_model(model, adapt, move(adapt.init(seed=0)), batch)


def test_merges_saves_and_binds_to_a_module(tmp_path):
    model, batch = _classifier()
    adapt = ll.build(model, [ll.FullConfig(target_names="classifier$"), ll.LNTuningConfig(), ll.LoRAConfig(r=2, target_names="query$")])
    params = move(adapt.init(seed=0))
    want = adapt(params, batch).logits
    merged = copy.deepcopy(model)
    merged.load_state_dict(adapt.merge(params), strict=False)
    torch.testing.assert_close(merged(**batch).logits, want, rtol=1e-5, atol=1e-5)
    ll.save(adapt, params, tmp_path / "a.safetensors")
    again, read = ll.load(copy.deepcopy(model), tmp_path / "a.safetensors")
    assert_trees_equal(read, params)
    assert torch.equal(again(read, batch).logits, want)
    module = adapt.module(params)
    assert torch.equal(module(**batch).logits, want)
    assert_trees_equal(adapt.params(module), params)


def test_a_whole_block_has_params_with_dotted_names(tmp_path):
    model, batch = _classifier()
    adapt = ll.build(model, ll.FullConfig(target_names=r"encoder\.layer\.1$"), remat=r"layer\.\d+$")
    params = move(adapt.init(seed=0))
    assert "attention.self.query.weight" in params["bert.encoder.layer.1"]
    _assert_equals_the_moved_model(model, adapt, params, batch)
    ll.save(adapt, params, tmp_path / "a.safetensors")
    again, read = ll.load(model, tmp_path / "a.safetensors")
    assert torch.equal(again(read, batch).logits, adapt(params, batch).logits)
    assert_trees_equal(adapt.params(adapt.module(params)), params)


@pytest.mark.parametrize("cfg", [ll.FullConfig(target_names=(r"^classifier$", r"pooler$")), ll.LNTuningConfig()], ids=lambda c: c.name)
def test_rows_of_a_mixed_batch_equal_a_loop(cfg):
    model, batch = _classifier()
    adapt = ll.build(model, cfg)
    members, rows = [move(adapt.init(seed=0), seed=k) for k in range(2)], [1, 0, 0, 1]
    got = adapt.mixed(ll.stack(members), {"input_ids": batch["input_ids"]}, rows).logits
    for row, k in enumerate(rows):
        want = adapt(members[k], {"input_ids": batch["input_ids"][row : row + 1]}).logits[0]
        torch.testing.assert_close(got[row], want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("names", [r"encoder\.layer\.1$", r"^bert$", r"^bert\.encoder$"])
@pytest.mark.parametrize("index", [None, [1, 0, 0, 1], [1, 1, 1, 1]])
@pytest.mark.parametrize("training", [False, True])
def test_rows_of_a_module_called_with_several_tensors_equal_a_loop(names, index, training):
    model, batch = _classifier()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    mask = torch.ones_like(batch["input_ids"])
    mask[0, 5:] = 0
    inputs = {"input_ids": batch["input_ids"], "attention_mask": mask}
    adapt = ll.build(
        model,
        [ll.FullConfig(target_names=(names, "classifier$")), ll.LoRAConfig(r=2, target_names=r"pooler\.dense$")][
            : 2 - (names == r"^bert$")
        ],
    )
    adapt = adapt.train() if training else adapt
    members = [move(adapt.init(seed=0), seed=k) for k in range(2)]

    def loss(stacked):
        return adapt.mixed(stacked, inputs, index).logits.square().sum()

    got = adapt.mixed(ll.stack(members), inputs, index).logits
    _, grads = ll.value_and_grad(loss)(ll.stack(members))
    for row, k in enumerate(index or [0, 0, 1, 1]):
        want = adapt(members[k], {name: value[row : row + 1] for name, value in inputs.items()}).logits[0]
        torch.testing.assert_close(got[row], want, rtol=1e-4, atol=1e-5)

    def alone(params):  # the members in turn, each on its rows
        trees = ll.unstack(params)
        one = [{name: value[row : row + 1] for name, value in inputs.items()} for row in range(4)]
        return sum(adapt(trees[k], one[row]).logits.square().sum() for row, k in enumerate(index or [0, 0, 1, 1]))

    _, want = ll.value_and_grad(alone)(ll.stack(members))
    for a, b in zip(ll.tree_leaves(grads), ll.tree_leaves(want), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


class Beside(torch.nn.Module):
    """A layer that is called with rows, with a table for all rows, and with a number of rows that only it knows."""

    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(4, 4)

    def forward(self, x, y, table, odd=None):
        return self.inner(x) * y + table.sum() + (0 if odd is None else odd.sum())


class Around(torch.nn.Module):
    """A model that calls such a layer."""

    def __init__(self, odd=False):
        super().__init__()
        self.layer, self.odd = Beside(), odd

    def forward(self, x):
        table = torch.arange(12.0).view(3, 4)  # as long as a batch of three rows: only a trial tells it from rows
        odd = torch.ones(len(x) + 1) if self.odd else None
        return self.layer(x, 2 * x, table, odd=odd)


class PairNorm(nn.LayerNorm):
    """A norm that returns a scale beside its output, or none, as I-BERT's does."""

    def forward(self, x):
        return super().forward(x), None


class Paired(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.head = PairNorm(6), nn.Linear(6, 3)

    def forward(self, x):
        y, scale = self.norm(x)
        return self.head(y if scale is None else y * scale)


@pytest.mark.parametrize("cfg", [ll.LNTuningConfig(), ll.FullConfig(target_names="norm")], ids=lambda cfg: cfg.name)
def test_outputs_that_are_no_tensors_have_no_rows(cfg):
    adapt, x = ll.build(Paired(), cfg), torch.randn(4, 6)
    members = [move(adapt.init(), seed=k) for k in range(2)]
    got = adapt.mixed(ll.stack(members), x, [0, 1, 1, 0])
    want = torch.cat([adapt(members[k], x[n : n + 1]) for n, k in enumerate([0, 1, 1, 0])])
    torch.testing.assert_close(got, want)


def test_norms_whose_weight_is_a_buffer_are_not_taken():
    """As those of Falcon Mamba's mixer: there is nothing to train."""

    class FixedNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("weight", torch.ones(6))

        def forward(self, x):
            return x * self.weight

    model = nn.Sequential(FixedNorm(), nn.LayerNorm(6))
    assert [t.path for t in ll.find_targets(model, ll.LNTuningConfig())] == ["1"]
    with pytest.raises(ValueError, match="expected a model with norms with a weight"):
        ll.build(nn.Sequential(FixedNorm()), ll.LNTuningConfig())


def test_a_table_as_long_as_the_batch_is_no_rows():
    torch.manual_seed(0)
    model, x = Around(), torch.randn(3, 4)
    adapt = ll.build(model, ll.FullConfig(target_names="^layer$"))
    members = [move(adapt.init(seed=0), seed=k) for k in range(3)]
    got = adapt.mixed(ll.stack(members), x)
    for row in range(3):
        torch.testing.assert_close(got[row], adapt(members[row], x[row : row + 1])[0])


def test_what_neither_grows_with_the_batch_nor_stays_is_refused_by_name():
    adapt = ll.build(Around(odd=True), ll.FullConfig(target_names="^layer$"))
    with pytest.raises(ValueError, match=r'"layer" expected arguments whose rows can be told from what rows share, found that .*odd'):
        adapt.mixed(ll.stack([adapt.init(seed=0)] * 3), torch.randn(3, 4))


def test_bfloat16_models_keep_float32_params():
    model, batch = _classifier()
    model.bfloat16()
    adapt = ll.build(model, ll.FullConfig(target_names="classifier$"))
    params = adapt.init(seed=0)
    grads = ll.value_and_grad(lambda p: adapt(p, batch).loss.float())(params)[1]
    assert {leaf.dtype for leaf in ll.tree_leaves(params)} == {leaf.dtype for leaf in ll.tree_leaves(grads)} == {torch.float32}
    assert adapt(move(params), batch).logits.dtype == torch.bfloat16


class TestPEFT:
    def _theirs(self, model, config):
        theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
        with torch.no_grad():
            for p in theirs.parameters():
                if p.requires_grad:
                    p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
        return theirs

    @pytest.mark.parametrize(
        "config",
        [
            peft.LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"]),
            peft.IA3Config(target_modules=["key"], feedforward_modules=[], modules_to_save=["classifier", "pooler"]),
            peft.LNTuningConfig(target_modules=["LayerNorm"]),
            peft.LNTuningConfig(target_modules=["LayerNorm"], modules_to_save=["classifier", "pooler"]),
            peft.LNTuningConfig(target_modules=["LayerNorm"], task_type="SEQ_CLS"),
        ],
        ids=["lora", "ia3", "ln-tuning", "ln-tuning-and-modules", "ln-tuning-of-a-task"],
    )
    @pytest.mark.filterwarnings("ignore:Unsupported layer type")  # PEFT's own, of the norms that it adapts
    def test_files_are_read_with_their_values_and_gradients_and_written_back(self, config, tmp_path):
        model, batch = _classifier()
        theirs = self._theirs(model, config)
        theirs.save_pretrained(tmp_path / "theirs")
        adapt, params = ll.from_peft(model, tmp_path / "theirs")
        out = theirs(**batch)
        out.loss.backward()
        update, out.logits = (out.logits - model(**batch).logits).detach(), out.logits.detach()
        grads = ll.value_and_grad(lambda p: adapt(p, batch).loss)(params)[1]
        assert update.abs().max() > 1e-3
        assert float((adapt(params, batch).logits - out.logits).abs().max() / update.abs().max()) < TOLERANCE
        ours = sorted(leaf.norm().item() for leaf in ll.tree_leaves(grads))
        wanted = sorted(p.grad.norm().item() for p in theirs.parameters() if p.requires_grad)
        assert ours == pytest.approx(wanted, rel=1e-4, abs=1e-7)
        ll.to_peft(adapt, params, tmp_path / "ours")
        again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours").eval()
        assert float((again(**batch).logits - out.logits).abs().max() / update.abs().max()) < TOLERANCE

    def test_what_peft_cannot_express_is_refused(self, tmp_path):
        model, _ = _classifier()
        for cfg, match in (
            (ll.FullConfig(target_names="classifier$"), "beside a method only"),
            ([ll.LNTuningConfig(), ll.LoRAConfig(r=2, target_names="query$")], "LN-tuning at .* beside another method"),
        ):
            adapt = ll.build(model, cfg)
            with pytest.raises(ValueError, match=match):
                ll.to_peft(adapt, adapt.init(seed=0), tmp_path / "a")
        assert not (tmp_path / "a").exists()

    def test_a_head_of_another_size_is_refused(self, tmp_path):
        model, _ = _classifier()
        config = peft.LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"])
        self._theirs(model, config).save_pretrained(tmp_path / "a")
        model.classifier = nn.Linear(32, 5)
        with pytest.raises(ValueError, match=r'"classifier\.weight": expected \(5, 32\), found \(3, 32\)'):
            ll.from_peft(model, tmp_path / "a")


def test_refusals():
    model, _ = _classifier()
    with pytest.raises(ValueError, match=r"FullConfig\.target_names: expected the modules to train, found none"):
        ll.build(model, ll.FullConfig())
    with pytest.raises(ValueError, match="no target inside a module that is trained as a whole"):
        ll.build(model, [ll.FullConfig(target_names=r"layer\.1$"), ll.LoRAConfig(r=2, target_names="query$")])
    with pytest.raises(ValueError, match="expected a model with norms with a weight, found none"):
        ll.build(nn.Sequential(nn.Linear(2, 2)), ll.LNTuningConfig())


def test_a_tied_head_moves_alone_and_does_not_merge():
    model, batch = tiny_models["gpt2"]()
    model.eval()
    adapt = ll.build(model, ll.FullConfig(target_names="lm_head$"))
    params = move(adapt.init(seed=0))
    hidden = [adapt.base(batch, output_hidden_states=True), adapt(params, batch, output_hidden_states=True)]
    assert torch.equal(hidden[0].hidden_states[-1], hidden[1].hidden_states[-1])
    assert not torch.allclose(hidden[0].logits, hidden[1].logits)
    with pytest.raises(ValueError, match="its weight is shared with"):
        adapt.merge(params)


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(self.a(x).tanh())


def test_a_weight_that_parts_of_a_module_share_moves_in_all_of_them():
    model, x = nn.Sequential(Tied(), nn.Linear(6, 3)), torch.randn(5, 6)
    adapt = ll.build(model, ll.FullConfig(target_names="^0$"))
    params = move(adapt.init())
    got = adapt(params, x)
    moved = {f"0.{name}": p + params["0"][name] for name, p in model[0].named_parameters()}
    torch.testing.assert_close(got, torch.func.functional_call(model, moved, (x,)))
    model.load_state_dict(adapt.merge(params), strict=False)
    torch.testing.assert_close(model(x), got)
