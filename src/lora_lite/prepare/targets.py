"""Choose which layers a config adapts: a pure function from model and config to a value that can be read and counted."""

import difflib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, NamedTuple

from torch import nn

from lora_lite.clone.structure import refuse_opaque
from lora_lite.core.config import AdapterConfig, as_config, patterns, patterns_of, with_fields
from lora_lite.core.errors import listed, require_type
from lora_lite.core.memory import Place, place_in_memory
from lora_lite.core.plan import UNNAMED, Target, Targets
from lora_lite.core.tree import join, modules_by_path
from lora_lite.layers.access import raw
from lora_lite.layers.find import asked_for, find, names, unnamed
from lora_lite.layers.kind import Kind
from lora_lite.layers.kinds import SITES, as_kinds, kind_of
from lora_lite.layers.linear import keeps_codes
from lora_lite.layers.parameter import UNREAD
from lora_lite.prepare.blocks import block_indices
from lora_lite.prepare.heads import heads_left_out
from lora_lite.prepare.nested import outermost
from lora_lite.prepare.worn import ending, refuse_bound, refuse_half, refuse_worn

_UNREAD = "packed as codes that no kind reads"
_UNPACK = "Load them unpacked, give their kind, kinds=(ItsKind,)"
_WIDTH_NAMES = ("hidden_size", "d_model", "n_embd", "hidden_dim", "embed_dim", "dim", "model_dim")


def find_targets(model: nn.Module, cfg: AdapterConfig, *, kinds: Sequence[type[Kind]] = ()) -> Targets:
    """Find the layers that `cfg` adapts, without building anything.

    With no roles and no names, every linear-like layer that is not excluded is taken. Roles, names and layers narrow
    this down together. Embeddings, convolutions, experts' weights and bare parameters are taken where a name asks for them.

    Args:
        model: any module; it is only read.
        cfg: the config whose target fields are used.
        kinds: as in `build`.

    Returns:
        A tuple of `Target` to print, count and assert on. Its `left_out` maps the path of each other linear layer to the reason. With no
        names these are the layers that PEFT's `all-linear` leaves out: the output embeddings, and a classifier's new head.

    Raises:
        ValueError: where nothing matches, or one name, role or layer index matches nothing: a half-adapted model is
            never what was meant.

    Example:
        >>> import torch, lora_lite as ll
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))
        >>> [t.path for t in ll.find_targets(model, ll.LoRAConfig(target_names=r"^2$"))]
        ['2']
    """
    require_type(isinstance(model, nn.Module), "find_targets(model, cfg)", "model", "a torch.nn.Module", model)
    asking, kinds = as_config(cfg, "find_targets"), as_kinds(kinds)
    refuse_opaque(modules_by_path(model))
    refuse_bound(model)
    cfg = _named(model, asking)
    heads = {} if cfg.adapts != "linear" or asking.target_names or not cfg.exclude_names else heads_left_out(model)
    everything = find(model, cfg.adapts, kinds)
    known = asked_for(everything, cfg.target_names)
    unread = _unread(model, everything) if cfg.adapts == "linear" else []
    _require_any(model, cfg, known, unread, list(everything))
    asked, plain = patterns_of(cfg.target_names), unnamed(known)
    allowed = [path for path in known if path not in heads and not _excluded(path, cfg, plain)]
    blocks: Any = cfg.layers
    index = {} if blocks is None else block_indices(model, [*everything, *(path for path, _ in model.named_modules())])
    _check_layers(cfg, {i for path in allowed if (i := index.get(path)) is not None})
    in_blocks = [path for path in allowed if blocks is None or index[path] in blocks]
    chosen = [path for path in in_blocks if not asked or _matches(asked, path)]

    def wanted(path: str) -> bool:
        return not _excluded(path, cfg, plain) and (blocks is None or index[path] in blocks)

    refuse_worn(model, [(path, cfg) for path in chosen], lambda path: cfg.adapts == "linear" and wanted(path) and _matches(asked, path))
    _check_names(model, cfg, list(known), in_blocks, list(everything))
    if cfg.adapts == "linear":
        refuse_half(model, cfg, list(everything), chosen, wanted)
    d_model, shared = width_of(model, kinds), sharing(model)
    chosen = outermost(chosen) if cfg.adapts == "module" else chosen
    found = [_target(model, path, known[path], cfg, d_model, shared) for path in chosen]
    taken = {t.path: t for t in found if t is not None}
    reasons = _Reasons(heads, set(allowed), set(in_blocks), set(chosen))
    left_out = {path: reasons.of(path) for path in known if path not in taken} if cfg.adapts == "linear" else {}
    left_out |= dict.fromkeys(unread, _UNREAD)
    targets = Targets.of(taken.values(), left_out)
    _check_roles(cfg, targets, found, d_model, unread)
    return targets


def _named(model: nn.Module, cfg: AdapterConfig) -> AdapterConfig:
    """Return a config with its variant's own names where it has none, as a tuple of expressions."""
    if cfg.adapts not in SITES:
        raise ValueError(
            f"{type(cfg).__name__}.adapts: expected a word among {listed(SITES)}, found {cfg.adapts!r}. Correct the class variable."
        )
    cfg = cfg if cfg.target_names else with_fields(cfg, target_names=cfg.default_names(model))
    return with_fields(cfg, target_names=patterns(cfg, "target_names"))


def _unread(model: nn.Module, known: Mapping[str, Any]) -> list[str]:
    """List the linear layers that a library has packed in a layout which no kind reads."""
    named = ((path, m) for path, m in modules_by_path(model).items() if path not in known and "linear" in type(m).__name__.lower())
    return [path for path, m in named if keeps_codes(m._parameters, m._buffers)]


def _unpacked(unread: Sequence[str]) -> str:
    """Return the way out for layers that no kind reads."""
    return f"{len(unread)} are {_UNREAD}, {listed(unread)}. {_UNPACK}"


def _require_any(model: nn.Module, cfg: AdapterConfig, known: Mapping[str, Any], unread: Sequence[str], named: Sequence[str]) -> None:
    """Refuse a model without layers that the config takes. `named` are those that a name can ask for."""
    if not known:
        way = "Pass the module that holds them, or the kinds of its own layers as kinds=(ItsKind,)."
        if unread:
            way = f"{_unpacked(unread)}."
        elif named:
            way = f'Name other layers, which are taken by name alone, e.g. target_names=r"{ending(named[0])}".'
        elif whole := [path for path, module in model.named_modules() if isinstance(module, UNREAD)]:
            way = f"Train recurrent layers whole, with FullConfig: {listed(path or 'the model' for path in whole)}."
        raise ValueError(f"find_targets: expected a model with {SITES[cfg.adapts][1]}, found none in {type(model).__name__}. {way}")
    if cfg.adapts == "module" and not cfg.target_names:
        raise ValueError(f'{type(cfg).__name__}.target_names: expected the modules to train, found none. Name them, e.g. r"score$".')


class _Reasons(NamedTuple):
    """The steps of a choice of layers, each of which leaves some out."""

    heads: Mapping[str, str]
    allowed: AbstractSet[str]
    in_blocks: AbstractSet[str]
    chosen: AbstractSet[str]

    def of(self, path: str) -> str:
        """Return the reason why a layer is left out."""
        if path not in self.allowed:
            return self.heads.get(path, "by exclude_names")
        if path not in self.in_blocks:
            return "by layers"
        return "by target_roles" if path in self.chosen else UNNAMED


def width_of(model: nn.Module, kinds: Sequence[type[Kind]] = ()) -> int:
    """Return `d_model`: the config's hidden size, else the commonest width among the linear layers."""
    config = getattr(model, "config", None)
    text = getattr(config, "get_text_config", lambda: None)()
    for source in (config, text):
        for name in _WIDTH_NAMES:
            value = getattr(source, name, None)
            if isinstance(value, int):
                return value
    widths = Counter(w for layer in _kinds(model, kinds) for w in (layer.in_features, layer.out_features))
    return max(widths, key=lambda w: (widths[w], w), default=0)


def _kinds(model: nn.Module, kinds: Sequence[type[Kind]]) -> Iterator[Kind]:
    for layer in model.modules():
        kind = kind_of(layer, kinds)
        if kind is not None:
            yield kind(raw(layer))


def _matches(patterns: tuple[str, ...], path: str) -> bool:
    return any(re.search(pattern, path) for pattern in patterns)


def _excluded(path: str, cfg: AdapterConfig, plain: Sequence[str]) -> bool:
    """Whether a config leaves a layer out: by its `exclude_names`, or by the default ones, unless a name asks for the layer itself."""
    if _matches(patterns_of(cfg.exclude_names), path):
        return True
    added = patterns_of(type(cfg).exclude_names) if cfg.exclude_names else ()
    return _matches(added, path) and not any(names(pattern, path, plain) for pattern in cfg.target_names)


def sharing(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Map the path of each module with a shared weight to the paths of the others that have the weight.

    It is shared as one parameter, or as two in one memory, `b.weight.data = a.weight.data`.
    """
    holders: dict[Place, list[str]] = {}
    for path, module in modules_by_path(model).items():
        weight = module._parameters.get("weight")
        if weight is not None:
            holders.setdefault(place_in_memory(weight), []).append(path)
    return {path: tuple(p for p in paths if p != path) for paths in holders.values() for path in paths if len(paths) > 1}


def _target(
    model: nn.Module, path: str, kind: type[Kind], cfg: AdapterConfig, d_model: int, shared: dict[str, tuple[str, ...]]
) -> Target | None:
    W = kind.at(model, path)
    fits = {"reader": W.in_features == d_model, "writer": W.out_features == d_model}
    fits["inner"] = not any(fits.values())
    role = next((r for r, fit in fits.items() if fit and (not cfg.target_roles or r in cfg.target_roles)), None)
    if role is None:
        return None
    return Target(path, kind, W.in_features, W.out_features, role, kind.holders(path, shared))


def _check_names(model: nn.Module, cfg: AdapterConfig, known: list[str], allowed: list[str], everything: list[str]) -> None:
    what = SITES[cfg.adapts][0]
    for pattern in cfg.target_names:
        if any(_matches((pattern,), path) for path in allowed):
            continue
        where = f'{type(cfg).__name__}.target_names: expected "{pattern}" to match a {what}'
        if any(_matches((pattern,), path) for path in known):
            raise ValueError(
                f"{where}, found that exclude_names={cfg.exclude_names} and layers={cfg.layers} leave out all it matches. "
                "Change them: exclude_names=() leaves nothing out, layers=None takes all blocks."
            )
        unread = [join(p, name) for p, m in model.named_modules() if isinstance(m, UNREAD) for name in m._parameters]
        if named := [name for name in unread if _matches((pattern,), name)]:
            raise ValueError(
                f"{where}, found weights of recurrent layers, which reach them by a list of their own: {listed(named[:3])}. Train such a "
                "layer whole, with FullConfig, or leave it out."
            )
        others = [(path, m) for path, m in _places(model) if path and _matches((pattern,), path)]
        if others:
            kinds = listed(f"{path} ({type(m).__name__})" for path, m in others[:3])
            way = _beside([path for path, _ in others], everything) or f"Name {SITES[cfg.adapts][1]}"
            if any(keeps_codes(m._parameters, m._buffers) for _, m in others):
                kinds, way = f"{kinds}, {_UNREAD}", f"{_UNPACK}, or leave them out"
            raise ValueError(f"{where}, found only modules of other kinds: {kinds}. {way}.")
        way = f"Closest: {_closest(pattern, allowed)}"
        way = "Leave target_names out, which takes them all" if pattern == "all-linear" else way
        raise ValueError(f"{where}, found no match among {len(known)} {what}s. {way}.")


def _places(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules by path, and beside each that is packed the paths of its parameters."""
    for path, module in model.named_modules():
        yield path, module
        if keeps_codes(module._parameters):
            yield from ((join(path, name), module) for name in module._parameters)


def _beside(paths: Sequence[str], everything: Sequence[str]) -> str | None:
    """Return the way out where modules are named that hold layers which can be adapted, or that lie in one; None for others."""
    inside = [p for p in everything if any(p.startswith(f"{path}.") for path in paths)]
    around = [p for p in everything if any(path.startswith(f"{p}.") for path in paths)]
    return f'Name what is inside, e.g. r"{ending(inside[0])}"' if inside else f'Name r"{ending(around[0])}"' if around else None


def _closest(pattern: str, paths: list[str]) -> str:
    """List the layers most like a pattern by the last part of their paths, which patterns usually spell."""
    word = max(re.split(r"[^A-Za-z0-9_]+", pattern), key=len)
    last = {path.rpartition(".")[2]: path for path in reversed(paths)}
    close = difflib.get_close_matches(word, last, n=3, cutoff=0.3)
    return listed([last[name] for name in close] or paths[:3])


def _check_layers(cfg: AdapterConfig, known: set[int]) -> None:
    blocks: Any = cfg.layers
    missing = [index for index in blocks or () if index not in known]
    if missing:
        span = f"blocks {min(known)} to {max(known)}" if known else "no numbered blocks"
        raise ValueError(
            f"{type(cfg).__name__}.layers: expected indices of blocks with {SITES[cfg.adapts][0]}s, found {missing} in a model with "
            f"{span}. Use indices among {sorted(known)}."
        )


def _check_roles(cfg: AdapterConfig, targets: Targets, found: list[Target | None], d_model: int, unread: Sequence[str]) -> None:
    if targets and len(cfg.target_roles) < 2:
        return
    if not targets:
        asked = f"target_names={cfg.target_names}, target_roles={cfg.target_roles}, layers={cfg.layers}, exclude_names={cfg.exclude_names}"
        raise ValueError(
            f"find_targets: expected at least one {SITES[cfg.adapts][0]} for {type(cfg).__name__}({asked}), found none "
            f"({len(found)} layers before roles; d_model={d_model}). {_unpacked(unread) if unread else 'Widen one of them'}."
        )
    for role in cfg.target_roles:
        fits = {"reader": lambda t: t.i == d_model, "writer": lambda t: t.o == d_model, "inner": lambda t: t.role == "inner"}[role]
        if not any(fits(t) for t in targets):
            raise ValueError(
                f'{type(cfg).__name__}.target_roles: expected a layer with role "{role}", found none with d_model={d_model}. Leave it out.'
            )
