"""The modules that `import lora_lite` imports, and its public names, which are documented and agree."""

import inspect
import subprocess
import sys
import types
from importlib import metadata

import pytest
import torch
from packaging.requirements import Requirement

import lora_lite as ll
import typed_user
from lora_lite.core.documented import fields_in

NAMES = sorted(name for name in vars(ll) if not name.startswith("_") and not isinstance(getattr(ll, name), types.ModuleType))


def test_import_pulls_in_nothing_optional():
    code = "import sys, lora_lite; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "lora_lite" in loaded
    assert {"transformers", "peft", "bitsandbytes", "accelerate", "hypothesis", "pytest"} & set(loaded) == set()


USE = """
import torch, lora_lite as ll
model, x = torch.nn.Sequential(torch.nn.Linear(64, 64)), torch.randn(3, 64)
for cfg in (ll.LoRAConfig(target_names=".*"), ll.FullConfig(target_names="0"), ll.UniLoRAConfig(theta_d_length=16, target_names=".*")):
    adapt = ll.build(model, cfg)
    params = adapt.init()
    ll.value_and_grad(lambda p: adapt(p, x).square().mean())(params)
    ll.save(adapt, params, "adapter.safetensors")
    again, loaded = ll.load(model, "adapter.safetensors")
    assert torch.equal(again(loaded, x), adapt(params, x))
    adapt.merge(params)
"""


def _required(name, extra=""):
    """Return the distributions that an installation of one brings, by their names in lower case."""
    found = {name.lower().replace("_", "-")}
    for line in metadata.requires(name) or ():
        need = Requirement(line)
        if (need.marker is None or need.marker.evaluate({"extra": extra})) and need.name.lower().replace("_", "-") not in found:
            found |= _required(need.name)
    return found


def test_the_dependencies_suffice_to_adapt_save_load_and_merge(tmp_path):
    own = _required("lora-lite")
    others = [top for top, dists in metadata.packages_distributions().items() if not own & {d.lower().replace("_", "-") for d in dists}]
    hidden = f"import sys; sys.modules |= dict.fromkeys({sorted(set(others) - {'torch'})!r})"
    done = subprocess.run([sys.executable, "-c", f"{hidden}\n{USE}"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_import_is_quiet_and_leaves_the_random_state():
    code = "import torch; torch.manual_seed(0); a = torch.get_rng_state(); import lora_lite; assert torch.equal(a, torch.get_rng_state())"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_contract_names_are_there():
    contract = {
        *(
            "build",
            "find_targets",
            "save",
            "load",
            "value_and_grad",
            "checked",
            "functional",
            "testing",
            "AdapterConfig",
            "Frozen",
            "VARIANTS",
        ),
        *("LoRAConfig", "PiSSAConfig", "DoRAConfig", "IA3Config", "IA3FFConfig"),
    }
    assert contract - set(vars(ll)) == set()


def test_the_file_for_the_type_checker_runs(tmp_path):
    """`tox run -e type` checks the file; here it is run, so that what it says is true."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 3))
    assert typed_user.trained(model, torch.randn(2, 4), str(tmp_path / "adapter.safetensors")).shape == (2, 3)
    assert {type(cfg.target_names) for cfg in typed_user.CONFIGS} == {tuple}


@pytest.mark.parametrize("name", [name for name in NAMES if callable(getattr(ll, name))])
def test_public_name_has_a_docstring_of_its_own(name):
    thing = getattr(ll, name)
    doc = thing.__dict__.get("__doc__") if inspect.isclass(thing) else thing.__doc__
    assert doc
    assert not (inspect.isclass(thing) and doc.startswith(f"{name}(")), "the docstring that dataclass writes says nothing"


@pytest.mark.parametrize("cls", [ll.AdapterConfig, *ll.VARIANTS.values()], ids=lambda cls: cls.__name__)
def test_docstring_of_a_config_has_every_field(cls):
    documented = [name for names in fields_in(cls.__doc__) for name in names.split(", ")]
    assert sorted(documented) == sorted(inspect.signature(cls).parameters)


def test_fields_of_a_base_come_after_those_that_a_class_documents_itself():
    class MineConfig(ll.LoRAConfig):
        """Config of mine.

        Args:
            alpha: another meaning,
                on two lines.

        A paragraph after it.
        """

    fields = fields_in(MineConfig.__doc__)
    assert list(fields)[:3] == ["alpha", "r", "rslora"]
    assert fields["alpha"].split() == ["alpha:", "another", "meaning,", "on", "two", "lines."]
    assert fields["layers"] == fields_in(ll.AdapterConfig.__doc__)["layers"]
    assert MineConfig.__doc__.endswith("\n\nA paragraph after it.")
    assert fields_in(ll.LoRAConfig.__doc__)["alpha"] != fields["alpha"]


def _public_methods():
    for cls in (ll.Adapt, ll.AdapterConfig, ll.Frozen):
        yield from (
            (cls, name)
            for name, value in vars(cls).items()
            if not name.startswith("_") and (callable(value) or isinstance(value, property))
        )


@pytest.mark.parametrize(("cls", "name"), list(_public_methods()), ids=lambda part: getattr(part, "__name__", part))
def test_public_method_has_a_docstring(cls, name):
    assert inspect.getdoc(vars(cls)[name])


def test_table_of_variants_names_its_classes():
    assert {name: cls.name for name, cls in ll.VARIANTS.items()} == {name: name for name in ll.VARIANTS}
    assert all(issubclass(cls, ll.AdapterConfig) for cls in ll.VARIANTS.values())
    assert {cls.__name__ for cls in ll.VARIANTS.values()} == {name for name in NAMES if name.endswith("Config")} - {"AdapterConfig"}


def test_functional_has_one_function_per_variant():
    assert sorted(ll.functional.__all__) == sorted(ll.VARIANTS)
    for name in ll.VARIANTS:
        function = getattr(ll.functional, name)
        assert function.__name__ == name
        assert list(inspect.signature(function).parameters)[:3] == ["params", "W", "x"]
        assert function.__doc__


@pytest.mark.parametrize("cls", list(ll.VARIANTS.values()), ids=lambda cls: cls.name)
def test_module_of_a_variant_says_what_it_must(cls):
    doc = inspect.getmodule(cls).__doc__
    for part in (
        "$$",
        "Identity at init:",
        "Paper:",
        "| tensor | shape | trained | init |",
        "Trained per target:",
        "Departures:",
    ):
        assert part in doc, part
    assert "arXiv:" in doc or "OpenReview:" in doc
