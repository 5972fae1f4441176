"""Tell a model's new head, drawn at random beside a pretrained body, from the layers that a pretrained file holds."""

import re

from torch import nn

_CLASSIFIER = re.compile(
    r"For(Sequence|Token|Image|Audio|Video|AudioFrame|ImageAndText)?Classification$|ForMultipleChoice$|ForQuestionAnswering$"
)


def new_heads(model: nn.Module) -> list[str]:
    """Return the paths of the linear layers that stand outside the body of one of transformers' classifiers.

    The body is the module that `base_model_prefix` names. Heads of language models are pretrained with it and not among them.
    """
    body = getattr(model, "base_model_prefix", "")
    if not isinstance(body, str) or not body or not hasattr(model, body) or not _CLASSIFIER.search(type(model).__name__):
        return []
    return [path for path, m in model.named_modules() if isinstance(m, nn.Linear) and path.partition(".")[0] != body]
