"""The weights that an adapter stands on: what its file says of them, and what loading makes of others.

Of a module trained as a whole the file holds the values that the displacements stand on, so that a new head comes back whatever the model's
own head was drawn as. Of every other target it holds a fingerprint of the weight. Most variants add to whatever weight is there, and a
fine-tuned base is as good: only those that derived constants from the weight, and new heads, are reported when the fingerprint differs.
"""

import hashlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lora_lite.core.config import AdapterConfig
from lora_lite.core.errors import listed
from lora_lite.core.plan import Plan, Target
from lora_lite.core.tree import Tree
from lora_lite.layers.find import packed
from lora_lite.variants.full import FullConfig

_SAMPLE = 2**18


def values_at(plan: Plan, target: Target, cfg: AdapterConfig) -> dict[str, Tensor]:
    """Return the values that a whole module's displacements stand on; nothing for other targets, and where there are none.

    Raises:
        ValueError: where the base is sharded, which one process alone cannot read.
    """
    if not isinstance(cfg, FullConfig):
        return {}
    if plan.sharding is not None:
        raise ValueError(
            f'save: expected the whole weights of "{target.path}", which is trained as a whole, found a sharded base. Save with an adapt '
            "that is not sharded, the one that shard was called on; the params fit both."
        )
    return {name: p.detach() for name, p in plan.layer(target, cfg).parameters.items() if not p.is_meta}


def fingerprint(plan: Plan, target: Target, cfg: AdapterConfig) -> str | None:
    """Return a short hash of a target's weight, rounded to bfloat16, so that loading in another dtype changes nothing.

    Of a large weight evenly spread numbers are hashed: another weight differs in these too. None for weights that are packed, sharded,
    computed or without data.
    """
    if plan.sharding is not None or isinstance(cfg, FullConfig):
        return None
    if packed(plan.base.get_submodule(target.kind.host(target.path)), target.path, plan.kinds):
        return None
    W = plan.layer(target, cfg)
    try:
        weights = [t for name, t in W.kept().items() if name != W.state.get("bias")]
    except (ValueError, AttributeError):
        return None
    if not weights or any(t.is_meta or not t.is_floating_point() for t in weights):
        return None
    digest = hashlib.blake2b(digest_size=8)
    for t in weights:
        flat = t.detach().reshape(-1)
        sample = flat[:: -(-flat.numel() // _SAMPLE) or 1].to(torch.bfloat16).cpu().contiguous()
        digest.update(repr(tuple(t.shape)).encode() + sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def rebase(plan: Plan, params: Tree, values: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Turn the displacements of whole modules into those from the model's own values, so that the module ends where it was saved.

    Where the values are the same, the displacements stay as they are, to the bit.
    """
    for target, cfg in plan.entries:
        own = plan.layer(target, cfg).parameters if target.path in values else {}
        for name, stood_on in values.get(target.path, {}).items():
            p, d = own[name].detach(), params[target.path][name]
            if p.is_meta or torch.equal(stood_on.to(p), p):
                continue
            exact = torch.float32 if p.device.type == "mps" else torch.float64
            moved = d.to(exact) + stood_on.to(p.device, exact) - p.to(exact)
            params[target.path][name] = moved.to(d.dtype)


def report(plan: Plan, marks: Mapping[str, str], new: list[str], where: object, read: Callable[[], None] = lambda: None) -> None:
    """Warn of targets whose weight is another than the one that the adapter was trained on, where that changes what the adapter is.

    Args:
        plan: the loaded plan, with its constants.
        marks: the fingerprints of the file.
        new: paths of layers that a pretrained file does not hold.
        where: the file.
        read: called when a weight has been read.
    """
    at_stake = [(t, cfg) for t, cfg in plan.entries if t.path in marks and (t.path in new or _derived(plan, t, cfg))]
    differ = []
    for t, cfg in at_stake:
        differ += [(t, cfg)] if fingerprint(plan, t, cfg) not in (None, marks[t.path]) else []
        read()
    derived = {t.path: type(cfg).__name__ for t, cfg in differ if _derived(plan, t, cfg)}
    drawn = [t.path for t, _ in differ if t.path not in derived]
    if derived:
        names = sorted(set(derived.values()))
        warnings.warn(
            f'load: "{where}" was trained on other weights at {listed(derived)}, from which {listed(names)} derived constants. Its outputs '
            "are not those of the training. Load it onto the model that it was trained on, or train it again on this one.",
            UserWarning,
            stacklevel=4,
        )
    if drawn:
        warnings.warn(
            f'load: "{where}" was trained on other weights at {listed(drawn)}, the head that this model drew anew. Its outputs are not '
            "those of the training. Load the head's weights first, or train it whole by ll.FullConfig(target_names=...), whose file "
            "holds them.",
            UserWarning,
            stacklevel=4,
        )


def _derived(plan: Plan, target: Target, cfg: AdapterConfig) -> bool:
    constants: Any = plan.constants[target.path]
    return bool(constants) and "dense" in cfg.uses
