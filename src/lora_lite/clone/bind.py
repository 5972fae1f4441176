"""Bind params to a clone: targets take a class that runs the variant, their params are placeholders filled for one call.

`torch.func.functional_call` does the filling. A placeholder lies on the meta device, so that a stray read of it fails rather than
computing silently without the adapter.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_lite.core.checked import in_dtype
from lora_lite.core.config import AdapterConfig
from lora_lite.core.errors import several, tree_faults
from lora_lite.core.frozen import CONSTANT, PARAM, Frozen, FrozenLinear
from lora_lite.core.subclass import derived
from lora_lite.core.tree import AnyTree, Tree, join
from lora_lite.prepare.targets import Target

Shapes = dict[str, dict[str, tuple[int, ...]]]


def apply_variant(cfg: AdapterConfig, params: Mapping[str, Tensor], W: Frozen, x: Tensor) -> Tensor:
    """Run a variant on one layer, or on each of the linear maps that it is made of."""
    return W.over_parts(functools.partial(apply_part, cfg), params, x)


def apply_part(cfg: AdapterConfig, params: Mapping[str, Tensor], W: Frozen, x: Tensor) -> Tensor:
    """Run a variant on one linear map: params take part in the dtype of `x`, or of the weight where `x` has none."""
    W, x = W.entered(x, cfg.uses)
    return cfg.forward(in_dtype(params, W.rows(x).dtype), W, x)


class Binding(NamedTuple):
    """What a target layer of a clone knows: its variant, its params' names and attributes, its frozen side, its path."""

    cfg: AdapterConfig
    names: tuple[tuple[str, str], ...]
    W: FrozenLinear
    path: str


class Adapted:
    """The part of a target's class in the clone that runs the variant instead of the layer."""

    _lora_lite: Binding

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        cfg, _, W, path = self._lora_lite
        own = super().forward  # type: ignore[misc]
        if torch.compiler.is_compiling():
            return W.call(self._run, own, args, kwargs)
        try:
            return W.call(self._run, own, args, kwargs)
        except Exception as e:
            e.add_note(f'in {type(cfg).__name__} at target "{path}"')
            raise

    def _run(self, W: Frozen, x: Tensor) -> Tensor:
        return apply_variant(self._lora_lite.cfg, self._params_in_place(W), W, x)

    def _params_in_place(self, W: Frozen) -> dict[str, Tensor]:
        """Give the params of this call; a placeholder is refused here, since products on a CPU take one without a word."""
        params = {name: getattr(self, attribute) for name, attribute in self._lora_lite.names}
        if any(p.is_meta for p in params.values()) and W.device.type != "meta":
            path = self._lora_lite.path
            raise RuntimeError(
                f'adapt: expected params with data at "{path}", found them on meta. Pass params on its device; where the model recomputes '
                "blocks by a checkpoint of its own, leave that to build(..., remat=) instead."
            )
        return params


@functools.cache
def adapted_class(cls: Any) -> Any:
    """Make the subclass of a layer's class that a target takes in the clone; the same one for the same class."""
    return derived(adapted_class, cls, Adapted)


def attribute_of(name: str) -> str:
    """Name the attribute that holds a param; the params of a whole module have names with dots, which no attribute may have."""
    return PARAM + name.replace(".", "/")


def layer_at(clone: nn.Module, path: str) -> Any:
    """Give a target layer of a bound clone: an `Adapted` that is also the layer's own class."""
    return clone.get_submodule(path)


def adapt_layer(
    layer: nn.Module,
    target: Target,
    cfg: AdapterConfig,
    shapes: Mapping[str, tuple[int, ...]],
    constants: Mapping[str, Tensor],
) -> None:
    """Turn one layer of a clone into a target: its class, its placeholders, its constants."""
    layer.__class__ = adapted_class(type(layer))  # type: ignore[arg-type]
    for name, shape in shapes.items():
        placeholder = torch.empty(shape, dtype=cfg.dtype, device="meta")
        layer.register_parameter(attribute_of(name), nn.Parameter(placeholder, requires_grad=False))
    for name, constant in constants.items():
        layer.register_buffer(CONSTANT + name, constant)
    W = target.kind(layer, {name: CONSTANT + name for name in constants})
    names = tuple((name, attribute_of(name)) for name in shapes)
    vars(layer)["_lora_lite"] = Binding(cfg, names, W, target.path)


def rebind(clone: nn.Module) -> None:
    """Give each target of a copied clone a `Frozen` that reads the copy."""
    for layer in clone.modules():
        if isinstance(layer, Adapted):
            W = layer._lora_lite.W
            layer._lora_lite = layer._lora_lite._replace(W=type(W)(layer, W.constant_names))


def fits(params: AnyTree, shapes: Shapes) -> bool:
    """Tell whether a params tree has these paths, names and shapes. Plain loops: every call passes here, with hundreds of targets."""
    if len(params) != len(shapes):
        return False
    for path, expected in shapes.items():
        leaves = params[path]
        if len(leaves) != len(expected):
            return False
        for name, shape in expected.items():
            leaf = leaves[name]
            if leaf.shape != shape or not leaf.is_floating_point():
                return False
    return True


def require_fit(params: Any, shapes: Shapes, caller: str) -> None:
    """Refuse a params tree of other paths, names or shapes.

    Raises:
        ValueError: it lists each departure.
    """
    try:
        if fits(params, shapes):
            return
    except (KeyError, TypeError, AttributeError):
        pass  # whatever is wrong is found again below, and named
    raise ValueError(
        f"{caller}: expected params that fit this model and config, found:\n{several(tree_faults(params, shapes))}\n"
        "Use adapt.init(...), or load(...) with the file that the params were saved to."
    )


def placed(params: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Name the leaves of a params tree as the clone's placeholders are named."""
    found = {}
    for path, leaves in params.items():
        prefix = join(path, "")
        for name, leaf in leaves.items():
            found[prefix + attribute_of(name)] = leaf
    return found


def read_params(module: nn.Module, shapes: Shapes, get: Callable[[Tensor], Tensor]) -> Tree:
    """Read a params tree out of a bound module."""
    layers = {path: module.get_submodule(path) for path in shapes}
    return {path: {name: get(getattr(layers[path], attribute_of(name))) for name in names} for path, names in shapes.items()}


@torch.no_grad()
def write_params(module: nn.Module, params: AnyTree) -> None:
    """Write the values of a params tree into a bound module, in place."""
    for path, leaves in params.items():
        layer = bare(module).get_submodule(path)
        for name, leaf in leaves.items():
            getattr(layer, attribute_of(name)).copy_(leaf)


def bare(module: nn.Module) -> nn.Module:
    """Take off the wrappers of DDP, DataParallel and `torch.compile`."""
    while True:
        wrapper = "module" if isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel) else "_orig_mod"
        inner = getattr(module, wrapper, None)
        if not isinstance(inner, nn.Module):
            return module
        module = inner


def whole(param: Tensor) -> Tensor:
    """Copy a param out of a module; one that FSDP2 has split is gathered, by all processes together."""
    param = param.detach()
    return param.full_tensor() if hasattr(param, "full_tensor") else param.clone()


_SMALL = 2**16


def volatile_buffers(clone: nn.Module) -> dict[str, Tensor]:
    """Find the buffers that a forward may update in place: BatchNorm's statistics, counters and their like.

    They alias the user's, so each call gets copies. Small ones are copied whatever they are; of the large ones those that hold
    floating numbers in training mode, since large integer buffers are packed weights and masks, which nobody updates.
    """
    found = {}
    for path, module in clone.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is None or buffer.device.type == "meta" or name.startswith(CONSTANT):
                continue
            if buffer.numel() <= _SMALL or (module.training and buffer.is_floating_point()):
                found[join(path, name)] = buffer
    return found


def call(clone: nn.Module, tensors: Mapping[str, Tensor], batch: Any, kwargs: Mapping[str, Any]) -> Any:
    """Run the clone on a batch with `tensors` in place for the length of the call."""
    args: tuple[Any, ...] = ()
    if isinstance(batch, Mapping):
        kwargs = {**batch, **kwargs}
    elif isinstance(batch, Tensor):
        args = (batch,)
    elif isinstance(batch, Sequence) and not isinstance(batch, str | bytes):
        args = tuple(batch)
    else:
        raise TypeError(
            f"adapt: expected batch as a mapping (model(**batch)), a tuple or list (model(*batch)) or a tensor, found "
            f"{type(batch).__name__}. Wrap a single argument as (argument,)."
        )
    return torch.func.functional_call(clone, dict(tensors), args, dict(kwargs), tie_weights=False)
