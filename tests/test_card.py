"""The model card: metadata that the Hub reads, true facts, and no README of the user's overwritten."""

import pytest
import torch
from huggingface_hub import ModelCard
from torch import nn

import lora_lite as ll
from lora_lite.cli import main

CONFIGS = [ll.LoRAConfig(r=2, target_names="^0$"), ll.LoRAConfig(r=1, target_names="^2$")]


@pytest.fixture
def adapter():
    adapt = ll.build(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), CONFIGS)
    return adapt, ll.tree_map(lambda p: p + 0.1, adapt.init(seed=0))


def test_the_hub_reads_the_metadata(adapter):
    text = ll.model_card(
        *adapter, base="user/model-1B", metrics={"accuracy | test": 0.875}, license="apache-2.0", tags=["maths"], title="Sums"
    )
    data = ModelCard(text).data
    assert (data.base_model, data.library_name, data.license) == ("user/model-1B", "peft", "apache-2.0")
    assert data.tags == ["lora", "lora_lite", "maths"]
    assert "# Sums\n" in text
    assert r"| accuracy \| test | 0.875 |" in text
    adapt, _ = adapter
    assert f"{adapt.num_params:,} trained values" in text
    assert "lora at 2 layers" in text
    assert "r=2" in text
    assert "r=1" in text


def test_a_local_path_is_not_published(adapter, tmp_path):
    adapt, params = adapter
    adapt._plan.base.config = type("Config", (), {"_name_or_path": str(tmp_path)})()
    text = ll.model_card(adapt, params)
    assert str(tmp_path) not in text
    assert ModelCard(text).data.base_model is None
    adapt._plan.base.config._name_or_path = "user/model"
    assert ModelCard(ll.model_card(adapt, params, form="lora_lite")).data.base_model == "user/model"


def test_card_beside_the_files_of_peft(adapter, tmp_path):
    adapt, params = adapter
    ll.to_peft(adapt, params, tmp_path / "peft", card=ll.model_card(adapt, params))
    names = {path.name for path in (tmp_path / "peft").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    (tmp_path / "peft" / "README.md").write_text("mine")
    with pytest.warns(UserWarning, match="was kept"):
        ll.to_peft(adapt, params, tmp_path / "peft", card="another")
    assert (tmp_path / "peft" / "README.md").read_text() == "mine"


def test_wrong_arguments_are_refused_before_anything_is_written(adapter, tmp_path):
    adapt, params = adapter
    with pytest.raises(TypeError, match="card as text"):
        ll.to_peft(adapt, params, tmp_path / "peft", card=3)
    with pytest.raises(ValueError, match="user/repo"):
        ll.model_card(adapt, params, base="/home/me/model")
    with pytest.raises(ValueError, match="form"):
        ll.model_card(adapt, params, form="gguf")
    with pytest.raises(ValueError, match="model_card"):
        ll.model_card(adapt, {"0": {"A": torch.zeros(1)}})
    assert list(tmp_path.iterdir()) == []


def test_card_of_the_command_line(adapter, tmp_path, capsys):
    adapt, params = adapter
    ll.save(adapt, params, tmp_path / "a.safetensors")
    assert main(["convert", str(tmp_path / "a.safetensors"), str(tmp_path / "peft"), "--card", "user/model"]) == 0
    assert ModelCard.load(tmp_path / "peft" / "README.md").data.base_model == "user/model"
    assert main(["convert", str(tmp_path / "peft"), str(tmp_path / "b.safetensors"), "--card", "user/model"]) == 2
    assert main(["convert", str(tmp_path / "a.safetensors"), str(tmp_path / "no"), "--card", "not a name"]) == 2
    assert not (tmp_path / "no").exists()
