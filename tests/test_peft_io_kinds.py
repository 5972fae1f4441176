"""PEFT's files of embeddings, convolutions and parameters: read with PEFT's values, written so that PEFT loads them."""

import copy
import json

import peft
import pytest
import safetensors.torch
import torch
import transformers as tf
from torch import nn

import lora_lite as ll
from cases import assert_trees_equal, move, tiny_models
from peft_oracle import assert_close, wrapped

TOLERANCE = 1e-5
pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
    pytest.mark.filterwarnings("ignore:.*target_parameters.*"),
]


def _text(family):
    def make():
        model, batch = tiny_models[family]()
        for p in model.parameters():
            nn.init.normal_(p, std=0.2)
        if hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("eager")
        return model.eval(), {"input_ids": batch["input_ids"]}

    return make


class Around(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.net = nn.Sequential(*layers)

    def forward(self, x):
        return self.net(x)


def _images():
    return Around(nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.Tanh(), nn.Conv2d(6, 4, 1), nn.Flatten(), nn.Linear(64, 5)), torch.randn(
        2, 3, 8, 8
    )


def _volumes():
    return Around(nn.Conv3d(2, 4, 2), nn.Tanh(), nn.Conv3d(4, 3, 1)), torch.randn(2, 2, 4, 4, 4)


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CASES = {
    "embedding": (_text("llama"), peft.LoraConfig(r=4, lora_alpha=6, target_modules=["embed_tokens", "q_proj"])),
    "head": (_text("llama"), peft.LoraConfig(r=4, lora_alpha=6, target_modules=["lm_head", "q_proj"])),
    "falcon": (_text("falcon"), peft.LoraConfig(r=4, lora_alpha=6, target_modules=["query_key_value", "dense_4h_to_h"])),
    "experts": (_text("qwen3_moe"), peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"], target_parameters=EXPERTS)),
    "experts-down": (_text("qwen3_moe"), peft.LoraConfig(r=3, lora_alpha=5, target_modules=[], target_parameters=EXPERTS[1:])),
    "images": (_images, peft.LoraConfig(r=2, lora_alpha=3, target_modules=["net.0", "net.2", "net.4"])),
    "images-dora": (_images, peft.LoraConfig(r=2, lora_alpha=3, use_dora=True, target_modules=["net.0", "net.2"])),
    "images-ia3": (_images, peft.IA3Config(target_modules=["net.0", "net.2", "net.4"], feedforward_modules=["net.4"])),
    "images-loha": (_images, peft.LoHaConfig(r=2, alpha=3, target_modules=["net.0", "net.2", "net.4"])),
    "images-adalora": (_images, peft.AdaLoraConfig(init_r=3, target_r=2, total_step=9, lora_alpha=5, target_modules=["net.0", "net.2"])),
    "volumes": (_volumes, peft.LoraConfig(r=2, lora_alpha=3, target_modules=["net.0", "net.2"])),
}


def _values(out):
    return (out if isinstance(out, torch.Tensor) else out.logits).detach()


def _run(model, batch):
    return _values(model(**batch) if isinstance(batch, dict) else model(batch))


@pytest.mark.parametrize("name", CASES)
def test_reads_pefts_files_and_writes_what_peft_reads(name, tmp_path):
    torch.manual_seed(0)
    model, batch = CASES[name][0]()
    model.eval()
    theirs = peft.get_peft_model(copy.deepcopy(model), copy.deepcopy(CASES[name][1])).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))
    theirs.save_pretrained(tmp_path / "theirs")
    base, want = _run(model, batch), _run(theirs, batch)

    adapt, params = ll.from_peft(model, tmp_path / "theirs")
    assert_close(_values(adapt(params, batch)) - base, want - base)

    ll.to_peft(adapt, params, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours").eval()
    assert_close(_run(again, batch) - base, want - base)
    back, read = ll.from_peft(model, tmp_path / "ours")
    assert [t.path for t in back.targets] == [t.path for t in adapt.targets]
    assert_trees_equal(read, params, 1e-6)
    written, saved = (safetensors.torch.load_file(tmp_path / f / "adapter_model.safetensors") for f in ("ours", "theirs"))
    assert {k: t.shape for k, t in written.items()} == {k: t.shape for k, t in saved.items() if "base_layer.weight" not in k}


@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["q_proj"]])
def test_own_weights_saved_beside_the_adapter_are_held_to_the_model(targets, tmp_path):
    model, batch = CASES["embedding"][0]()
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2, target_modules=targets))
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)  # as PEFT does by itself where tokens were added
    adapt, params = ll.from_peft(model, tmp_path)
    assert torch.equal(_run(lambda **b: adapt(params, b), batch), _run(model, batch))
    with torch.no_grad():
        model.model.embed_tokens.weight.add_(1.0)
        model.lm_head.weight.add_(1.0)
    with pytest.raises(ValueError, match=r"(embed_tokens|lm_head)\..*weight\": it differs from the model's own"):
        ll.from_peft(model, tmp_path)


class Scaled(nn.Linear):
    """As of an equalised learning rate."""

    def forward(self, x):
        return 2.0 * super().forward(x)


class Checked(nn.Linear):
    """A forward of its own that is the plain one."""

    def forward(self, x):
        assert x.shape[-1] == self.in_features
        return super().forward(x)


class Residual(nn.Linear):
    """A sum in which the weight stands once."""

    def forward(self, x):
        return x.flip(-1)[..., : self.out_features] + super().forward(x)


class Reads(nn.Module):
    """A layer that is never called."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(6, 4)

    def forward(self, x):
        return torch.nn.functional.linear(x, self.net.weight, self.net.bias)


class Listed(nn.Module):
    """Layers in a list, which are registered beside it."""

    def __init__(self):
        super().__init__()
        self.steps = [nn.Linear(6, 6), nn.Linear(6, 4)]
        for k, layer in enumerate(self.steps):
            self.add_module(f"step{k}", layer)

    def forward(self, x):
        for layer in self.steps:
            x = layer(x)
        return x


def _mamba():
    torch.manual_seed(0)
    return tf.MambaForCausalLM(tf.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, state_size=4)).eval()


ALIKE = {
    "checked": (Checked, {"target_modules": ["net.0"]}),
    "checked-dora": (Checked, {"target_modules": ["net.0"], "use_dora": True}),
    "residual": (Residual, {"target_modules": ["net.0"]}),
    "scaled-parameter": (Scaled, {"target_modules": [], "target_parameters": ["net.0.weight"]}),  # PEFT adapts it inside the forward
}


@pytest.mark.parametrize("case", ALIKE)
def test_own_forwards_that_peft_computes_alike_are_read(case, tmp_path):
    torch.manual_seed(0)
    cls, fields = ALIKE[case]
    model, x = Around(cls(6, 4)).eval(), torch.randn(3, 6)
    theirs = wrapped(model, peft.LoraConfig(r=2, **fields))
    theirs.save_pretrained(tmp_path / "theirs")
    adapt, params = ll.from_peft(model, tmp_path / "theirs")
    assert_close(adapt(params, x) - model(x), theirs(x) - model(x))
    if cls is not Scaled:
        ll.to_peft(adapt, params, tmp_path / "ours")
        assert_close(peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours")(x) - model(x), theirs(x) - model(x))


APART = {
    "scaled": (lambda: Around(Scaled(6, 4)), {"target_modules": ["net.0"]}, r'"net\.0": LoRAConfig on a Scaled, which has a forward'),
    "residual-dora": (
        lambda: Around(Residual(6, 4)),
        {"target_modules": ["net.0"], "use_dora": True},
        "on a Residual, which has a forward",
    ),
    "read": (Reads, {"target_modules": ["net"]}, "on a layer whose weight Reads reads without calling it"),
    "listed": (Listed, {"target_modules": ["step1"]}, "on a layer that Listed keeps outside of its modules too"),
    "mamba": (_mamba, {"target_modules": ["dt_proj"]}, "on a layer whose weight MambaMixer reads without calling it"),
}


@pytest.mark.parametrize("case", APART)
def test_layers_that_peft_computes_otherwise_are_refused_both_ways(case, tmp_path):
    make, fields, message = APART[case]
    model = make()
    wrapped(model, peft.LoraConfig(r=2, **fields)).save_pretrained(tmp_path / "theirs")
    with pytest.raises(ValueError, match=f"(?s)from_peft: .*{message}"):
        ll.from_peft(model, tmp_path / "theirs")
    cls = ll.DoRAConfig if fields.get("use_dora") else ll.LoRAConfig
    adapt = ll.build(model, cls(r=2, target_names=fields["target_modules"]))
    with pytest.raises(ValueError, match=f"(?s)to_peft: .*{message}"):
        ll.to_peft(adapt, move(adapt.init()), tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("name", ["out_proj", "conv1d"])
def test_layers_of_mamba_that_peft_refuses_are_refused(name, tmp_path):
    model = _mamba()
    with pytest.raises(ValueError, match=f"Module '{name}' is incompatible with Mamba"):
        peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2, target_modules=[name]))
    adapt = ll.build(model, ll.LoRAConfig(r=2, target_names=f"{name}$"))
    with pytest.raises(ValueError, match=rf'"backbone\.layers\.0\.mixer\.{name}": LoRAConfig on a layer of Mamba: PEFT.s LORA refuses'):
        ll.to_peft(adapt, move(adapt.init()), tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


REFUSED = {
    "attention": (
        lambda: Around(nn.TransformerEncoderLayer(16, 2, 32)),
        ll.LoRAConfig(r=2, target_names="in_proj_weight"),
        "adds the update of its output projection twice",
    ),
    "dilated": (lambda: Around(nn.Conv2d(3, 4, 3, dilation=2)), ll.LoRAConfig(r=2, target_names=r"net\.0"), "dilation or a padding mode"),
    "groups": (lambda: Around(nn.Conv2d(4, 4, 3, groups=2)), ll.LoRAConfig(r=2, target_names=r"net\.0"), "in groups: in PEFT's update"),
    "transposed": (lambda: Around(nn.ConvTranspose2d(4, 4, 3)), ll.LoRAConfig(r=2, target_names=r"net\.0"), "a transposed convolution"),
    "ia3-1d": (lambda: Around(nn.Conv1d(3, 4, 3)), ll.IA3Config(target_names=r"net\.0"), "takes images and volumes"),
    "loha-padding": (
        lambda: Around(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")),
        ll.LoHaConfig(r=2, target_names=r"net\.0"),
        "a padding mode, which PEFT's LoHa leaves out",
    ),
    "adalora-1d": (
        lambda: Around(nn.Conv1d(3, 4, 3)),
        ll.AdaLoRAConfig(total_step=9, target_names=r"net\.0"),
        "another definition there, or none",
    ),
    "hra": (lambda: Around(nn.Conv2d(3, 4, 3)), ll.HRAConfig(r=2, target_names=r"net\.0"), "another definition"),
    "ia3-embedding": (lambda: Around(nn.Embedding(5, 4)), ll.IA3Config(target_names=r"net\.0"), "on an embedding: PEFT has LoRA alone"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_peft_has_not_is_refused(name, tmp_path):
    make, cfg, why = REFUSED[name]
    adapt = ll.build(make(), cfg)
    with pytest.raises(ValueError, match=why):
        ll.to_peft(adapt, move(adapt.init()), tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_factors_over_the_channels_of_all_groups_are_not_read(tmp_path):
    model = Around(nn.Conv2d(4, 4, 3, groups=2))
    with pytest.warns(UserWarning, match="groups > 1"):
        theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=4, target_modules=["net.0"]))
    theirs.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r'"net\.0": .* of all groups'):
        ll.from_peft(model, tmp_path)


def test_what_peft_computes_otherwise_is_not_read(tmp_path):
    model = Around(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"))
    peft.get_peft_model(copy.deepcopy(model), peft.LoHaConfig(r=2, target_modules=["net.0"])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r'"net\.0": LoHaConfig on .* a padding mode, which PEFT.s LoHa leaves out'):
        ll.from_peft(model, tmp_path)


def test_config_names_parameters(tmp_path):
    model, _ = CASES["experts"][0]()
    adapt = ll.build(model, ll.LoRAConfig(r=2, target_names=(r"experts", r"q_proj$")))
    ll.to_peft(adapt, adapt.init(), tmp_path / "ours")
    fields = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert fields["target_parameters"] == [t.path for t in adapt.targets if "experts" in t.path]
    assert fields["target_modules"] == [f"model.layers.{k}.self_attn.q_proj" for k in range(2)]
