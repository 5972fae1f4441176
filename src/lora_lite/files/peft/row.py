"""What a row of the table of PEFT's methods holds."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from lora_lite.core.config import AdapterConfig
from lora_lite.core.frozen import Constants

Fields = Mapping[str, Any]
Tensors = Mapping[str, Tensor]
Leaves = dict[str, Tensor]


class Leaf(NamedTuple):
    """A tensor of ours in PEFT's file: its key, its neutral value, its shape where ours is flat.

    Its number of axes is None where it depends on the config, and `optional` says whether the tensor itself does.
    """

    key: str
    ndim: int | None
    origin: Callable[[Any, Constants], Tensor | float] = lambda cfg, constants: 0.0
    shape: tuple[int, ...] | None = None
    optional: bool = False


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
        shared: keys of the constants that all layers share, by name; a file may lack them.
        completed: PEFT's tensors with what it leaves out of the file.
        signs: signs that align PEFT's factors with ours, by param.
        written: config and params as another variant, where PEFT's files hold them so.
        refused: what of a config PEFT cannot express, as the field and the reason.
        lists: PEFT's field that names the layers of this variant among those of its type.
        conv1d: whether PEFT adapts transformers' `Conv1D` by it.
    """

    config: type[AdapterConfig]
    peft_type: str
    leaves: Mapping[str, Leaf]
    read: Callable[[Fields, str, Tensors], dict[str, Any]]
    write: Callable[[Any], dict[str, Any]]
    when: Callable[[Fields, Tensors], bool] = lambda fields, tensors: True
    constants: Mapping[str, Leaf] = {}
    saved: Callable[[int, Constants], Leaves] = lambda i, constants: {}
    shared: Mapping[str, str] = {}
    completed: Callable[[Any, Leaves], Leaves] = lambda cfg, theirs: theirs
    signs: Callable[[Tensors, Constants], Leaves] = lambda theirs, constants: {}
    written: Callable[[Any, Leaves, Constants], tuple[Any, Leaves]] = lambda cfg, leaves, constants: (cfg, leaves)
    refused: Callable[[Any], str | None] = lambda cfg: None
    lists: str | None = None
    conv1d: bool = False
