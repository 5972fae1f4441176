"""The facts of an adapted model, all of which its plan has."""

from functools import cached_property

from lora_lite.core.certificate import Start
from lora_lite.core.config import AdapterConfig
from lora_lite.core.frozen import Constants
from lora_lite.core.plan import Plan, Shapes, Targets
from lora_lite.derived.report import count_all, macs_by_target, table


class Described:
    """The facts that can be read off a plan: targets, configs, shapes, constants and counts."""

    _plan: Plan

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
        """The variants' frozen tensors, by target path and name. Tensors that targets share stand under the variant's name."""
        return {path: dict(constants) for path, constants in {**self._plan.shared, **self._plan.constants}.items()}

    @property
    def starts(self) -> dict[str, Start]:
        """The way in which the leading singular vectors of a target's start were found, by its path: a `lora_lite.Start`.

        The targets whose start is made of such vectors. Of a layer of several maps, the largest bounds.
        """
        return dict(self._plan.starts)

    @property
    def num_params(self) -> int:
        """The number of values in a params tree."""
        return count_all(self.shapes)

    @property
    def macs_per_token(self) -> int:
        """Multiply-adds that the adapter adds for one token passing through every target once."""
        return sum(self._macs.values())

    @cached_property
    def _macs(self) -> dict[str, int]:
        return macs_by_target(self._plan)

    def summary(self, full: bool = False) -> str:
        """Return a table of path, role, shape, variant, params and multiply-adds per token, with totals and the trained share of the model.

        Where starts are made of leading singular vectors, the last line says how many were found in which way, and the largest bound.

        Args:
            full: a line for each target. Else those whose paths differ only in numbers, such as the same layer of each block, share one.

        Example:
            >>> import torch, lora_lite as ll
            >>> blocks = [torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU()) for _ in range(4)]
            >>> print(ll.build(torch.nn.Sequential(*blocks), ll.LoRAConfig(r=2)).summary())
            path       role    (o, i)    variant  count  params  MACs/token
            *.0        reader  (64, 64)  lora         4   1,024       1,024
            4 targets                                 4   1,024       1,024
            6.15% of the model's 16,640 params
        """
        return table(self._plan, self._macs, full)

    def __repr__(self) -> str:
        variants = ", ".join(sorted({cfg.name for cfg in self.configs}))
        return f"Adapt({type(self._plan.base).__name__}, {variants}, {len(self._plan.entries)} targets, {self.num_params:,} params)"
