"""Block outputs: hidden states `(b, t, d)` that a variant edits. `W.prompt` masks the positions of each row's prompt."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_lite.core.frozen import Frozen
from lora_lite.core.tracing import vmap_rows
from lora_lite.layers.kind import Params, Run, Variant, of_rows
from lora_lite.layers.module import ModuleKind
from lora_lite.layers.norm import is_norm
from lora_lite.layers.prompt import PROMPT, note_prompt

Own = Callable[..., Any]
IsLinear = Callable[[nn.Module], Any]


class BlockKind(ModuleKind):
    """A block whose output a variant edits. The output is the variant's input, and so `W(x) = x`."""

    site: ClassVar[str] = "block"
    gives: ClassVar[AbstractSet[str]] = Frozen.gives - {"positions"}
    why: ClassVar[str] = "A block's output has no weight of its own."

    def __init__(self, layer: Any, constants: Params | None = None, width: int = 0) -> None:
        super().__init__(layer, constants)
        self.width = width or width_of_block(layer)

    @classmethod
    def places(cls, path: str, module: nn.Module, linear: IsLinear) -> Iterator[str]:
        """Yield the members of module lists that hold linear layers: the repeated blocks."""
        if path and isinstance(module, nn.ModuleList | nn.Sequential):
            for name, block in module.named_children():
                if not linear(block) and any(linear(m) for m in block.modules()):
                    yield f"{path}.{name}"

    @classmethod
    def holders(cls, path: str, shared: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
        return ()  # its weights are not adapted

    @classmethod
    def install(cls, clone: nn.Module, path: str) -> None:
        note_prompt(clone, path)

    @property
    def in_features(self) -> int:
        """Width of the hidden states, `d`."""
        return self.width

    @property
    def out_features(self) -> int:
        """Width of the hidden states, `d`."""
        return self.width

    def __call__(self, x: Tensor) -> Tensor:
        return x

    def call(self, run: Run, own: Own, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        out = own(*args, **kwargs)
        h = out if isinstance(out, Tensor) else out[0]
        if not isinstance(h, Tensor) or h.dim() != 3 or h.shape[-1] != self.width:
            found = f"shape {tuple(h.shape)}" if isinstance(h, Tensor) else type(h).__name__
            raise ValueError(f"adapt: expected a block to give hidden states (b, t, {self.width}), found {found}. Name blocks that do.")
        new = run(self.with_prompt(self._prompt(h)), h)
        return new if isinstance(out, Tensor) else (new, *out[1:])

    def beside(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        return {}  # the block itself runs once, on all rows

    def results(self, y: Any) -> dict[str, Tensor]:
        return {}  # what a block returns beside its hidden states is passed on as it is

    def _prompt(self, h: Tensor) -> Tensor:
        noted = self.layer._buffers.get(PROMPT)
        everywhere = noted is None or noted.shape != h.shape[:2]
        return torch.ones(h.shape[:2], dtype=torch.bool, device=h.device) if everywhere else noted

    def with_prompt(self, prompt: Tensor) -> "BlockKind":
        """Return the block in a call whose prompt is known, `(b, t)`."""
        W = type(self)(self.layer, self.constants, self.width)
        W.prompt = prompt
        return W

    def apply_rows(self, f: Variant, params: Params, x: Tensor, index: Tensor | None) -> Tensor:
        params, rows = of_rows(params, index)
        if not rows or x.shape[0] % rows:
            raise ValueError(f"expected hidden states of a multiple of {rows} rows, found shape {tuple(x.shape)}. Leave the block out.")
        prompt = self._prompt(x) if self.prompt is None else self.prompt
        each = x.unflatten(0, (rows, -1)), prompt.to(x.device).unflatten(0, (rows, -1))
        return vmap_rows(lambda p, x, prompt: f(p, self.with_prompt(prompt), x), params, *each).flatten(0, 1)

    def changes(self, f: Variant, params: Params) -> list[tuple[Tensor, Tensor]]:
        raise ValueError("edits the output of a block, which has no weight")

    def readable(self) -> list[str]:
        return []


def width_of_block(layer: nn.Module) -> int:
    """Return the width of the hidden states that a block passes on: that of its outermost norm, else of its first linear layer's input."""
    norms = [(name.count("."), module) for name, module in layer.named_modules() if is_norm(module)]
    if norms:  # the deeper ones may be of single attention heads
        return min(norms, key=lambda found: found[0])[1].weight.shape[-1]
    from lora_lite.layers.kinds import kind_of  # the table has this kind in it

    linear = next((kind(module) for module in layer.modules() if (kind := kind_of(module)) is not None), None)
    if linear is not None:
        return linear.in_features
    raise ValueError("find_targets: expected blocks with a norm or a linear layer, found one with neither. Name other blocks.")
