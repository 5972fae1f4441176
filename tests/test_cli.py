"""The command line: each subcommand, with and without the base model, and what a user sees of an error."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from torch import nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import lora_lite as ll
from lora_lite.cli import main
from lora_lite.files.checkpoint import Checkpoint

CONFIGS = {
    "lora": ll.LoRAConfig(r=4),
    "dora": ll.DoRAConfig(r=2),
    "pissa": ll.PiSSAConfig(r=2),
    "ia3": ll.IA3Config(),
    "vera": ll.VeRAConfig(r=4),
    "lokr": ll.LoKrConfig(r=2),
    "oft": ll.OFTConfig(block_size=8),
    "embedding": ll.LoRAConfig(r=2, target_names=("embed_tokens$", "q_proj$"), exclude_names=()),
}
FREE = ("lora", "lokr", "embedding")
"""Those that convert without the base model."""


def moved(tree):
    generator = torch.Generator().manual_seed(1)
    return ll.tree_map(lambda p: p + 0.1 * torch.randn(p.shape, generator=generator).to(p), tree)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return a model, and a folder with its checkpoint in shards and adapters of it, beside those as objects."""
    folder = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes, tie_word_embeddings=False)).to(torch.bfloat16).eval()
    model.save_pretrained(folder / "base", max_shard_size="12KB")
    assert len(list((folder / "base").glob("*.safetensors"))) > 2
    (folder / "base" / "tokenizer.json").write_text("{}")
    (folder / "base" / "pytorch_model.bin").write_bytes(b"unmerged")
    adapters = {}
    for name, cfg in CONFIGS.items():
        adapt = ll.build(model, cfg)
        params = moved(adapt.init(seed=0))
        ll.save(adapt, params, folder / f"{name}.safetensors")
        adapters[name] = adapt, params
    return model, folder, adapters


def run(capsys, *args):
    """Run a command. Return its exit status, and the lines that it wrote on stdout and on stderr."""
    capsys.readouterr()
    status = main([str(arg) for arg in args])
    out, err = capsys.readouterr()
    return status, out.splitlines(), err.splitlines()


def weights_of(folder):
    return {name: t for path in folder.glob("*.safetensors") for name, t in safetensors.torch.load_file(path).items()}


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in ("embedding",)])
def test_merge_equals_adapt_merge(made, tmp_path, capsys, name):
    model, folder, adapters = made
    adapt, params = adapters[name]
    status, out, err = run(capsys, "merge", folder / "base", folder / f"{name}.safetensors", tmp_path / "out")
    assert status == 0, err
    assert out == [f"{len(adapt.targets)} layers merged into {tmp_path / 'out'}"]
    want = {**model.state_dict(), **adapt.merge(params)}
    found = weights_of(tmp_path / "out")
    assert found.keys() == want.keys()
    for key, tensor in want.items():
        assert found[key].dtype == tensor.dtype
        assert torch.equal(found[key], tensor), key
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {path.name for path in (folder / "base").iterdir()} - {"pytorch_model.bin"}
    assert any("pytorch_model.bin" in line for line in err)  # a slow machine shows the progress bar before
    index = "model.safetensors.index.json"
    assert json.loads((tmp_path / "out" / index).read_text()) == json.loads((folder / "base" / index).read_text())


def test_merged_model_computes_what_the_adapter_does(made, tmp_path, capsys):
    _, folder, adapters = made
    adapt, params = adapters["lora"]
    assert run(capsys, "merge", folder / "base", folder / "lora.safetensors", tmp_path / "out")[0] == 0
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    batch = {"input_ids": torch.arange(10)[None]}
    with torch.no_grad():
        got, want, base = merged(**batch).logits, adapt(params, batch).logits.float(), adapt.base(batch).logits.float()
    assert (got - want).norm() < 0.05 * (want - base).norm()


def test_merge_of_a_folder_of_peft_and_of_stored_transposes(tmp_path, capsys):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2)).eval()
    adapt = ll.build(model, ll.LoRAConfig(r=2))
    params = moved(adapt.init(seed=0))
    ll.to_peft(adapt, params, tmp_path / "adapter")
    model.save_pretrained(tmp_path / "base")
    assert run(capsys, "merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "out")[0] == 0
    merged = GPT2LMHeadModel.from_pretrained(tmp_path / "out").state_dict()
    for key, tensor in {**model.state_dict(), **adapt.merge(params)}.items():
        assert torch.equal(merged[key], tensor), key


def test_merge_of_an_embedding_whose_scale_no_file_holds(tmp_path, capsys):
    sizes = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "head_dim": 8,
        "tie_word_embeddings": False,
    }
    model = Gemma3ForCausalLM(Gemma3TextConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)).eval()
    model.save_pretrained(tmp_path / "base")
    adapt = ll.build(model, [ll.LoRAConfig(r=2), ll.LoRAConfig(r=2, target_names="embed_tokens", exclude_names=("head",))])
    params = moved(adapt.init(seed=0))
    ll.save(adapt, params, tmp_path / "a.safetensors")
    run(capsys, "merge", tmp_path / "base", tmp_path / "a.safetensors", tmp_path / "merged")
    got = safetensors.torch.load_file(tmp_path / "merged" / "model.safetensors")
    for name, want in adapt.merge(params).items():
        torch.testing.assert_close(got[name], want)


def test_merge_into_one_file_of_any_model(tmp_path, capsys):
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 8), nn.Conv1d(8, 4, 3))
    adapt = ll.build(model, [ll.LoRAConfig(r=2, target_names=r"^[01]$"), ll.LoRAConfig(r=1, target_names=r"^2$")])
    params = moved(adapt.init(seed=0))
    ll.save(adapt, params, tmp_path / "adapter.safetensors")  # it says which layer is an embedding: no name does
    safetensors.torch.save_file(model.state_dict(), tmp_path / "base.safetensors")
    status, _, err = run(capsys, "merge", tmp_path / "base.safetensors", tmp_path / "adapter.safetensors", tmp_path / "out.safetensors")
    assert status == 0, err
    found = safetensors.torch.load_file(tmp_path / "out.safetensors")
    want = {**model.state_dict(), **adapt.merge(params)}
    assert all(torch.equal(found[key], want[key]) for key in want)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter.safetensors", "base.safetensors", "out.safetensors"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_merge_keeps_no_more_than_a_layer_in_memory(tmp_path):
    """Merge 96 MB in three shards in a process of its own, and compare its peak with that after the imports."""
    layers = {f"layers.{k}.up.weight": torch.randn(1024, 1024) for k in range(24)}
    names = sorted(layers)
    index = {name: f"model-{k // 8}.safetensors" for k, name in enumerate(names)}
    (tmp_path / "base").mkdir()
    for shard in set(index.values()):
        safetensors.torch.save_file({name: layers[name] for name in names if index[name] == shard}, tmp_path / "base" / shard)
    (tmp_path / "base" / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    model = nn.Module()
    model.layers = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(1024, 1024, bias=False)}) for _ in range(24))
    adapt = ll.build(model, ll.LoRAConfig(r=2))
    ll.save(adapt, moved(adapt.init(seed=0)), tmp_path / "adapter.safetensors")
    assert peak_of_merge(tmp_path) < 80e6  # the model is 100 MB; half of this is what is imported late


def peak_of_merge(folder):
    """Merge `base` and `adapter.safetensors` in a process of its own. Return the bytes of its peak above that after the imports."""
    code = (
        "import sys, torch, lora_lite.cli\n"
        "torch.ones(4, 4) @ torch.ones(4, 4)\n"
        "peak = lambda: int(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])\n"
        "before = peak(); assert lora_lite.cli.main(sys.argv[1:]) == 0; print(peak() - before)"
    )
    args = ["merge", "-q", *(str(folder / name) for name in ("base", "adapter.safetensors", "out"))]
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1]) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize("cfg", [ll.LoRAConfig(r=2, exclude_names=()), ll.OFTConfig(block_size=4, exclude_names=())], ids=["lora", "oft"])
def test_merge_of_one_large_matrix_takes_less_than_its_shard_and_100_mb(tmp_path, cfg):
    """The shards are a head and an embedding of 67 MB each, which in float32 would take twice as much, for each copy of them."""
    size = {"num_embeddings": 32768, "embedding_dim": 1024}
    model = nn.ModuleDict({"embed_tokens": nn.Embedding(**size), "lm_head": nn.Linear(1024, 32768, bias=False)}).to(torch.bfloat16)
    (tmp_path / "base").mkdir()
    for name, tensor in model.state_dict().items():
        safetensors.torch.save_file({name: tensor}, tmp_path / "base" / f"{name}.safetensors")
    cfg = dataclasses.replace(cfg, target_names=(r"lm_head$", *([r"embed_tokens$"] if cfg.name == "lora" else [])))
    adapt = ll.build(model, cfg)
    params = moved(adapt.init(seed=0))
    ll.save(adapt, params, tmp_path / "adapter.safetensors")
    assert peak_of_merge(tmp_path) < 67e6 + 100e6
    found, want = weights_of(tmp_path / "out"), adapt.merge(params)
    assert len(want) == len(adapt.targets)
    for key, tensor in want.items():
        assert torch.equal(found[key], tensor), key
        assert not torch.equal(tensor, model.state_dict()[key])


def test_a_mapped_checkpoint_is_read_where_it_is_touched(made):
    _, folder, _ = made
    checkpoint = Checkpoint(folder / "base")
    assert checkpoint.lacking == []
    weight = checkpoint.model.get_parameter("model.layers.0.mlp.up_proj.weight")
    before = weight.clone()
    checkpoint.mapped.release()
    assert torch.equal(weight, before)


@pytest.mark.parametrize("name", CONFIGS)
def test_info_shows_each_layer(made, capsys, name):
    _, folder, adapters = made
    adapt, _ = adapters[name]
    status, out, _ = run(capsys, "info", folder / f"{name}.safetensors")
    assert status == 0
    text = "\n".join(out)
    for target, cfg in zip(adapt.targets, adapt.configs):
        assert f"{target.path} " in text
        assert f"{cfg.name}(" in text
        assert f"({target.o}, {target.i})" in text
    assert f"{adapt.num_params:,}" in text


@pytest.mark.parametrize("name", CONFIGS)
def test_numbers_of_info_are_those_of_the_updates(made, capsys, name):
    _, folder, adapters = made
    adapt, params = adapters[name]
    status, out, _ = run(capsys, "info", folder / f"{name}.safetensors", "--json", "--base", folder / "base")
    assert status == 0
    layers = {row["path"]: row for row in json.loads("\n".join(out))["layers"]}
    merged = adapt.merge(params, torch.float64) if name != "embedding" else {}
    for target in adapt.targets:
        key = f"{target.path}.weight"
        if key in merged:
            delta = merged[key] - adapt._plan.base.get_parameter(key).double()
            values = torch.linalg.svdvals(delta)
            shares = values / values.sum()
            assert layers[target.path]["norm"] == pytest.approx(float(delta.norm()), rel=1e-5)
            assert layers[target.path]["rank"] == pytest.approx(float(torch.special.entr(shares).sum().exp()), rel=1e-3)
    if name in FREE:
        without = run(capsys, "info", folder / f"{name}.safetensors", "--json")[1]
        for row in json.loads("\n".join(without))["layers"]:
            assert row["norm"] == pytest.approx(layers[row["path"]]["norm"], rel=1e-6)
            assert row["rank"] == pytest.approx(layers[row["path"]]["rank"], rel=1e-6)


@pytest.mark.parametrize("name", ["lora", "dora", "ia3", "vera"])
def test_info_of_a_folder_of_peft(made, tmp_path, capsys, name):
    _, _, adapters = made
    ll.to_peft(*adapters[name], tmp_path / "peft")
    found = []
    for place in (tmp_path / "peft", tmp_path / "peft" / "adapter_config.json", tmp_path / "peft" / "adapter_model.safetensors"):
        status, out, _ = run(capsys, "info", place)
        assert status == 0
        assert "layers.1.mlp.down_proj" in "\n".join(out)
        found.append(out)
    assert found[0] == found[1] == found[2]  # the scale too, which is in the config alone


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "pissa"])  # which PEFT holds as LoRA
def test_convert_there_and_back(made, tmp_path, capsys, name):
    model, folder, adapters = made
    base = () if name in FREE else ("--base", folder / "base")
    status, _, err = run(capsys, "convert", folder / f"{name}.safetensors", tmp_path / "peft", *base)
    assert status == 0, err
    there, params = ll.from_peft(model, tmp_path / "peft")
    status, _, err = run(capsys, "convert", tmp_path / "peft", tmp_path / "back.safetensors", *base)
    assert status == 0, err
    adapt, again = ll.load(model, tmp_path / "back.safetensors")
    batch = {"input_ids": torch.arange(10)[None]}
    own, own_params = adapters[name]
    with torch.no_grad():
        base, want = own.base(batch).logits, own(own_params, batch).logits
        assert not torch.equal(want, base)
        assert torch.equal(there(params, batch).logits, want)
        assert torch.equal(adapt(again, batch).logits, want)


def test_convert_to_lora(made, tmp_path, capsys):
    model, folder, adapters = made
    args = ("convert", folder / "dora.safetensors", tmp_path / "lora", "--r", 4, "--alpha", 8)
    status, _, err = run(capsys, *args)
    assert (status, len(err)) == (2, 1)
    assert "--base" in err[0]
    assert run(capsys, *args, "--base", folder / "base")[0] == 0
    adapt, params = ll.from_peft(model, tmp_path / "lora")
    want, wanted, _ = ll.to_lora(*adapters["dora"], r=4, alpha=8)
    assert all(cfg == ll.LoRAConfig(r=4, alpha=8, target_names=cfg.target_names, exclude_names=()) for cfg in adapt.configs)
    assert all(torch.allclose(params[path][name], wanted[path][name]) for path in want.shapes for name in "AB")


def test_combine_is_ll_combine(made, tmp_path, capsys):
    model, folder, adapters = made
    ll.to_peft(*adapters["lora"], tmp_path / "peft")
    files = (tmp_path / "peft", folder / "lokr.safetensors")
    status, _, err = run(capsys, "combine", *files, tmp_path / "both.safetensors", "--weights", 0.5, -2)
    assert status == 0, err
    adapt, params = ll.load(model, tmp_path / "both.safetensors")
    (lora, a), (lokr, b) = adapters["lora"], adapters["lokr"]
    want, wanted, _ = ll.combine([lora, lokr], [a, b], [0.5, -2.0])
    found, merged = adapt.merge(params, torch.float64), want.merge(wanted, torch.float64)
    assert all(torch.allclose(found[key], merged[key], atol=1e-6) for key in merged)
    options = ("--method", "ties", "--density", 0.5, "--r", 3, "--base", folder / "base", "--to", "peft")
    assert run(capsys, "combine", *files, folder / "dora.safetensors", tmp_path / "ties", *options)[0] == 0
    assert {cfg.r for cfg in ll.from_peft(model, tmp_path / "ties")[0].configs} == {3}


@pytest.mark.parametrize("weight", ["-5e-1", "-.5", "-5.E-01"])
def test_weights_below_zero_in_any_notation(made, tmp_path, capsys, weight):
    """argparse took -5e-1 for an option."""
    model, folder, adapters = made
    status, _, err = run(capsys, "combine", *[folder / "lora.safetensors"] * 2, tmp_path / "both.safetensors", "--weights", 1, weight)
    assert status == 0, err
    adapt, params = ll.load(model, tmp_path / "both.safetensors")
    lora, a = adapters["lora"]
    want, wanted, _ = ll.combine(lora, [a, a], [1, -0.5])
    found, merged = adapt.merge(params, torch.float64), want.merge(wanted, torch.float64)
    assert all(torch.allclose(found[key], merged[key], atol=1e-6) for key in merged)


@pytest.mark.parametrize("name", ["x.png", "x.PNG"])
def test_plot_draws_an_image(made, tmp_path, capsys, name):
    _, folder, _ = made
    assert run(capsys, "plot", folder / "lora.safetensors", tmp_path / name)[0] == 0
    assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"


def test_plot_without_matplotlib_says_so(made, tmp_path, capsys, monkeypatch):
    _, folder, _ = made
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    status, _, err = run(capsys, "plot", folder / "lora.safetensors", tmp_path / "x.png")
    assert (status, len(err)) == (2, 1)
    assert "pip install matplotlib" in err[0]


WRONG = {
    "no command": ([], "required"),
    "no such command": (["mrege"], "merge"),
    "no such adapter": (["info", "missing.safetensors"], "missing.safetensors"),
    "a foreign file": (["info", "shard.safetensors"], "ll.save"),
    "a truncated file": (["info", "short.safetensors"], "short.safetensors"),
    "a text file": (["info", "base/config.json"], "config.json"),
    "a folder of PEFT's whose large file git has not fetched": (["info", "pointer"], "git lfs pull"),
    "a folder without an adapter": (["info", "base"], "adapter_config.json"),
    "no such base": (["merge", "nowhere", "lora.safetensors", "out"], "nowhere"),
    "a base without weights": (["merge", "empty", "lora.safetensors", "out"], "safetensors"),
    "a base of other sizes": (["merge", "other", "lora.safetensors", "out"], "expected a layer of shape"),
    "a lost shard": (["merge", "lost", "lora.safetensors", "out"], "Fetch them"),
    "something at OUT": (["merge", "base", "lora.safetensors", "base"], "Name another place"),
    "no parent of OUT": (["merge", "base", "lora.safetensors", "no/where/out"], "Create it first"),
    "a variant that cannot be merged": (["merge", "base", "reft.safetensors", "out"], "not linear"),
    "no base where it is needed": (["combine", "lora.safetensors", "ia3.safetensors", "out"], "--base MODEL"),
    "too few weights": (["combine", "lora.safetensors", "lokr.safetensors", "out", "--weights", "1"], "--weights"),
    "a density out of range": (["combine", "lora.safetensors", "lora.safetensors", "out", "--method", "ties", "--density", "2"], "density"),
    "alpha without r": (["convert", "lora.safetensors", "out", "--alpha", "2"], "--r"),
    "rank of zero": (["convert", "lora.safetensors", "out", "--r", "0"], "LoRAConfig.r"),
    "a file for a folder": (["convert", "lora.safetensors", "out.safetensors", "--to", "peft"], "Name a folder"),
    "no image": (["plot", "lora.safetensors", "out"], ".png"),
}


@pytest.fixture(scope="module")
def broken(made, tmp_path_factory):
    """Return a folder with good files and with broken ones. No test changes it."""
    model, folder, _ = made
    place = tmp_path_factory.mktemp("broken")
    for path in folder.iterdir():
        os.symlink(path, place / path.name)
    (place / "empty").mkdir()
    (place / "pointer").mkdir()
    (place / "pointer/adapter_config.json").write_text('{"peft_type": "LORA"}')
    (place / "pointer/adapter_model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    (place / "short.safetensors").write_bytes((folder / "lora.safetensors").read_bytes()[:-5])
    sizes = {"hidden_size": 16, "head_dim": 4}
    LlamaForCausalLM(LlamaConfig(**{**model.config.to_dict(), **sizes})).save_pretrained(place / "other")
    (place / "lost").mkdir()
    for path in sorted((folder / "base").iterdir()):
        os.symlink(path, place / "lost" / path.name)
    next((place / "lost").glob("*.safetensors")).unlink()
    os.symlink(next((folder / "base").glob("*.safetensors")), place / "shard.safetensors")
    reft = ll.build(model, ll.LoReFTConfig(r=2))
    ll.save(reft, reft.init(), place / "reft.safetensors")
    return place


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_gets_one_line_and_leaves_nothing(broken, capsys, monkeypatch, case):
    monkeypatch.chdir(broken)
    before = sorted(str(path) for path in broken.rglob("*"))
    args, expected = WRONG[case]
    status, out, err = run(capsys, *args)
    assert (status, out, len(err)) == (2, [], 1), err
    assert err[0].startswith("lora-lite")
    assert expected in err[0]
    assert sorted(str(path) for path in broken.rglob("*")) == before


def test_a_merge_that_stops_half_way_leaves_nothing(made, tmp_path, capsys, monkeypatch):
    _, folder, _ = made
    from lora_lite.files import merge_checkpoint

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(merge_checkpoint, "merged_parts", stopped)
    status, _, err = run(capsys, "merge", folder / "base", folder / "lora.safetensors", tmp_path / "out")
    assert (status, err) == (130, ["lora-lite merge: stopped. Nothing was written."])
    assert list(tmp_path.iterdir()) == []


FULL = {
    "merge": ("merge", "base", "lora.safetensors", "OUT"),
    "to PEFT": ("convert", "lora.safetensors", "OUT"),
    "to kohya": ("convert", "lora.safetensors", "OUT.safetensors", "--to", "kohya", "--base", "base"),
    "combine": ("combine", "lora.safetensors", "lokr.safetensors", "OUT.safetensors", "--r", "8"),
}


@pytest.mark.parametrize("case", FULL)
def test_a_disk_that_takes_no_more_gets_one_line_and_leaves_nothing(made, tmp_path, capsys, monkeypatch, case):
    resource = pytest.importorskip("resource")
    _, folder, _ = made
    monkeypatch.chdir(folder)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # as a full disk: the write fails half way
    try:
        status, out, err = run(capsys, *(part.replace("OUT", str(tmp_path / "out")) for part in FULL[case]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (status, out, len(err)) == (2, [], 1), err
    assert "File too large" in err[0]
    assert "free space" in err[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["info", "merge", "convert", "combine", "plot"])
def test_help_of_each_command(capsys, command):
    status, out, _ = run(capsys, command, "--help")
    assert status == 0
    text = "\n".join(out)
    assert "usage: lora-lite" in text
    assert "example" in text
    assert "None" not in text


def test_module_runs_as_a_program(made, tmp_path):
    _, folder, _ = made
    command = [sys.executable, "-m", "lora_lite", "info"]
    done = subprocess.run([*command, str(folder / "lora.safetensors")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "layers.1.mlp.down_proj" in done.stdout
    wrong = subprocess.run([*command, str(tmp_path / "none")], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert len(wrong.stderr.splitlines()) == 1


@pytest.mark.parametrize("buffered", [False, True])
def test_reader_that_has_seen_enough_is_no_error(made, buffered):
    """As behind `head`. It was an error, or Python's complaint at its exit."""
    _, folder, _ = made
    end, start = os.pipe()
    os.close(end)
    command = [sys.executable, *([] if buffered else ["-u"]), "-m", "lora_lite", "info", str(folder / "lora.safetensors")]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(command, stdout=start, stderr=subprocess.PIPE, text=True, check=False, env=environment)
    os.close(start)
    assert (done.returncode, done.stderr) == (141, "")
