"""`build`: config -> targets -> constants -> plan. The whole flow can be read here."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lora_lite.adapt import Adapt
from lora_lite.clone.checkpointing import check_pattern
from lora_lite.clone.structure import clone_module
from lora_lite.core.alike import made_alike
from lora_lite.core.config import AdapterConfig, as_config
from lora_lite.core.errors import exactly, require_type
from lora_lite.core.plan import Entries, Target
from lora_lite.core.tree import still
from lora_lite.layers.kind import Kind
from lora_lite.prepare.calibrate import gather, require_data
from lora_lite.prepare.checks import check_entries
from lora_lite.prepare.derive import derive
from lora_lite.prepare.heads import warn_of_new_heads
from lora_lite.prepare.originals import Originals, read_originals
from lora_lite.prepare.partners import read_partners
from lora_lite.prepare.ranks import require_group
from lora_lite.prepare.start import require_paths
from lora_lite.prepare.targets import find_targets


def build(
    model: nn.Module,
    cfg: AdapterConfig | Sequence[AdapterConfig],
    *,
    calibration: Iterable[Any] | None = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
    group: Any = None,
    remat: str | None = None,
    progress: bool = True,
    kinds: Sequence[type[Kind]] = (),
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
        kinds: kinds of layers of your own, subclasses of `Kind`; the first that fits a module reads it, before those that ship.
        original: for LoftQ, the weights from before quantisation: a state dict, or the path of a safetensors file or of a folder of them.

    Returns:
        The adapted model, an `Adapt`. Then `params = adapt.init(seed=0)`, and `adapt(params, batch)` calls it.

    Raises:
        ValueError: where a config matches nothing, claims a layer that another claims, or asks of a layer what its kind
            cannot give; each names the layers. Where calibration data is missing, empty, not finite or of no use.
        TypeError: where `model`, `cfg`, `loss` or `group` is of another type.

    Example:
        >>> import torch, lora_lite as ll
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))
        >>> adapt = ll.build(model, ll.LoRAConfig(r=4))
        >>> adapt
        Adapt(Sequential, lora, 2 targets, 320 params)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"build: expected model as a torch.nn.Module, found {type(model).__name__}. Pass the model itself.")
    usage = "build(model, cfg, calibration=batches, loss=f, group=torch.distributed.group.WORLD)"
    require_type(loss is None or callable(loss), usage, "loss", "a function of the output and the batch", loss)
    require_group(usage, group)
    with still(model):
        entries = choose(model, cfg, kinds)
        warn_of_new_heads(model, entries)
        require_data(entries, calibration, loss)
        originals = read_originals(model, entries, original)
        base = clone_module(model, kinds)
    check_pattern(base, remat)
    stats = originals | read_partners(base, entries, kinds)
    stats |= {} if calibration is None else gather(base, entries, calibration, progress, loss, group, kinds)
    return Adapt(derive(base, allocated(entries, stats), remat, stats, progress, kinds))


def choose(model: nn.Module, cfg: AdapterConfig | Sequence[AdapterConfig], kinds: Sequence[type[Kind]] = ()) -> Entries:
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
                    f"{type(config).__name__}. Narrow target_names of one, or leave the layer out of one: "
                    f'exclude_names=(r"{exactly(target.path)}",). Two adapters on one layer are the sum of their updates: build each by '
                    "itself, and ll.combine([a, b], [a_params, b_params], [1, 1])."
                )
            claimed[target.path] = (target, config)
    check_entries(model, tuple(claimed.values()))
    return tuple(claimed.values())


def allocated(entries: Entries, stats: Mapping[str, Any]) -> Entries:
    """Return each target with its config, as calibrated configs allocate them from the statistics of all targets."""
    own: dict[str, AdapterConfig] = {}
    for cfg in {id(cfg): cfg for _, cfg in entries if cfg.calibrated}.values():
        given = {target.path: stats[target.path] for target, other in entries if other is cfg}
        found = made_alike(cfg.allocate)(given)
        require_paths(found, given, f"{type(cfg).__name__}.allocate")
        own |= {path: as_config(one) for path, one in found.items()}
    kept = tuple((target, own.get(target.path, cfg)) for target, cfg in entries if not cfg.calibrated or target.path in own)
    if not kept:
        raise ValueError(f"{type(entries[0][1]).__name__}.allocate dropped every target. It must keep at least one.")
    return kept
