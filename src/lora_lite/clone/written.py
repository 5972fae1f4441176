"""Weights that the code of a model writes to in its forward: they are the user's, and a call keeps no copy of them."""

from weakref import ReferenceType, WeakKeyDictionary, ref

from torch import nn

from lora_lite.clone.offloaded import Offloaded
from lora_lite.clone.state import has_code, modules_of_model
from lora_lite.core.errors import listed
from lora_lite.core.tree import join
from lora_lite.layers.access import renormed

Places = list[tuple[str, ReferenceType[nn.Module], str]]
_PLACES: WeakKeyDictionary[nn.Module, Places] = WeakKeyDictionary()
"""The places of the weights of a copy, or of a block of it, which asks in each of its calls.

They keep nothing: a weight may lead to its copy.
"""


def _places(root: nn.Module) -> Places:
    modules = modules_of_model(root)
    if not any(map(has_code, modules.values())):
        return []
    watched = {path: m for path, m in modules.items() if not isinstance(m, nn.RNNBase) and not renormed(m)}
    return [(join(path, name), ref(module), name) for path, module in watched.items() for name in module._parameters]


class Weights:
    """The weights of a copy, which count their changes.

    Those of torch's own layers alone are not looked at, and none that a layer of torch's writes to by itself: a table with `max_norm`, of
    which a call has a copy, and the weights of recurrent layers, which a model may lay out anew.

    Args:
        root: the copy.
    """

    def __init__(self, root: nn.Module) -> None:
        if (places := _PLACES.get(root)) is None:
            places = _PLACES[root] = _places(root)
        own = {name: None if (module := of()) is None else module._parameters.get(key) for name, of, key in places}
        self._weights = {name: p for name, p in own.items() if not (p is None or p.is_inference() or isinstance(p, Offloaded))}

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
