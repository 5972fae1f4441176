"""Find a model's new head, drawn at random beside a pretrained body."""

import re
import warnings

from torch import nn

from lora_lite.core.config import patterns_of
from lora_lite.core.plan import Entries
from lora_lite.layers.find import names

_CLASSIFIER = re.compile(r"For(Sequence|Token)Classification$")


def new_heads(model: nn.Module) -> list[str]:
    """Return the paths of the linear layers that stand outside the body of one of transformers' classifiers.

    The body is the module that `base_model_prefix` names. Heads of language models are pretrained with it and not among them.
    """
    body = getattr(model, "base_model_prefix", "")
    if not isinstance(body, str) or not body or not hasattr(model, body) or not _CLASSIFIER.search(type(model).__name__):
        return []
    return [path for path, m in model.named_modules() if isinstance(m, nn.Linear) and path.partition(".")[0] != body]


def warn_of_new_heads(model: nn.Module, entries: Entries) -> None:
    """Warn of a classifier's head that a config took without being asked for it: it would stay frozen as it was drawn."""
    taken = {target.path: cfg for target, cfg in entries if cfg.adapts == "linear"}
    heads = [path for path in new_heads(model) if path in taken]
    unasked = [path for path in heads if not any(names(p, path, list(taken)) for p in patterns_of(taken[path].target_names))]
    if unasked:
        path, name = unasked[0], type(taken[unasked[0]]).__name__
        warnings.warn(
            f'build: {name} adapts "{path}", the head of {type(model).__name__}, by an update of weights that stay frozen. Where the '
            "checkpoint has no such head, they are random. Train it whole: build(model, "
            f'[ll.{name}(..., exclude_names=(r"^{re.escape(path)}$",)), ll.FullConfig(target_names=r"^{re.escape(path)}$")]).',
            UserWarning,
            stacklevel=3,
        )
