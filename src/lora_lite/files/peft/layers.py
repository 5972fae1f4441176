"""Layers that PEFT keeps otherwise than linear ones, as linear ones and back: embeddings, convolutions and parameters.

Keys and shapes alone differ. `lora_embedding_A` is `lora_A.weight`; a convolution's factors have its kernel's axes; of a stack of `n`
matrices PEFT keeps one `A (n r, i)` and one `B (o, r n)`, whose last axis runs over `n` fastest, in wrappers around the module, the first
parameter's innermost.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_lite.core.config import AdapterConfig
from lora_lite.core.plan import Target
from lora_lite.core.tree import join
from lora_lite.files.peft.calls import in_attention, uncalled
from lora_lite.files.peft.fields import carried, shifts_weights, version_of
from lora_lite.files.peft.gates import GATE, laid_out
from lora_lite.layers.access import weight_names
from lora_lite.layers.convolution import CLASSES, ConvKind
from lora_lite.layers.embedding import EmbeddingKind
from lora_lite.layers.kind import Kind
from lora_lite.layers.kinds import kind_of
from lora_lite.layers.linear import Conv1DKind, FalconKind, LinearKind
from lora_lite.layers.parameter import ParameterKind
from lora_lite.layers.quantised import FrozenQuantised
from lora_lite.layers.transposed import TransposedConvKind

Tensors = dict[str, Tensor]
A, B, BIAS, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_magnitude_vector"
EMBEDDING = {"lora_embedding_A": A, "lora_embedding_B": B}
_WRAPPER = "base_layer."
EXPERTS_SINCE = (0, 19, 1)
"""The first PEFT that takes the axis of a stack of matrices for the input by which the module multiplies."""
LOAD = "Load it into the model first"
"""The way out where a file holds a tensor of the model's own that the model has otherwise."""


def as_linear(model: nn.Module, fields: Mapping[str, Any], tensors: Mapping[str, Tensor], prefix: str) -> tuple[Tensors, list[str]]:
    """Return a file's tensors in the keys and shapes of a linear layer at the same path, and list those without such a form."""
    found, faults = dict(tensors), list[str]()
    for path, module in model.named_modules():
        at = prefix + join(path, "")
        faults += _own(found, at, module, shifts_weights(fields) and any(at + key in tensors for key in (A, B)))
        if at + GATE in found and of_kernel(found[at + GATE], kernel_size(module)):
            found[at + GATE] = laid_out(found[at + GATE], fields, path)
        if _weight_asked(module, path, fields.get("target_parameters") or []):
            _weight(found, at, module)
            continue
        if isinstance(module, nn.Embedding):
            _embedding(found, at)
        elif isinstance(module, CLASSES):
            _convolution(found, at, module)
        else:
            _parameters(found, at, model, path, fields)
    return found, faults


def _own(found: Tensors, at: str, module: nn.Module, shifted: bool) -> list[str]:
    """Take out a module's own tensors, which PEFT saves beside adapted embeddings and heads, in case tokens were added."""
    faults = []
    for name, own in module._parameters.items():
        for key in (at + _WRAPPER + name, at + name):
            saved = found.pop(key, None)
            if saved is not None and not same(saved, own):
                faults.append(f'unexpected "{key}": {_LEFT if shifted and name == "weight" else _unlike(saved, own)}')
    return faults


_LEFT = "it is what the start left of the weight, which is computed here from the model's. Save it in PEFT with save_embedding_layers=False"


def _unlike(saved: Tensor, own: Tensor | None) -> str:
    """Return the difference of a file's tensor from the model's own, with the way out."""
    if own is None or saved.shape == own.shape:
        return f"it differs from the model's own. {LOAD}"
    resize = f": where the vocabulary had grown, by model.resize_token_embeddings({len(saved)})" if saved.dim() == 2 else ""
    return f"its shape is {tuple(saved.shape)}, and the model has {tuple(own.shape)}. Give the model that shape first{resize}"


def same(saved: Tensor, own: Tensor | None) -> bool:
    """Whether a tensor of a file is the model's own, to the rounding of the model."""
    return own is not None and saved.shape == own.shape and torch.equal(saved.to(own), own)


def _embedding(found: Tensors, at: str) -> None:
    for theirs, ours in EMBEDDING.items():
        if at + theirs in found:
            found[at + ours] = found.pop(at + theirs)


def kernel_size(layer: nn.Module) -> tuple[int, ...]:
    """Return the axes of a convolution's kernel, less the channels; of another layer none."""
    weight: Any = getattr(layer, "weight", None)
    return () if weight is None else tuple(weight.shape[2:])


def of_kernel(tensor: Tensor, size: tuple[int, ...]) -> bool:
    """Whether a tensor has a kernel of this size, or none: a product of the same size would pass for it once it is flat."""
    own = tuple(tensor.shape[2:])
    return own == size or set(own) <= {1}


def _convolution(found: Tensors, at: str, module: nn.Module) -> None:
    for key in (A, B, MAGNITUDE):
        tensor = found.get(at + key)
        if tensor is not None and tensor.dim() > 2 and of_kernel(tensor, kernel_size(module)):
            flat = {MAGNITUDE: (-1,)}.get(key, (len(tensor), -1))
            found[at + key] = tensor.reshape(flat)


def _weight_asked(module: nn.Module, path: str, asked: Sequence[str]) -> bool:
    """Whether `target_parameters` names the weight of a linear layer or an embedding, which are layers here."""
    is_layer = isinstance(module, nn.Embedding) or kind_of(module) is not None
    return is_layer and any(f".{join(path, 'weight')}".endswith(f".{name}") for name in asked)


def _weight(found: Tensors, at: str, module: nn.Module) -> None:
    """Transpose the update of a weight that the module keeps as `(i, o)`: PEFT takes its first axis for the output."""
    across = isinstance(module, nn.Embedding) or issubclass(kind_of(module) or Kind, Conv1DKind)
    if across and at + A in found and at + B in found:
        found[at + A], found[at + B] = found[at + B].mT.contiguous(), found[at + A].mT.contiguous()


def with_weights(model: nn.Module, fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the fields with the values that layers have whose weight is among `target_parameters`: PEFT looks for the parameter's name."""
    asked = fields.get("target_parameters") or []
    for path, module in model.named_modules() if asked else ():
        if _weight_asked(module, path, asked):
            fields = carried(fields, join(path, "weight"), path)
    return fields


def _parameters(found: Tensors, at: str, model: nn.Module, path: str, fields: Mapping[str, Any]) -> None:
    asked, module = fields.get("target_parameters") or [], model.get_submodule(path)
    names = [name for name in weight_names(module) if any(f".{join(path, name)}".endswith(f".{a}") for a in asked)]
    taken = [found.pop(at + _WRAPPER * k + key, None) for k in reversed(range(len(names))) for key in (A, B)]
    for name, a, b in zip(names, taken[::2], taken[1::2]):
        if a is None or b is None:
            continue
        weight = getattr(module, name)
        if weight.dim() == 3:
            a, b = a.reshape(len(weight), -1, a.shape[-1]), b.reshape(len(b), -1, len(weight)).permute(2, 0, 1)
            a, b = (b.mT, a.mT) if _turned(fields, module, weight, a) else (a, b)
        found[f"{at}{name}.{A}"], found[f"{at}{name}.{B}"] = a.contiguous(), b.contiguous()


def _turned(fields: Mapping[str, Any], module: nn.Module, weight: Tensor, a: Tensor) -> bool:
    """Whether a file has the factors of the transposed matrices: of a stack PEFT took another axis for the input before 0.19.1.

    The shape tells, and of square matrices the version. Older files of `to_peft` have an older version and today's axes; PEFT's own
    name a revision."""
    rows, columns = weight.shape[1:]
    now, version = not getattr(module, "is_transposed", False), version_of(fields)
    then = now if version >= EXPERTS_SINCE or "revision" not in fields else not now if version >= (0, 19) else False
    last = then if rows == columns else a.shape[-1] == columns
    return last != now and a.shape[-1] in (rows, columns)


READ_AT: dict[tuple[type[nn.Module], ...], set[str]] = {
    **{(nn.Embedding,): {"LORA"}, CLASSES: {"LORA", "IA3", "LOHA", "ADALORA"}},
    (nn.MultiheadAttention,): set(),
}
"""The PEFT types that are read at layers which are no linear ones."""


def unread(model: nn.Module, method: str, name: str) -> str | None:
    """Return the fault of a tensor at a layer where its method is not read, though PEFT has it there, or None."""
    modules = dict(model.named_modules())
    path = name.rpartition(".")[0]
    while path and path not in modules:
        path = path.rpartition(".")[0]
    kind = type(modules[path])
    if any(issubclass(kind, classes) and method not in methods for classes, methods in READ_AT.items()):
        way = "merge it in PEFT, merge_and_unload(), and adapt the merged model"
        return f'"{path}" ({kind.__name__}): PEFT\'s {method} is not read at such a layer: {way}'
    return None


def axes_of(model: nn.Module, path: str) -> int:
    """Count the axes that params at a path have before those of a linear layer's."""
    parent, _, name = path.rpartition(".")
    try:
        weight = getattr(model.get_submodule(parent), name, None)
    except AttributeError:  # a file of another model, which is told elsewhere
        return 0
    return int(isinstance(weight, Tensor) and weight.dim() == 3)


def as_saved(model: nn.Module, target: Target, tensors: Mapping[str, Tensor], targets: Sequence[Target]) -> Tensors:
    """Return the tensors of one target of LoRA or IA3 with the keys, from the model's root, and the shapes that PEFT's file has."""
    if issubclass(target.kind, EmbeddingKind):
        keys = {ours: theirs for theirs, ours in EMBEDDING.items()}
        return {join(target.path, keys[key]): t for key, t in tensors.items()}
    if issubclass(target.kind, ConvKind):
        kernel: Any = model.get_submodule(target.path).weight
        ones = [1] * (kernel.dim() - 2)
        shapes = {A: (-1, *kernel.shape[1:]), B: (len(kernel), -1, *ones), GATE: (1, -1, *ones), MAGNITUDE: (1, -1, *ones)}
        return {join(target.path, key): t.reshape(shapes.get(key, t.shape)) for key, t in tensors.items()}
    if is_parameter(target):
        return _wrapped(model, target, tensors, {t.path for t in targets})
    return {join(target.path, key): t for key, t in tensors.items()}


def _wrapped(model: nn.Module, target: Target, tensors: Mapping[str, Tensor], paths: set[str]) -> Tensors:
    parent, _, own = target.path.rpartition(".")
    names = [name for name in weight_names(model.get_submodule(parent)) if join(parent, name) in paths]
    at = join(parent, _WRAPPER * (len(names) - 1 - names.index(own)))
    a, b = tensors[A], tensors[B]
    if a.dim() == 3:
        a, b = a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)
    return {at + A: a.contiguous(), at + B: b.contiguous()}


def unsaved(model: nn.Module, target: Target, cfg: AdapterConfig, asked: Sequence[str] = ()) -> str | None:
    """Return the reason why PEFT cannot keep a variant at a target, or None. `asked` is a file's `target_parameters`."""
    layer: Any = model.get_submodule(target.kind.host(target.path))
    if in_attention(model, target.path):
        return "inside nn.MultiheadAttention: PEFT adds the update of its output projection twice"
    elsewhere = uncalled(model, target, cfg, _weight_asked(layer, target.path, asked))
    if elsewhere:
        return elsewhere
    if issubclass(target.kind, ParameterKind | EmbeddingKind) and (cfg.name != "lora" or getattr(cfg, "lora_bias", False)):
        lacking = "no lora_bias" if cfg.name == "lora" else "LoRA alone"
        return f"on {'an embedding' if issubclass(target.kind, EmbeddingKind) else 'a parameter'}: PEFT has {lacking} there"
    if not issubclass(target.kind, ConvKind):
        return None
    if issubclass(target.kind, TransposedConvKind):
        return "on a transposed convolution: PEFT adapts none"
    if cfg.name in ("ia3", "ia3_ff") and layer.weight.dim() == 3:
        return "on a Conv1d: PEFT's IA3 takes images and volumes"
    if cfg.name == "ia3_ff" and (layer.groups > 1 or layer.weight[0, 0].numel() > 1):
        return "on a convolution: PEFT gates each channel of its input, and a gate here is one for each entry of a patch"
    if cfg.name in ("ia3", "ia3_ff"):
        return None
    if cfg.name == "loha":
        return "on a Conv3d or a padding mode, which PEFT's LoHa leaves out" if _unusual(layer) else None
    if cfg.name == "adalora" and layer.weight.dim() == 4 and layer.groups == 1 and layer.padding_mode == "zeros":
        return None  # an update of patches, of nn.Conv2d alone
    if cfg.name not in ("lora", "dora", "pissa", "olora", "mica"):
        return "on a convolution: PEFT has another definition there, or none"
    if layer.groups > 1:
        return "on a convolution in groups: in PEFT's update an output sees the channels of all groups, which no kernel in groups holds"
    if layer.padding_mode != "zeros" or max(layer.dilation) > 1:
        return "on a convolution with dilation or a padding mode, which PEFT's LoRA leaves out"
    return None


def _unusual(layer: Any) -> bool:
    return layer.padding_mode != "zeros" or layer.weight.dim() == 5


def not_linear(kind: type[Kind]) -> str | None:
    """Return why a start that PEFT decomposes from the weight has another meaning at a kind of layer, or None.

    It decomposes the weight as it is stored, transposed in a Conv1D, and rounds the residual of a quantised one again."""
    return None if issubclass(kind, LinearKind | FalconKind) else "PEFT's start has this meaning in an nn.Linear alone"


def transposed(kind: type[Kind]) -> str | None:
    """Return why singular vectors of PEFT's have another meaning at a kind of layer, or None."""
    return "PEFT decomposes an embedding the other way round" if issubclass(kind, EmbeddingKind) else None


def is_parameter(target: Target) -> bool:
    """Whether PEFT names the target among `target_parameters`."""
    return issubclass(target.kind, ParameterKind)


def is_embedding(target: Target) -> bool:
    """Whether the target is an embedding, at which PEFT drops nothing."""
    return issubclass(target.kind, EmbeddingKind)


def is_linear(target: Target) -> bool:
    """Whether the target is a linear layer whose weight is dense."""
    return issubclass(target.kind, LinearKind)


def is_packed(module: nn.Module) -> bool:
    """Whether a layer's weight is stored in another form than the layer computes with."""
    kind = kind_of(module)
    return getattr(module, "weight", None) is None or (kind is not None and issubclass(kind, FrozenQuantised))


def is_conv1d(target: Target) -> bool:
    """Whether the target is a layer of transformers' `Conv1D`, which PEFT knows by `fan_in_fan_out`."""
    return issubclass(target.kind, Conv1DKind)


def kernel_of(model: nn.Module, target: Target) -> tuple[int, ...] | None:
    """Return the shape of one output's weights: `(i,)` of an `nn.Linear`, `(i, *kernel)` of a convolution. None of other kinds.

    A transposed convolution keeps its channels the other way, and no tool says which way its factors lie.
    """
    if issubclass(target.kind, ConvKind) and not issubclass(target.kind, TransposedConvKind):
        layer: Any = model.get_submodule(target.path)
        return tuple(layer.weight.shape[1:])
    return (target.i,) if issubclass(target.kind, LinearKind) else None
