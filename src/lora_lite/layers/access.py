"""Ways into the modules of a copy: the places of its tensors, views without adapters, and stand-ins for weights that the model reads."""

import copy
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from lora_lite.core.tree import join, modules_by_path
from lora_lite.layers.given import require_followed, require_traced

ADAPTERS = "_lora_lite_adapters"
"""The attribute of a module with children that lists the adapters whose params are registered on the module."""
ADOPTED = "_lora_lite_adopted"
"""The attribute that marks a layer of a private copy which runs its kind."""
HOST = "_lora_lite_host"
"""The attribute of a view that holds the module it is a view of."""


def module_at(root: nn.Module, path: str) -> Any:
    """Return the module at a path that is known to lead to one; `get_submodule` checks each step, which takes longer than the step."""
    for name in path.split(".") if path else ():
        root = root._modules[name]  # type: ignore[assignment]
    return root


def place_of(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the module inside that holds a parameter, and the parameter's name there."""
    parent, _, own = name.rpartition(".")
    return module.get_submodule(parent), own


def first_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return the first argument of a call, by place or by name."""
    return args[0] if args else next(iter(kwargs.values()))


def takes_one(layer: nn.Module) -> bool:
    """Whether the forward of a layer's class takes one argument, so that no call can have more."""
    of: Any = type(layer)
    return _takes_one(of.forward)


@functools.lru_cache(1024)
def _takes_one(forward: Callable[..., Any]) -> bool:
    _, *given = inspect.signature(forward).parameters.values()
    return len(given) == 1 and given[0].kind in (given[0].POSITIONAL_ONLY, given[0].POSITIONAL_OR_KEYWORD)


def renormed(module: nn.Module) -> bool:
    """Whether a module shortens rows of its table in each lookup, as `nn.Embedding` with `max_norm` does: it writes to its weight."""
    return vars(module).get("max_norm") is not None and module._parameters.get("weight") is not None


def weight_names(module: nn.Module) -> list[str]:
    """List a module's parameters as they stand, and then by name those that parametrizations compute, as of experts in 4 bits.

    PEFT nests its adapters of them in this order.
    """
    computed: Any = module._modules.get("parametrizations") or ()
    return [*module._parameters, *sorted(computed)]


def raw(layer: nn.Module) -> Any:
    """Return a view of a module whose attributes are its frozen tensors, even where the model reads adapted ones.

    The view shares the tables of parameters, buffers and submodules, so that tensors swapped in for a call are seen. It runs no hooks.
    """
    twin = _twin(layer)
    vars(twin).pop("forward", None)
    vars(twin)[HOST] = layer  # its mode may change
    if makers := dict(_makers(layer)):
        for name in makers:
            vars(twin).pop(name, None)  # what the last call left
        of: Any = type(layer)
        twin.__class__ = _made(of, tuple(makers))
    if (parts := layer._modules.get("parametrizations")) is not None:
        vars(twin)["_modules"] = {**layer._modules, "parametrizations": _twin(parts, _Readings)}
    return twin


def _twin(module: nn.Module, cls: type[nn.Module] | None = None) -> nn.Module:
    of = cls or type(module)
    twin = of.__new__(of)
    vars(twin).update({name: value for name, value in vars(module).items() if not isinstance(value, ReadTensor)})
    return twin


def _makers(layer: nn.Module) -> Iterator[tuple[str, Callable[[nn.Module], Tensor]]]:
    """Yield the names of the weights that hooks of torch's make before a layer's forward, and how they are made without a trace in it."""
    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, BasePruningMethod):
            yield hook._tensor_name, hook.apply_mask
        elif isinstance(hook, SpectralNorm):
            yield hook.name, functools.partial(hook.compute_weight, do_power_iteration=False)
        elif isinstance(hook, WeightNorm):
            yield hook.name, hook.compute_weight


@functools.cache
def _made(cls: Any, names: tuple[str, ...]) -> Any:
    """Return the class of a view whose weights are made where they are read: the layer has those of its last call, if any."""

    def reduced(self: nn.Module, protocol: Any) -> Any:
        return _view, (cls, names), vars(self)

    facts = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__reduce_ex__": reduced}
    return type(cls.__name__, (cls,), facts | {name: property(functools.partial(_read_anew, name)) for name in names})


def _read_anew(name: str, view: nn.Module) -> Tensor:
    return dict(_makers(view))[name](view)


def _view(cls: Any, names: tuple[str, ...]) -> Any:
    of = _made(cls, names)
    return of.__new__(of)


class _Readings(nn.ModuleDict):
    """The parametrizations of a view: to read a weight leaves no trace in their buffers, as the vectors of a spectral norm."""

    def __getitem__(self, name: str) -> nn.Module:
        part = super().__getitem__(name)
        return _with_own_buffers(part) if part.training and not torch.compiler.is_compiling() else part


def _with_own_buffers(module: nn.Module) -> nn.Module:
    twin = _twin(module)
    vars(twin)["_buffers"] = {name: b if b is None else b.clone() for name, b in module._buffers.items()}
    vars(twin)["_modules"] = {name: m if m is None else _with_own_buffers(m) for name, m in module._modules.items()}
    return twin


_KEEPS = nn.Module.__setattr__.__code__


class ReadTensor(Tensor):
    """A stand-in for an adapted parameter that the model reads. It has the parameter's shape and dtype. Each use sees the adapted tensor.

    The stand-in lies in the module's `__dict__`, which Python searches before the table of parameters. That table keeps the frozen tensor.
    """

    binding: Any
    of_parameter: str
    like: Tensor | None = None

    @property
    def _is_param(self) -> bool:
        """Whether this counts as an `nn.Parameter`: for all but a module that keeps it, which would register an adapted tensor."""
        if torch.compiler.is_compiling():
            return True
        asks = sys._getframe(1)
        return asks.f_back is None or asks.f_back.f_code is not _KEEPS

    @classmethod
    def of(cls, binding: Any, name: str) -> "ReadTensor":
        """Make the stand-in for a parameter of a bound layer."""
        module, own = place_of(binding.W.layer, name)
        p: Any = module._parameters[own]
        whole = type(p.data) is Tensor  # else a part of a sharded weight, or a tensor of a class of its own
        like = p.detach() if whole else torch.empty((), dtype=p.dtype, device=p.device)
        return _stand_in(like, binding, name, tuple(p.shape), vars(p))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") == "__get__" and getattr(func.__self__, "__name__", "") in FACTS:
            with torch._C.DisableTorchFunction():  # modes too: under one the compiler would ask here again
                return func(*args, **(kwargs or {}))
        if func in _MEASURES:
            with torch._C.DisableTorchFunction():
                return func(*args, **(kwargs or {}))
        if func is linear and (whole := _product(*args, **(kwargs or {}))) is not None:
            return whole(args[0] if args else kwargs["input"])
        args = tuple(_adapted(a) for a in args)
        return func(*args, **{name: _adapted(a) for name, a in (kwargs or {}).items()})

    def __deepcopy__(self, memo: dict[int, Any]) -> "ReadTensor":
        with torch._C.DisableTorchFunctionSubclass():
            return _stand_in(self.detach(), copy.deepcopy(self.binding, memo), self.of_parameter, tuple(self.shape))

    def __reduce_ex__(self, protocol: Any) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if self.like is None:  # kept: what sends memory to another process needs it alive until it is there
                self.like = torch.empty((), dtype=self.dtype, device=self.device)
            return _stand_in, (self.like, self.binding, self.of_parameter, tuple(self.shape))


FACTS = frozenset(
    ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_leaf", "is_meta", "is_cuda", "is_cpu", "is_mps", "is_quantized")
) | {"is_sparse", "is_mkldnn", "is_nested", "_base", "grad"}
"""The attributes that a stand-in answers from the frozen parameter."""
_MEASURES = (
    {Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, torch.numel, Tensor.element_size, Tensor.get_device}
    | {Tensor.is_floating_point, torch.is_floating_point, Tensor.is_complex, torch.is_complex, Tensor.is_signed, Tensor.__len__}
    | {Tensor.stride, Tensor.storage_offset, Tensor._is_view, Tensor.is_conj, torch.is_conj, Tensor.is_neg, torch.is_neg}
)
"""The functions that it answers so too: a model that asks for a dtype or a size reads no weight, nor does the compiler."""


def _stand_in(like: Tensor, binding: Any, name: str, shape: tuple[int, ...], noted: Mapping[str, Any] = MappingProxyType({})) -> ReadTensor:
    self: ReadTensor = (like if like.shape == shape else like.expand(shape)).as_subclass(ReadTensor)
    vars(self).update(noted)  # what a library keeps on the parameter
    self.binding, self.of_parameter = binding, name
    return self


def _product(input: Any, weight: Any, bias: Any = None) -> Any:
    """Return the binding of a layer that is reached by its product, where `F.linear` has its whole weight and bias. None for others."""
    binding = weight.binding if isinstance(weight, ReadTensor) and not isinstance(input, ReadTensor) else None
    if binding is None or not binding.W.by_product or weight.of_parameter != binding.W.state["weight"]:
        return None
    own = bias is None if binding.W.bias is None else isinstance(bias, ReadTensor) and bias.binding is binding
    return binding if own else None


def _adapted(value: Any) -> Any:
    if isinstance(value, ReadTensor):
        if torch.compiler.is_compiling():
            if torch.is_grad_enabled():
                require_traced(value.binding.path, value.binding.W.keeps_forward)
        elif not torch.is_grad_enabled() and (value.binding.W.tries or value.binding.trained):
            require_followed(value)
        if value.binding.W.layer._parameters.get(value.of_parameter) is value:
            raise ValueError(
                f'adapt: at "{value.binding.path}" expected a layer with its frozen weight, found the adapted one put into it, as by '
                "torch.func.functional_call in the model's own forward, where it would be adapted again. Let the forward call the layer, "
                "or torch.nn.functional.linear with the weight."
            )
        return value.binding.read(value.of_parameter)
    if isinstance(value, list | tuple) and any(isinstance(v, ReadTensor) for v in value):
        return type(value)(_adapted(v) for v in value)
    return value


def named_parameters(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters of a module and its children by name, without adapters' params. A shared parameter comes once."""
    parts = modules_by_path(module, prefix)
    seen = {p for inner in parts.values() for p in parameters_of_adapters(inner)}
    for path, inner in parts.items():
        for name, p in dict.items(inner._parameters):
            if p is not None and p not in seen:
                seen.add(p)
                yield join(path, name), p


def parameters_of_adapters(module: Any) -> Iterator[Tensor]:
    """Yield the parameters that adapters have registered on a module. For an adapter, yield its own."""
    for adapter in (module, *vars(vars(module).get(HOST, module)).get(ADAPTERS, ())):  # a view has them at its host
        if hasattr(type(adapter), "parameters_by_name"):
            yield from (p for p in adapter.parameters_by_name.values() if p is not None)
