"""Parameter groups for torch optimizers: LoRA+, a larger learning rate for the factor that starts at zero.

Paper: Hayou, Ghosh, Yu, *LoRA+: Efficient Low Rank Adaptation of Large Models*, 2024, arXiv:2402.12354.
"""

from typing import Any

from lora_lite.core.errors import require_tree
from lora_lite.core.fields import Within, require_number
from lora_lite.core.tree import AnyTree

FAST = ("B", "dB")  # the factor on the output's side, by its name in the variants that have one


def lora_plus(params: AnyTree, lr: float, ratio: float = 16.0) -> list[dict[str, Any]]:
    """Split a params tree into two groups for a torch optimizer: `B` learns `ratio` times as fast as the rest.

    PEFT's helper gives vectors, such as DoRA's magnitude, the larger rate too; the paper speaks of `B` alone, and so does this.

    Args:
        params: a params tree.
        lr: learning rate of the rest, per step, > 0.
        ratio: how many times larger the rate of `B` is, >= 1; the paper suggests about 16.

    Returns:
        Groups for `torch.optim.AdamW(groups)` and its like; a group without a leaf is left out.

    Raises:
        ValueError: where `lr` or `ratio` is out of range.
        TypeError: where `params` is no tree of tensors, or the others are no numbers.

    Example:
        >>> import torch, lora_lite as ll
        >>> adapt = ll.build(torch.nn.Sequential(torch.nn.Linear(8, 4)), ll.LoRAConfig(r=2))
        >>> optimizer = torch.optim.AdamW(ll.lora_plus(adapt.init(seed=0), lr=1e-4, ratio=16.0))
        >>> [group["lr"] for group in optimizer.param_groups]
        [0.0001, 0.0016]
    """
    call = "lora_plus(params, lr=1e-4)"
    require_tree(call, "params", params)
    require_number(call, "lr", lr, Within(0, above=True), "Use e.g. lr=1e-4.")
    require_number(call, "ratio", ratio, Within(1), "Use e.g. ratio=16.")
    slow = [leaf for leaves in params.values() for name, leaf in leaves.items() if name.rpartition(".")[2] not in FAST]
    fast = [leaf for leaves in params.values() for name, leaf in leaves.items() if name.rpartition(".")[2] in FAST]
    return [{"params": leaves, "lr": rate} for leaves, rate in ((slow, lr), (fast, lr * ratio)) if leaves]
