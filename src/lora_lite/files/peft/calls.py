"""Layers that a model does not simply call for `W x + b`: PEFT's layers compute something else there, or nothing."""

import ast
import copy
import functools
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lora_lite.core.config import AdapterConfig
from lora_lite.core.plan import Target

_SUMS = ("lora", "alora", "pissa", "olora", "mica", "eva", "loftq", "corda", "asvd", "lora_ga")
"""The variants that PEFT adds to a layer's output, whatever else the layer adds to `W x`."""
_INPUTS = ((2,), (1, 2), (1, 1, 2))
"""The leading axes of the inputs that a forward is tried with."""
_MAMBA = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
_KERNELS = ("out_proj", "conv1d")
"""The layers whose weights Mamba's fused kernels read."""


def uncalled(model: nn.Module, target: Target, cfg: AdapterConfig, inside: bool) -> str | None:
    """Return the reason why PEFT computes something else at a layer that the model does not simply call, or None.

    `inside` tells a weight among `target_parameters`, which the layer's own forward finds adapted."""
    if target.kind.host(target.path) != target.path or not target.path:
        return None
    parent, _, name = target.path.rpartition(".")
    layer, holder = model.get_submodule(target.path), model.get_submodule(parent)
    of: Any = type(holder)
    if _reads_alone(of, name):
        return f"on a layer whose weight {of.__name__} reads without calling it: PEFT's layer acts in a call alone"
    keeper = None if inside else _keeper(model, target.path, layer)
    if keeper is not None:
        return f"on a layer that {keeper} keeps outside of its modules too: PEFT puts its own into the modules alone"
    sums = cfg.name in _SUMS and not getattr(cfg, "lora_bias", False)
    if target.kind.keeps_forward and not inside and (not target.kind.by_product or _differs(layer, sums)):
        return f"on a {type(layer).__name__}, which has a forward of its own: PEFT's update stays outside of it, ours is inside"
    return None


def in_attention(model: nn.Module, path: str) -> bool:
    """Whether a layer is the output projection of an `nn.MultiheadAttention`, which reads its weight without calling it."""
    return isinstance(model.get_submodule(path.rpartition(".")[0]), nn.MultiheadAttention)


def _keeper(model: nn.Module, path: str, layer: nn.Module) -> str | None:
    """Return the class of a module around a layer that holds the layer in an attribute of its own, plain or in a list, or None."""
    names = path.split(".")
    for depth in range(len(names)):
        around = model.get_submodule(".".join(names[:depth]))
        for name, value in vars(around).items():
            held = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else (value,)
            if name != "_modules" and any(part is layer for part in held):
                return type(around).__name__
    return None


def barred(model: nn.Module, target: Target, peft_type: str) -> str | None:
    """Return the reason why PEFT raises at a layer of Mamba, or None. It goes by the type of the whole model."""
    kept = getattr(getattr(model, "config", None), "model_type", None) in _MAMBA
    lora = peft_type in ("LORA", "ADALORA", "RANDLORA")
    names = target.kind.host(target.path).rpartition(".")[2] in _KERNELS
    return f"on a layer of Mamba: PEFT's {peft_type} refuses {' and '.join(_KERNELS)} there" if kept and lora and names else None


# Forwards of layers


def _differs(layer: nn.Module, sums: bool) -> bool:
    """Whether an own forward returns vectors other than `W x + b`; with `sums`, other than `W x` and a sum without `W`.

    A forward that fails on vectors, or returns another form, fails in PEFT too. One that takes further arguments cannot be tried."""
    for lead in _INPUTS:
        try:
            return _differs_at(layer, lead, sums)
        except TypeError:
            return True
        except Exception:
            continue
    return False


@torch.no_grad()
def _differs_at(layer: Any, lead: tuple[int, ...], sums: bool) -> bool:
    generator = torch.Generator().manual_seed(0)
    twin = _twin(layer, generator)
    x = torch.randn(*lead, layer.in_features, generator=generator).to(twin.weight.device)
    y = type(layer).forward(twin, x.clone())
    want = x @ twin.weight.T
    if not isinstance(y, Tensor) or y.shape != want.shape:
        return False
    if sums:
        twin.weight.zero_()
    rest = type(layer).forward(twin, x.clone()) if sums else twin.bias
    error = y - want - (0.0 if rest is None else rest)
    return not bool(error.abs().max() <= 1e-3 * want.abs().max())


def _twin(layer: nn.Module, generator: torch.Generator) -> Any:
    """Copy a layer in float32 and evaluation mode, with a weight and a bias drawn at random. Its values may be elsewhere, or all alike."""
    twin = copy.copy(layer)
    for table in ("_parameters", "_buffers"):
        vars(twin)[table] = {name: t if t is None else _drawn_or_own(name, t, generator) for name, t in getattr(layer, table).items()}
    vars(twin)["training"] = False
    return twin


def _drawn_or_own(name: str, tensor: Tensor, generator: torch.Generator) -> Tensor:
    if tensor.is_meta or name in ("weight", "bias"):
        drawn = torch.randn(tensor.shape, generator=generator)
        return drawn if tensor.is_meta else drawn.to(tensor.device)
    return tensor.detach().float() if tensor.is_floating_point() else tensor.detach().clone()


# Layers whose weight alone is read


@functools.lru_cache(1024)
def _reads_alone(of: Any, name: str) -> bool:
    """Whether a class uses a submodule for its weight and bias only, as the source of its methods has it. Without source it does not."""
    try:
        uses = {use for cls in of.__mro__ if cls not in (nn.Module, object) for use in _uses(cls, name)}
    except (OSError, TypeError, SyntaxError):
        return False
    return "weight" in uses and uses <= {"weight", "bias"}


def _uses(cls: type, name: str) -> Iterator[str]:
    """Yield the attribute that a class takes of each `self.name`, empty where it uses the module itself. Starts of weights are left out."""
    if not name.isidentifier() or f".{name}" not in inspect.getsource(inspect.getmodule(cls) or cls):  # finding a class in it takes long
        return
    for method in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(cls)))):
        if isinstance(method, ast.FunctionDef) and not any(word in method.name for word in ("init", "reset")):
            taken = {id(part.value): part.attr for part in ast.walk(method) if isinstance(part, ast.Attribute)}
            found = [part for part in ast.walk(method) if isinstance(part, ast.Attribute) and part.attr == name]
            yield from (taken.get(id(part), "") for part in found if isinstance(part.ctx, ast.Load))
