"""`lora-lite convert` without `--base`: what real PEFT loads is the adapter, or one line says what is lacking."""

import contextlib
import copy
import dataclasses
import io

import peft
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

import lora_lite as ll
from cases import FIRST, move
from lora_lite.cli import main
from peft_oracle import wrapped

RIGHT = (
    *("lora", "ia3", "ia3_ff", "hra", "road", "oft", "bitfit", "eva", "vera", "pvera", "randlora", "vblora", "unilora", "loha", "lokr"),
    *("ether", "miss", "shira", "gralora", "boft", "c3a", "fourierft", "waveft"),
)
"""The variants of whose files PEFT's follow without the model."""

APART = ("loftq", "lora_ga", "tokens")
"""The variants whose start takes a quantised model, a loss or an embedding."""

LINEAR = [row for row in FIRST if row.cfg.adapts == "linear" and row.cfg.name not in APART]


class Nested(nn.Module):
    """A model whose inner layers have the names of the outer ones, and other widths."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(24, 32), nn.Linear(32, 24)
        self.inner = nn.Module()
        self.inner.fc1, self.inner.fc2 = nn.Linear(24, 48), nn.Linear(48, 24)

    def forward(self, x):
        x = x + self.fc2(self.fc1(x).tanh())
        return x + self.inner.fc2(self.inner.fc1(x).tanh())


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.fc = nn.MultiheadAttention(24, 2, batch_first=True), nn.Linear(24, 24)

    def forward(self, x):
        return self.fc(self.attn(x, x, x)[0])


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = self.b = nn.Linear(24, 24)

    def forward(self, x):
        return self.b(self.a(x).tanh())


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.fc = nn.Embedding(30, 24), nn.Linear(24, 24)

    def forward(self, ids):
        return self.fc(self.table(ids))


def _saved(folder, model, cfg, x=None):
    adapt = ll.build(model, cfg, calibration=[x] if getattr(cfg, "calibrated", False) else None)
    params = move(adapt.init(seed=0))
    ll.save(adapt, params, folder / "adapter.safetensors")
    return adapt, params


def _convert(source, out):
    """Convert without the base model. Return the lines of the error."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        status = main(["convert", str(source), str(out)])
    assert (status == 0) == out.exists()
    return said.getvalue().splitlines() if status else []


@pytest.mark.filterwarnings("ignore")  # PEFT's, of CUDA kernels and odd ranks
@pytest.mark.parametrize("row", LINEAR, ids=lambda row: row.cfg.name)
def test_peft_adapts_the_named_layers_alone_and_equally(row, tmp_path):
    cfg = row.cfg
    torch.manual_seed(0)
    model, x = Nested().eval(), torch.randn(2, 5, 24)
    adapt, params = _saved(tmp_path, model, dataclasses.replace(cfg, target_names=(r"^fc\d$",)), x)
    error = _convert(tmp_path / "adapter.safetensors", tmp_path / "peft")
    assert (not error) == (cfg.name in RIGHT), error
    if error:
        assert len(error) == 1
        with_model = tmp_path / "with_model"
        try:
            ll.to_peft(adapt, params, with_model)
        except ValueError:  # PEFT has no such method: the base model would not help
            return
        assert "--base MODEL" in error[0]
        return
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "peft").eval()
    layers = {path for path, module in theirs.base_model.model.named_modules() if isinstance(module, BaseTunerLayer)}
    assert layers == {target.path for target in adapt.targets}
    with torch.no_grad():
        base, want, got = adapt.base(x), adapt(params, x), theirs(x)
    assert float((want - base).abs().max()) > 1e-3
    torch.testing.assert_close(got - base, want - base, rtol=0, atol=1e-5 * float((want - base).abs().max()) + 1e-6)


def _conv(**options):
    return nn.Sequential(nn.Conv2d(8, 8, 3, padding=2, **options))


LORA = ll.LoRAConfig(r=2, exclude_names=())
NAMED = dataclasses.replace(LORA, target_names=r"^0$")
ROWS = ll.TokensConfig(token_ids=(3, 5), target_names="table$", exclude_names=())
UNKNOWN = {
    "dilation": (lambda: _conv(dilation=2), NAMED, "does not describe"),
    "padding mode": (lambda: _conv(padding_mode="reflect"), NAMED, "does not describe"),
    "groups": (lambda: _conv(groups=2), NAMED, "does not describe"),
    "attention": (Attention, dataclasses.replace(LORA, target_names="out_proj$"), "does not describe"),
    "a layer at two places": (Twice, LORA, "does not describe"),
    "rows of a table": (Tokens, ROWS, "depend on the weight"),
    "rows beside LoRA": (Tokens, [ROWS, dataclasses.replace(LORA, target_names="fc$")], "depend on the weight"),
    "a trained bias": (Tokens, dataclasses.replace(LORA, bias=True, target_names="fc$"), "bias whole"),
    "a bias beside LoRA": (Nested, [ll.BitFitConfig(target_names="fc1$"), ll.LoRAConfig(target_names="fc2$")], "bias whole"),
    "layers that share params": (Nested, ll.LilyConfig(r=2), "groups"),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_what_the_file_does_not_tell_is_asked_for(case, tmp_path):
    make, cfg, said = UNKNOWN[case]
    _saved(tmp_path, make().eval(), cfg)
    (error,) = _convert(tmp_path / "adapter.safetensors", tmp_path / "peft")
    assert said in error
    assert "--base MODEL" in error


@pytest.mark.filterwarnings("ignore")
def test_one_group_of_layers_that_share_params_needs_no_model(tmp_path):
    torch.manual_seed(0)
    model, x = Nested().eval(), torch.randn(2, 5, 24)
    adapt, params = _saved(tmp_path, model, ll.LilyConfig(r=2, target_names=r"^fc1$"))
    assert _convert(tmp_path / "adapter.safetensors", tmp_path / "peft") == []
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "peft").eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(x), adapt(params, x))


OF_PEFT = {
    "attention": (Attention, peft.LoraConfig(r=2, target_modules=["attn"])),
    "its projection": (Attention, peft.LoraConfig(r=2, target_modules=["out_proj", "fc"])),
    "convolution": (lambda: nn.Sequential(nn.Conv2d(8, 8, 3, dilation=2)), peft.LoraConfig(r=2, target_modules=["0"])),
}


@pytest.mark.parametrize("case", OF_PEFT)
def test_what_pefts_files_do_not_tell_is_asked_for(case, tmp_path):
    make, config = OF_PEFT[case]
    wrapped(make(), config).save_pretrained(tmp_path / "peft")
    (error,) = _convert(tmp_path / "peft", tmp_path / "adapter.safetensors")
    assert "--base MODEL" in error


def test_a_pointwise_convolution_of_pefts_needs_no_model(tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(8, 6, 1)).eval(), torch.randn(2, 8, 5, 5)
    theirs = wrapped(model, peft.LoraConfig(r=2, target_modules=["0"]))
    theirs.save_pretrained(tmp_path / "peft")
    assert _convert(tmp_path / "peft", tmp_path / "adapter.safetensors") == []
    adapt, params = ll.load(model, tmp_path / "adapter.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(adapt(params, x), theirs(x))
