"""The conformance kit: every shipped variant passes every check, and so does one from outside the package.

Compiling takes as long as all other checks together: here it is tried on each variant's first row, and with `LORA_LITE_COMPILE=every`,
which `tox -e compiled` sets, on all.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, TypedDict

import pytest
import torch
from jaxtyping import Float
from torch import Tensor, nn

import lora_lite as ll
from cases import CASES, COMPILE_ALL, FIRST, ShiftConfig, assert_trees_equal, move
from lora_lite.testing import CHECKS


def _grid():
    compiled = CASES if COMPILE_ALL else FIRST
    for row in CASES:
        updates = type(row.cfg).update is not ll.AdapterConfig.update
        applies = {"compiles": row in compiled, "positions": "positions" in row.cfg.uses, "stepped": updates}
        for name in (name for name in CHECKS if applies.get(name, True)):
            marks = [pytest.mark.xfail(reason=row.fails[name], strict=True)] if name in row.fails else []
            yield pytest.param(row.cfg, name, id=f"{row.id}-{name}", marks=marks)


@pytest.mark.parametrize(("cfg", "check"), list(_grid()))
def test_shipped_variant_passes(cfg, check):
    CHECKS[check](cfg)


def test_declared_failures_name_checks():
    assert [(row.id, name) for row in CASES for name in row.fails if name not in CHECKS] == []


# Two variants from outside the package.


class TiltParams(TypedDict):
    u: Float[Tensor, " o"]
    v: Float[Tensor, " i"]


@ll.checked
def tilt(params: TiltParams, W: ll.Frozen, x: Float[Tensor, "*b i"], *, gain: float) -> Float[Tensor, "*b o"]:
    """Return `W x + b + gain u <v0 + v, x>`; `v0` is drawn once and frozen."""
    return W(x) + gain * params["u"] * (x @ (W.constants["v0"].to(x.dtype) + params["v"]))[..., None]


@dataclass(frozen=True, kw_only=True)
class TiltConfig(ll.AdapterConfig):
    """A rank-one update with a frozen random start, a field, a formula and a steer of its own."""

    name: ClassVar[str] = "tilt"
    trained: ClassVar[str | None] = "i + o"
    gain: float = 2.0

    def init(self, W, generator, stats=None):
        v0 = W.constants.get("v0")
        v0 = torch.randn(W.in_features, generator=generator) if v0 is None else v0
        return {"u": torch.zeros(W.out_features), "v": torch.zeros(W.in_features)}, {"v0": v0}

    def forward(self, params, W, x):
        return tilt(params, W, x, gain=self.gain)

    def steer(self, params: Mapping[str, Tensor], c):
        return {**params, "u": c * params["u"]}


@pytest.mark.parametrize("cfg", [ShiftConfig(), TiltConfig(gain=0.5)], ids=lambda cfg: cfg.name)
class TestVariantFromOutside:
    def test_passes_the_kit(self, cfg):
        ll.testing.check_variant(cfg)

    @pytest.mark.parametrize("variants", [lambda cls: [cls], lambda cls: {cls.name: cls}], ids=["sequence", "mapping"])
    def test_builds_saves_and_loads(self, cfg, variants, tmp_path):
        model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 4)).eval()
        x = torch.randn(3, 6)
        adapt = ll.build(model, cfg)
        params = move(adapt.init(seed=0))
        assert not torch.allclose(adapt(params, x), model(x))
        ll.save(adapt, params, tmp_path / "a.safetensors")
        again, read = ll.load(model, tmp_path / "a.safetensors", variants=variants(type(cfg)))
        assert_trees_equal(read, params)
        assert again.configs[0] == cfg
        assert torch.equal(again(read, x), adapt(params, x))

    def test_is_unknown_to_load_unless_passed(self, cfg, tmp_path):
        model = nn.Sequential(nn.Linear(6, 10))
        adapt = ll.build(model, cfg)
        ll.save(adapt, adapt.init(), tmp_path / "a.safetensors")
        with pytest.raises(ValueError, match=f'expected.*variants.*found "{cfg.name}".*variants='):
            ll.load(model, tmp_path / "a.safetensors")
