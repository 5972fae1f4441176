"""The table of the kinds that ship. `kinds=` puts a user's own before them."""

import functools
import inspect
from collections.abc import Sequence
from typing import Any

from torch import nn

from lora_lite.core.errors import listed
from lora_lite.core.frozen import USES
from lora_lite.layers.awq import AWQKind, GPTQModelAWQKind
from lora_lite.layers.bitnet import BitLinearKind
from lora_lite.layers.bitsandbytes import Linear4bitKind, Linear8bitKind
from lora_lite.layers.block import BlockKind
from lora_lite.layers.compressed_tensors import CompressedTensorsKind
from lora_lite.layers.convolution import ConvKind, GroupedConvKind
from lora_lite.layers.embedding import EmbeddingKind
from lora_lite.layers.experts import ExpertsKind
from lora_lite.layers.fp8 import FP8Kind, RowFP8Kind
from lora_lite.layers.gemma import GemmaKind
from lora_lite.layers.gguf import DiffusersGgufKind, GgufKind
from lora_lite.layers.gptq import AutoGPTQKind, GPTQModelKind
from lora_lite.layers.hqq import HQQKind
from lora_lite.layers.kind import Kind
from lora_lite.layers.linear import Conv1DKind, FalconKind, LinearKind
from lora_lite.layers.module import ModuleKind
from lora_lite.layers.norm import NormKind
from lora_lite.layers.own_forward import OwnForwardConvKind, OwnForwardEmbeddingKind, OwnForwardKind, OwnForwardTransposedKind
from lora_lite.layers.parameter import ParameterKind
from lora_lite.layers.tensor_class import QuantoKind, TensorClassKind
from lora_lite.layers.transposed import TransposedConvKind

KINDS: tuple[type[Kind], ...] = (
    *(Linear4bitKind, Linear8bitKind, HQQKind, GPTQModelKind, AutoGPTQKind, AWQKind, GPTQModelAWQKind),
    # Before the linear layers that some of these are subclasses of.
    *(FP8Kind, RowFP8Kind, BitLinearKind, GemmaKind, GgufKind, DiffusersGgufKind, CompressedTensorsKind, QuantoKind, TensorClassKind),
    *(FalconKind, OwnForwardKind, LinearKind, Conv1DKind),
    *(OwnForwardEmbeddingKind, OwnForwardConvKind, OwnForwardTransposedKind),
    *(EmbeddingKind, ConvKind, GroupedConvKind, TransposedConvKind, NormKind, ModuleKind, BlockKind),
    *(ExpertsKind, ParameterKind),  # last: parameters of modules that no other kind reads
)
"""The kinds that ship, in the order in which they are asked."""

SITES = {
    "linear": ("linear layer", "nn.Linear or Conv1D layers"),
    "norm": ("norm", "norms with a weight"),
    "module": ("module", "modules with floating parameters"),
    "block": ("block", "blocks of a module list that hold linear layers"),
}
"""The values of a variant's fact `adapts`, each with two phrases for messages: the singular, and the layers that a model should have."""


def as_kinds(kinds: Any) -> tuple[type[Kind], ...]:
    """Check the kinds that a user gives.

    Raises:
        TypeError: where they are no sequence of kinds.
        ValueError: where one is of a site that there is none of, or gives parts that no variant uses.
    """
    given = kinds if isinstance(kinds, Sequence) and not isinstance(kinds, str) else None
    if given is None or not all(isinstance(kind, type) and issubclass(kind, Kind) for kind in given):
        raise TypeError(f"kinds: expected a sequence of subclasses of ll.Kind, found {kinds!r}. Write kinds=(ItsKind,).")
    for kind in given:
        of = kind.classes
        if not isinstance(of, type) and not (isinstance(of, tuple) and all(isinstance(cls, type) for cls in of)):
            raise TypeError(f"{kind.__name__}.classes: expected a tuple of classes, found {of!r}. Write classes = (ItsLayer,).")
        if not isinstance(inspect.getattr_static(kind, "fits"), classmethod | staticmethod):
            raise TypeError(f"{kind.__name__}.fits: expected a classmethod, found a method of instances. Write @classmethod above it.")
        for fact, words, known in (("site", [kind.site], SITES), ("gives", kind.gives, _PARTS)):
            if unknown := sorted(set(words) - set(known)):
                raise ValueError(
                    f"{kind.__name__}.{fact}: expected words among {listed(known, 20)}, found {listed(unknown)}. Change the class variable."
                )
    return tuple(given)


_PARTS = (*USES, "inputs", "dropout", "moved")


def candidates(layer: nn.Module) -> tuple[type[Kind], ...]:
    """Return the kinds that ship of which modules of a layer's class can be, in the order in which they are asked."""
    of: Any = type(layer)
    return _of_class(of)


@functools.lru_cache(1024)  # every build asks of every module
def _of_class(of: Any) -> tuple[type[Kind], ...]:
    return tuple(kind for kind in KINDS if kind.may_fit(of))


def kind_of(layer: nn.Module, kinds: Sequence[type[Kind]] = ()) -> type[Kind] | None:
    """Find the kind of a linear layer that a config takes without naming it. None for other modules."""
    asked = (*kinds, *candidates(layer))
    return next((kind for kind in asked if kind.site == "linear" and not kind.by_name and kind.fits(layer)), None)
