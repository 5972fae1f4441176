"""PEFT's files under older module names, or those of the model with or without its head: read by transformers' tables, as by PEFT."""

import copy
import re

import peft
import pytest
import safetensors.torch
import torch
import transformers as tf
from torch import nn

import lora_lite as ll
from cases import tiny_models
from lora_lite.cli import main
from peft_oracle import assert_close, edit, saved, wrapped

TOLERANCE = 1e-5
WARNED = "the file names modules otherwise than this model"


def _rename(folder, *pairs):
    """Give a file's tensors older names; of the pairs `(expression, replacement)` the first that matches holds."""
    found = {}
    for name, tensor in saved(folder).items():
        hits = [re.sub(pattern, new, name, count=1) for pattern, new in pairs if re.search(pattern, name)]
        found[hits[0] if hits else name] = tensor
    assert set(found) != set(saved(folder))
    safetensors.torch.save_file(found, folder / "adapter_model.safetensors")


def _llava():
    torch.manual_seed(0)
    text = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = {
        "image_size": 16,
        "patch_size": 8,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config = tf.LlavaConfig(text_config=tf.LlamaConfig(**text), vision_config=tf.CLIPVisionConfig(**vision), image_token_index=63)
    model = tf.LlavaForConditionalGeneration(config).eval()
    ids = torch.cat([torch.full((2, 4), 63), torch.randint(0, 60, (2, 5))], 1)
    return model, {"input_ids": ids, "pixel_values": torch.randn(2, 3, 16, 16)}


OLDER = [
    (r"^base_model\.model\.model\.language_model\.", "base_model.model.language_model.model."),
    (r"^base_model\.model\.lm_head", "base_model.model.language_model.lm_head"),
    (r"^base_model\.model\.model\.vision_tower\.", "base_model.model.vision_tower.vision_model."),
    (r"^base_model\.model\.model\.multi_modal_projector", "base_model.model.multi_modal_projector"),
]
LLAVA = {
    "attention": peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    "lora": peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "linear_1", "lm_head"],
        rank_pattern={r"layers\.1\..*q_proj": 2},
        alpha_pattern={"linear_1": 3},
    ),
    "whole": peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["multi_modal_projector"]),
    "tokens": peft.LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [3, 5]}),
}


@pytest.mark.parametrize("case", LLAVA)
def test_llavas_older_names_are_the_newer_ones(case, tmp_path):
    model, batch = _llava()
    theirs = wrapped(model, LLAVA[case])
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    want, base = theirs(**batch).logits, model(**batch).logits
    adapt, _ = ll.from_peft(model, tmp_path)
    _rename(tmp_path, *OLDER)
    with pytest.warns(UserWarning, match=f'{WARNED}(?s:.*)"language_model.model.layers.0.*" as "model.language_model.layers.0'):
        again, read = ll.from_peft(model, tmp_path)
    if case == "attention":  # PEFT 0.21 leaves out heads and projectors, whose newer name it takes for a part of the older
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
        assert_close(loaded(**batch).logits - base, want - base)
    assert [t.path for t in again.targets] == [t.path for t in adapt.targets]
    assert again.configs == adapt.configs
    assert_close(again(read, batch).logits - base, want - base)


def test_checkpoints_under_older_names_are_merged_into_without_loading_them(tmp_path):
    """The result has the names of the base, as other tools know them."""
    model, batch = _llava()
    model.save_pretrained(tmp_path / "base")
    names = set(safetensors.torch.load_file(tmp_path / "base/model.safetensors"))
    assert not names & set(model.state_dict())
    adapt = ll.build(model, ll.LoRAConfig(r=2, target_names=("q_proj$", "linear_1$")))
    params = ll.tree_map(lambda p: p + 0.1 * torch.randn_like(p), adapt.init())
    ll.save(adapt, params, tmp_path / "a.safetensors")
    assert main(["merge", "-q", str(tmp_path / "base"), str(tmp_path / "a.safetensors"), str(tmp_path / "merged")]) == 0
    assert set(safetensors.torch.load_file(tmp_path / "merged/model.safetensors")) == names
    merged = tf.LlavaForConditionalGeneration.from_pretrained(tmp_path / "merged").eval()
    assert_close(merged(**batch).logits, adapt(params, batch).logits, TOLERANCE)


def test_patterns_by_older_paths_hold_for_the_newer_ones(tmp_path):
    model, _ = _llava()
    path = "model.language_model.layers.1.self_attn.q_proj"
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], rank_pattern={path: 2}, alpha_pattern={path: 5})
    wrapped(model, config).save_pretrained(tmp_path)
    adapt, _ = ll.from_peft(model, tmp_path)
    older = "language_model.model.layers.1.self_attn.q_proj"
    edit(tmp_path, rank_pattern={older: 2}, alpha_pattern={older: 5})
    _rename(tmp_path, *OLDER)
    with pytest.warns(UserWarning, match=WARNED):
        again, _ = ll.from_peft(model, tmp_path)
    assert again.configs == adapt.configs
    assert {(cfg.r, cfg.alpha) for cfg in again.configs} == {(4, 8), (2, 5)}


@pytest.mark.parametrize("method", ["lora", "ia3", "ln_tuning"])
@pytest.mark.parametrize("bare", [True, False])
@pytest.mark.filterwarnings("ignore:Unsupported layer type")
def test_an_adapter_of_the_backbone_fits_the_model_with_a_head_and_the_reverse(method, bare, tmp_path):
    model, batch = tiny_models["llama"]()
    batch = {"input_ids": batch["input_ids"]}
    config = {
        "lora": peft.LoraConfig(r=2, target_modules=["q_proj"]),
        "ia3": peft.IA3Config(target_modules=["v_proj"], feedforward_modules=[]),
        "ln_tuning": peft.LNTuningConfig(target_modules=["input_layernorm"]),
    }[method]
    trained, other = (model.model, model) if bare else (model, model.model)
    theirs = wrapped(trained.eval(), config)
    theirs.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=WARNED):
        adapt, params = ll.from_peft(other.eval(), tmp_path)
    hidden = [
        getattr(out, "last_hidden_state", None) if getattr(out, "last_hidden_state", None) is not None else out.hidden_states[-1]
        for out in (adapt(params, batch, output_hidden_states=True), theirs(**batch, output_hidden_states=True), model.model(**batch))
    ]
    assert_close(hidden[0] - hidden[2], hidden[1] - hidden[2])


def _mixtral():
    """Return a model whose experts are fused, and a file of factors for each single expert as transformers 4 named them."""
    torch.manual_seed(0)
    config = tf.MixtralConfig(
        **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "eager"},
    )
    model = tf.MixtralForCausalLM(config).eval()
    tensors, g = {}, torch.Generator().manual_seed(1)
    for layer in range(2):
        at = f"base_model.model.model.layers.{layer}."
        sizes = {f"block_sparse_moe.experts.{n}.{w}": (32, 48) if w != "w2" else (48, 32) for n in range(4) for w in ("w1", "w2", "w3")}
        sizes |= {"block_sparse_moe.gate": (32, 4), "self_attn.q_proj": (32, 32)}
        for name, (i, o) in sizes.items():
            tensors[f"{at}{name}.lora_A.weight"] = 0.3 * torch.randn(3, i, generator=g)
            tensors[f"{at}{name}.lora_B.weight"] = 0.3 * torch.randn(o, 3, generator=g)
    return model, {"input_ids": torch.randint(0, 64, (2, 7), generator=g)}, tensors


def _write(folder, tensors, **fields):
    config = peft.LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": ["w1", "w2", "w3", "gate", "q_proj"], **fields})
    config.save_pretrained(folder)
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


def _by_hand(model, tensors, scale):
    """Return the model with each expert's update in its own part of the fused weights."""
    dense = copy.deepcopy(model)
    for layer, block in enumerate(dense.model.layers):
        at, experts = f"base_model.model.model.layers.{layer}.", block.mlp.experts

        def update(name, at=at):
            return scale * tensors[f"{at}{name}.lora_B.weight"] @ tensors[f"{at}{name}.lora_A.weight"]

        with torch.no_grad():
            block.self_attn.q_proj.weight += update("self_attn.q_proj")
            block.mlp.gate.weight += update("block_sparse_moe.gate")
            for n in range(4):
                w1, w2, w3 = (update(f"block_sparse_moe.experts.{n}.{w}") for w in ("w1", "w2", "w3"))
                experts.gate_up_proj[n] += torch.cat([w1, w3])
                experts.down_proj[n] += w2
    return dense


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not")  # PEFT looks for modules alone, and applies them
@pytest.mark.parametrize("rslora", [False, True])
def test_single_experts_are_read_into_the_fused_ones(rslora, tmp_path):
    model, batch, tensors = _mixtral()
    _write(tmp_path / "theirs", tensors, use_rslora=rslora)
    with pytest.warns(UserWarning, match=WARNED):
        adapt, params = ll.from_peft(model, tmp_path / "theirs")
    at = "model.layers.0.mlp."
    assert {path: leaves["A"].shape[-2] for path, leaves in params.items() if path.startswith(at)} == {
        f"{at}experts.gate_up_proj": 6,
        f"{at}experts.down_proj": 3,
        f"{at}gate.weight": 3,
    }
    base = model(**batch).logits
    want = _by_hand(model, tensors, 5 / (3**0.5 if rslora else 3))(**batch).logits
    assert_close(adapt(params, batch).logits - base, want - base)
    if not rslora:  # whose scale PEFT gives the fused weights sqrt(2) times
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "theirs").eval()
        assert_close(adapt(params, batch).logits - base, theirs(**batch).logits - base)
    ll.to_peft(adapt, params, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours").eval()
    assert_close(again(**batch).logits - base, want - base)


@pytest.mark.parametrize(
    ("lose", "message"),
    [
        (
            r"layers\.1\..*\.experts\.2\.",
            r'"model\.layers\.1\.mlp\.experts\.gate_up_proj": expected the factors of 2 x 4 .*lacking "0\.2", "1\.2"',
        ),
        (r"layers\.0\..*\.w3\.", r'"model\.layers\.0\.mlp\.experts\.gate_up_proj": expected the factors of 2 x 4'),
    ],
)
def test_experts_that_lack_some_are_refused(lose, message, tmp_path):
    model, _, tensors = _mixtral()
    _write(tmp_path, {name: t for name, t in tensors.items() if not re.search(lose, name)})
    with pytest.raises(ValueError, match=f"(?s){message}"), pytest.warns(UserWarning, match=WARNED):
        ll.from_peft(model, tmp_path)


@pytest.mark.parametrize(
    ("at", "wrapper"),
    [
        (r"^", "_orig_mod."),
        (r"(?<=\.)layers\.", "_orig_mod.layers."),
        (r"self_attn\.", "_fsdp_wrapped_module._checkpoint_wrapped_module.self_attn."),
    ],
    ids=["compiled", "compiled inside", "sharded"],
)
def test_names_of_torchs_wrappers_are_left_out(at, wrapper, tmp_path):
    """PEFT finds no layer of such a file, and runs the base model with a warning."""
    model, batch = tiny_models["llama"]()
    theirs = wrapped(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    theirs.save_pretrained(tmp_path / "peft")
    _rename(tmp_path / "peft", (at, wrapper))
    adapt, params = ll.from_peft(model, tmp_path / "peft")
    assert_close(adapt(params, batch).logits, theirs(**batch).logits, TOLERANCE)
    keys = {
        f"unet.{name.removeprefix('base_model.model.')}".replace("unet._orig_mod.base_model.model", "unet"): t
        for name, t in saved(tmp_path / "peft").items()
    }
    safetensors.torch.save_file(keys, tmp_path / "image.safetensors")
    assert {target.path for target in ll.from_diffusers(model, tmp_path / "image.safetensors")[0].targets} == {
        t.path for t in adapt.targets
    }
    assert main(["convert", str(tmp_path / "peft"), str(tmp_path / "a.safetensors")]) == 0  # the names alone tell the layers
    assert ll.load(model, tmp_path / "a.safetensors")[0].shapes == adapt.shapes


def test_names_that_fit_nothing_are_refused_by_name_and_nothing_is_guessed(tmp_path):
    model, _ = tiny_models["llama"]()
    wrapped(model, peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    _rename(tmp_path, (r"layers\.1", "layers.7"))
    with pytest.raises(ValueError, match=r'"model\.layers\.7\.self_attn\.q_proj": expected a linear layer, found nothing'):
        ll.from_peft(model, tmp_path)


def test_the_older_form_of_the_table_is_read_too(tmp_path):
    class Older(nn.Module):
        _checkpoint_conversion_mapping = {"^body": "new.body"}  # noqa: RUF012  # as transformers 4 and models of their own code have it

        def __init__(self):
            super().__init__()
            self.new = nn.ModuleDict({"body": nn.Linear(4, 4)})

        def forward(self, x):
            return self.new["body"](x)

    model, x = Older(), torch.randn(2, 4)
    theirs = wrapped(model, peft.LoraConfig(r=2, target_modules=["body"]))
    theirs.save_pretrained(tmp_path)
    _rename(tmp_path, (r"new\.body", "body"))
    with pytest.warns(UserWarning, match='"body" as "new.body"'):
        adapt, params = ll.from_peft(model, tmp_path)
    assert_close(adapt(params, x) - model(x), theirs(x) - model(x))


def test_no_module_is_given_two_of_the_file(tmp_path):
    model, _ = tiny_models["llama"]()
    wrapped(model, peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    tensors = saved(tmp_path)
    tensors |= {name.replace("model.model.layers", "model.layers"): t.clone() for name, t in tensors.items()}
    safetensors.torch.save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r'"layers\.0\.self_attn\.q_proj": expected a linear layer, found nothing'):
        ll.from_peft(model, tmp_path)
