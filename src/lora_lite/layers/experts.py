"""The experts of a mixture in one module, as transformers keeps them: weights `(n, o, i)`, each adapted by params `(n, ...)`.

In a copy the experts' forward is this file's: tokens are sorted by expert and each expert that is hit runs the variant on its own tokens,
so that no update of a weight is formed, and nothing at all for experts that are not hit. It serves every class that has transformers'
protocol of experts (`has_gate`, `has_bias`, `is_transposed`, `_apply_gate`), whichever implementation the model's config names.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from lora_lite.core.frozen import Frozen, plus
from lora_lite.core.tree import join
from lora_lite.layers.access import weight_names
from lora_lite.layers.kind import Kind, Params, Run, Variant
from lora_lite.layers.linear import keeps_codes
from lora_lite.layers.parameter import ParameterKind

_WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")
_PROTOCOL = ("num_experts", "has_gate", "has_bias", "is_transposed", "_apply_gate")


def has_experts(module: nn.Module) -> bool:
    """Whether a module keeps the weights of experts by transformers' protocol."""
    names = weights_of(module)
    return "down_proj" in names and all(hasattr(module, n) for n in _PROTOCOL) and _first(module) in names


def weights_of(module: nn.Module) -> list[str]:
    """List the weights of experts in a module, in the order of transformers."""
    names = weight_names(module)
    return [name for name in _WEIGHTS if name in names]


def _first(module: Any) -> str:
    return "gate_up_proj" if module.has_gate else "up_proj"


class Routes(NamedTuple):
    """The routing of an expert layer's input rows, sorted by expert.

    Attributes:
        experts: the expert of each row, `(s,)`.
        tokens: the token that each row is of, `(s,)`.
        counts: rows of each expert, or None where numbers cannot be read, under `vmap` and while compiling.
        total: number of tokens.
    """

    experts: Tensor
    tokens: Tensor
    counts: list[int] | None
    total: int

    def only(self, rows: Tensor) -> "Routes":
        """Return the routes of some of the rows, in their order."""
        experts = self.experts[rows]
        counts = None if self.counts is None else _counts(experts, len(self.counts))
        return Routes(experts, self.tokens[rows], counts, self.total)


def _counts(experts: Tensor, n: int) -> list[int]:
    counts: list[int] = torch.bincount(experts, minlength=n).tolist()
    return counts


class _Expert(Frozen):
    """The linear map of one expert. Its bias is added to a finished product, as in transformers: a fused one may round otherwise."""

    def __call__(self, x: Tensor) -> Tensor:
        return plus(self.matmul(x), self.bias)


class ExpertsKind(ParameterKind):
    """A weight of experts. Its input holds the rows of all experts, sorted, and `routes` assigns each row to its expert."""

    gives: ClassVar[AbstractSet[str]] = Kind.gives - {"inputs", "positions"}
    sees_inputs: ClassVar[bool] = True
    takes_shifts: ClassVar[bool] = True
    why: ClassVar[str] = "Its inputs are the tokens of all experts at once, without their places in the text."

    def __init__(self, layer: Any, constants: Params | None = None, name: str = "down_proj", routes: Routes | None = None) -> None:
        super().__init__(layer, constants, name)
        self.routes = routes

    @classmethod
    def places(cls, path: str, module: nn.Module, linear: Callable[[nn.Module], Any]) -> Iterator[str]:
        if has_experts(module) and not keeps_codes(module._parameters):
            yield from (join(path, name) for name in weights_of(module))

    @classmethod
    def install(cls, clone: nn.Module, path: str) -> None:
        """Let the experts' module run each expert on its own tokens."""
        module = clone.get_submodule(cls.host(path))
        vars(module)["forward"] = functools.partial(_forward, module)

    @property
    def bias(self) -> Tensor | None:
        return self.own("bias") if getattr(self.layer, "has_bias", False) else None

    def one(self, weight: Tensor, bias: Tensor | None, constants: Params) -> Frozen:
        return _Expert(weight, bias, constants, self.training)

    def bind(self, layer: nn.Module, binding: Any) -> None:
        vars(layer)[_bound(self.state["weight"])] = binding

    def call(self, run: Run, own: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        x, routes = args
        return run(self._with(routes), x)

    def frozen(self, own: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        x, routes = args
        return self._with(routes).apply(lambda params, W, rows: W(rows), {}, x)

    def given(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        x, routes = args
        by_token: Tensor = x.new_zeros(routes.total, x.shape[1]).index_add(0, routes.tokens, x)
        return by_token

    def _with(self, routes: Routes) -> "ExpertsKind":
        return type(self)(self.layer, self.constants, self.state["weight"], routes)

    def apply(self, f: Variant | Callable[..., Tensor], params: Params, x: Tensor) -> Tensor:
        routes = self._required()
        if routes.counts is None:
            return self._row_by_row(f, {name: p[routes.experts] for name, p in params.items()}, x)
        parts = zip(self.split(params), self.parts, x.split(routes.counts))
        return torch.cat([f(p, W, rows) for p, W, rows in parts if len(rows)] or [x.new_zeros(0, self.out_features)])

    def _required(self) -> Routes:
        if self.routes is None:
            raise ValueError("ExpertsKind: expected the routes of its rows, found none. Call the experts' module, not its weight.")
        return self.routes

    def _row_by_row(self, f: Callable[..., Tensor], params: Params, x: Tensor) -> Tensor:
        """Gather each row's own weight, as the `batched_mm` implementation does: no shape depends on the routing."""
        routes = self._required()
        stacks = {"weight": self.weight, **({} if self.bias is None else {"bias": self.bias})}
        weights, constants = ({name: t[routes.experts] for name, t in tree.items()} for tree in (stacks, self.constants))

        def one(params: Params, weights: Params, constants: Params, row: Tensor) -> Tensor:
            return f(params, self.one(weights["weight"], weights.get("bias"), constants), row)

        return torch.vmap(one, randomness="different")(params, weights, constants, x)

    def apply_rows(self, f: Variant, params: Params, x: Tensor, index: Tensor | None) -> Tensor:
        """Apply a variant to each expert's rows, those of one member of stacked params `(k, n, ...)` at a time.

        `index` names the member of each row of the batch, None equal contiguous groups. Rows have equal shares of the tokens, in order.
        """
        routes = self._required()
        members = next(iter(params.values())).shape[0]
        rows = members if index is None else index.shape[0]
        if routes.total % rows:
            raise ValueError(f"expected tokens of {rows} rows of one length, found {routes.total} tokens. Pad the rows.")
        owner = routes.tokens // (routes.total // rows)
        owner = owner if index is None else index.to(owner.device)[owner]
        if routes.counts is None:
            return self._row_by_row(f, {name: p[owner, routes.experts] for name, p in params.items()}, x)
        each = {name: p.unbind(0) for name, p in params.items()}
        order = owner.argsort(stable=True)
        pieces = []
        for k, mine in enumerate(order.split(_counts(owner, members))):
            W = self._with(routes.only(mine))
            pieces.append(W.apply(f, {name: p[k] for name, p in each.items()}, x[mine]))
        return torch.cat(pieces)[order.argsort()]


def _forward(experts: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Run each expert on its own tokens."""
    x, index, weights = (*args, *kwargs.values())
    routes, order = routed(index, experts.num_experts)
    h = _linear(experts, _first(experts), x[routes.tokens], routes)
    h = experts._apply_gate(h) if experts.has_gate else experts.act_fn(h)
    h = _linear(experts, "down_proj", h, routes)
    if getattr(experts, "has_post_expert_norm", False):
        h = experts.post_expert_norm(h)
    h = h * weights.reshape(-1)[order, None]
    return torch.zeros_like(x).index_add(0, routes.tokens, h.to(x.dtype))


def routed(index: Tensor, experts: int) -> tuple[Routes, Tensor]:
    """Sort a router's choices `(tokens, k)` by expert, with the place of each in `index`. Indices past the last are left out."""
    flat, k = index.reshape(-1), index.shape[-1]
    if torch.compiler.is_compiling() or torch._C._functorch.is_batchedtensor(flat):
        order = torch.arange(flat.shape[0], device=flat.device)
        return Routes(flat, order // k, None, index.shape[0]), order
    order = flat.argsort(stable=True)
    counts = _counts(flat, experts)[:experts]
    order = order[: sum(counts)]
    return Routes(flat[order], order // k, counts, index.shape[0]), order


def _bound(name: str) -> str:
    return f"_lora_lite_{name}"  # the attribute with a target's binding


def _linear(experts: Any, name: str, x: Tensor, routes: Routes) -> Tensor:
    """Apply one weight of the experts to sorted rows, by its variant where it is a target."""
    binding = getattr(experts, _bound(name), None)
    if binding is not None:
        y: Tensor = binding(x, routes)
        return y
    return ExpertsKind(experts, name=name, routes=routes).apply(lambda params, W, rows: W(rows), {}, x)
