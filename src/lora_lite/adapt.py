"""`Adapt`: what `build` returns. A function of params and batch over a private clone of the model, and what can be asked of it."""

import dataclasses
import hashlib
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lora_lite._errors import several, tree_faults
from lora_lite._tree import Tree
from lora_lite.audit import Audit
from lora_lite.bind import Shapes, adapt_layer, call, placed, read_params, rebind, volatile_buffers
from lora_lite.clone import clone_module
from lora_lite.config import AdapterConfig
from lora_lite.counts import macs_per_token
from lora_lite.frozen import Constants
from lora_lite.merge import merge
from lora_lite.remat import install
from lora_lite.targets import Target, Targets


@dataclass(frozen=True)
class Plan:
    """All that `build` decided: each target with its config, shapes and constants, over a plain clone of the model."""

    base: nn.Module
    entries: tuple[tuple[Target, AdapterConfig], ...]
    shapes: Shapes
    constants: dict[str, Constants]
    remat: str | None


class _Replica:
    """One thread's clone. `functional_call` swaps tensors into modules, so two threads must not share one."""

    def __init__(self, module: nn.Module, paths: list[str]) -> None:
        self.module = module
        self.volatile = volatile_buffers(module)
        self.audit = Audit(module, paths)

    def __call__(self, tensors: dict[str, Tensor], batch: Any, kwargs: Mapping[str, Any]) -> Any:
        state = {name: buffer.clone() for name, buffer in self.volatile.items()}
        if torch.compiler.is_compiling() or not self.audit.unseen:
            return call(self.module, {**tensors, **state}, batch, kwargs)
        with self.audit.watch():
            return call(self.module, {**tensors, **state}, batch, kwargs)


class Adapt:
    """An adapted model as a function: `adapt(params, batch)`.

    Made by `build` or `load`. It holds no trained state: params are a plain tree `{target path: {name: tensor}}`, made by `init`
    and passed to every call, so that any `torch.func` transform composes. The user's model is never touched.

    Example:
        >>> import torch, lora_lite as ll
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4))
        >>> adapt = ll.build(model, ll.LoRAConfig(r=2))
        >>> params = adapt.init(seed=0)
        >>> x = torch.randn(3, 8)
        >>> bool((adapt(params, x) == model(x)).all())
        True
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._paths = [target.path for target, _ in plan.entries]
        self._main = _Replica(self._bound_clone(), self._paths)
        self._plain = _Replica(plan.base, [])
        self._local = threading.local()
        self._local.replicas = {"adapted": self._main, "base": self._plain}

    def __call__(self, params: Mapping[str, Mapping[str, Tensor]], batch: Any, **kwargs: Any) -> Any:
        """Run the adapted model.

        Args:
            params: a tree as `init` makes it; leaves may be of any floating dtype.
            batch: a mapping (`model(**batch)`), a tuple or list (`model(*batch)`) or a tensor (`model(batch)`).
            kwargs: further keywords for the model.

        Returns:
            What the model returns.

        Raises:
            ValueError: where `params` does not fit; it lists each departure. Where the model turns out never to call a target.
            TypeError: for a batch of another type.
        """
        self._require(params, "adapt")
        return self._replica("adapted")(placed(params), batch, kwargs)

    def base(self, batch: Any, **kwargs: Any) -> Any:
        """Run the frozen model, as `adapt` runs the adapted one."""
        return self._replica("base")({}, batch, kwargs)

    @torch.no_grad()
    def init(self, seed: int = 0) -> Tree:
        """Make fresh params.

        Args:
            seed: any integer. Each target draws from a generator of its own, seeded by this and its path, so that a layer's start
                does not depend on which others are adapted.

        Returns:
            `{target path: {name: tensor}}` in the config's dtype, on the layers' devices. The global random state is not used.
        """
        return {target.path: self._init_target(target, cfg, seed) for target, cfg in self._plan.entries}

    def module(self, params: Mapping[str, Mapping[str, Tensor]]) -> nn.Module:
        """Give an `nn.Module` of the model's own class with copies of `params` as its only trainable parameters.

        For what needs a module: `generate`, `Trainer`, DDP. The frozen weights are shared with the model. `params` reads back.

        Raises:
            ValueError: where `params` does not fit.
        """
        self._require(params, "module")
        module = self._copy_of(self._main.module)
        for target, cfg in self._plan.entries:
            layer = module.get_submodule(target.path)
            for (name, attribute) in layer._lora_lite.names:
                leaf = params[target.path][name].detach().clone()
                layer.register_parameter(attribute, nn.Parameter(leaf))
        return module

    def params(self, module: nn.Module) -> Tree:
        """Read the params out of a module that `module` made; detached copies.

        Raises:
            ValueError: where `module` is not one.
        """
        module = getattr(module, "module", module) if isinstance(module, nn.parallel.DistributedDataParallel) else module
        try:
            return read_params(module, self._plan.shapes, lambda t: t.detach().clone())
        except AttributeError as e:
            raise ValueError(
                f"adapt.params: expected a module made by this adapt.module(params), found {type(module).__name__} without its "
                f"params ({e}). Pass the module itself, not the model it was built from."
            ) from e

    def merge(self, params: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Give the merged weights and biases of the targets as a state dict; the model is not touched.

        `model.load_state_dict(adapt.merge(params), strict=False)` is the user's own act.

        Raises:
            ValueError: where `params` does not fit, a variant is not linear, the adapter moves a bias that the layer lacks, or a weight is
                shared with another module.
        """
        self._require(params, "merge")
        return merge(self._main.module, self._plan.entries, params)

    def steer(self, params: Mapping[str, Mapping[str, Tensor]], c: float | Tensor) -> Tree:
        """Give the params at strength `c`: 0 is the base model, 1 the adapter; differentiable in `c` and `params`.

        Raises:
            ValueError: where `params` does not fit.
        """
        self._require(params, "steer")
        return {target.path: dict(cfg.steer(params[target.path], c)) for target, cfg in self._plan.entries}

    def train(self, mode: bool = True) -> "Adapt":
        """Give an `adapt` in training mode; this one stays as it is."""
        base = clone_module(self._plan.base)
        base.train(mode)
        return Adapt(dataclasses.replace(self._plan, base=base))

    def eval(self) -> "Adapt":
        """Give an `adapt` in evaluation mode; this one stays as it is."""
        return self.train(False)

    @property
    def targets(self) -> Targets:
        """The adapted layers, in order."""
        return Targets(target for target, _ in self._plan.entries)

    @property
    def configs(self) -> tuple[AdapterConfig, ...]:
        """The configs, one for each of `targets`."""
        return tuple(cfg for _, cfg in self._plan.entries)

    @property
    def shapes(self) -> Shapes:
        """The shape of every leaf of a params tree."""
        return self._plan.shapes

    @property
    def constants(self) -> dict[str, Constants]:
        """The variants' frozen tensors, by target path and name."""
        return {path: dict(constants) for path, constants in self._plan.constants.items()}

    @cached_property
    def num_params(self) -> int:
        """How many numbers a params tree holds."""
        return sum(torch.Size(shape).numel() for leaves in self.shapes.values() for shape in leaves.values())

    @cached_property
    def macs_per_token(self) -> int:
        """Multiply-adds that the adapter adds for one token passing through every target once."""
        return sum(self._macs.values())

    @cached_property
    def _macs(self) -> dict[str, int]:
        known: dict[Any, int] = {}
        counts = {}
        for target, cfg in self._plan.entries:
            W = self._main.module.get_submodule(target.path)._lora_lite.W
            key = (id(cfg), target.i, target.o, W.bias is None)
            if key not in known:
                shapes = self.shapes[target.path]
                params = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
                known[key] = macs_per_token(cfg, params, W)
            counts[target.path] = known[key]
        return counts

    def summary(self) -> str:
        """Give a table of path, role, shape, variant, params and multiply-adds per token, with a total."""
        rows = [("path", "role", "(o, i)", "variant", "params", "MACs/token")]
        for target, cfg in self._plan.entries:
            count = sum(torch.Size(s).numel() for s in self.shapes[target.path].values())
            path = target.path + (" (shared weight)" if target.shared_with else "")
            rows.append((path, target.role, f"({target.o}, {target.i})", cfg.name, f"{count:,}", f"{self._macs[target.path]:,}"))
        rows.append((f"{len(self._paths)} targets", "", "", "", f"{self.num_params:,}", f"{self.macs_per_token:,}"))
        widths = [max(len(row[column]) for row in rows) for column in range(6)]
        return "\n".join("  ".join(cell.ljust(w) if c < 4 else cell.rjust(w) for c, (cell, w) in enumerate(zip(row, widths))) for row in rows)

    def __repr__(self) -> str:
        variants = ", ".join(sorted({cfg.name for cfg in self.configs}))
        return f"Adapt({type(self._plan.base).__name__}, {variants}, {len(self._paths)} targets, {self.num_params:,} params)"

    def _bound_clone(self) -> nn.Module:
        clone = clone_module(self._plan.base)
        for target, cfg in self._plan.entries:
            path = target.path
            adapt_layer(clone.get_submodule(path), target, cfg, self._plan.shapes[path], self._plan.constants[path])
        install(clone, self._plan.remat)
        return clone

    def _copy_of(self, bound: nn.Module) -> nn.Module:
        copy = clone_module(bound)
        rebind(copy)
        return copy

    def _replica(self, role: str) -> _Replica:
        main = self._main if role == "adapted" else self._plain
        if torch.compiler.is_compiling():
            return main  # tracing swaps nothing in, and asking for the thread cannot be traced
        replicas = self._local.__dict__.setdefault("replicas", {})
        if role not in replicas:
            replicas[role] = _Replica(self._copy_of(main.module), self._paths if role == "adapted" else [])
        return replicas[role]

    def _require(self, params: object, caller: str) -> None:
        shapes = self._plan.shapes
        try:
            if len(params) == len(shapes) and all(_fits(params[path], leaves) for path, leaves in shapes.items()):
                return
        except (KeyError, TypeError, AttributeError):
            pass
        raise ValueError(
            f"{caller}: expected params that fit this model and config, found:\n{several(tree_faults(params, shapes))}\n"
            "Use adapt.init(...), or load(...) with the file that the params were saved to."
        )

    def _init_target(self, target: Target, cfg: AdapterConfig, seed: int) -> dict[str, Tensor]:
        W = self._main.module.get_submodule(target.path)._lora_lite.W
        params, _ = cfg.init(W, generator_for(seed, target.path))
        return {name: p.to(W.device, cfg.dtype, copy=True) for name, p in params.items()}


def _fits(leaves: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> bool:
    return len(leaves) == len(shapes) and all(
        leaves[name].shape == shape and leaves[name].is_floating_point() for name, shape in shapes.items()
    )


def generator_for(seed: int, path: str) -> torch.Generator:
    """Give a target's own generator: the seed folded with its path."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"adapt.init: expected seed as an integer, found {seed!r}. Use e.g. adapt.init(seed=0).")
    digest = hashlib.blake2b(f"{seed}:{path}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))
