"""Save and load: every bit comes back, nothing is recomputed, unpickled or half-written."""

import dataclasses
import json
import os
import pickle
import signal
import stat
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn

import lora_lite as ll

BOTH = [ll.IA3Config(target_names=r"(up|skip)$"), ll.IA3FFConfig(target_names=r"down$")]
CONFIGS = {
    "lora": ll.LoRAConfig(r=4, alpha=3.0, rslora=True, dropout=0.1, layers=(0, 1), target_names=("up$", "down$")),
    "dora": ll.DoRAConfig(r=4, target_roles="reader"),
    "pissa": ll.PiSSAConfig(r=4, exclude_names=("skip",)),
    "ia3": ll.IA3Config(),
    "ia3_ff": ll.IA3FFConfig(),
    "ia3 and ia3_ff": BOTH,
}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.skip = nn.Linear(12, 20), nn.Linear(20, 12, bias=False), nn.Linear(12, 12)

    def forward(self, x):
        return self.skip(x) + self.down(self.up(x).tanh())


def fresh_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(Block(), Block()).eval()


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def moved(tree, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        path: {name: leaf + 0.1 * torch.randn(leaf.shape, generator=generator).to(leaf.dtype) for name, leaf in leaves.items()}
        for path, leaves in tree.items()
    }


def assert_same(got, want):
    """Equal to the bit: keys, dtypes, values."""
    assert {path: list(leaves) for path, leaves in got.items()} == {path: list(leaves) for path, leaves in want.items()}
    for path, leaves in want.items():
        for name, leaf in leaves.items():
            assert got[path][name].dtype == leaf.dtype, f"{path}.{name}"
            assert torch.equal(got[path][name], leaf), f"{path}.{name}"


@pytest.fixture
def saved(tmp_path):
    """Return `(adapt, params, path)` of a LoRA that is saved there."""
    adapt = ll.build(fresh_model(), ll.LoRAConfig(r=4))
    params = moved(adapt.init())
    ll.save(adapt, params, tmp_path / "a.safetensors")
    return adapt, params, tmp_path / "a.safetensors"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("config", CONFIGS)
def test_what_is_saved_comes_back_to_the_bit_onto_a_fresh_copy(tmp_path, config, dtype):
    cfgs = CONFIGS[config] if isinstance(CONFIGS[config], list) else [CONFIGS[config]]
    adapt = ll.build(fresh_model(), [dataclasses.replace(cfg, dtype=dtype) for cfg in cfgs])
    params, x = moved(adapt.init()), draw(3, 12)
    ll.save(adapt, params, tmp_path / "a.safetensors")
    again, read = ll.load(fresh_model(), tmp_path / "a.safetensors")
    assert_same(read, params)
    assert_same(again.constants, adapt.constants)
    assert again.configs == adapt.configs
    assert again.targets == adapt.targets
    assert_same(again.init(seed=3), adapt.init(seed=3))
    assert torch.equal(again(read, x), adapt(params, x))
    assert not torch.equal(again(read, x), again.base(x))
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_params_keep_a_dtype_other_than_the_configs(tmp_path):
    adapt = ll.build(fresh_model(), ll.PiSSAConfig(r=4))
    params = {path: {name: t.bfloat16() for name, t in leaves.items()} for path, leaves in moved(adapt.init()).items()}
    ll.save(adapt, params, tmp_path / "a.safetensors")
    again, read = ll.load(fresh_model(), tmp_path / "a.safetensors")
    assert_same(read, params)
    assert {c.dtype for constants in again.constants.values() for c in constants.values()} == {torch.float32}


def test_a_bfloat16_model_keeps_its_constants(tmp_path):
    adapt = ll.build(fresh_model().bfloat16(), ll.DoRAConfig(r=4))
    params, x = moved(adapt.init()), draw(3, 12).bfloat16()
    ll.save(adapt, params, tmp_path / "a.safetensors")
    again, read = ll.load(fresh_model().bfloat16(), tmp_path / "a.safetensors")
    assert_same(again.constants, adapt.constants)
    assert torch.equal(again(read, x), adapt(params, x))


def test_a_model_that_is_itself_the_layer_comes_back(tmp_path):
    torch.manual_seed(0)
    layer, x = nn.Linear(12, 12), draw(3, 12)
    adapt = ll.build(layer, ll.PiSSAConfig(r=4))
    params = moved(adapt.init())
    ll.save(adapt, params, tmp_path / "a.safetensors")
    again, read = ll.load(layer, tmp_path / "a.safetensors")
    assert_same(read, params)
    assert torch.equal(again(read, x), adapt(params, x))


@pytest.mark.parametrize("read", [ll.load, ll.from_peft, ll.from_kohya, ll.from_diffusers])
def test_a_compiled_model_is_named_as_such_rather_than_its_layers_as_absent(read, saved):
    with pytest.raises(ValueError, match=r'found one set on the instance at "the model".*compiled\._orig_mod'):
        read(torch.compile(fresh_model(), backend="eager"), saved[2])


def test_loading_leaves_the_model_as_it_was(saved):
    model = fresh_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapt, params = ll.load(model, saved[2])
    adapt(params, draw(3, 12))
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(type(m) in (nn.Sequential, Block, nn.Linear) and p.requires_grad for m in model.modules() for p in m.parameters())


def test_loading_and_initialising_again_runs_no_decomposition(tmp_path, monkeypatch):
    adapt = ll.build(fresh_model(), ll.PiSSAConfig(r=4))
    params = moved(adapt.init())
    ll.save(adapt, params, tmp_path / "a.safetensors")

    def refuse(*_, **__):
        raise AssertionError("a decomposition ran")

    for where, names in {torch.linalg: ("svd", "svdvals", "eigh", "qr"), torch: ("svd", "svd_lowrank", "pca_lowrank")}.items():
        for name in names:
            monkeypatch.setattr(where, name, refuse)
    with pytest.raises(AssertionError, match="decomposition"):  # the watch works
        ll.build(fresh_model(), ll.PiSSAConfig(r=4))
    again, read = ll.load(fresh_model(), tmp_path / "a.safetensors")
    assert torch.equal(again(read, draw(3, 12)), adapt(params, draw(3, 12)))
    assert_same(again.init(1), adapt.init(1))


def test_the_file_can_be_read_without_the_library(tmp_path):
    adapt = ll.build(fresh_model(), BOTH)
    ll.save(adapt, adapt.init(), tmp_path / "a.safetensors")
    with safetensors.safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        metadata, names = file.metadata(), set(file.keys())
    assert metadata["lora_lite_format"] == "1"
    configs = json.loads(metadata["configs"])
    assert [c["name"] for c in configs] == ["ia3", "ia3_ff"]
    assert (configs[0]["target_names"], configs[0]["dtype"], configs[0]["layers"]) == (["(up|skip)$"], "float32", None)
    targets = json.loads(metadata["targets"])
    assert list(targets) == [target.path for target in adapt.targets]
    assert {key: targets["1.down"][key] for key in ("config", "i", "o", "role")} == {"config": 1, "i": 20, "o": 12, "role": "writer"}
    assert names == {f"{path}.g" for path in targets}


def test_params_are_named_by_path_and_constants_stand_apart(tmp_path):
    adapt = ll.build(fresh_model(), ll.PiSSAConfig(r=4, target_names=r"1\.up$"))
    ll.save(adapt, adapt.init(), tmp_path / "a.safetensors")
    tensors = safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert set(tensors) == {"1.up.dA", "1.up.dB", "constant/1.up.A0", "constant/1.up.B0"}
    assert torch.equal(tensors["constant/1.up.A0"], adapt.constants["1.up"]["A0"])


@dataclass
class Payload:
    """Unpickled, it writes a file."""

    mark: Path

    def __reduce__(self):
        return Path.write_text, (self.mark, "unpickled")


def test_the_same_params_are_the_same_bytes(tmp_path):
    """safetensors writes metadata in the order of a hash table, another in each call."""
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8))
    model.add_module('a "name"\n of älter', nn.Linear(8, 8))
    configs = [ll.PiSSAConfig(r=2, target_names="^0$"), ll.FullConfig(target_names="^1$"), ll.VeRAConfig(r=2, target_names="^2$")]
    adapt = ll.build(model, [*configs, ll.LoRAConfig(r=2, target_names="name")])
    params, found = adapt.init(seed=0), set()
    turned = {path: dict(reversed(leaves.items())) for path, leaves in reversed(params.items())}
    for k, tree in enumerate([params] * 5 + [turned]):
        ll.save(adapt, tree, tmp_path / f"{k}.safetensors")
        found.add((tmp_path / f"{k}.safetensors").read_bytes())
    adapt, params = ll.load(model, tmp_path / "0.safetensors")
    ll.save(adapt, params, tmp_path / "again.safetensors")
    assert found == {(tmp_path / "again.safetensors").read_bytes()}


def test_nothing_is_ever_unpickled(saved, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("something was unpickled")

    for zipped in (True, False):
        torch.save(Payload(tmp_path / "mark"), tmp_path / "b.safetensors", _use_new_zipfile_serialization=zipped)
        with pytest.raises(ValueError, match=r"(?s)expected .* a whole safetensors file, found a pickled file.*never opened"):
            ll.load(fresh_model(), tmp_path / "b.safetensors")
    assert not (tmp_path / "mark").exists()
    for where, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(where, name, refuse)
    assert_same(ll.load(fresh_model(), saved[2])[1], saved[1])


def half_of(tensors, path, metadata):
    """Write as `save_file` does, and stop in the middle."""
    whole = safetensors.torch.save(tensors, metadata)
    Path(path).write_bytes(whole[: len(whole) // 2])


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt(), MemoryError()], ids=lambda e: type(e).__name__
)
def test_an_interrupted_save_leaves_the_old_file_and_nothing_else(saved, monkeypatch, error):
    adapt, params, path = saved
    before = path.read_bytes()

    def interrupted(tensors, place, metadata=None):
        half_of(tensors, place, metadata)
        raise error

    monkeypatch.setattr(safetensors.torch, "save_file", interrupted)
    with pytest.raises(type(error)):
        ll.save(adapt, moved(params, 1), path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_a_rename_that_fails_leaves_the_old_file_and_nothing_else(saved, monkeypatch):
    adapt, params, path = saved
    before = path.read_bytes()

    def refused(*_):
        raise PermissionError("rename")

    monkeypatch.setattr(os, "replace", refused)
    with pytest.raises(PermissionError, match="rename"):
        ll.save(adapt, moved(params, 1), path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.skipif(os.name != "posix", reason="permissions are those of POSIX")
@pytest.mark.parametrize("mask", [0o022, 0o007, 0o077], ids=oct)
def test_files_have_the_permissions_that_open_would_leave(saved, mask):
    adapt, params, path = saved

    def modes():
        ll.save(adapt, params, path)
        ll.to_peft(adapt, params, path.parent / "peft")
        ll.save(adapt, params, path.parent / f"new-{mask}.safetensors")
        places = [path.parent / "peft", *(path.parent / "peft").iterdir(), path.parent / f"new-{mask}.safetensors", path]
        return [stat.S_IMODE(place.stat().st_mode) for place in places]

    path.chmod(0o640)
    before = os.umask(mask)
    try:
        assert modes() == [0o777 & ~mask, 0o666 & ~mask, 0o666 & ~mask, 0o666 & ~mask, 0o640]
        for place in (path.parent / "peft").iterdir():
            place.chmod(0o604)
        assert modes()[1:3] == [0o604, 0o604]
    finally:
        os.umask(before)


def test_a_process_killed_in_the_middle_of_writing_leaves_the_old_file(saved):
    adapt, params, path = saved
    before = path.read_bytes()
    code = """
        import os, signal, sys
        import safetensors.torch, torch
        import lora_lite as ll
        from test_io import fresh_model, half_of, moved

        def killed(tensors, path, metadata=None):
            half_of(tensors, path, metadata)
            os.kill(os.getpid(), signal.SIGKILL)

        safetensors.torch.save_file = killed
        adapt, params = ll.load(fresh_model(), sys.argv[1])
        ll.save(adapt, moved(params, 1), sys.argv[1])
    """
    here = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(path)], env=here, capture_output=True, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert len(os.listdir(path.parent)) == 2  # what it had written lies beside: it did get to the middle
    assert path.read_bytes() == before
    assert_same(ll.load(fresh_model(), path)[1], params)
    ll.save(adapt, moved(params, 1), path)
    assert_same(ll.load(fresh_model(), path)[1], moved(params, 1))


def test_saving_again_replaces_the_file(saved):
    adapt, params, path = saved
    ll.save(adapt, moved(params, 1), path)
    assert_same(ll.load(fresh_model(), path)[1], moved(params, 1))


def test_a_missing_directory_is_named_and_not_made(saved, tmp_path):
    adapt, params, _ = saved
    with pytest.raises(FileNotFoundError, match=r"save: expected the directory of .*none.*to exist, found none\. Create it first\."):
        ll.save(adapt, params, tmp_path / "none" / "a.safetensors")
    assert os.listdir(tmp_path) == ["a.safetensors"]


class Named:
    """A path that is neither a string nor a `Path`."""

    def __init__(self, path):
        self.path = path

    def __fspath__(self):
        return self.path


@pytest.mark.parametrize("kind", [str, Path, Named, os.path.basename], ids=["str", "Path", "PathLike", "relative"])
def test_any_kind_of_path_will_do(saved, tmp_path, monkeypatch, kind):
    adapt, params, _ = saved
    monkeypatch.chdir(tmp_path)
    path = kind(str(tmp_path / "b.safetensors"))
    ll.save(adapt, params, path)
    assert_same(ll.load(fresh_model(), path)[1], params)
    assert sorted(os.listdir(tmp_path)) == ["a.safetensors", "b.safetensors"]


def test_views_and_shared_leaves_come_back_as_tensors_of_their_own(tmp_path):
    adapt = ll.build(fresh_model(), ll.LoRAConfig(r=4, target_names="skip$"))
    bank = draw(1000, 12)
    one = {"A": bank[10:14], "B": bank[20:24].t()}  # a slice of a large storage, a transposed view
    params = {"0.skip": one, "1.skip": {"A": one["A"].requires_grad_(False), "B": bank[0, :4].expand(12, 4)}}
    ll.save(adapt, params, tmp_path / "a.safetensors")
    _, read = ll.load(fresh_model(), tmp_path / "a.safetensors")
    assert_same(read, params)
    leaves = [leaf for layer in read.values() for leaf in layer.values()]
    assert len({leaf.untyped_storage().data_ptr() for leaf in leaves}) == 4
    assert all(leaf.is_contiguous() and leaf.untyped_storage().nbytes() == leaf.nbytes for leaf in leaves)
    assert (tmp_path / "a.safetensors").stat().st_size < bank.nbytes


def test_leaves_in_training_are_saved_as_their_values(saved):
    adapt, params, path = saved
    training = {p: {name: nn.Parameter(leaf) for name, leaf in leaves.items()} for p, leaves in params.items()}
    ll.save(adapt, training, path)
    read = ll.load(fresh_model(), path)[1]
    assert_same(read, params)
    assert not any(leaf.requires_grad for leaves in read.values() for leaf in leaves.values())


def test_what_is_loaded_does_not_lean_on_the_file(saved):
    _, params, path = saved
    _, read = ll.load(fresh_model(), path)
    path.write_bytes(b"\0" * path.stat().st_size)
    assert_same(read, params)


def test_a_loaded_adapt_recomputes_as_a_built_one(saved):
    _, params, path = saved
    plain, _ = ll.load(fresh_model(), path)
    remat, _ = ll.load(fresh_model(), path, remat=r"^\d$")
    grads = [ll.value_and_grad(lambda p, a=a: a(p, draw(3, 12)).square().sum())(params)[1] for a in (plain, remat)]
    assert_same(*grads)


@dataclass(frozen=True, kw_only=True)
class GainConfig(ll.AdapterConfig):
    """A variant from outside: a gate with a power and a frozen offset."""

    name: ClassVar[str] = "gain"
    power: float = 2.0
    steps: tuple[int, ...] = (1, 2)

    def init(self, W, generator, stats=None):
        offset = W.constants.get("offset", torch.rand(W.out_features, generator=generator))
        return {"g": torch.zeros(W.out_features)}, {"offset": offset}

    def forward(self, params, W, x):
        return W(x) * (1 + params["g"]) ** self.power + params["g"] * W.constants["offset"]


class PlainConfig:
    """A variant from outside that owes the package nothing."""

    name = "plain"

    def __init__(self, power=2.0):
        self.power = power

    def init(self, W, generator, stats=None):
        return {"g": torch.zeros(W.out_features)}, {}

    def forward(self, params, W, x):
        return W(x) * (1 + params["g"]) ** self.power


@pytest.mark.parametrize("variants", [lambda c: [c], lambda c: (c,), lambda c: {c.name: c}], ids=["list", "tuple", "mapping"])
@pytest.mark.parametrize("cfg", [GainConfig(power=3.0, steps=(4,)), PlainConfig(power=3.0)], ids=["dataclass", "plain"])
def test_a_variant_from_outside_comes_back(tmp_path, cfg, variants):
    adapt = ll.build(fresh_model(), cfg)
    params, x = moved(adapt.init()), draw(3, 12)
    ll.save(adapt, params, tmp_path / "a.safetensors")
    again, read = ll.load(fresh_model(), tmp_path / "a.safetensors", variants=variants(type(cfg)))
    assert_same(read, params)
    assert vars(again.configs[0]) == vars(adapt.configs[0])
    assert torch.equal(again(read, x), adapt(params, x))


def test_a_field_that_a_file_cannot_hold_is_named_and_nothing_is_written(tmp_path):
    adapt = ll.build(fresh_model(), PlainConfig(power=torch.relu))
    with pytest.raises(TypeError, match=r"PlainConfig\.power: expected a value that a file can hold, found <built-in.*Keep the name"):
        ll.save(adapt, adapt.init(), tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


KOHYA = {
    "lora": {"lora_down.weight": (3, 8), "lora_up.weight": (6, 3)},
    "loha": {"hada_w1_a": (6, 3), "hada_w1_b": (3, 8), "hada_w2_a": (6, 3), "hada_w2_b": (3, 8)},
    "lokr": {"lokr_w1": (2, 2), "lokr_w2_a": (3, 1), "lokr_w2_b": (1, 4)},
    "lokr, whole": {"lokr_w1": (2, 2), "lokr_w2": (3, 4)},  # whose scale is 1, whatever alpha says
}


@pytest.mark.parametrize("case", KOHYA)
def test_a_negative_alpha_of_kohya_negates_the_update(tmp_path, case):
    model = nn.ModuleDict({"q": nn.Linear(8, 6)})
    tensors = {f"lora_unet_q.{key}": draw(*shape, seed=k) for k, (key, shape) in enumerate(KOHYA[case].items())}
    moved_by = []
    for alpha in (3.0, -3.0):
        safetensors.torch.save_file({**tensors, "lora_unet_q.alpha": torch.tensor(alpha)}, tmp_path / "a.safetensors")
        adapt, params = ll.from_kohya(model, tmp_path / "a.safetensors")
        moved_by.append(adapt.merge(params)["q.weight"] - model["q"].weight)
    assert moved_by[0].abs().max() > 0.1
    torch.testing.assert_close(moved_by[1], moved_by[0] if case == "lokr, whole" else -moved_by[0])
