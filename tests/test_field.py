"""Situations out of public reports: each is the smallest model in which it happened, and what is right there."""

import copy
import os
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import torch
import transformers as tf
from torch import nn

import lora_lite as ll
from cases import move
from lora_lite.integrations.trainer import AdapterTrainer

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
HEAD = r"(^|\.)(score|classifier)$"


def bert(seed=0, head=0, dtype=torch.float32):
    """Give a classifier whose body is of one seed and whose head of another, as `from_pretrained` makes it."""
    torch.manual_seed(seed)
    model = tf.BertForSequenceClassification(tf.BertConfig(vocab_size=64, num_labels=3, hidden_dropout_prob=0.0, **SMALL))
    torch.manual_seed(100 + head)
    nn.init.normal_(model.classifier.weight, std=0.2)
    nn.init.normal_(model.classifier.bias, std=0.2)
    return model.to(dtype).eval()


def ids(rows=3, length=7):
    return torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(5))


def other_weights(model, pattern, by=0.3):
    with torch.no_grad():
        for name, p in model.named_parameters():
            if pattern in name:
                p.add_(by * torch.randn(p.shape, generator=torch.Generator().manual_seed(8)).to(p.dtype))
    return model


# A file gives back the function that was saved


WITH_HEAD = [ll.LoRAConfig(r=4, target_names=r"(query|value)$"), ll.FullConfig(target_names=HEAD)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_head_comes_back_where_the_model_drew_another(tmp_path, dtype):
    adapt = ll.build(bert(head=1, dtype=dtype), WITH_HEAD)
    params = move(adapt.init())
    ll.save(adapt, params, tmp_path / "a.safetensors")
    again, loaded = ll.load(bert(head=2, dtype=dtype), tmp_path / "a.safetensors")
    want = adapt(params, {"input_ids": ids()}).logits
    assert (adapt.base({"input_ids": ids()}).logits - again.base({"input_ids": ids()}).logits).abs().max() > 0.1
    torch.testing.assert_close(again(loaded, {"input_ids": ids()}).logits, want, rtol=1e-5, atol=1e-5 if dtype == torch.float32 else 2e-2)
    same = ll.load(bert(head=1, dtype=dtype), tmp_path / "a.safetensors")[1]
    assert all(torch.equal(a, b) for a, b in zip(ll.tree_leaves(same), ll.tree_leaves(params)))


def test_new_head_comes_back_in_another_process(tmp_path):
    adapt = ll.build(bert(head=1), WITH_HEAD)
    params = move(adapt.init())
    ll.save(adapt, params, tmp_path / "a.safetensors")
    torch.save(adapt(params, {"input_ids": ids()}).logits, tmp_path / "want.pt")
    code = """
        import sys, torch, lora_lite as ll
        from test_field import bert, ids
        adapt, params = ll.load(bert(head=3), sys.argv[1] + "/a.safetensors")
        torch.testing.assert_close(adapt(params, {"input_ids": ids()}).logits, torch.load(sys.argv[1] + "/want.pt"), rtol=1e-5, atol=1e-5)
    """
    here = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)], env=here, capture_output=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr.decode()


def test_norms_come_back_on_a_model_with_others(tmp_path):
    model = bert()
    adapt = ll.build(model, ll.LNTuningConfig())
    params = move(adapt.init())
    ll.save(adapt, params, tmp_path / "a.safetensors")
    other = other_weights(bert(), "LayerNorm")
    again, loaded = ll.load(other, tmp_path / "a.safetensors")
    torch.testing.assert_close(again(loaded, (ids(),)).logits, adapt(params, (ids(),)).logits, rtol=1e-5, atol=1e-5)


def arguments(folder, **options):
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "learning_rate": 0.05, "per_device_train_batch_size": 3}
    return tf.TrainingArguments(str(folder), max_steps=4, save_strategy="steps", save_steps=2, **{**quiet, **options})


def trainer(model, folder, cfg=WITH_HEAD, **options):
    adapt = ll.build(model, cfg, **options)
    rows = [{"input_ids": row, "labels": k % 3} for k, row in enumerate(ids(12))]
    return AdapterTrainer(adapt, adapt.init(), args=arguments(folder), train_dataset=rows)


def test_resumed_training_goes_on_with_the_head_of_the_checkpoint(tmp_path):
    whole = trainer(bert(head=1), tmp_path)
    whole.train()
    resumed = trainer(bert(head=2), tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    got, want = (t.adapt(t.params(), {"input_ids": ids()}).logits for t in (resumed, whole))
    # The displacements start from another head, so their last digits differ, and Adam divides by small gradients: not to the bit.
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_checkpoint_of_other_constants_is_not_resumed(tmp_path):
    cfg = ll.CorDAConfig(r=4, target_names=r"query$")
    first, second = ([{"input_ids": torch.randint(3, 64, (4, 9), generator=torch.Generator().manual_seed(k))}] for k in (1, 2))
    trainer(bert(), tmp_path, cfg, calibration=first).train()
    trainer(bert(), tmp_path, cfg, calibration=first).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    file = tmp_path / "checkpoint-2" / "adapter.safetensors"
    with pytest.raises(ValueError, match=r"expected the constants of .*found others at .*query.*ll\.load"):
        trainer(bert(), tmp_path, cfg, calibration=second).train(resume_from_checkpoint=str(file.parent))
    adapt, params = ll.load(bert(), file)
    rows = [{"input_ids": row, "labels": k % 3} for k, row in enumerate(ids(12))]
    AdapterTrainer(adapt, params, args=arguments(tmp_path), train_dataset=rows).train(resume_from_checkpoint=str(file.parent))


def saved(folder, cfg, model):
    adapt = ll.build(model, cfg)
    ll.save(adapt, move(adapt.init()), folder / "a.safetensors")
    return folder / "a.safetensors"


DERIVED = [cls(r=4, target_names=r"query$") for cls in (ll.DoRAConfig, ll.PiSSAConfig, ll.SSVDConfig, ll.LoRAXSConfig)]


@pytest.mark.parametrize("cfg", DERIVED, ids=lambda cfg: cfg.name)
def test_constants_of_another_weight_are_reported(tmp_path, cfg):
    file = saved(tmp_path, cfg, bert())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ll.load(bert(), file)
        ll.load(bert(dtype=torch.bfloat16), file)  # the same checkpoint, rounded
    with pytest.warns(
        UserWarning, match=rf'other weights at "bert\.encoder\.layer\.0\.attention\.self\.query"$|{type(cfg).__name__}'
    ) as seen:
        ll.load(other_weights(bert(), "layer.0.attention.self.query"), file)
    assert len(seen) == 1
    assert "layer.1" not in str(seen[0].message)


def test_lora_takes_a_fine_tuned_base_without_a_word(tmp_path):
    file = saved(tmp_path, ll.LoRAConfig(r=4, target_names=r"query$"), bert())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ll.load(other_weights(bert(), "query"), file)


@pytest.mark.filterwarnings("ignore:build")
def test_low_rank_update_of_another_head_is_reported(tmp_path):
    file = saved(tmp_path, ll.LoRAConfig(r=4), bert(head=1))
    with pytest.warns(UserWarning, match=r'other weights at "classifier".*FullConfig'):
        ll.load(bert(head=2), file)
