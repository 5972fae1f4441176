"""Weights that the code of a model makes in its forward: a copy's are others than those of the user's model."""

from torch import nn

from lora_lite.clone.state import has_code, modules_of_model
from lora_lite.core.errors import listed
from lora_lite.core.tree import join


class Made:
    """The weights of a copy before its first call, in which a model that makes its layers late makes them.

    Args:
        root: the copy.
    """

    def __init__(self, root: nn.Module) -> None:
        modules = modules_of_model(root)
        self._root = root if any(map(has_code, modules.values())) else None
        self._tables = [(path, m._parameters, set(m._parameters)) for path, m in modules.items()] if self._root is not None else []
        self._known = {id(p) for _, table, _ in self._tables for p in table.values()}
        self._paths = {path for path, _, _ in self._tables}

    def require(self) -> None:
        """Raise where the call has made weights, and take away those that it put into modules of the copy.

        Raises:
            ValueError: naming them.
        """
        if self._root is None:
            return
        late = [(join(path, name), table, name) for path, table, names in self._tables for name in table.keys() - names]
        made = [where for where, table, name in late if table[name] is not None and id(table[name]) not in self._known]
        for _, table, name in late:
            del table[name]
        for path, module in modules_of_model(self._root).items() if not made else ():
            own = module._parameters.items() if path not in self._paths else ()
            made += [join(path, name) for name, p in own if p is not None and id(p) not in self._known]
        if made:
            raise ValueError(
                f"adapt: expected a model that has all its weights, found that its forward made {listed(made)}, which are not those of "
                "your model. Run the model on one batch before build."
            )
