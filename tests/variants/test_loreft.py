"""LoReFT: the paper's equation, its positions under padding and labels, generation, and its place in a model."""

import copy

import pytest
import torch
from torch import nn

import lora_lite as ll
from cases import move, tiny_models
from lora_lite.core.positions import edited
from lora_lite.variants.loreft import orthonormal


def _paper(h, R, W, b):
    """The paper's eq. (2), each product written out, with a QR of R's rows for the orthonormal matrix of the same span."""
    return h + (h @ W.T + b - h @ R.T) @ R


def _dense(cfg, params, h, lengths, starts):
    """Edit row by row, position by position, as the paper's code chooses them."""
    out, (first, last) = h.clone(), cfg.ends
    R = torch.stack([torch.linalg.solve(torch.linalg.cholesky(r @ r.T), r) for r in params["R"]])
    for row, (start, length) in enumerate(zip(starts, lengths)):
        places = [(start + k, 0) for k in range(min(first, length // 2))]
        places += [(start + length - 1 - k, -1) for k in range(min(last, length // 2))]
        for place, n in places:
            out[row, place] = _paper(h[row, place], R[n], params["W"][n], params["b"][n])
    return out


@pytest.mark.parametrize("positions", ["f1+l1", "f3", "l2", "f2+l3", "f7+l7"])
@pytest.mark.parametrize("share", [False, True])
def test_edits_the_papers_positions_by_the_papers_equation(positions, share):
    cfg = ll.LoReFTConfig(r=3, positions=positions, share_weights=share, dtype=torch.float64)
    g = torch.Generator().manual_seed(0)
    params = cfg.init(ll.Frozen(torch.eye(6)), g)
    params = {name: p.double() + 0.3 * torch.randn(p.shape, generator=g, dtype=torch.float64) for name, p in params.items()}
    h = torch.randn(4, 9, 6, generator=g, dtype=torch.float64)
    starts, lengths = [0, 3, 2, 8], [9, 6, 5, 1]
    prompt = torch.stack([(torch.arange(9) >= s) & (torch.arange(9) < s + n) for s, n in zip(starts, lengths)])
    eye = ll.Frozen(torch.eye(6, dtype=torch.float64))
    got = edited(lambda z: cfg.forward(params, eye, z), h, prompt, cfg.ends)
    want = _dense(cfg, params, h, lengths, starts)
    assert (want - h).abs().max() > 0.1
    torch.testing.assert_close(got - h, want - h, rtol=1e-10, atol=1e-10)


def test_rows_are_orthonormal_and_zero_ones_stay():
    R = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    Q = orthonormal(R)
    torch.testing.assert_close(Q @ Q.mT, torch.eye(3, dtype=torch.float64).expand(2, 3, 3))
    torch.testing.assert_close(Q.mT @ Q @ R.mT, R.mT)  # the same span
    assert not orthonormal(torch.zeros(1, 3, 8)).any()


def _hidden(adapt, params, batch):
    return adapt(params, batch, output_hidden_states=True).hidden_states


FAMILIES = ("llama", "qwen3", "gpt2", "bert", "gpt_neox", "vit", "t5")


@pytest.mark.parametrize("family", FAMILIES)
def test_starts_and_acts_in_every_family(family):
    model, batch = tiny_models[family]()
    model.eval()
    adapt = ll.build(model, ll.LoReFTConfig(r=4, start="identity"))
    blocks = sum(getattr(model.config, name, 0) or 0 for name in ("num_hidden_layers", "num_decoder_layers"))
    assert len(adapt.targets) == blocks
    with torch.no_grad():
        want = model(**batch).logits
        assert torch.equal(adapt(adapt.init(seed=0), batch).logits, want)
        assert not torch.allclose(adapt(move(adapt.init(seed=0)), batch).logits, want)


def test_padding_on_either_side_does_not_move_the_edits():
    model, _ = tiny_models["llama"]()
    adapt = ll.build(model.eval(), ll.LoReFTConfig(r=4, positions="f2+l1", layers=(1,)))
    params, ids = adapt.init(seed=0), torch.randint(3, 64, (1, 6), generator=torch.Generator().manual_seed(0))
    alone = adapt(params, {"input_ids": ids}).logits
    for left, right in ((0, 3), (3, 0)):
        padded = torch.nn.functional.pad(ids, (left, right))
        mask = torch.nn.functional.pad(torch.ones_like(ids), (left, right))
        places = torch.nn.functional.pad(torch.arange(6)[None], (left, right))
        out = adapt(params, {"input_ids": padded, "attention_mask": mask, "position_ids": places}).logits
        torch.testing.assert_close(out[:, left : left + 6], alone, rtol=1e-5, atol=1e-5)


def test_the_prompt_ends_where_labels_begin():
    model, _ = tiny_models["llama"]()
    adapt = ll.build(model.eval(), ll.LoReFTConfig(r=4, positions="l1", layers=(1,)))
    params, ids = adapt.init(seed=0), torch.randint(3, 64, (2, 6), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, :4] = -100  # the first row's prompt has four tokens, the second's labels count everywhere: all six
    change = (_hidden(adapt, params, {"input_ids": ids, "labels": labels})[-1] - _hidden(adapt, params, {"input_ids": ids})[-1]).norm(
        dim=-1
    )
    assert [k for k in range(6) if change[0, k] > 1e-3] == [3, 5]  # an edit at 3 instead of at 5
    assert not change[1].any()


def test_generate_edits_the_prompt_alone():
    model, _ = tiny_models["llama"]()
    model.generation_config.eos_token_id = None
    adapt = ll.build(model.eval(), ll.LoReFTConfig(r=4, positions="f1+l1"))
    params, ids = move(adapt.init(seed=0)), torch.randint(3, 64, (2, 5), generator=torch.Generator().manual_seed(0))
    got = adapt.module(params).generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    tokens = ids
    for _ in range(4):  # without a cache: what is generated is told from the prompt by labels
        labels = torch.where(torch.arange(tokens.shape[1]) < 5, -100, tokens)
        tokens = torch.cat([tokens, adapt(params, {"input_ids": tokens, "labels": labels}).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(got, tokens)
    assert not torch.equal(got, model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False))


def test_gradients_with_remat_and_under_compile_are_those_without():
    model, batch = tiny_models["llama"]()
    model.eval()
    plain, remat = (ll.build(model, ll.LoReFTConfig(r=4), remat=pattern) for pattern in (None, r"layers\.\d+$"))
    params = move(plain.init(seed=0))
    want = ll.value_and_grad(lambda p: plain(p, batch).loss)(params)[1]
    compiled = torch.compile(ll.value_and_grad(lambda p: plain(p, batch).loss), fullgraph=True, backend="aot_eager")
    for grads in (ll.value_and_grad(lambda p: remat(p, batch).loss)(params)[1], compiled(params)[1]):
        for got, leaf in zip(ll.tree_leaves(grads), ll.tree_leaves(want)):
            assert leaf.abs().max() > 1e-6
            torch.testing.assert_close(got, leaf, rtol=1e-4, atol=1e-7)


def test_identity_from_a_file_is_as_exact(tmp_path):
    model, batch = tiny_models["llama"]()
    model.eval()
    adapt = ll.build(model, ll.LoReFTConfig(r=4, start="identity"))
    ll.save(adapt, adapt.init(seed=0), tmp_path / "a.safetensors")
    again, read = ll.load(model, tmp_path / "a.safetensors")
    with torch.no_grad():
        assert torch.equal(again(read, batch).logits, model(**batch).logits)


def test_beside_lora_and_in_a_file(tmp_path):
    model, batch = tiny_models["llama"]()
    model.eval()
    adapt = ll.build(model, [ll.LoReFTConfig(r=4), ll.LoRAConfig(r=2, target_names=r"q_proj$")])
    params = move(adapt.init(seed=0))
    ll.save(adapt, params, tmp_path / "a.safetensors")
    again, read = ll.load(copy.deepcopy(model), tmp_path / "a.safetensors")
    assert torch.equal(again(read, batch).logits, adapt(params, batch).logits)
    with pytest.raises(ValueError, match="LoReFTConfig is not linear"):
        adapt.merge(params)


@pytest.mark.parametrize("positions", ["", "f0", "l", "f1l", "2", "f1+f2", 3])
def test_positions_that_name_none_are_refused(positions):
    with pytest.raises((ValueError, TypeError), match=r"LoReFTConfig\.positions: expected (the numbers of|a string)"):
        ll.LoReFTConfig(positions=positions)


def test_refusals():
    model, _ = tiny_models["llama"]()
    with pytest.raises(ValueError, match=r"LoReFTConfig\.r: expected at most 32"):
        ll.build(model, ll.LoReFTConfig(r=33))
    with pytest.raises(ValueError, match="expected a model with blocks of a module list"):
        ll.build(nn.Sequential(nn.Linear(2, 2)), ll.LoReFTConfig(r=1))
    with pytest.raises(ValueError, match=r"to match a block, found only modules of other kinds"):
        ll.build(model, ll.LoReFTConfig(target_names="q_proj$"))
