"""`model_card`: the README of an adapter, as the Hugging Face Hub shows it beside the files."""

import json
import os
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from lora_lite.adapt import Adapt
from lora_lite.core.config import AdapterConfig
from lora_lite.core.config_json import to_json
from lora_lite.core.errors import require_type
from lora_lite.files.durable import written

NAME = "README.md"
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?")
_PIPELINES = {
    **{"CAUSAL_LM": "text-generation", "SEQ_CLS": "text-classification", "TOKEN_CLS": "token-classification"},
    **{"QUESTION_ANS": "question-answering", "FEATURE_EXTRACTION": "feature-extraction"},
}
"""The Hub's names of tasks, by PEFT's."""

_USES = {
    "peft": """\
```python
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "path or name of this repository")
```

or, with `lora_lite`:

```python
import lora_lite as ll

adapt, params = ll.from_peft(base_model, "path or name of this repository")
outputs = adapt(params, batch)
```
""",
    "lora_lite": """\
```python
import lora_lite as ll

adapt, params = ll.load(base_model, "adapter.safetensors")
outputs = adapt(params, batch)
```
""",
}


def model_card(
    adapt: Adapt,
    params: Mapping[str, Mapping[str, Tensor]],
    *,
    base: str | None = None,
    metrics: Mapping[str, float | str] | None = None,
    title: str = "Adapter",
    license: str | None = None,
    tags: Sequence[str] = (),
    form: Literal["peft", "lora_lite"] = "peft",
) -> str:
    """Return a model card: the Hub's metadata, then the base model, variants, sizes, metrics and how to load the files.

    Args:
        adapt: the adapted model of the params.
        params: a tree that fits it.
        base: name of the base model on the Hub, "user/repo"; None for the one that the model was loaded by, if it is such a name.
        metrics: results by name, for a table; nothing is computed.
        title: the heading.
        license: the Hub's identifier of a licence, such as "apache-2.0".
        tags: further tags for the Hub.
        form: the files beside the card, `"peft"` for those of `to_peft`, `"lora_lite"` for the one of `save`.

    Returns:
        Markdown with a header in YAML, the text of a `README.md`.

    Raises:
        TypeError: where an argument is of another type, as in another order.
        ValueError: where `params` does not fit, `base` is no name of a repository, or `form` is another word.

    Example:
        >>> import torch, lora_lite as ll
        >>> adapt = ll.build(torch.nn.Sequential(torch.nn.Linear(8, 4)), ll.LoRAConfig(r=2))
        >>> card = ll.model_card(adapt, adapt.init(), base="user/model", metrics={"accuracy": 0.9})
        >>> card.splitlines()[1:4]
        ['base_model: "user/model"', 'library_name: "peft"', 'tags: ["lora", "lora_lite"]']
    """
    call = "model_card(adapt, params)"
    require_type(isinstance(adapt, Adapt), call, "adapt", "what build or load returned", adapt)
    require_type(isinstance(params, Mapping), call, "params", "a params tree, e.g. adapt.init()", params)
    _require_words(call, base, metrics, title, license, tags)
    adapt._require(params, "model_card")
    if form not in _USES:
        raise ValueError(f"model_card: expected form to be any of {', '.join(map(repr, _USES))}, found {form!r}.")
    if base is not None and not _REPOSITORY.fullmatch(base):
        raise ValueError(f'model_card: expected base as the name of a repository, "user/repo", found {base!r}. Name it, or leave it out.')
    base, variants = base or _loaded_by(adapt._plan.base), sorted({cfg.name for cfg in adapt.configs})
    fields = {
        "base_model": base,
        "library_name": form,
        "license": license,
        "pipeline_tag": _PIPELINES.get(adapt._plan.task_type or ""),
        "tags": list(dict.fromkeys([*variants, "lora_lite", *tags])),
    }
    header = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in fields.items() if value]  # JSON is YAML
    lines = ["---", *header, "---", "", f"# {title}", "", _about(adapt, base, variants), ""]
    lines += ["| variant | options | layers |", "|---|---|---|", *_configs(adapt), ""]
    if metrics:
        lines += ["| metric | value |", "|---|---|", *(f"| {_cell(name)} | {_cell(value)} |" for name, value in metrics.items()), ""]
    return "\n".join([*lines, "## Use", "", _USES[form]])


def _require_words(call: str, base: Any, metrics: Any, title: Any, license: Any, tags: Any) -> None:
    require_type(base is None or isinstance(base, str), call, "base", "the name of a repository", base)
    require_type(metrics is None or isinstance(metrics, Mapping), call, "metrics", "a mapping from names to results", metrics)
    require_type(isinstance(title, str), call, "title", "a string", title)
    require_type(license is None or isinstance(license, str), call, "license", "a string", license)
    listed_tags = isinstance(tags, Sequence) and not isinstance(tags, str) and all(isinstance(tag, str) for tag in tags)
    require_type(listed_tags, call, "tags", "a list of strings", tags)


def _about(adapt: Adapt, base: str | None, variants: Sequence[str]) -> str:
    """Return the sentence that says what was adapted, by what, and how much is trained."""
    model = adapt._plan.base
    known = type(model) is not nn.Module  # else the layers alone, read from the adapter's files
    kind = type(model).__name__ if known else "model"
    of = f"[{base}](https://huggingface.co/{base})" if base else f"a {kind}"
    total = sum(p.numel() for p in model.parameters()) if known else 0
    share = f", {100 * adapt.num_params / total:.2g}% of the model's {total:,}" if total else ""
    return f"An adapter of {of}: {', '.join(variants)} at {len(adapt.targets)} layers, {adapt.num_params:,} trained values{share}."


def write_card(card: str, folder: Path) -> None:
    """Write a card into a folder, unless it has a README already: that is kept, with a warning."""
    place = folder / NAME
    if place.exists():
        warnings.warn(f'"{place}" is there already and was kept. Remove it for a new card.', UserWarning, stacklevel=3)
        return
    with written(place) as beside:
        beside.write_text(card, "utf-8")


def _loaded_by(model: object) -> str | None:
    """Return the name by which transformers loaded a model, where it is one of the Hub rather than a path."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    return name if isinstance(name, str) and _REPOSITORY.fullmatch(name) and not os.path.exists(name) else None


def _configs(adapt: Adapt) -> list[str]:
    """Return a line of the table for each config, without the fields that all configs share."""
    shared = {"name", *AdapterConfig.__dataclass_fields__}
    options = [
        (cfg.name, ", ".join(f"{name}={value}" for name, value in to_json(cfg).items() if name not in shared)) for cfg in adapt.configs
    ]
    return [f"| {name} | {_cell(text)} | {count} |" for (name, text), count in Counter(options).items()]


def _cell(value: object) -> str:
    return " ".join(str(value).split()).replace("|", r"\|")
