"""The module in transformers' Trainer and pipeline, in accelerate's loop, wrapped and compiled."""

import copy
import functools
import json
import types
from pathlib import Path

import accelerate
import pytest
import safetensors.torch
import tokenizers
import torch
import transformers as tf

import lora_lite as ll
from cases import FIVE, assert_trees_equal, by_name, move, tiny_models
from lora_lite.integrations.trainer import ADAPTER_FILE, AdapterSaving, AdapterTrainer

STEPS = 6


def rows(count=12, seed=1):
    ids = torch.randint(3, 64, (count, 7), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row} for row in ids]


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_base_weights_stay_frozen_where_a_module_is_unfrozen(name):
    model, batch = tiny_models[name]()
    before = {name: p.clone() for name, p in model.named_parameters()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    adapt = ll.build(model, ll.LoRAConfig(r=2))
    params = move(adapt.init())
    module = adapt.module(params)
    own = {name for name, p in module.named_parameters() if p.requires_grad}
    module.requires_grad_(False)
    assert not any(p.requires_grad for p in module.parameters())
    with pytest.warns(UserWarning, match=r"^requires_grad_: .* They stay frozen"):
        assert module.requires_grad_(True) is module
    for part in (next(module.children()), next(m for m in module.modules() if type(m).__name__.endswith("Norm"))):
        with pytest.warns(UserWarning, match=r"^requires_grad_: .* They stay frozen"):
            part.requires_grad_()
    assert {name for name, p in module.named_parameters() if p.requires_grad} == own
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    module.train()(**batch).loss.backward()
    optimizer.step()
    assert all(torch.equal(p, before[name]) and p.requires_grad == flags[name] for name, p in model.named_parameters())
    assert any(not torch.equal(a, b) for a, b in zip(ll.tree_leaves(adapt.params(module)), ll.tree_leaves(params), strict=True))


def arguments(folder, **options):
    settings = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "max_steps": STEPS, "learning_rate": 0.05}
    saving = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "logging_steps": 2}
    return tf.TrainingArguments(str(folder), per_device_train_batch_size=3, **{**settings, **saving, **options})


def started(cfg=FIVE[0], model="llama", **overrides):
    model = tiny_models[model](**overrides)[0]
    adapt = ll.build(model, cfg)
    return model, adapt, move(adapt.init())


def trainer_of(kind, adapt, params, args, **options):
    data = {"args": args, "train_dataset": rows(), "eval_dataset": rows(4, seed=2), **options}
    return AdapterTrainer(adapt, params, **data) if kind == "adapter" else tf.Trainer(adapt.module(params), **data)


def trained_by(adapt, trainer):
    return adapt.params(trainer.model)


def distance(a, b):
    return max(float((x - y).abs().max()) for x, y in zip(ll.tree_leaves(a), ll.tree_leaves(b)))


plainly = pytest.mark.filterwarnings("ignore:save_pretrained")  # by Trainer itself, whose checkpoints hold the base model too


@pytest.fixture(autouse=True)
def _quiet(monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yield
    capsys.readouterr()  # the logs that Trainer prints


@plainly
@pytest.mark.parametrize("kind", ["plain", "adapter"])
@pytest.mark.parametrize(
    "cfg", [FIVE[0], FIVE[2], ll.LoRAConfig(r=4, dropout=0.2)], ids=lambda cfg: f"{cfg.name}{getattr(cfg, 'dropout', '')}"
)
def test_resumed_run_ends_where_an_unbroken_one_does(tmp_path, kind, cfg):
    model, adapt, params = started(cfg)
    before = copy.deepcopy(model.state_dict())
    whole = trainer_of(kind, adapt, params, arguments(tmp_path / "whole"))
    whole.train()
    broken = trainer_of(kind, adapt, params, arguments(tmp_path / "whole"))
    broken.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert broken.state.global_step == STEPS
    assert_trees_equal(trained_by(adapt, broken), trained_by(adapt, whole))
    assert distance(trained_by(adapt, whole), params) > 1e-2
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_checkpoint_holds_the_adapter_alone(tmp_path):
    model, adapt, params = started()
    trainer = trainer_of("adapter", adapt, params, arguments(tmp_path))
    trainer.train()
    folder = tmp_path / f"checkpoint-{STEPS}"
    files = {path.name for path in folder.iterdir()}
    assert {ADAPTER_FILE, "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= files
    assert not {name for name in files if name.startswith("model")}
    tensors = safetensors.torch.load_file(folder / ADAPTER_FILE)
    assert sum(t.numel() for t in tensors.values()) == adapt.num_params
    assert_trees_equal(ll.load(model, folder / ADAPTER_FILE)[1], trainer.params())
    trainer.save_model(str(tmp_path / "final"))
    assert_trees_equal(ll.load(model, tmp_path / "final" / ADAPTER_FILE)[1], trainer.params())


def test_evaluation_is_of_the_adapted_model(tmp_path):
    _, adapt, params = started()
    trainer = trainer_of("adapter", adapt, params, arguments(tmp_path, per_device_eval_batch_size=4))
    batch = tf.default_data_collator(rows(4, seed=2))
    want = float(adapt(params, batch).loss)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(want, rel=1e-5)
    assert want != pytest.approx(float(adapt.base(batch).loss), rel=1e-3)


@plainly
@pytest.mark.parametrize("kind", ["plain", "adapter"])
def test_best_checkpoint_comes_back(tmp_path, kind):
    _, adapt, params = started()
    # The highest loss is called the best: it is not that of the last checkpoint, which would show nothing.
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    trainer = trainer_of(kind, adapt, params, arguments(tmp_path, **best))
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert max(losses) > 1.001 * losses[-1]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(max(losses), rel=1e-5)


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_gradient_checkpointing_of_the_arguments_changes_nothing(tmp_path, model):
    _, adapt, params = started(model=model)
    plain = trainer_of("adapter", adapt, params, arguments(tmp_path / "plain"))
    plain.train()
    lean = trainer_of("adapter", adapt, params, arguments(tmp_path / "lean", gradient_checkpointing=True))  # it seeds again
    lean.train()
    assert lean.model.is_gradient_checkpointing
    assert_trees_equal(lean.params(), plain.params(), 1e-5)


def test_custom_variant_resumes(tmp_path):
    from cases import ShiftConfig

    _, adapt, params = started(ShiftConfig())
    trainer = trainer_of("adapter", adapt, params, arguments(tmp_path))
    trainer.train()
    resumed = trainer_of("adapter", adapt, params, arguments(tmp_path))
    resumed.train(resume_from_checkpoint=True)
    assert_trees_equal(resumed.params(), trainer.params())


def test_saving_fits_another_trainer(tmp_path):
    class Scaled(tf.Trainer):
        def compute_loss(self, *args, **kwargs):
            return 0.5 * super().compute_loss(*args, **kwargs)

    class Both(AdapterSaving, Scaled):
        pass

    _, adapt, params = started()
    trainer = Both(adapt, params, args=arguments(tmp_path, eval_strategy="no"), train_dataset=rows())
    trainer.train()
    assert (tmp_path / f"checkpoint-{STEPS}" / ADAPTER_FILE).is_file()


def test_an_adapted_head_is_refused_where_the_trainer_reads_its_weight(tmp_path):
    class Reading(tf.Trainer):
        def __init__(self, model, **options):
            super().__init__(model, **options)
            self.model.forward = lambda **batch: None  # as TRL's, which computes the head's output in parts

    class Both(AdapterSaving, Reading):
        pass

    def trainer(*names):
        _, adapt, params = started(ll.LoRAConfig(r=2, target_names=names, exclude_names=()))
        return Both(adapt, params, args=arguments(tmp_path, eval_strategy="no"), train_dataset=rows())

    with pytest.raises(ValueError, match=r"Both: expected an output head that is not adapted, found \"lm_head\".*exclude_names="):
        trainer("q_proj$", "lm_head$")
    assert trainer("q_proj$").adapt.targets
    plain = ll.build(torch.nn.Sequential(torch.nn.Linear(4, 4)), ll.LoRAConfig(r=2))  # a model that names no head
    Both(plain, plain.init(), args=arguments(tmp_path, eval_strategy="no"), train_dataset=rows())


def test_reference_that_is_moved_has_memory_of_its_own(tmp_path):
    class Synced(tf.Trainer):
        def __init__(self, model, ref_model=None, **options):
            super().__init__(model, **options)
            self.ref_model, self.args.sync_ref_model = ref_model, True  # as TRL's, which mixes all parameters in place

    class Both(AdapterSaving, Synced):
        pass

    model, adapt, params = started()
    start = functools.partial(Both, adapt, params, args=arguments(tmp_path, eval_strategy="no"), train_dataset=rows())
    for reference, found in ((adapt.module(params), "the same memory at"), (model, "the same memory at"), (None, "without the adapter's")):
        with pytest.raises(ValueError, match=rf"expected for sync_ref_model .* found .*{found}.*copy\.deepcopy"):
            start(ref_model=reference)
    trainer, before = start(ref_model=copy.deepcopy(adapt.module(params))), copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for its, own in zip(trainer.ref_model.parameters(), trainer.model.parameters(), strict=True):
            its.mul_(0.5).add_(own, alpha=0.5)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert_trees_equal(adapt.params(trainer.ref_model), params)


def test_foreign_checkpoint_is_an_error(tmp_path):
    _, adapt, params = started()
    trainer_of("adapter", adapt, params, arguments(tmp_path)).train()
    _, other, fresh = started(ll.LoRAConfig(r=2))
    trainer = trainer_of("adapter", other, fresh, arguments(tmp_path))
    with pytest.raises(ValueError, match=r"(?s)AdapterTrainer: expected params that fit.*expected shape \(2, 32\), found \(4, 32\)"):
        trainer.train(resume_from_checkpoint=True)
    assert_trees_equal(trainer.params(), fresh)


@plainly
def test_checkpoint_of_trainer_itself_is_named_and_its_way_out_works(tmp_path):
    _, adapt, params = started()
    plain = trainer_of("plain", adapt, params, arguments(tmp_path))
    plain.train()
    last = tmp_path / f"checkpoint-{STEPS}"
    trainer = trainer_of("adapter", adapt, params, arguments(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"found none, as in the checkpoints of Trainer itself"):
        trainer.train(resume_from_checkpoint=str(last))
    module = adapt.module(params)
    module.load_state_dict(safetensors.torch.load_file(last / "model.safetensors"), strict=False)
    assert_trees_equal(adapt.params(module), adapt.params(plain.model))


@pytest.mark.parametrize(
    ("cfg", "said"),
    [
        (ll.LoRAConfig(r=4, alpha=64), r"LoRAConfig\.alpha=64, 16\.0 there"),
        (ll.LoRAConfig(r=4, rslora=True), r"LoRAConfig\.rslora=True, False there"),
        (ll.EVAConfig(r=4), "EVAConfig, LoRAConfig there"),
    ],
)
def test_checkpoint_of_another_scale_is_an_error(tmp_path, cfg, said):
    """The trees have the same shapes: what they mean is in the config alone."""
    model, adapt, params = started(ll.LoRAConfig(r=4))
    trainer_of("adapter", adapt, params, arguments(tmp_path)).train()
    other = ll.build(model, cfg, calibration=[{"input_ids": rows(2)[0]["input_ids"][None]}] if cfg.calibrated else None)
    trainer = trainer_of("adapter", other, other.init(), arguments(tmp_path))
    with pytest.raises(
        ValueError, match=rf"AdapterTrainer: expected the configs of .*found others: .*{said}.*ll\.load\(model, that file\)"
    ):
        trainer.train(resume_from_checkpoint=True)


def test_a_run_resumes_with_another_dropout_and_another_way_to_name_its_layers(tmp_path):
    model, adapt, params = started(ll.LoRAConfig(r=4))
    trainer = trainer_of("adapter", adapt, params, arguments(tmp_path))
    trainer.train()
    other = ll.build(model, ll.LoRAConfig(r=4, dropout=0.5, target_names="."))  # every layer
    resumed = trainer_of("adapter", other, other.init(), arguments(tmp_path))
    resumed.train(resume_from_checkpoint=True)
    assert_trees_equal(resumed.params(), trainer.params())


def test_module_of_another_scale_is_not_read():
    model, adapt, params = started(ll.LoRAConfig(r=4))
    other = ll.build(model, ll.LoRAConfig(r=4, alpha=4))
    with pytest.raises(ValueError, match=r"adapt\.params: .*another config at .*LoRAConfig\.alpha=4, 16\.0 there.*that made it"):
        other.params(adapt.module(params))
    same = ll.build(model, ll.LoRAConfig(r=4, dropout=0.5))
    assert_trees_equal(same.params(adapt.module(params)), params)
    outputs = {"rank_dropout": 0.5, "module_dropout": 0.5, "rank_dropout_scale": True}
    adapt, dropping = (ll.build(model, ll.LoKrConfig(r=2, **drops)) for drops in ({}, outputs))
    assert_trees_equal(dropping.params(adapt.module(adapt.init())), adapt.init())


def test_model_that_calls_itself_quantised_is_trained(tmp_path):
    model, _, _ = started()
    model.is_quantized, model.hf_quantizer = True, types.SimpleNamespace(is_trainable=True)
    adapt = ll.build(model, FIVE[0])
    with pytest.raises(ValueError, match="purely quantized"):
        tf.Trainer(adapt.module(adapt.init()), args=arguments(tmp_path), train_dataset=rows(), eval_dataset=rows(4))
    trainer = trainer_of("adapter", adapt, adapt.init(), arguments(tmp_path))
    trainer.train()
    assert distance(trainer.params(), adapt.init()) > 1e-2
    assert "_hf_peft_config_loaded" not in vars(model)


def test_other_engines_are_refused(tmp_path):
    _, adapt, params = started()
    args = arguments(tmp_path)
    args.deepspeed = {"zero_optimization": {"stage": 2}}
    with pytest.raises(ValueError, match=r"AdapterTrainer: expected one process.*found fsdp or deepspeed.*adapt\.shard"):
        AdapterTrainer(adapt, params, args=args)


# accelerate


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_accumulates_to_the_step_of_the_whole_batch(precision):
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    _, adapt, params = started(FIVE[2])
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)
    module = adapt.module(params)
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1)
    loader = torch.utils.data.DataLoader(rows(4), batch_size=2)
    module, optimizer, loader = accelerator.prepare(module, optimizer, loader)
    module.train()
    for batch in loader:
        with accelerator.accumulate(module):
            accelerator.backward(module(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
    grads = ll.value_and_grad(lambda p: adapt(p, tf.default_data_collator(rows(4))).loss)(params)[1]
    want = ll.tree_map(lambda p, g: p - 0.1 * g, params, grads)
    got = adapt.params(module)
    step = distance(want, params)
    assert step > 1e-3
    assert distance(got, want) <= (1e-6 if precision == "no" else 0.05 * step)
    assert_trees_equal(adapt.params(accelerator.unwrap_model(module)), got)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("wrap", [torch.nn.DataParallel, functools.partial(torch.compile, backend="eager"), copy.deepcopy])
def test_params_are_read_from_a_wrapped_module(wrap):
    _, adapt, params = started()
    assert_trees_equal(adapt.params(wrap(adapt.module(params))), params)


def test_deep_copy_stands_on_its_own():
    _, adapt, params = started(FIVE[1])
    batch = tf.default_data_collator(rows(2))
    module = adapt.module(params)
    twin = copy.deepcopy(module)
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:  # the rest is the model's
                p.zero_()
    torch.testing.assert_close(twin(**batch).logits, adapt(params, batch).logits)


# what the module holds


@pytest.mark.parametrize("cfg", FIVE, ids=by_name)
def test_state_dict_has_the_model_and_the_adapter_and_no_placeholder(cfg):
    model, adapt, params = started(cfg, tie_word_embeddings=True)
    module = adapt.module(params)
    state = module.state_dict()
    assert not any(t.is_meta for t in (*module.parameters(), *module.buffers(), *state.values()))
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    extra = state.keys() - model.state_dict().keys()
    assert extra
    assert all(name.split(".")[-2] == "adapter" for name in extra)
    assert module.lm_head.weight is module.model.embed_tokens.weight
    assert {name for name, p in module.named_parameters() if p.requires_grad} == {
        f"{path}.adapter.{name}" for path, leaves in params.items() for name in leaves
    }


def test_state_dict_carries_over_to_another_module():
    _, adapt, params = started()
    other = adapt.module(adapt.init(seed=5))
    other.load_state_dict(adapt.module(params).state_dict())
    assert_trees_equal(adapt.params(other), params)


@pytest.mark.parametrize("copied", [False, True])
def test_save_pretrained_writes_the_base_beside_the_adapter_and_says_so(tmp_path, copied):
    model, adapt, params = started()
    module = adapt.module(params)
    module = copy.deepcopy(module) if copied else module
    with torch.no_grad():
        next(p for p in module.parameters() if p.requires_grad).add_(1.0)  # the copy saves itself
    with pytest.warns(UserWarning, match="save_pretrained: the folder gets the base model.*which from_pretrained leaves out"):
        module.save_pretrained(tmp_path)
    saved = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert json.loads((Path(tmp_path) / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert set(model.state_dict()) <= set(saved)
    assert sum(".adapter." in name for name in saved) == len(ll.tree_leaves(params))
    assert all(torch.equal(tensor, module.state_dict()[name]) for name, tensor in saved.items())


@pytest.mark.filterwarnings("error:save_pretrained")
def test_each_way_out_of_save_pretrained_works(tmp_path):
    model, adapt, params = started()
    batch = {"input_ids": torch.arange(4)[None]}
    merged = copy.deepcopy(model)
    merged.load_state_dict(adapt.merge(params), strict=False)
    merged.save_pretrained(tmp_path / "merged")
    ll.save(adapt, params, tmp_path / "adapter")
    again, loaded = ll.load(model, tmp_path / "adapter")
    read = tf.LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    for logits in (read(**batch).logits, again(loaded, batch).logits):
        torch.testing.assert_close(logits, adapt(params, batch).logits, rtol=1e-4, atol=1e-5)


def tokenizer():
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "[PAD]": 5, "[EOS]": 6}, unk_token="a"))
    return tf.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", eos_token="[EOS]")


def test_training_leaves_the_settings_of_the_users_model(tmp_path):
    model, adapt, params = started()
    before = model.config.to_dict(), model.generation_config.to_dict()
    args = arguments(tmp_path, gradient_checkpointing=True)
    trainer = trainer_of("adapter", adapt, params, args, processing_class=tokenizer(), data_collator=tf.default_data_collator)
    trainer.train()
    assert (trainer.model.config.pad_token_id, trainer.model.generation_config.pad_token_id) == (5, 5)
    assert (model.config.to_dict(), model.generation_config.to_dict()) == before


@pytest.mark.parametrize("cfg", [FIVE[0], ll.FullConfig(target_names=r"self_attn$")], ids=by_name)
def test_settings_of_a_module_are_its_own_and_reach_all_of_it(cfg):
    model, adapt, params = started(cfg, attn_implementation="sdpa")
    module, other = adapt.module(params), adapt.module(params)
    module.set_attn_implementation("eager")
    module.resize_token_embeddings(80)
    assert (model.config.vocab_size, model.config._attn_implementation) == (64, "sdpa")
    assert (other.config.vocab_size, other.config._attn_implementation) == (64, "sdpa")
    attentions = module(torch.arange(4)[None], output_attentions=True).attentions  # which the fused one does not give
    assert len(attentions) == model.config.num_hidden_layers
    assert all(weights is not None for weights in attentions)


@pytest.mark.parametrize("name", ["model", "model_init"])
def test_trainer_takes_no_model_beside_the_adapter(tmp_path, name):
    model, adapt, params = started()
    with pytest.raises(TypeError, match=f'expected adapt and params in the place of a model, found "{name}"'):
        AdapterTrainer(adapt, params, args=arguments(tmp_path), **{name: model})


def test_trainer_names_what_it_was_given_in_the_place_of_an_adapt(tmp_path):
    model, adapt, params = started()
    for given in (model, params):
        with pytest.raises(TypeError, match=f"expected adapt as what build or load returned, found {type(given).__name__}"):
            AdapterTrainer(given, adapt, args=arguments(tmp_path))


def test_stack_is_refused_before_it_trains(tmp_path):
    """It trained, and the run ended when its first checkpoint was written."""
    _, adapt, params = started()
    for wrong, way in ((ll.stack([params, params]), r"a stack of 2: run it by adapt\.mixed"), ({}, r"Use adapt\.init")):
        with pytest.raises(ValueError, match=rf"(?s)AdapterTrainer: expected params that fit.*{way}"):
            AdapterTrainer(adapt, wrong, args=arguments(tmp_path), train_dataset=rows())
