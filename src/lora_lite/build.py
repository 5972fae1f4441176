"""`build`: config -> targets -> variant init -> bind. The one place where the flow can be read."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lora_lite.adapt import Adapt
from lora_lite.clone.accelerate import refuse_offloaded
from lora_lite.clone.checkpointing import check_pattern
from lora_lite.clone.structure import clone_module
from lora_lite.core.config import AdapterConfig, as_config
from lora_lite.core.errors import listed
from lora_lite.core.frozen import USES, FrozenLinear
from lora_lite.core.plan import Entries
from lora_lite.layers.kinds import kind_of, own_forward
from lora_lite.layers.module import refuse_nested
from lora_lite.layers.parameter import layer_of
from lora_lite.layers.quantised import FrozenQuantised
from lora_lite.prepare.calibrate import gather, require_data
from lora_lite.prepare.derive import derive
from lora_lite.prepare.originals import Originals, read_originals
from lora_lite.prepare.targets import Target, find_targets


def build(
    model: nn.Module,
    cfg: AdapterConfig | Sequence[AdapterConfig],
    *,
    calibration: Iterable[Any] | None = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
    group: Any = None,
    remat: str | None = None,
    progress: bool = True,
    kinds: Sequence[type[FrozenLinear]] = (),
    original: Originals | None = None,
) -> Adapt:
    """Adapt a model without touching it.

    Args:
        model: any module. It is read, never changed; its weights are shared, not copied.
        cfg: a variant's config, or several that claim different layers.
        calibration: batches as `adapt` takes them, for variants whose start depends on data; they run once, in evaluation mode.
        loss: `(output, batch) -> scalar`, for variants whose start depends on the gradient of a loss; None for the output's own `.loss`.
        group: a `torch.distributed` process group, e.g. `torch.distributed.group.WORLD`: the statistics are those of the batches of all its
            processes, each of which calls this with batches of its own. None for those of this process alone, whatever is initialised.
        remat: regular expression of the paths of blocks whose activations are recomputed in the backward pass instead of kept,
            e.g. `r"layers\\.\\d+$"`.
        progress: show a progress bar on stderr when it takes more than a second.
        kinds: kinds of layers of your own, subclasses of `FrozenQuantised`; the first that fits a module reads it, before those that ship.
        original: for LoftQ, the weights from before quantisation: a state dict, or the path of a safetensors file or of a folder of them.

    Returns:
        An `Adapt`: `params = adapt.init(seed=0)`, then `adapt(params, batch)`.

    Raises:
        ValueError: where a config matches nothing, claims a layer that another claims, or asks of a layer what its kind
            cannot give; each names the layers. Where calibration data is missing, empty, not finite or of no use.
        TypeError: where `model` or `cfg` is of another type.

    Example:
        >>> import torch, lora_lite as ll
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))
        >>> adapt = ll.build(model, ll.LoRAConfig(r=4))
        >>> adapt
        Adapt(Sequential, lora, 2 targets, 320 params)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"build: expected model as a torch.nn.Module, found {type(model).__name__}. Pass the model itself.")
    entries = choose(model, cfg, kinds)
    require_data(entries, calibration, loss)
    originals = read_originals(entries, original)
    base = clone_module(model, kinds)
    check_pattern(base, remat)
    stats = originals if calibration is None else originals | gather(base, entries, calibration, progress, loss, group)
    return Adapt(derive(base, allocated(entries, stats), remat, stats, progress))


def choose(model: nn.Module, cfg: AdapterConfig | Sequence[AdapterConfig], kinds: Sequence[type[FrozenLinear]] = ()) -> Entries:
    """Pair each target with the config that claims it."""
    configs = [as_config(c) for c in cfg] if isinstance(cfg, Sequence) and not isinstance(cfg, str) else [as_config(cfg)]
    if not configs:
        raise ValueError("build: expected a config or a non-empty sequence of them, found an empty one. Pass e.g. LoRAConfig().")
    claimed: dict[str, tuple[Target, AdapterConfig]] = {}
    for config in configs:
        for target in find_targets(model, config, kinds=kinds):
            if target.path in claimed:
                other = claimed[target.path][1]
                raise ValueError(
                    f'build: expected each layer in one config, found "{target.path}" in both {type(other).__name__} and '
                    f"{type(config).__name__}. Narrow target_names of one."
                )
            claimed[target.path] = (target, config)
    refuse_nested({path: target.kind for path, (target, _) in claimed.items()})
    check_entries(model, tuple(claimed.values()))
    return tuple(claimed.values())


def allocated(entries: Entries, stats: Mapping[str, Any]) -> Entries:
    """Let each calibrated config give its targets configs of their own, from the statistics of all of them."""
    own: dict[str, AdapterConfig] = {}
    for cfg in {id(cfg): cfg for _, cfg in entries if cfg.calibrated}.values():
        own |= cfg.allocate({target.path: stats[target.path] for target, other in entries if other is cfg})
    kept = tuple((target, own.get(target.path, cfg)) for target, cfg in entries if not cfg.calibrated or target.path in own)
    if not kept:
        raise ValueError("build: expected allocate to keep a target, found none left. Leave at least one its config.")
    return kept


def check_entries(model: nn.Module, entries: Entries) -> None:
    """Refuse what cannot be adapted: layers offloaded, with their own forward, or of a kind that lacks what is needed."""
    refuse_offloaded(model)
    strange = [t.path for t, cfg in entries if cfg.adapts == "linear" and own_forward(layer_of(model, t.path), t.kind)]
    if strange:
        cls = type(layer_of(model, strange[0])).__name__
        raise ValueError(
            f"build: expected layers that compute W x + b, found a forward of its own at {listed(p or 'the model' for p in strange)} "
            f"({cls}). Leave them out with exclude_names, or take a hook library's patch off first."
        )
    _refuse_packed(model, entries)
    for target, cfg in entries:
        check_uses(target, cfg)


def _refuse_packed(model: nn.Module, entries: Entries) -> None:
    """Refuse to train whole modules whose weights are quantised: what is left to train would be a bias."""
    for target, cfg in entries:
        if cfg.adapts != "module":
            continue
        layers = model.get_submodule(target.path).named_modules(prefix=target.path)
        packed = [path for path, m in layers if (kind := kind_of(m)) is not None and issubclass(kind, FrozenQuantised)]
        if packed:
            raise ValueError(
                f'build: expected modules with floating weights for {type(cfg).__name__} at "{target.path}", found quantised ones at '
                f"{listed(packed)}, which cannot be trained. Leave them out, or adapt them by a variant of linear layers, e.g. LoRAConfig."
            )


def check_uses(target: Target, cfg: AdapterConfig) -> None:
    """Refuse a variant that uses what the kind of a layer does not give.

    Raises:
        ValueError: it names the target, the reason and the way out.
    """
    kind, name = target.kind, type(cfg).__name__
    unknown = sorted(set(cfg.uses) - set(USES))
    if unknown:
        raise ValueError(f"{name}.uses: expected words among {listed(USES)}, found {listed(unknown)}. Change the class variable.")
    reasons = [words for word, words in USES.items() if word in cfg.uses and word not in kind.gives]
    gives = f", which gives only {listed(word for word in USES if word in kind.gives)}" if reasons else ""
    reasons += ["is calibrated on input vectors"] if cfg.calibrated and not (kind.observed and kind.has_input) else []
    reasons += ["drops inputs"] if getattr(cfg, "dropout", 0.0) and not kind.has_input else []
    reasons += ["changes the layer's output alone"] if not kind.has_input and "project" not in cfg.uses else []
    if reasons:
        other = "LoRAConfig without dropout" if "project" in kind.gives else "IA3Config"
        raise ValueError(
            f'build: expected a variant that fits the layer at "{target.path}"{gives}; found that {name} '
            f"{'; it '.join(reasons)}. {kind.why or kind.__name__ + ' gives no more.'} Leave the layer out with exclude_names, or adapt it "
            f"by a config of its own, e.g. {other}."
        )
