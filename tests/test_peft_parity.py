"""Values, gradients, merged weights, dropout and training trajectories agree with PEFT's."""

from itertools import pairwise

import pytest
import torch
import transformers as tf
from torch import nn
from transformers.pytorch_utils import Conv1D

import lora_lite as ll
from peft_oracle import dense, pair

TOLERANCE = 1e-5  # float32, relative to the largest entry


def _stack(linear, widths=(24, 24, 40, 16)):
    layers = [linear(i, o) for i, o in pairwise(widths)]  # square, o > i, i > o
    model = nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])
    for layer in layers:
        nn.init.normal_(layer.weight, std=0.2)
        if layer.bias is not None:
            nn.init.normal_(layer.bias)
    return model


def _draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def _text(model, config):
    ids = torch.randint(0, 64, (2, 7), generator=torch.Generator().manual_seed(1))
    return model(config), {"input_ids": ids, "labels": ids}


_LLAMA = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.1,
}
_GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.1}

MODELS = {
    "linear-bias-2d": lambda: (_stack(lambda i, o: nn.Linear(i, o)), _draw(5, 24)),
    "linear-bias-3d": lambda: (_stack(lambda i, o: nn.Linear(i, o)), _draw(2, 3, 24)),
    "linear-plain-2d": lambda: (_stack(lambda i, o: nn.Linear(i, o, bias=False)), _draw(5, 24)),
    "linear-plain-3d": lambda: (_stack(lambda i, o: nn.Linear(i, o, bias=False)), _draw(2, 3, 24)),
    "conv1d-2d": lambda: (_stack(lambda i, o: Conv1D(o, i)), _draw(5, 24)),
    "conv1d-3d": lambda: (_stack(lambda i, o: Conv1D(o, i)), _draw(2, 3, 24)),
    "llama": lambda: _text(tf.LlamaForCausalLM, tf.LlamaConfig(**_LLAMA, num_key_value_heads=2)),
    "gpt2": lambda: _text(tf.GPT2LMHeadModel, tf.GPT2Config(**_GPT2)),
}

CONFIGS = {
    "lora": ll.LoRAConfig(r=4),
    "rslora": ll.LoRAConfig(r=4, alpha=8.0, rslora=True),
    "dora": ll.DoRAConfig(r=4),
    "dora-rslora": ll.DoRAConfig(r=4, alpha=4.0, rslora=True),
    "pissa": ll.PiSSAConfig(r=4),
    "ia3": ll.IA3Config(),
    "ia3-ff": ll.IA3FFConfig(),
}


def _make(name):
    torch.manual_seed(0)
    model, batch = MODELS[name]()
    return model.eval(), batch


def _run(model, batch):
    return model(**batch) if isinstance(batch, dict) else model(batch)


def _output(out):
    return out if isinstance(out, torch.Tensor) else out.logits


def _loss(out):
    if not isinstance(out, torch.Tensor):
        return out.loss
    return (out * _draw(*out.shape)).sum()


def _assert_close(got, want, what):
    assert got.shape == want.shape, f"{what}: {tuple(got.shape)} and {tuple(want.shape)}"
    largest = want.abs().max()
    assert largest > 1e-4, f"{what}: all but zero, nothing is compared"
    error = float((got - want).abs().max() / largest)
    assert error <= TOLERANCE, f"{what}: {error:.1e} of the largest entry apart"


def _assert_trees_close(got, want):
    assert {path: set(leaves) for path, leaves in got.items()} == {path: set(leaves) for path, leaves in want.items()}
    for path, leaves in want.items():
        for name, leaf in leaves.items():
            _assert_close(got[path][name], leaf, f"{path}.{name}")


def _peft_loss_and_grads(both, batch):
    out = _run(both.theirs, batch)
    _loss(out).backward()
    return _output(out).detach(), both.grads()


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", MODELS)
def test_values_and_gradients_are_pefts(name, config):
    model, batch = _make(name)
    both = pair(model, CONFIGS[config]).move()
    params, base = both.params(), _output(_run(model, batch)).detach()
    theirs, their_grads = _peft_loss_and_grads(both, batch)
    _assert_close(_output(both.adapt(params, batch)) - base, theirs - base, "the update of the output")
    _assert_trees_close(torch.func.grad(lambda p: _loss(both.adapt(p, batch)))(params), their_grads)
    _assert_trees_close(ll.value_and_grad(lambda p: _loss(both.adapt(p, batch)))(params)[1], their_grads)


def test_the_paper_setting_of_ia3_is_pefts():
    model, batch = _make("llama")
    both = pair(model, [ll.IA3Config(target_names=r"(k|v)_proj$"), ll.IA3FFConfig(target_names=r"down_proj$")]).move()
    params, base = both.params(), model(**batch).logits.detach()
    theirs, their_grads = _peft_loss_and_grads(both, batch)
    assert len(params) == 6
    _assert_close(both.adapt(params, batch).logits - base, theirs - base, "the update of the logits")
    _assert_trees_close(torch.func.grad(lambda p: both.adapt(p, batch).loss)(params), their_grads)


@pytest.mark.parametrize("name", ["linear-bias-2d", "conv1d-2d"])
@pytest.mark.parametrize("alpha", [4.0, 16.0])
def test_the_start_of_pissa_is_what_peft_takes_off_the_weight(name, alpha):
    model, _ = _make(name)
    both = pair(model, ll.PiSSAConfig(r=4, alpha=alpha))
    for path, start in both.adapt.constants.items():
        residual = dense(both.theirs.base_model.model.get_submodule(path).base_layer)
        taken = dense(model.get_submodule(path)) - residual
        _assert_close(alpha / 4 * start["B0"] @ start["A0"], taken, path)
    assert all(not leaf.any() for leaves in both.params().values() for leaf in leaves.values())


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", ["linear-bias-2d", "linear-plain-2d", "conv1d-2d"])
def test_merged_weights_are_pefts(name, config):
    model, _ = _make(name)
    both = pair(model, CONFIGS[config]).move()
    frozen = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    merged = both.adapt.merge(both.params())
    theirs = both.theirs.merge_and_unload().state_dict()
    assert set(merged) == set(theirs) == set(frozen)
    for key, tensor in merged.items():
        if torch.equal(theirs[key], frozen[key]):
            assert torch.equal(tensor, frozen[key]), f"{key}: PEFT leaves it as it is"
        else:
            _assert_close(tensor - frozen[key], theirs[key] - frozen[key], f"the update of {key}")


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("config", [ll.LoRAConfig(r=4, dropout=0.4), ll.DoRAConfig(r=4, dropout=0.4)], ids=["lora", "dora"])
def test_dropout_in_training_mode_is_pefts(config, bias):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(24, 32, bias=bias)), _draw(6, 24)
    both = pair(model.eval(), config).move()
    adapt, params, base = both.adapt.train(), both.params(), model(x).detach()
    both.theirs.train()
    torch.manual_seed(3)
    theirs, their_grads = _peft_loss_and_grads(both, x)
    torch.manual_seed(3)
    ours = adapt(params, x)
    _assert_close(ours - base, theirs - base, "the update of the output")
    assert (ours - both.adapt(params, x)).abs().max() > 0.1  # something was dropped
    torch.manual_seed(3)
    _assert_trees_close(ll.value_and_grad(lambda p: _loss(adapt(p, x)))(params)[1], their_grads)


def _train_both(both, batch, grad):
    """Take five AdamW steps with each, from PEFT's start; give our params and PEFT's as ours."""
    params = both.params()
    ours = torch.optim.AdamW(_flat(params), lr=1e-2, weight_decay=0.0)
    theirs = torch.optim.AdamW([p for p in both.theirs.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    for _ in range(5):
        for leaf, gradient in zip(_flat(params), _flat(grad(params))):
            leaf.grad = gradient
        ours.step()
        theirs.zero_grad()
        _loss(_run(both.theirs, batch)).backward()
        theirs.step()
    return params, both.params()


def _flat(tree):
    return [leaf for leaves in tree.values() for leaf in leaves.values()]


@pytest.mark.parametrize("name", ["linear-bias-2d", "conv1d-3d"])
@pytest.mark.parametrize("config", ["lora", "pissa", "dora", "ia3"])
def test_five_adamw_steps_take_every_tensor_where_peft_takes_it(name, config):
    model, batch = _make(name)
    both = pair(model, CONFIGS[config])
    start = both.params()
    params, arrived = _train_both(both, batch, torch.func.grad(lambda p: _loss(both.adapt(p, batch))))
    ways = [{p: {k: t - start[p][k] for k, t in leaves.items()} for p, leaves in tree.items()} for tree in (params, arrived)]
    _assert_trees_close(*ways)


@pytest.mark.parametrize("config", ["lora", "pissa"])
def test_five_adamw_steps_on_a_transformer_give_pefts_update(config):
    # Outputs, not leaves: Adam divides each entry by its own size, so entries with all but no gradient move by rounding.
    model, batch = _make("llama")
    both = pair(model, CONFIGS[config])
    base = model(**batch).logits.detach()
    params, _ = _train_both(both, batch, lambda p: ll.value_and_grad(lambda q: both.adapt(q, batch).loss)(p)[1])
    theirs = both.theirs(**batch).logits.detach()
    _assert_close(both.adapt(params, batch).logits - base, theirs - base, "the update of the logits")
