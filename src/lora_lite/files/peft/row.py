"""A row of the table of PEFT's methods: how a variant stands in PEFT's files."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_lite.core.config import AdapterConfig
from lora_lite.core.frozen import Constants, Frozen
from lora_lite.core.plan import Target
from lora_lite.files.peft.numbered import unstacked
from lora_lite.layers.kind import Kind

Fields = Mapping[str, Any]
Tensors = Mapping[str, Tensor]
Leaves = dict[str, Tensor]


class Leaf(NamedTuple):
    """A tensor of ours in PEFT's file.

    Attributes:
        key: its name there, after the layer's path; with a `#`, of one tensor for each number, which ours stacks, or else joins.
        ndim: number of its axes; several where options differ.
        origin: `(our config, constants)` to PEFT's neutral value; the layer's own bias is there as `own_bias`.
        shape: its shape there, where ours is flat.
        field: the field, of PEFT's config and of ours, without which there is no such tensor.
        optional: whether a layer may lack it.
        floating: false for indices, which may have any dtype.
        joined: whether tensors by number are joined at their first axis, or laid out flat where that is the only one here.
        implied: whether the weight implies it, so that a file of the same model holds the same.
        hollow: whether some options leave it without numbers.
    """

    key: str
    ndim: int | tuple[int, ...]
    origin: Callable[[Any, Constants], Tensor | float] = lambda cfg, constants: 0.0
    shape: tuple[int, ...] | None = None
    field: str | None = None
    optional: bool = False
    floating: bool = True
    joined: bool = False
    implied: bool = False
    hollow: bool = False

    def theirs(self, cfg: Any, constants: Constants, ours: Tensor) -> Tensor:
        """Return a param of ours as PEFT's value. The sum with an origin is in at least float32: half precision is coarse around it."""
        origin = self.origin(cfg, constants)
        if isinstance(origin, float) and origin == 0.0:
            return ours
        return ours.to(torch.promote_types(ours.dtype, torch.float32)) + origin

    def misfit(self, tensor: Tensor, further: int) -> str | None:
        """Return the expectation, with so many further axes, that a tensor of the file does not meet, or None."""
        axes = [n + further for n in (self.ndim if isinstance(self.ndim, tuple) else (self.ndim,))]
        if tensor.ndim in axes and (tensor.is_floating_point() or not self.floating):
            return None
        return f"{' or '.join(map(str, axes))} axes{' of a floating dtype' if self.floating else ''}"


def as_it_is(cfg: Any, leaves: Leaves, constants: Constants) -> tuple[Any, Leaves]:
    """Return the config and the params of a variant that a file holds as itself."""
    return cfg, leaves


def is_lowered(rank: int, asked: int, tensors: Tensors) -> bool:
    """Whether the rank of LoRA's factors is the layer's smaller width, to which PEFT has lowered the one that was asked for."""
    return rank < asked and rank == min(tensors["lora_A.weight"].shape[-1], tensors["lora_B.weight"].shape[-2])


class Row(NamedTuple):
    """A variant as PEFT has it.

    Attributes:
        config: the variant's config class.
        peft_type: PEFT's name of the method.
        leaves: our params by name.
        read: `(fields, path, tensors of the layer)` to our config's values.
        write: our config to the fields of PEFT's that a layer may have of its own.
        when: whether a layer of this PEFT type is of this variant; the first row that fits is taken.
        constants: our constants that the file holds, by name.
        saved: `(target's input width, constants)` to the constants as the file holds them.
        derived: `(our config, layer, constants)` to the constants with what the origins take of the weight besides.
        shared: keys of the constants that all layers share, by name; a file may lack them.
        shared_leaves: our params that all layers share, by name, with whole keys; a file has them.
        zeros: PEFT's tensors of zeros, with their axes, each of which stands where a layer has no leaf under the same part of the key.
        of_sort: keys of the constants that a file holds once for all layers of a sort, each with the sort after it.
        sort: the sort of a layer by its path.
        settled: `(layer, constants of the file)` to the constants that follow from them.
        apart: our tensors by PEFT's keys, and the constants, to those that the file holds.
        completed: PEFT's tensors with what it leaves out of the file.
        signs: signs that align PEFT's factors with ours, by param.
        written: config and params as another variant, where PEFT's files hold them so.
        refused: what of a config PEFT cannot express, as the field and the reason.
        misread: kinds of layers at which PEFT's file has another meaning than the variant, as the reason.
        unsure: `(our config, layer)` to why PEFT derives something else from the weight than we do, or None.
        bare: whether a file may hold nothing of a layer; the config's `target_modules` then says which layers there are.
        lists: PEFT's field that names the layers of this variant among those of its type.
        named: `(our config, the layers' targets, paths of all other modules, None where unknown)` to the fields that name the layers
            otherwise than as a list.
        agreed: the target and the fields of each layer, to fields that say the same of all layers where theirs differ.
        conv1d: whether PEFT adapts transformers' `Conv1D` by it.
        lowers: whether PEFT lowers a rank above the layer's widths to the smaller one in silence.
        idles: whether PEFT may so leave a layer nothing to train, with empty tensors, where it computes as the base model.
    """

    config: type[AdapterConfig]
    peft_type: str
    leaves: Mapping[str, Leaf]
    read: Callable[[Fields, str, Tensors], dict[str, Any]]
    write: Callable[[Any], dict[str, Any]]
    when: Callable[[Fields, Tensors], bool] = lambda fields, tensors: True
    constants: Mapping[str, Leaf] = {}
    saved: Callable[[int, Constants], Leaves] = lambda i, constants: {}
    derived: Callable[[Any, Frozen, Constants], Constants] = lambda cfg, W, constants: constants
    shared: Mapping[str, str] = {}
    shared_leaves: Mapping[str, Leaf] = {}
    zeros: Mapping[str, str] = {}
    of_sort: tuple[str, ...] = ()
    sort: Callable[[str], str] = lambda path: path
    settled: Callable[[Frozen, Constants], Constants] = lambda W, constants: {}
    apart: Callable[[Leaves, Constants], Leaves] = lambda tensors, constants: unstacked(tensors)
    completed: Callable[[Any, Leaves], Leaves] = lambda cfg, theirs: theirs
    signs: Callable[[Tensors, Constants], Leaves] = lambda theirs, constants: {}
    written: Callable[[Any, Leaves, Constants], tuple[Any, Leaves]] = as_it_is
    refused: Callable[[Any], str | None] = lambda cfg: None
    misread: Callable[[type[Kind]], str | None] = lambda kind: None
    unsure: Callable[[Any, Frozen], str | None] = lambda cfg, W: None
    bare: bool = False
    lists: str | None = None
    named: Callable[[Any, Sequence[Target], Sequence[str] | None], dict[str, Any]] = lambda cfg, targets, others: {}
    agreed: Callable[[Sequence[tuple[Target, Fields]]], dict[str, Any]] = lambda layers: {}
    conv1d: bool = False
    lowers: bool = False
    idles: bool = False

    def held(self, value: Callable[[str], Any]) -> dict[str, Leaf]:
        """Return the leaves of a layer by our names, where `value(field)` is that of the config."""
        return {name: leaf for name, leaf in self.leaves.items() if leaf.field is None or value(leaf.field)}


def own_bias(layer: Frozen) -> Constants:
    """Return a layer's own bias as an origin finds it among the constants."""
    return {} if layer.bias is None else {"own_bias": layer.bias.detach()}
