"""The demands of an adapted model's calls, with the way out where one is not met."""

from typing import TYPE_CHECKING, Any, NoReturn

import torch

from lora_lite.clone.offloaded import offloaded_in
from lora_lite.clone.params import require_fit
from lora_lite.core.elsewhere import CALLS
from lora_lite.core.errors import listed
from lora_lite.core.plan import Shapes
from lora_lite.core.tracing import require_read
from lora_lite.core.tree import flatten, tree_leaves
from lora_lite.derived.described import Described


class Required(Described):
    """The demands on params and on the frozen weights, read off a plan."""

    _on_meta: bool

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> NoReturn:
            """Raise, and name the module that has it, such as `parameters` or `generate`."""
            base = getattr(vars(self).get("_plan"), "base", None)
            way = f" It is a function of params, no module: use adapt.module(params).{name}." if hasattr(base, name) else ""
            way = f" {CALLS[name]}." if name in CALLS else way
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}.{way}", name=name, obj=self)

    def _require(self, params: Any, caller: str, shapes: Shapes | None = None) -> torch.dtype | None:
        return require_fit(params, shapes or self.shapes, caller, self._on_meta)

    def _require_finite(self, params: Any, caller: str) -> None:
        require_read(tree_leaves(params), caller)
        strange = [where for where, leaf in flatten(params).items() if not bool(leaf.isfinite().all())]
        if strange:
            raise ValueError(
                f"{caller}: expected finite params, found inf or nan at {listed(strange)}. Take those from before the training went astray."
            )

    def _require_stored(self, params: Any, caller: str) -> None:
        require_read(tree_leaves(params), caller)
        odd = [where for where, leaf in flatten(params).items() if leaf.is_meta or leaf.layout is not torch.strided]
        if odd:
            raise ValueError(
                f"{caller}: expected dense params with data, found them on meta or sparse at {listed(odd)}. Pass params of a model with "
                "weights, or dense ones: leaf.to_dense()."
            )

    def _require_in_memory(self, caller: str) -> None:
        names = list(offloaded_in(self._plan.base))
        if names:
            raise ValueError(
                f"adapt.{caller}: expected weights in memory, found those that accelerate offloads at {listed(names)}. Load the model "
                "without offloading, or where its weights were in memory first take that off with "
                "accelerate.hooks.remove_hook_from_module(model, recurse=True), and build again; the params fit both."
            )
        if self._on_meta:
            raise ValueError(
                f"adapt.{caller}: expected weights with data, found a model on meta. Build on the loaded model; the params fit both, where "
                "they have data."
            )

    def _require_whole(self, caller: str) -> None:
        if self._plan.sharding is not None:
            raise ValueError(
                f"adapt.{caller}: expected whole weights, found a base that is sharded over {self._plan.sharding.mesh.size()} processes. "
                "Call it on an adapt that is not; the params fit both."
            )
