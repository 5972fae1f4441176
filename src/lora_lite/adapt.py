"""`Adapt`: the adapted model that `build` returns, a function of params and batch over a private clone of the model."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lora_lite.clone.assemble import bound_copy, trainable_copy
from lora_lite.clone.fsdp import ShardedReplicas, Sharding, shard_plan
from lora_lite.clone.params import bare, params_of
from lora_lite.clone.per_call import Replica, Replicas
from lora_lite.clone.structure import clone_again
from lora_lite.core.plan import Places, Plan
from lora_lite.core.tree import AnyTree, Tree
from lora_lite.derived.merge import merge, merge_error
from lora_lite.derived.mixed import index_of, is_stacked, member_shapes, stacked_size, steered
from lora_lite.derived.required import Required
from lora_lite.derived.rows import Followed, RowMap, own_rows
from lora_lite.derived.stack_module import give_rows
from lora_lite.prepare.derive import drawn

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class Adapt(Required):
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
        shared = {target.path: plan.places(target.path, cfg) for target, cfg in plan.entries} if plan.shared_params() else {}
        self._on_meta = any(p.is_meta for p in plan.base.parameters())
        make = functools.partial(_replica, plan, shared)
        self._replicas = Replicas(make) if plan.sharding is None else ShardedReplicas(make, plan.sharding)
        self._followed = Followed(self._replicas, plan.sharding and plan.sharding.mesh.get_group())

    def __call__(self, params: Mapping[str, Mapping[str, Tensor]], batch: Any, **kwargs: Any) -> Any:
        """Run the adapted model.

        Args:
            params: a tree as this `adapt.init` makes it; leaves may be of any floating dtype of 16 bits or more. It belongs to this `adapt`
                and those of equal configs: its shapes say the rank, but not `alpha`, so that another's tree runs at another scale.
            batch: a mapping (`model(**batch)`), a tuple or list (`model(*batch)`) or a tensor (`model(batch)`).
            kwargs: further keywords for the model.

        Returns:
            The model's output.

        Raises:
            ValueError: where `params` does not fit; it lists each departure.
            TypeError: for a batch of another type.
        """
        dtype = self._require(params, "adapt")
        return self._replicas.here().adapted(params, batch, kwargs, dtype)

    def mixed(
        self,
        stacked: AnyTree,
        batch: Any,
        index: Tensor | Sequence[int] | None = None,
        *,
        row_map: RowMap | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run each row of a batch through its own adapter, the frozen model once.

        Each target's input must have the batch's rows on its first axis, one entry or several for each row, unless `row_map` says where
        they are. The first batch with rows of a shape is tried: the frozen model runs on its first row, alone and beside itself. A compiled
        function tries it when it runs. The processes of a sharded model try the batches of all of them together.

        Args:
            stacked: a params tree with a leading adapter axis of length K, as `stack` makes it.
            batch: as in a call.
            index: for each row of the batch the number of its adapter, `(rows,)`; None for K equal contiguous groups of rows.
            row_map: for targets whose input has the rows elsewhere, by a regular expression of their paths: for each entry of the input's
                first axis the row that it belongs to, `(entries,)`, as for the packed patches of images; or the axis that has the rows,
                e.g. 1 for a module that takes time first.
            kwargs: further keywords for the model.

        Returns:
            The model's output, row `n` as adapter `index[n]` alone would compute it, in a batch of that row.

        Raises:
            ValueError: where `stacked` does not fit, `index` names no member, `row_map` no target or no row, or a target's input is not
                made of the batch's rows.
            TypeError: where `index` or `row_map` holds no integers, or `stacked` is no tree.
        """
        members = stacked_size(stacked)
        self._require(stacked, "mixed", member_shapes(self.shapes, members))
        leaf = next(leaf for leaves in stacked.values() for leaf in leaves.values())
        index = own_rows(batch, kwargs, members) if index is None and not all(cfg.rowwise for cfg in self.configs) else index
        replica, index = self._replicas.here(), index_of(index, members, leaf.device)
        rows = self._followed.rows(replica, batch, kwargs, members, index, row_map)
        return replica.adapted(stacked, batch, kwargs, None, rows, index)

    def base(self, batch: Any, **kwargs: Any) -> Any:
        """Run the frozen model, as `adapt` runs the adapted one."""
        return self._replicas.here().frozen(batch, kwargs)

    @torch.no_grad()
    def init(self, seed: int = 0) -> Tree:
        """Make fresh params.

        Args:
            seed: any integer. Each target draws from a generator of its own, seeded by this and its path, so that a layer's start
                does not depend on which others are adapted.

        Returns:
            `{target path: {name: tensor}}` in the config's dtype, on the layers' devices. The global random state is not used.
        """
        return drawn(self._plan, seed)

    def module(self, params: Mapping[str, Mapping[str, Tensor]], index: Tensor | Sequence[int] | None = None) -> nn.Module:
        """Return an `nn.Module` of the model's own class with copies of `params` as its only trainable parameters.

        For tools that need a module: `generate`, `Trainer`, DDP. The frozen weights are shared with the model. `params` reads the
        parameters back.

        The module of a stack runs each row of a batch through its own adapter, as `mixed` does. It generates so too: beams and returned
        sequences take the adapter of their prompt.

        Args:
            params: a params tree, or a stack of K of them.
            index: for a stack, for each row of every batch, or each prompt, the number of its adapter, `(rows,)`; None for K equal
                contiguous groups of rows.

        Raises:
            ValueError: where `params` does not fit, or `index` is empty or names no member. The module raises it for a batch of other rows,
                and where a target's input is not made of them.
            TypeError: where `index` holds no integers.

        Example:
            >>> import torch, lora_lite as ll
            >>> adapt = ll.build(torch.nn.Sequential(torch.nn.Linear(8, 4)), ll.LoRAConfig(r=2))
            >>> members = [adapt.init(seed=k) for k in range(2)]
            >>> module = adapt.module(ll.stack(members), index=[1, 0, 1])
            >>> module(torch.randn(3, 8)).shape
            torch.Size([3, 4])
        """
        self._require_whole("module")
        members = stacked_size(params) if index is not None or is_stacked(params, self.shapes) else None
        self._require(params, "module", None if members is None else member_shapes(self.shapes, members))
        module = trainable_copy(self._plan, params)
        if members is not None:
            give_rows(module, members, index)
        return module

    def params(self, module: nn.Module) -> Tree:
        """Read detached copies of the params out of a module that `module` made.

        It may be wrapped by DDP, DataParallel, `torch.compile` or accelerate. Params that FSDP2 has split are gathered, so that every
        process must call this.

        Raises:
            ValueError: where `module` is not one, or was made under other configs, such as another `alpha`.
        """
        return params_of(self._plan, bare(module))

    def merge(self, params: Mapping[str, Mapping[str, Tensor]], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Return the merged weights and biases of the targets as a state dict. The model is not touched.

        Args:
            params: a params tree.
            dtype: of the merged tensors; None for that of each layer's own. A quantised layer's are dense, by default in float32: load them
                into a model that is not quantised. Quantising it again is the user's own act, and may lose the update (`merge_error`).

        `model.load_state_dict(adapt.merge(params), strict=False)` is the user's own act. It changes the weights that this `adapt` shares:
        to go on adapting, build anew, or load into a copy of the model.

        Raises:
            ValueError: where `params` does not fit, a variant is not linear, the adapter moves a bias that the layer lacks, a weight is
                shared with another module, accelerate offloads weights, or `torch.func.grad` differentiates by `params`.
            TypeError: where `dtype` is no floating one.
        """
        self._require_whole("merge")
        self._require_in_memory("merge")
        self._require(params, "merge")
        return merge(self._plan, params, dtype)

    def merge_error(self, params: Mapping[str, Mapping[str, Tensor]], merged: Mapping[str, Tensor]) -> dict[str, float]:
        """Compute the share of each target's update that merged weights miss, for want of digits or through quantising again.

        Args:
            params: a params tree.
            merged: the result of `merge(params)`, in any dtype or after a round trip through another storage.

        Returns:
            `{target path: relative error}`: the distance of the merged map from the adapted one over the size of the update, or of
            the weight where the adapter is at its start; dimensionless.

        Raises:
            ValueError: where `params` does not fit, a target cannot be merged, or `merged` lacks its weight.
            TypeError: where `merged` holds no tensors.
        """
        self._require(params, "merge_error")
        return merge_error(self._plan, params, merged)

    def steer(self, params: Mapping[str, Mapping[str, Tensor]], c: float | Tensor) -> Tree:
        """Return the params at strength `c`, 0 for the base model and 1 for the adapter. Differentiable in `c` and `params`.

        Each variant scales what its mathematics asks for: LoRA's update is `c` times as large, a rotation turns by `c` times its angle. `c`
        times every leaf is another thing: it scales LoRA's `B A` by `c * c`, so that -1 does nothing.

        Args:
            params: a params tree, or a stack of K of them.
            c: a number or a scalar tensor; or `(K,)`, a strength for each member of the stack. One tree at `(K,)` strengths gives a
                stack of K.

        Returns:
            A tree like `params`, stacked where either was. Leaves that a strength does not scale, such as LoRA's `A`, are those of
            `params` themselves: clone the tree before an optimiser writes to it.

        Raises:
            ValueError: where `params` does not fit, or `c` is neither a finite scalar nor a strength for each member.
            TypeError: where `c` is neither a real number nor a tensor of them.

        Example:
            >>> import torch, lora_lite as ll
            >>> adapt = ll.build(torch.nn.Sequential(torch.nn.Linear(8, 4)), ll.LoRAConfig(r=2))
            >>> stacked = ll.stack([adapt.init(seed=0), adapt.init(seed=1)])
            >>> adapt.mixed(adapt.steer(stacked, torch.tensor([0.5, -1.0])), torch.randn(6, 8)).shape
            torch.Size([6, 4])
            >>> params = ll.tree_map(torch.ones_like, adapt.init())  # as after training
            >>> x = torch.eye(8)
            >>> update = adapt(params, x) - adapt.base(x)
            >>> for tree in adapt.steer(params, -1.0), ll.tree_map(lambda p: -p, params):
            ...     print(round(float(((adapt(tree, x) - adapt.base(x)) / update).mean()), 3))
            -1.0
            1.0
        """
        members = stacked_size(params) if is_stacked(params, self.shapes) else None
        self._require(params, "steer", None if members is None else member_shapes(self.shapes, members))
        return steered(self._plan, params, c, members)

    def train(self, mode: bool = True) -> "Adapt":
        """Return an `adapt` in training mode. This one stays as it is."""
        base = clone_again(self._plan.base, self._plan.kinds)
        base.train(mode)
        return Adapt(dataclasses.replace(self._plan, base=base))

    def eval(self) -> "Adapt":
        """Return an `adapt` in evaluation mode. This one stays as it is."""
        return self.train(False)

    def shard(self, mesh: "DeviceMesh", blocks: str = r"layers\.\d+$") -> "Adapt":
        """Return an `adapt` whose frozen base is split over the processes of a mesh by torch's `fully_shard`.

        This `adapt` stays as it is.

        Every process calls this on a model with the same weights. It copies its own part of each weight to the mesh's device, and
        nothing of the model is shared: the model and this `adapt` may be deleted. Params stay whole, a plain tree on every process;
        average their gradients with `all_reduce_mean`. Each call of the result is one of all processes together.

        Packed weights are split as they are. Calls, `mixed` and `base` work as ever, under `value_and_grad` and under transforms. Not
        supported: nested reverse-mode transforms, `torch.compile`, other threads, `merge`, `module`.

        Args:
            mesh: a mesh of one axis, `torch.distributed.device_mesh.init_device_mesh(device, (processes,))`.
            blocks: regular expression of the paths of blocks whose weights are gathered one at a time.

        Raises:
            ValueError: where `blocks` matches nothing, the mesh has more than one axis, or a weight cannot be split, such as one
                that is offloaded or of a class that no kind reads.
            TypeError: where `mesh` is of another type.
        """
        self._require_whole("shard")
        self._require_in_memory("shard")
        return Adapt(shard_plan(self._plan, Sharding(mesh, blocks)))

    def unused(self) -> list[str]:
        """List the targets that no call in the building thread has reached yet: their layers were neither called nor read.

        A branch that a batch does not take is no error. A target that took no part in a whole training was never adapted.
        """
        used = {path for path, binding in self._replicas.main.bindings if binding.used}
        return [target.path for target in self.targets if target.path not in used]

    def __reduce__(self) -> tuple[Any, ...]:
        return Adapt, (self._plan,)  # only the plan is copied and pickled: the clones follow from it, and belong to this process's threads


def _replica(plan: Plan, shared: Mapping[str, Places]) -> Replica:
    module, bound, settings = bound_copy(plan)
    return Replica(module, bound, shared, settings)
