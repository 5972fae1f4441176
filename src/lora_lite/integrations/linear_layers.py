"""`LinearLayers`: params as weights of `nn.Linear` layers, for tools that see nothing else.

K-FAC and its kin (laplace-torch's Kronecker factors, curvlinops, kronfluence) read a gradient off the input and the output gradient of an
`nn.Linear`. The params of a variant enter a formula of their own, so those tools pass `adapt.module(params)` over. Here each leaf of params
is the weight of a layer that is called with the identity once for each row of the batch. Its output is the leaf as that row sees it, and
`adapt.mixed` runs the row through it. So the output's gradient is the row's own gradient of the leaf, for every variant.

Such a tool takes the columns of the output for positions of one input. Its factor of the inputs is the identity, and that of the outputs
holds the covariance of the leaf's rows, or of its columns where those are longer. For a vector that is the whole block, without an
approximation. For LoRA's `A` it is the covariance of the layer's input, for `B` that of its output gradient, as in K-FAC of two linear
layers. The `r x r` factors between them are taken for the identity.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_lite.adapt import Adapt
from lora_lite.core.errors import require_type
from lora_lite.core.tree import Tree
from lora_lite.transforms.per_example import rows_of


class LinearLayers(nn.Module):
    """An adapted model whose modules are `nn.Linear` layers without bias, one for each leaf of params.

    Called with what the model takes, it returns what the adapted model does, in one mixed batch in which every row is a member. The frozen
    model is no child of it: the leaves are all its parameters.

    Args:
        adapt: the adapted model.
        params: where the weights start; they are copied.

    Raises:
        ValueError: where `params` does not fit, or a call holds no tensor whose first axis is its rows.
        TypeError: where `adapt` is no `Adapt`.

    Example:
        >>> import torch, lora_lite as ll
        >>> from lora_lite.integrations.linear_layers import LinearLayers
        >>> adapt = ll.build(torch.nn.Sequential(torch.nn.Linear(8, 4)), ll.LoRAConfig(r=2))
        >>> module = LinearLayers(adapt, adapt.init(seed=0))
        >>> {name: tuple(p.shape) for name, p in module.named_parameters()}
        {'layers.0/A.weight': (8, 2), 'layers.0/B.weight': (4, 2)}
        >>> module(torch.randn(5, 8)).shape
        torch.Size([5, 4])
    """

    def __init__(self, adapt: Adapt, params: Mapping[str, Mapping[str, Tensor]]) -> None:
        super().__init__()
        require_type(isinstance(adapt, Adapt), "LinearLayers(adapt, params)", "adapt", "what build or load returned", adapt)
        adapt._require(params, "LinearLayers")
        self.adapt = adapt
        self.layers, self.paths = nn.ModuleDict(), list(params)  # a target may have none but shared params
        self.shapes = {(path, name): tuple(leaf.shape) for path, leaves in params.items() for name, leaf in leaves.items()}
        for path, name in self.shapes:
            self.layers[_key(path, name)] = _layer(params[path][name])

    def _layer(self, path: str, name: str) -> nn.Linear:
        return cast("nn.Linear", self.layers[_key(path, name)])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        batch = args[0] if len(args) == 1 and not kwargs else args
        if not args:
            batch, kwargs = kwargs, {}
        rows = rows_of(batch)
        members: Tree = {path: {} for path in self.paths}
        for (path, name), shape in self.shapes.items():
            layer = self._layer(path, name)
            weight = layer.weight
            eye = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device).expand(rows, -1, -1)
            columns = layer(eye)  # (rows, in, out)
            members[path][name] = (columns if _is_lying(shape) else columns.transpose(1, 2)).reshape(rows, *shape)
        return self.adapt.mixed(members, batch, **kwargs)

    def params(self) -> Tree:
        """Return detached copies of the weights as params, in the variant's own shapes."""
        read: Tree = {path: {} for path in self.paths}
        for (path, name), shape in self.shapes.items():
            weight = self._layer(path, name).weight.detach()
            read[path][name] = (weight.t() if _is_lying(shape) else weight).reshape(shape).clone()
        return read


def _key(path: str, name: str) -> str:
    """Return a name for a child, which must hold no dot."""
    return f"{path}.{name}".replace("/", "//").replace(".", "/")


def _is_lying(shape: tuple[int, ...]) -> bool:
    """Whether a leaf is wider than it is high: its transpose is the weight, so that the longer axis is the layer's output."""
    return len(shape) > 1 and shape[0] < torch.Size(shape[1:]).numel()


def _layer(leaf: Tensor) -> nn.Linear:
    """Return a layer whose weight holds a leaf as a matrix, the longer axis first."""
    matrix = leaf.detach().reshape(leaf.shape[0], -1) if leaf.dim() > 1 else leaf.detach().reshape(-1, 1)
    weight = (matrix.t() if _is_lying(tuple(leaf.shape)) else matrix).contiguous().clone()
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight)
    return layer
