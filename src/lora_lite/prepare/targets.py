"""Choose which layers a config adapts: a pure function from model and config to a value that can be read and counted."""

import difflib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from lora_lite.core.config import AdapterConfig, as_config
from lora_lite.core.errors import listed
from lora_lite.core.frozen import FrozenLinear
from lora_lite.layers.find import linear_kind, named_kinds, names
from lora_lite.layers.kinds import as_kinds, kind_of
from lora_lite.layers.module import LONGER, WORDS, FrozenBlock, candidates, outermost
from lora_lite.layers.parameter import layer_of

_WIDTH_NAMES = ("hidden_size", "d_model", "n_embd", "hidden_dim", "embed_dim", "dim", "model_dim")
_INDEX = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


@dataclass(frozen=True)
class Target:
    """One layer to adapt.

    Attributes:
        path: the module's path in the model; empty where the model is itself the layer.
        kind: the class of `lora_lite.frozen` that reads the layer.
        i, o: input and output width.
        role: `"reader"`, `"writer"` or `"inner"`; of a layer that is both, the first that the config asks for.
        shared_with: paths of other modules that hold the same weight.
    """

    path: str
    kind: type[FrozenLinear]
    i: int
    o: int
    role: str
    shared_with: tuple[str, ...] = ()

    def __str__(self) -> str:
        shared = f"  weight shared with {listed(self.shared_with)}" if self.shared_with else ""
        return f"{self.path}  {self.role}  ({self.o}, {self.i}){shared}"


class Targets(tuple[Target, ...]):
    """The targets of one config, in the model's order; prints as one line a target."""

    def __str__(self) -> str:
        return "\n".join([f"{len(self)} targets", *(f"  {t}" for t in self)])


def find_targets(model: nn.Module, cfg: AdapterConfig, *, kinds: Sequence[type[FrozenLinear]] = ()) -> Targets:
    """Find the layers that `cfg` adapts, without building anything.

    With no roles and no names, every linear-like layer that is not excluded is taken. Roles, names and layers narrow
    this down together. Embeddings, convolutions, experts' weights and bare parameters are taken where a name asks for them.

    Args:
        model: any module; it is only read.
        cfg: the config whose target fields are used.
        kinds: as in `build`.

    Returns:
        A tuple of `Target`; print it, count it, assert on it.

    Raises:
        ValueError: where nothing matches, or one name, role or layer index matches nothing: a half-adapted model is
            never what was meant.

    Example:
        >>> import torch, lora_lite as ll
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))
        >>> [t.path for t in ll.find_targets(model, ll.LoRAConfig(target_names=r"^2$"))]
        ['2']
    """
    cfg, kinds = as_config(cfg), as_kinds(kinds)
    known = _known(model, cfg, kinds)
    if not known:
        raise ValueError(
            f"find_targets: expected a model with {LONGER[cfg.adapts]}, found none in {type(model).__name__}. "
            "Pass the module that holds them, or the kinds of its own layers as kinds=(ItsKind,)."
        )
    if cfg.adapts == "module" and not cfg.target_names:
        raise ValueError(f'{type(cfg).__name__}.target_names: expected the modules to train, found none. Name them, e.g. r"score$".')
    allowed = [path for path in known if not _matches(cfg.exclude_names, path)]
    _check_layers(cfg, allowed)
    _check_names(model, cfg, list(known), [path for path in allowed if cfg.layers is None or _index(path) in cfg.layers])
    d_model = width_of(model, kinds)
    shared = sharing(model)
    chosen = [path for path in allowed if _selected(path, cfg)]
    chosen = outermost(chosen) if cfg.adapts == "module" else chosen
    found = [_target(path, known[path], layer_of(model, path), cfg, d_model, shared) for path in chosen]
    targets = Targets(t for t in found if t is not None)
    _check_roles(cfg, targets, found, d_model)
    return targets


def _known(model: nn.Module, cfg: AdapterConfig, kinds: Sequence[type[FrozenLinear]]) -> dict[str, type[FrozenLinear]]:
    """Find what the config may adapt: what is of its sort, and of what has to be named what it names; in the model's order."""
    known = candidates(model, cfg.adapts, kinds)
    if cfg.adapts != "linear":
        return known
    known = {path: linear_kind(model, path, kind) for path, kind in known.items()}
    further = named_kinds(model) if cfg.target_names else {}
    named = {path: kind for path, kind in further.items() if any(names(pattern, path, known) for pattern in cfg.target_names)}
    place = {path: k for k, (path, _) in enumerate(model.named_modules())}
    both = sorted({**known, **named}.items(), key=lambda item: place.get(item[0], place.get(item[0].rpartition(".")[0], 0)))
    return dict(both)


def width_of(model: nn.Module, kinds: Sequence[type[FrozenLinear]] = ()) -> int:
    """Give `d_model`: the config's hidden size, else the commonest width among the linear layers."""
    config = getattr(model, "config", None)
    text = getattr(config, "get_text_config", lambda: None)()
    for source in (config, text):
        for name in _WIDTH_NAMES:
            value = getattr(source, name, None)
            if isinstance(value, int):
                return value
    widths = Counter(w for layer in _kinds(model, kinds) for w in (layer.in_features, layer.out_features))
    return max(widths, key=lambda w: (widths[w], w), default=0)


def _kinds(model: nn.Module, kinds: Sequence[type[FrozenLinear]]) -> Iterator[FrozenLinear]:
    for layer in model.modules():
        kind = kind_of(layer, kinds)
        if kind is not None:
            yield kind(layer)


def _matches(patterns: tuple[str, ...], path: str) -> bool:
    return any(re.search(pattern, path) for pattern in patterns)


def _index(path: str) -> int | None:
    found = _INDEX.search(path)
    return int(found[1]) if found else None


def _selected(path: str, cfg: AdapterConfig) -> bool:
    return (not cfg.target_names or _matches(cfg.target_names, path)) and (cfg.layers is None or _index(path) in cfg.layers)


def sharing(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Map the path of each module whose weight others hold too to their paths."""
    holders: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            holders.setdefault(id(weight), []).append(path)
    return {path: tuple(p for p in paths if p != path) for paths in holders.values() for path in paths if len(paths) > 1}


def _target(
    path: str, kind: type[FrozenLinear], layer: nn.Module, cfg: AdapterConfig, d_model: int, shared: dict[str, tuple[str, ...]]
) -> Target | None:
    W = kind(layer)
    fits = {"reader": W.in_features == d_model, "writer": W.out_features == d_model}
    fits["inner"] = not any(fits.values())
    role = next((r for r, fit in fits.items() if fit and (not cfg.target_roles or r in cfg.target_roles)), None)
    if role is None:
        return None
    return Target(path, kind, W.in_features, W.out_features, role, shared_with(path, kind, shared))


def shared_with(path: str, kind: type[FrozenLinear], shared: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """Give the modules outside a target that hold a weight of it too."""
    if kind is FrozenBlock:
        return ()  # its weights are not adapted
    inside = (path, f"{path}.")
    holders = [other for own, others in shared.items() if own == path or own.startswith(inside[1]) for other in others]
    return tuple(other for other in dict.fromkeys(holders) if other != path and not other.startswith(inside[1]))


def _check_names(model: nn.Module, cfg: AdapterConfig, known: list[str], allowed: list[str]) -> None:
    what = WORDS[cfg.adapts]
    for pattern in cfg.target_names:
        if any(_matches((pattern,), path) for path in allowed):
            continue
        where = f'{type(cfg).__name__}.target_names: expected "{pattern}" to match a {what}'
        if any(_matches((pattern,), path) for path in known):
            raise ValueError(
                f"{where}, found that exclude_names={cfg.exclude_names} and layers={cfg.layers} leave out all it matches. Change them."
            )
        others = [(p, type(m).__name__) for p, m in model.named_modules() if p and _matches((pattern,), p)]
        if others:
            kinds = listed(f"{path} ({kind})" for path, kind in others[:3])
            raise ValueError(f"{where}, found only modules of other kinds: {kinds}. Name {LONGER[cfg.adapts]}.")
        raise ValueError(f"{where}, found no match among {len(known)} {what}s. Closest: {_closest(pattern, allowed)}.")


def _closest(pattern: str, paths: list[str]) -> str:
    """Name the layers most like a pattern: by their last component, since that is what patterns usually spell."""
    word = max(re.split(r"[^A-Za-z0-9_]+", pattern), key=len)
    last = {path.rpartition(".")[2]: path for path in reversed(paths)}
    close = difflib.get_close_matches(word, last, n=3, cutoff=0.3)
    return listed([last[name] for name in close] or paths[:3])


def _check_layers(cfg: AdapterConfig, allowed: list[str]) -> None:
    if cfg.layers is None:
        return
    known = {index for path in allowed if (index := _index(path)) is not None}
    missing = [index for index in cfg.layers if index not in known]
    if missing:
        span = f"blocks {min(known)} to {max(known)}" if known else "no numbered blocks"
        raise ValueError(
            f"{type(cfg).__name__}.layers: expected indices of blocks with {WORDS[cfg.adapts]}s, found {missing} in a model with "
            f"{span}. Use indices among {sorted(known)}."
        )


def _check_roles(cfg: AdapterConfig, targets: Targets, found: list[Target | None], d_model: int) -> None:
    if targets and len(cfg.target_roles) < 2:
        return
    if not targets:
        asked = f"target_names={cfg.target_names}, target_roles={cfg.target_roles}, layers={cfg.layers}, exclude_names={cfg.exclude_names}"
        raise ValueError(
            f"find_targets: expected at least one {WORDS[cfg.adapts]} for {type(cfg).__name__}({asked}), found none "
            f"({len(found)} layers before roles; d_model={d_model}). Widen one of them."
        )
    for role in cfg.target_roles:
        fits = {"reader": lambda t: t.i == d_model, "writer": lambda t: t.o == d_model, "inner": lambda t: t.role == "inner"}[role]
        if not any(fits(t) for t in targets):
            raise ValueError(
                f'{type(cfg).__name__}.target_roles: expected a layer with role "{role}", found none with d_model={d_model}. Leave it out.'
            )
