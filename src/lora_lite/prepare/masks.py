"""Positions that count in calibration, for each part of a model: its encoder, its decoder, its text and its images.

The layers of an encoder take the attention mask alone, those of a decoder its own mask and the labels, where an encoder is beside it; the
text layers of a model of several modalities take the masks, and its towers none. A coincidence of shapes decides nothing.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from lora_lite.layers.prompt import IGNORED

Counts = tuple[Tensor, Callable[[Tensor], Tensor]]


class Positions:
    """The positions that count for the layers of a model.

    Args:
        model: a copy of the model that runs the calibration; its encoder's output is noted as it passes.
    """

    def __init__(self, model: nn.Module) -> None:
        config: Any = getattr(model, "config", None)
        self._two_sided = bool(getattr(config, "is_encoder_decoder", False))
        self._text = None if self._two_sided else _text_parts(model, config)
        self._names = _positional(model)
        self._encoded: Tensor | None = None
        encoder = _encoder(model) if self._two_sided else None
        if encoder is not None:
            encoder.register_forward_hook(self._note)

    def _note(self, encoder: nn.Module, args: Any, output: Any) -> None:
        first = output if isinstance(output, Tensor) else next(iter(output.values()) if isinstance(output, Mapping) else iter(output), None)
        self._encoded = first if isinstance(first, Tensor) else None

    def masks(self, path: str, batch: Any, x: Tensor, label_mask: bool) -> list[Tensor]:
        """Return a batch's masks for a layer's input, each `(b, t)` and True where a position counts.

        Args:
            path: of the layer.
            batch: as `adapt` takes it.
            x: the layer's input: a decoder's keys and values are computed from the encoder's output.
            label_mask: whether positions whose label is ignored are left out.
        """
        if not self._is_text(path):
            return []
        batch = self._by_name(batch)
        if self._two_sided or any(str(key).startswith("decoder_") for key in batch):
            if _in_encoder(path) or self._is_encoded(x):
                return _kept(batch, "attention_mask")
            return _kept(batch, "decoder_attention_mask") + (_labelled(batch) if label_mask else [])
        return _kept(batch, "attention_mask") + (_labelled(batch) if label_mask else [])

    def _by_name(self, batch: Any) -> Mapping[Any, Any]:
        """Return a batch's arguments by their names, those that are given in order too."""
        if isinstance(batch, Mapping):
            return batch
        return dict(zip(self._names, batch if isinstance(batch, tuple | list) else (batch,)))

    def _is_text(self, path: str) -> bool:
        return self._text is None or any(path == part or path.startswith(f"{part}.") for part in self._text)

    def _is_encoded(self, x: Tensor) -> bool:
        seen = self._encoded
        return seen is not None and x.shape == seen.shape and x.data_ptr() == seen.data_ptr()


def _positional(model: nn.Module) -> list[str]:
    """Return the names of the arguments that a model takes in order."""
    parameters = inspect.signature(model.forward).parameters.values()
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def _kept(batch: Mapping[Any, Any], name: str) -> list[Tensor]:
    mask = batch.get(name)
    return [mask != 0] if isinstance(mask, Tensor) and mask.dim() == 2 else []


def _labelled(batch: Mapping[Any, Any]) -> list[Tensor]:
    labels = batch.get("labels")
    return [labels != IGNORED] if isinstance(labels, Tensor) and labels.dim() == 2 else []


def _in_encoder(path: str) -> bool:
    side = next((part for part in path.split(".") if "encoder" in part or "decoder" in part), "decoder")
    return "decoder" not in side  # a head is after the decoder


def _encoder(model: nn.Module) -> nn.Module | None:
    try:
        encoder = model.get_encoder()  # type: ignore[operator]
    except Exception:  # another library's, or none
        encoder = None
    encoder = encoder or getattr(model, "encoder", None)
    return encoder if isinstance(encoder, nn.Module) and encoder is not model else None


def _text_parts(model: nn.Module, config: Any) -> list[str] | None:
    """Return the paths of the parts that read text, of a model of several modalities; None of any other model."""
    text = getattr(config, "get_text_config", lambda: config)()
    if config is None or text is None or text is config:
        return None
    parts = [path for path, module in model.named_modules() if path and type(getattr(module, "config", None)) is type(text)]
    head = getattr(model, "get_output_embeddings", lambda: None)()
    heads = [path for path, module in model.named_modules() if module is head and path]
    return [*parts, *heads] if parts else None
