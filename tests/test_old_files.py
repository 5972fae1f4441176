"""Adapter files of earlier versions load to the bit, and give what they gave."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import lora_lite as ll
from files_0_1_0.write import CONFIGS, Model

HERE = Path(__file__).parent / "files_0_1_0"


@pytest.fixture(scope="module")
def model():
    model = Model()
    model.load_state_dict(load_file(HERE / "model.safetensors"))
    return model.eval()


def test_every_variant_of_that_version_has_a_file():
    assert {cfg.name for cfg in CONFIGS.values()} <= set(ll.VARIANTS)
    assert {path.stem for path in HERE.glob("*.safetensors")} == {*CONFIGS, "model", "outputs"}


@pytest.mark.parametrize("name", CONFIGS)
def test_file_of_version_0_1_0(model, name):
    outputs = load_file(HERE / "outputs.safetensors")
    adapt, params = ll.load(model, HERE / f"{name}.safetensors")
    with safe_open(HERE / f"{name}.safetensors", framework="pt") as file:
        stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # it is no mapping
    loaded = {f"{path}.{leaf}": t for path, leaves in params.items() for leaf, t in leaves.items()}
    loaded |= {f"constant/{path}.{leaf}": t for path, leaves in adapt.constants.items() for leaf, t in leaves.items()}
    missing = [key for key, t in stored.items() if not (key in loaded and torch.equal(t, loaded[key]) and t.dtype == loaded[key].dtype)]
    assert not missing
    assert not [key for key in loaded if key not in stored and not key.startswith("constant/")]
    update, want = adapt(params, outputs["ids"]) - outputs["base"], outputs[name] - outputs["base"]
    assert want.abs().max() > 1e-2
    torch.testing.assert_close(update, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))
