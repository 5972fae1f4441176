"""Weights that the code of a model writes to in its forward: they are the user's, and a call keeps no copy of them."""

from torch import Tensor, nn

from lora_lite.clone.offloaded import Offloaded
from lora_lite.clone.state import has_code, modules_of_model
from lora_lite.core.errors import listed
from lora_lite.core.tree import join


class Weights:
    """The weights of a copy, which count their changes.

    Those of torch's own layers alone are not looked at, and none that a layer of torch's writes to by itself: a table with `max_norm`, of
    which a call has a copy, and the weights of recurrent layers, which a model may lay out anew.

    Args:
        root: the copy.
    """

    def __init__(self, root: nn.Module) -> None:
        self._weights: dict[str, Tensor] = {}
        modules = modules_of_model(root)
        for path, module in modules.items() if any(map(has_code, modules.values())) else ():
            if not isinstance(module, nn.RNNBase) and getattr(module, "max_norm", None) is None:
                own = {join(path, name): p for name, p in module._parameters.items() if p is not None}
                self._weights |= {name: p for name, p in own.items() if not (p.is_inference() or isinstance(p, Offloaded))}

    def versions(self) -> list[int]:
        """Return the number of changes of each."""
        return [weight._version for weight in self._weights.values()]

    def written_since(self, versions: list[int]) -> list[str]:
        """Name the weights that have changed since they had these `versions`."""
        return [name for name, now, was in zip(self._weights, self.versions(), versions) if now != was]

    def require(self, versions: list[int]) -> None:
        """Raise unless the weights are those that had these `versions`.

        Raises:
            RuntimeError: naming those that have changed.
        """
        written = self.written_since(versions)
        if written:
            raise RuntimeError(
                f"adapt: expected a model that only reads its weights in a call, found that its forward wrote to {listed(written)}, which "
                "are the user's. Load the weights again, and let the model do that once before build: call it by itself in evaluation "
                "mode, or for RWKV set config.rescale_every = 0."
            )
