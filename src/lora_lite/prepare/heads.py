"""Find a model's heads: the output embeddings of a language model, and new heads, drawn at random beside a pretrained body."""

import re
import warnings
from collections.abc import Sequence

from torch import nn

from lora_lite.core.config import patterns_of
from lora_lite.core.errors import exactly
from lora_lite.core.plan import Entries
from lora_lite.core.tree import modules_by_path
from lora_lite.layers.find import names

_PEFTS = ("score", "classifier")
_CLASSIFIER = re.compile(r"For(Sequence|Token)Classification$")


def new_heads(model: nn.Module) -> list[str]:
    """Return the paths of the linear layers that stand outside the body of one of transformers' classifiers.

    The body is the module that `base_model_prefix` names. Heads of language models are pretrained with it and not among them.
    """
    body = getattr(model, "base_model_prefix", "")
    if not isinstance(body, str) or not body or not hasattr(model, body) or not _CLASSIFIER.search(type(model).__name__):
        return []
    return [path for path, m in model.named_modules() if isinstance(m, nn.Linear) and path.partition(".")[0] != body]


def output_heads(model: nn.Module) -> list[str]:
    """Return the paths of the module that a language model names as its output head. None for other models."""
    try:
        output = getattr(model, "get_output_embeddings", lambda: None)()
    except (AttributeError, NotImplementedError):
        output = None
    return [] if output is None else [path for path, module in modules_by_path(model).items() if module is output and path]


def heads_left_out(model: nn.Module) -> dict[str, str]:
    """Return the heads that a config takes by name alone, each with the reason: those that PEFT's `all-linear` leaves out."""
    found = dict.fromkeys(output_heads(model), "the head of a language model (get_output_embeddings), which target_names can ask for")
    for path in new_heads(model):
        if path.partition(".")[0] in _PEFTS:
            found[path] = "a classifier's new head, which FullConfig trains whole"
    return found


def warn_of_new_heads(model: nn.Module, entries: Entries) -> None:
    """Warn of a classifier's head that a config took without being asked for it: it would stay frozen as it was drawn."""
    taken = {target.path: cfg for target, cfg in entries if cfg.adapts == "linear"}
    new = new_heads(model)
    _warn_of_frozen_heads(model, entries, new)
    heads = [path for path in new if path in taken]
    unasked = [path for path in heads if not any(names(p, path, list(taken)) for p in patterns_of(taken[path].target_names))]
    if unasked:
        path, name = unasked[0], type(taken[unasked[0]]).__name__
        warnings.warn(
            f'build: {name} adapts "{path}", the head of {type(model).__name__}, by an update of weights that stay frozen. Where the '
            "checkpoint has no such head, they are random. Train it whole: build(model, "
            f'[ll.{name}(..., exclude_names=(r"{exactly(path)}",)), ll.FullConfig(target_names=r"{exactly(path)}")]).',
            UserWarning,
            stacklevel=3,
        )


def _warn_of_frozen_heads(model: nn.Module, entries: Entries, new: Sequence[str]) -> None:
    """Warn of a classifier's new head that no config takes, where one takes the linear layers without naming them."""
    plain = next((cfg for _, cfg in entries if cfg.adapts == "linear" and not cfg.target_names), None)
    if plain is None:
        return
    paths, excluded = [target.path for target, _ in entries], patterns_of(plain.exclude_names)
    frozen = [
        head
        for head in new
        if head.partition(".")[0] in _PEFTS
        and not any(head == p or head.startswith(f"{p}.") for p in paths)
        and not any(re.search(pattern, head) for pattern in excluded)
    ]
    if frozen:
        head, name = frozen[0].partition(".")[0], type(plain).__name__
        warnings.warn(
            f'build: {name} leaves "{frozen[0]}" out, the head of {type(model).__name__}, which stays as it is. Where the checkpoint has '
            f"no such head, it is random. Train it whole: build(model, [ll.{name}(...), "
            f'll.FullConfig(target_names=r"{exactly(head)}")]).',
            UserWarning,
            stacklevel=4,
        )
