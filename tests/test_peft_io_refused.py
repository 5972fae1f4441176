"""PEFT's files that cannot be understood, and adapters that PEFT cannot express: each is refused by the name of what is wrong."""

import json

import peft
import pytest
import safetensors.torch
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import lora_lite as ll

THEIRS = {
    "lora": peft.LoraConfig(r=4, target_modules=["0", "2"]),
    "ia3": peft.IA3Config(target_modules=["0", "2"], feedforward_modules=[]),
    "delora": peft.DeloraConfig(r=4, target_modules=["0", "2"]),
    "hra": peft.HRAConfig(r=4, target_modules=["0", "2"]),
    "vblora": peft.VBLoRAConfig(r=2, num_vectors=6, vector_length=4, target_modules=["0", "2"]),
    "psoft": peft.PsoftConfig(r=4, target_modules=["0", "2"]),
    "oft": peft.OFTConfig(oft_block_size=4, target_modules=["0", "2"]),
    "loha": peft.LoHaConfig(r=4, target_modules=["0", "2"]),
}


def _model(linear=nn.Linear):
    torch.manual_seed(0)
    return nn.Sequential(linear(12, 20), nn.Tanh(), linear(20, 8), nn.Tanh(), linear(8, 8)).eval()


def _saved(folder):
    return safetensors.torch.load_file(folder / "adapter_model.safetensors")


def _edit(folder, **fields):
    place = folder / "adapter_config.json"
    place.write_text(json.dumps({**json.loads(place.read_text()), **fields}))


def _save(case, folder):
    theirs = peft.get_peft_model(_model(), THEIRS[case])
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape))
    theirs.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path):
    return _save("lora", tmp_path / "lora")


REFUSED = {
    "peft_type": ("TOMORROW", 'peft_type in .* to be one of "LORA".*found "TOMORROW"'),
    "lora_bias": (True, r'missing "0\.lora_B\.bias"'),
    "bias": ("boft_only", "bias in .* to be one of .*found 'boft_only'"),
    "modules_to_save": (["4"], 'modules_to_save: expected the tensors of "4", found none'),
    "use_qalora": (True, "use_qalora: expected it off"),
    "layer_replication": ([[0, 1]], "layer_replication: expected it off"),
    "from_the_future": ({"a": 1}, "from_the_future: expected it off"),
    "use_dora": (True, r'missing "0\.lora_magnitude_vector"'),
    "lora_alpha": ("12", "lora_alpha: expected a number, found '12'"),
    "lora_dropout": (None, "lora_dropout: expected a number, found None"),
    "use_rslora": ("false", "use_rslora: expected true or false, found 'false'"),
    "alpha_pattern": ({"(": 3}, r"alpha_pattern: expected regular expressions, found '\(': missing"),
    "r": (5, 'r or rank_pattern: expected 4 at "0", as its tensors have, found 5'),
    "rank_pattern": ({"2": 3}, 'r or rank_pattern: expected 4 at "2", as its tensors have, found 3'),
    "init_lora_weights": ("loftq", "init_lora_weights in .*found 'loftq'.*merge_and_unload"),
    "target_modules": ({"0": 1}, "target_modules: expected names or an expression, found {'0': 1}"),
    "exclude_modules": ([0], r"exclude_modules: expected names or an expression, found \[0\]"),
    "target_parameters": (5, "target_parameters: expected a list of names, found 5"),
    "trainable_token_indices": ({"0": 5}, "trainable_token_indices: expected a list of ids, or one by name, found {'0': 5}"),
    "alora_invocation_tokens": ("ab", "alora_invocation_tokens: expected a list of ids, found 'ab'"),
    "kasa_config": (["beta"], r"kasa_config: expected numbers by name, found \['beta'\]"),
    "task_type": ({"a": 1}, "task_type: expected a text, found {'a': 1}"),
}


@pytest.mark.parametrize("value", [[], {"LORA": 1}, 5, None])
def test_method_that_is_no_name_is_named(folder, value):
    _edit(folder, peft_type=value)
    way = "tools, or merge them into the model there" if value is None else "merge_and_unload"  # None: of another library, such as MLX
    with pytest.raises(ValueError, match=f"from_peft: expected peft_type.*{way}"):
        ll.from_peft(_model(), folder)


@pytest.mark.parametrize("names", [5, "4", [5], [[1]]])
def test_names_that_are_no_list_are_named(folder, names):
    _edit(folder, modules_to_save=names)
    with pytest.raises(ValueError, match=r"modules_to_save: expected a list of names, found"):
        ll.from_peft(_model(), folder)


@pytest.mark.parametrize(
    ("case", "fields", "message"),
    [
        ("lora", {"lora_dropout": 5}, r'values that "0" can have here, found: LoRAConfig\.dropout'),
        ("psoft", {"ab_svd_init": ["psoft_init"]}, r"ab_svd_init: expected a text, found \['psoft_init'\]"),
        ("psoft", {"layers_to_transform": "1"}, "layers_to_transform: expected a number or a list of numbers, found '1'"),
        ("psoft", {"cayley_neumann_eps": "x"}, "cayley_neumann_eps: expected a number, found 'x'"),
        ("vblora", {"topk": 2.5}, r'values that "0" can have here, found: VBLoRAConfig\.topk'),
    ],
)
def test_values_that_a_config_does_not_take_are_told_with_the_file(case, fields, message, tmp_path):
    _edit(_save(case, tmp_path), **fields)
    with pytest.raises(ValueError, match=rf"(?s)from_peft: expected .*adapter_config\.json.*{message}"):
        ll.from_peft(_model(), tmp_path)


@pytest.mark.parametrize("field", REFUSED)
def test_unsupported_field_is_named(folder, field):
    value, message = REFUSED[field]
    _edit(folder, **{field: value})
    with pytest.raises(ValueError, match=f"(?s)from_peft: expected .*{message}"):
        ll.from_peft(_model(), folder)


@pytest.mark.parametrize("start", ["corda", "lora_ga", "pissa_niter_16"])
def test_starts_whose_shift_is_not_in_the_file_are_refused_with_what_to_do(folder, start):
    _edit(folder, init_lora_weights=start)
    with pytest.raises(ValueError, match=f"init_lora_weights in .*found '{start}': the start .*path_initial_model_for_weight_conversion"):
        ll.from_peft(_model(), folder)


@pytest.mark.parametrize("start", ["pissa", "olora"])
@pytest.mark.parametrize(("field", "value"), [("use_dora", True), ("lora_dropout", 0.1)])
def test_options_that_residual_starts_do_not_have_are_named(folder, start, field, value):
    _edit(folder, init_lora_weights=start, **{field: value})
    with pytest.raises(ValueError, match=f'{field} in .* with init_lora_weights="{start}"'):
        ll.from_peft(_model(), folder)


def test_a_start_that_means_something_else_on_a_layer_is_named(folder):
    _edit(folder, init_lora_weights="olora")
    with pytest.raises(ValueError, match=r'"0": OLoRAConfig: PEFT.s start has this meaning in an nn\.Linear alone'):
        ll.from_peft(_model(lambda i, o: Conv1D(o, i)), folder)


@pytest.mark.parametrize(
    ("case", "fields", "message"),
    [
        ("oft", {"coft": True, "eps": 1e-3}, r'coft: expected it off, or .*"0" beyond it'),
        ("oft", {"peft_version": None}, "peft_version in .* to be 0.18 or newer .*found none"),
        ("oft", {"peft_version": "0.17.1"}, "found 0.17.1"),
        ("loha", {"use_effective_conv2d": True}, "use_effective_conv2d: expected it off"),  # its factors have the kernel's axes
        ("hra", {"apply_GS": True}, "apply_GS: expected it off"),
        ("hra", {"r": 1}, 'r or rank_pattern: expected 4 at "0", as its tensors have, found 1'),
        ("psoft", {"psoft_svd": "lowrank"}, "psoft_svd: expected 'full', found 'lowrank'"),
        ("psoft", {"psoft_mag_a": False}, r'unexpected "0\.a"'),
        ("psoft", {"psoft_orth": False}, r'"0\.Q": expected shape \(4, 4\), found \(6,\)'),
        ("ia3", {"modules_to_save": ["head"]}, 'modules_to_save: expected modules of this model, found "head"'),
        ("vblora", {"save_only_topk_weights": True}, "save_only_topk_weights: expected it off, found True"),
        ("delora", {"bias": "delora_only"}, "bias: expected it off"),
    ],
)
def test_unsupported_fields_of_other_methods_are_named(case, fields, message, tmp_path):
    _edit(_save(case, tmp_path), **fields)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        ll.from_peft(_model(), tmp_path)


@pytest.mark.parametrize(
    ("key", "tensor", "message"),
    [
        ("base_model.model.0.lora_A.weight", None, r'missing "0\.lora_A\.weight"'),
        ("base_model.model.4.weight", torch.ones(8, 8), r'unexpected "base_model\.model\.4\.weight"'),
        ("base_model.model.1.lora_A.weight", torch.ones(4, 8), '"1": expected a linear layer, found Tanh'),
        ("base_model.model.9.lora_A.weight", torch.ones(4, 8), '"9": expected a linear layer, found nothing; closest: "0"'),
        ("base_model.model.2.lora_A.weight", torch.ones(4, 9), r'"2\.A": expected shape \(4, 20\), found \(4, 9\)'),
        ("base_model.model.2.lora_A.weight", torch.ones(4), r"expected 2 axes of a floating dtype, found \(4,\)"),
        ("base_model.model.2.lora_A.weight", torch.ones(0), r'no numbers in "base_model\.model\.2\.lora_A\.weight".*zero_to_fp32'),
        ("base_model.model.2.lora_magnitude_vector", torch.ones(8), r'unexpected "2\.lora_magnitude_vector"'),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder, key, tensor, message):
    tensors = {**_saved(folder), key: tensor}
    safetensors.torch.save_file({k: t for k, t in tensors.items() if t is not None}, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=message):
        ll.from_peft(_model(), folder)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [(None, "missing"), (torch.ones(6), "expected 2 axes"), (torch.ones(5, 4), r"\(5, 4\)")],
    ids=["none", "flat", "other"],
)
def test_tensors_of_all_layers_that_do_not_fit_are_named(tensor, message, tmp_path):
    _save("vblora", tmp_path)
    tensors = {**_saved(tmp_path), "base_model.vblora_vector_bank": tensor}
    safetensors.torch.save_file({k: t for k, t in tensors.items() if t is not None}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=f"(?s){message}"):
        ll.from_peft(_model(), tmp_path)


def test_missing_and_damaged_files_are_named(folder):
    model = _model()
    safetensors.torch.save_file({}, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="no tensors, as where DeepSpeed's ZeRO 3"):
        ll.from_peft(model, folder)
    (folder / "adapter_model.safetensors").write_bytes(b"\x80\x04pickled")
    with pytest.raises(ValueError, match="to be a whole safetensors file"):
        ll.from_peft(model, folder)
    (folder / "adapter_model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(ValueError, match=r"found the pointer of git-lfs.* git lfs pull"):  # of a clone without its large files
        ll.from_peft(model, folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="pickled files are never opened"):
        ll.from_peft(model, folder)
    for text in ("[1, 2", "[" * 100_000):
        (folder / "adapter_config.json").write_text(text)
        with pytest.raises(ValueError, match="to be a JSON object"):
            ll.from_peft(model, folder)
    with pytest.raises(FileNotFoundError, match=r'Pass subfolder= one of "lora"'):  # as PEFT saves adapters with names
        ll.from_peft(model, folder.parent)
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json"):
        ll.from_peft(model, folder / "elsewhere")
    with pytest.raises(TypeError, match=r"expected model as a torch\.nn\.Module"):
        ll.from_peft("llama", folder)


def _conv1d(i, o):
    return Conv1D(o, i)


UNWRITABLE = {
    "no class": (nn.Linear, ll.SSVDConfig(r=2), '"0": SSVDConfig has no class in PEFT'),
    "bias": (nn.Linear, ll.LoRAConfig(r=2, start="gaussian", lora_bias=True), "LoRAConfig.lora_bias: PEFT has it with its default start"),
    "no bias": (
        lambda i, o: nn.Linear(i, o, bias=i > 12),
        [ll.LoRAConfig(r=2, target_names="2"), ll.BitFitConfig(target_names="0")],
        '"0": BitFitConfig: the layer has no bias for PEFT to train',
    ),
    "no own bias": (
        lambda i, o: nn.Linear(i, o, bias=i > 12),
        ll.LoRAConfig(r=2, bias=True),
        '"0": LoRAConfig: the layer has no bias for PEFT to train',
    ),
    "beft": (_conv1d, ll.BitFitConfig(), '"0": BitFitConfig on a Conv1D'),
    "copy": (nn.Linear, ll.DeLoRAConfig(r=2, init="copy"), 'DeLoRAConfig.start="copy"'),
    "side": (nn.Linear, ll.HRAConfig(r=2, side="out"), 'HRAConfig.side="out"'),
    "miss": (nn.Linear, ll.MiSSConfig(r=4, init="bat", dropout=0.1), 'MiSSConfig.dropout with init="bat": PEFT applies none'),
    "conv1d": (_conv1d, ll.HRAConfig(r=2), '"0": HRAConfig on a Conv1D'),
    "methods": (nn.Linear, [ll.LoRAConfig(target_names="0"), ll.IA3Config(target_names="2")], 'variants of 2 methods, "IA3", "LORA"'),
    "dora": (nn.Linear, [ll.LoRAConfig(target_names="0"), ll.DoRAConfig(target_names="2")], 'use_dora: .* at "2"'),
    "dropout": (
        nn.Linear,
        [ll.LoRAConfig(target_names="0"), ll.LoRAConfig(dropout=0.1, target_names="2")],
        'lora_dropout: 0.0 and 0.1 at "2"',
    ),
    "rslora": (nn.Linear, [ll.LoRAConfig(target_names="0"), ll.LoRAConfig(rslora=True, target_names="2")], 'use_rslora: .* at "2"'),
    "ranks of hira": (nn.Linear, [ll.HiRAConfig(r=4, target_names="0"), ll.HiRAConfig(r=2, target_names="2")], 'r: 4 and 2 at "2"'),
    "blocks": (
        nn.Linear,
        [ll.OFTConfig(block_size=4, target_names="0"), ll.OFTConfig(block_size=2, target_names="2")],
        "oft_block_size: 4 and 2",
    ),
}


@pytest.mark.parametrize("case", UNWRITABLE)
def test_what_peft_cannot_express_is_named_and_nothing_is_written(case, tmp_path):
    linear, cfg, message = UNWRITABLE[case]
    adapt = ll.build(_model(linear), cfg)
    with pytest.raises(ValueError, match=f"(?s)to_peft: expected .*{message}"):
        ll.to_peft(adapt, adapt.init(), tmp_path / "ours")
    assert list(tmp_path.iterdir()) == []
