"""TRL: supervised fine-tuning and DPO of an adapted model, with the frozen model as DPO's reference."""

import runpy
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import lora_lite as ll
from cases import move
from lora_lite.integrations.trainer import ADAPTER_FILE, AdapterSaving

trl = pytest.importorskip("trl", reason="TRL is not installed: pip install trl")
import datasets  # noqa: E402  # after the skip
import tokenizers  # noqa: E402


class AdapterSFT(AdapterSaving, trl.SFTTrainer):
    """TRL's supervised fine-tuning, whose checkpoints hold the adapter alone."""


EXAMPLE = runpy.run_path(str(Path(__file__).parents[2] / "docs" / "examples" / "dpo.py"))
AdapterDPO = EXAMPLE["AdapterDPO"]

WORDS = ("the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "log", "no", "yes", ".")
PAIRS = (
    {"prompt": "the cat sat on", "chosen": " the mat .", "rejected": " the log ."},
    {"prompt": "a dog ran", "chosen": " under a log .", "rejected": " no ."},
)
CONFIGS = [ll.LoRAConfig(r=2), ll.DoRAConfig(r=2), ll.IA3Config(), ll.OFTConfig(block_size=4), ll.VeRAConfig(r=4)]
EACH = pytest.mark.parametrize("cfg", CONFIGS, ids=lambda cfg: cfg.name)
RATE = 0.1


def _tokenizer():
    vocabulary = {word: n for n, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def _adapted(cfg):
    torch.manual_seed(0)
    tokens = {"vocab_size": 3 + len(WORDS), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**tokens, **sizes)).eval()
    adapt = ll.build(model, cfg)
    return model, adapt, move(adapt.init(seed=0))


def _args(config, folder, **options):
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "bf16": False, "logging_steps": 1}
    step = {"max_steps": 1, "per_device_train_batch_size": 2, "optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 1e9}
    return config(str(folder), learning_rate=RATE, weight_decay=0.0, **step, **quiet, **options)


def _assert_step(adapt, params, trainer, loss, folder):
    """One step of the trainer is one along the gradient of `loss`, and its checkpoint is the adapter."""
    grads = torch.func.grad(loss)(params)
    trainer.train()
    after = trainer.params()
    for path, leaves in params.items():
        for name, leaf in leaves.items():
            torch.testing.assert_close(after[path][name] - leaf, -RATE * grads[path][name], rtol=1e-4, atol=1e-6)
    assert max(float(g.abs().max()) for g in ll.tree_leaves(grads)) > 1e-3
    file = folder / "checkpoint-1" / ADAPTER_FILE
    assert not list(file.parent.glob("model*.safetensors"))
    read = ll.load(adapt._plan.base, file)[1]
    assert all(torch.equal(read[path][name], leaf) for path, leaves in after.items() for name, leaf in leaves.items())


def _log_probs(logits, batch):
    """Return the log-probability of each row's completion."""
    ids, counted = batch["input_ids"][:, 1:], batch["completion_mask"][:, 1:]
    return (logits[:, :-1].log_softmax(-1).gather(-1, ids[..., None])[..., 0] * counted).sum(1)


@EACH
def test_supervised_fine_tuning(cfg, tmp_path):
    model, adapt, params = _adapted(cfg)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    rows = datasets.Dataset.from_list(
        [{"prompt": "the cat sat", "completion": " on the mat ."}, {"prompt": "a dog", "completion": " ran ."}]
    )
    trainer = AdapterSFT(adapt, params, args=_args(trl.SFTConfig, tmp_path), train_dataset=rows, processing_class=_tokenizer())
    batch = next(iter(trainer.get_train_dataloader()))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels") if name in batch}

    def loss(params):
        return adapt(params, inputs).loss

    torch.testing.assert_close(trainer.compute_loss(trainer.model, dict(batch)), loss(params), rtol=1e-5, atol=1e-6)
    _assert_step(adapt, params, trainer, loss, tmp_path)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


@EACH
def test_dpo_against_the_frozen_model(cfg, tmp_path):
    model, adapt, params = _adapted(cfg)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    pairs = datasets.Dataset.from_list(list(PAIRS))
    reference = adapt.module(ll.tree_map(torch.zeros_like, params))  # the zero tree is the base model; its weights are shared
    args = _args(trl.DPOConfig, tmp_path, beta=0.5)
    trainer = AdapterDPO(adapt, params, ref_model=reference, args=args, train_dataset=pairs, processing_class=_tokenizer())
    batch = next(iter(trainer.get_train_dataloader()))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}

    def loss(params):
        margins = _log_probs(adapt(params, inputs).logits, batch) - _log_probs(adapt.base(inputs).logits, batch)
        chosen, rejected = margins.chunk(2)
        return -nn.functional.logsigmoid(0.5 * (chosen - rejected)).mean()

    assert abs(float(loss(params)) - 0.6931472) > 1e-3
    torch.testing.assert_close(trainer.compute_loss(trainer.model, dict(batch)), loss(params), rtol=1e-5, atol=1e-6)
    _assert_step(adapt, params, trainer, loss, tmp_path)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert "forward" not in vars(model)


def test_an_adapted_head_is_refused(tmp_path):
    _, adapt, params = _adapted(ll.LoRAConfig(r=2, target_names=(r"lm_head$", r"q_proj$"), exclude_names=()))
    rows = datasets.Dataset.from_list([{"prompt": "the cat", "completion": " sat ."}] * 2)
    with pytest.raises(ValueError, match='an output head that is not adapted, found "lm_head"'):
        AdapterSFT(adapt, params, args=_args(trl.SFTConfig, tmp_path), train_dataset=rows, processing_class=_tokenizer())


@pytest.mark.parametrize("names", [(r"lm_head$",), (r"lm_head$", r"q_proj$")], ids=["head", "head-and-body"])
@pytest.mark.parametrize("kind", ["dpo", "sft"])
def test_a_plain_trainer_does_not_leave_an_adapted_head_out(tmp_path, kind, names):
    model, adapt, params = _adapted(ll.LoRAConfig(r=2, target_names=names, exclude_names=()))
    module = adapt.module(params)
    if kind == "dpo":
        rows, args = datasets.Dataset.from_list(list(PAIRS)), _args(trl.DPOConfig, tmp_path)
        trainer = trl.DPOTrainer(module, ref_model=model, args=args, train_dataset=rows, processing_class=_tokenizer())
    else:
        rows = datasets.Dataset.from_list([{"prompt": "the cat", "completion": " sat ."}] * 2)
        trainer = trl.SFTTrainer(module, args=_args(trl.SFTConfig, tmp_path), train_dataset=rows, processing_class=_tokenizer())
    with pytest.raises(RuntimeError, match='at "lm_head" expected a weight that autograd follows'):
        trainer.train()
    module.eval()
    batch = dict(next(iter(trainer.get_train_dataloader())))
    with torch.no_grad():  # without gradients the loss is that of the adapted head
        found = float(trainer.compute_loss(module, dict(batch)))
        if kind == "dpo":
            assert abs(found - 0.6931472) > 1e-4
        else:
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels") if name in batch}
            assert abs(found - float(adapt(params, inputs).loss)) < 1e-5


def test_the_recipe(tmp_path):
    model, _, _ = _adapted(ll.LoRAConfig(r=2))
    pairs = datasets.Dataset.from_list(list(PAIRS))
    adapt, params = EXAMPLE["dpo"](model, _tokenizer(), pairs, _args(trl.DPOConfig, tmp_path))
    start = adapt.init(seed=0)
    assert any(not torch.equal(leaf, start[path][name]) for path, leaves in params.items() for name, leaf in leaves.items())
