"""Shared by every test: checks on, one thread, no network, a seed per test, and the device to run on."""

import gc
import os

import pytest
import torch

SETTINGS = {"LORA_LITE_TYPECHECK": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
for name, value in SETTINGS.items():
    os.environ.setdefault(name, value)  # here, since lora_lite and transformers read these when a test module imports them

torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="cpu or cuda: where the tests that take the device run")


def pytest_ignore_collect(collection_path, config):
    """Leave out what compares a GPU with a CPU, unless asked for by `--device cuda`."""
    return True if collection_path.name == "test_gpu.py" and config.getoption("--device") == "cpu" else None


def pytest_collection_finish():
    """Leave what stays for the whole run, some million objects of modules and tests, out of the collections to come."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded():
    """Start every test from the same global random state, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def device(request):
    name = request.config.getoption("--device")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.fail("--device cuda: expected a CUDA device, found none. Run with --device cpu.")
    return torch.device(name)


@pytest.fixture
def tiny(device):
    """Return `(model, batch)` of a row of `tiny_models`, on the device, in evaluation mode; keywords override the config."""
    from cases import tiny_models  # not above: it imports lora_lite, after the settings

    def make(name, **overrides):
        model, batch = tiny_models[name](**overrides)
        return model.to(device).eval(), {key: value.to(device) for key, value in batch.items()}

    return make


@pytest.fixture
def symbolic(tmp_path, monkeypatch):
    """Put a package of a few templates where GSM-Symbolic is looked for."""
    from common import gsm_symbolic  # not above, for the same reason
    from hub_files import write_symbolic

    write_symbolic(tmp_path / "package")
    monkeypatch.setattr(gsm_symbolic, "folder_of", (tmp_path / "package").joinpath)
    monkeypatch.setattr(gsm_symbolic, "DRAWS", {"train": 5, "valid": 2, "test": 4})
    kept = gsm_symbolic.generators, gsm_symbolic.problems
    for cached in kept:
        cached.cache_clear()
    yield
    for cached in kept:
        cached.cache_clear()


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    """Return a folder with small models and data sets as the Hub lays them out."""
    from hub_files import write_hub  # not above, for the same reason

    folder = tmp_path_factory.mktemp("hub")
    write_hub(folder)
    return folder
