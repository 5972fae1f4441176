"""Adapters by their name on the Hub, read offline from a cache in the Hub's own layout."""

import os
import shutil
import sys

import huggingface_hub.constants
import peft
import pytest
import torch
from torch import nn

import lora_lite as ll
from cases import assert_trees_equal

FIRST, SECOND = "1" * 40, "2" * 40


def _model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 8)).eval()


def _save(folder, r):
    theirs = peft.get_peft_model(_model(), peft.LoraConfig(r=r, target_modules=["0", "2"]))
    torch.nn.init.normal_(theirs.base_model.model[0].lora_B["default"].weight)
    theirs.save_pretrained(folder)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Return a cache with two commits of `user/repo`: files are links to blobs by their names there, as the Hub's client lays them."""
    cache = tmp_path / "cache"
    repo = cache / "models--user--repo"
    for commit, r in ((FIRST, 2), (SECOND, 3)):
        for place, rank in ((repo / "snapshots" / commit, r), (repo / "snapshots" / commit / "inner", r + 4)):
            _save(tmp_path / "saved", rank)
            place.mkdir(parents=True)
            for name in ("adapter_config.json", "adapter_model.safetensors"):
                blob = repo / "blobs" / f"{commit[:4]}-{rank}-{name}"
                blob.parent.mkdir(exist_ok=True)
                shutil.copy(tmp_path / "saved" / name, blob)
                (place / name).symlink_to(os.path.relpath(blob, place))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(SECOND)
    (repo / "refs" / "v1").write_text(FIRST)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    return cache


@pytest.mark.parametrize(
    ("options", "r"),
    [
        ({}, 3),
        ({"revision": "v1"}, 2),
        ({"revision": FIRST}, 2),
        ({"subfolder": "inner"}, 7),
        ({"revision": "v1", "subfolder": "inner"}, 6),
    ],
)
def test_a_name_on_the_hub_is_read_at_a_revision_and_in_a_subfolder(cache, options, r):
    adapt, params = ll.from_peft(_model(), "user/repo", **options)
    assert {cfg.r for cfg in adapt.configs} == {r}
    commit = FIRST if "revision" in options else SECOND
    folder = cache / "models--user--repo" / "snapshots" / commit / options.get("subfolder", "")
    assert_trees_equal(params, ll.from_peft(_model(), folder)[1])


@pytest.mark.usefixtures("cache")
def test_a_folder_of_that_name_comes_first_and_may_have_subfolders_too(tmp_path):
    _save(tmp_path / "user" / "repo" / "inner", 5)
    adapt, _ = ll.from_peft(_model(), "user/repo", subfolder="inner")
    assert {cfg.r for cfg in adapt.configs} == {5}
    with pytest.raises(FileNotFoundError, match=r"expected a file at \"user/repo/adapter_config\.json\", found none"):
        ll.from_peft(_model(), "user/repo")
    with pytest.raises(
        ValueError, match=r'expected revision with the name of a repository on the Hub.*found revision="v1" with "user/repo"'
    ):
        ll.from_peft(_model(), "user/repo", revision="v1")


@pytest.mark.parametrize(("name", "options"), [("user/other", {}), ("user/repo", {"revision": "v9"})])
@pytest.mark.usefixtures("cache")
def test_what_neither_a_folder_nor_the_cache_has_is_named(name, options):
    at = r' at revision "v9"' if options else ""
    with pytest.raises(
        FileNotFoundError, match=f'expected a folder at "{name}", or a repository of that name on the Hub{at}, found neither'
    ):
        ll.from_peft(_model(), name, **options)


def test_files_that_a_repository_lacks_are_named(cache):
    snapshot = cache / "models--user--repo" / "snapshots" / SECOND
    (snapshot / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors.*pickled files are never opened"):
        ll.from_peft(_model(), "user/repo")
    (snapshot / "adapter_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected a file at .*adapter_config\.json"):
        ll.from_peft(_model(), "user/repo")


@pytest.mark.usefixtures("cache")
def test_the_package_is_asked_for_where_it_is_needed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModuleNotFoundError, match=r'expected a folder at "user/repo", found none.*pip install huggingface_hub'):
        ll.from_peft(_model(), "user/repo")
    _save(tmp_path / "own", 2)
    assert len(ll.from_peft(_model(), tmp_path / "own")[0].targets) == 2


@pytest.mark.parametrize("place", ["./user/repo", "a/b/c", "alone", "/user/repo"])
@pytest.mark.usefixtures("cache")
def test_paths_are_no_names_of_repositories(place):
    with pytest.raises(FileNotFoundError, match=r"expected a file at .*adapter_config\.json"):
        ll.from_peft(_model(), place)
