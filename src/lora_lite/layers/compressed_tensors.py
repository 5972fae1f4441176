"""compressed-tensors' layers: `nn.Linear` modules with a forward of the library's on the instance, and at first without a weight.

The library unpacks the whole model in its first call, by a hook that would do so in a private copy too. So such layers are refused, with
the way to load the model unpacked.
"""

from typing import Any, ClassVar

from torch import nn

from lora_lite.layers.quantised import FrozenQuantised


class CompressedTensorsKind(FrozenQuantised):
    """A layer that compressed-tensors has given a scheme, packed or unpacked."""

    classes: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear,)

    @classmethod
    def fits(cls, layer: nn.Module) -> bool:
        return cls.may_fit(type(layer)) and vars(layer).get("quantization_scheme") is not None and "forward" in vars(layer)

    @classmethod
    def fault(cls, layer: Any) -> str | None:
        return (
            "runs a forward of compressed-tensors, which unpacks weights in the model's first call: load the model unpacked, "
            "quantization_config=transformers.CompressedTensorsConfig(dequantize=True)"
        )
