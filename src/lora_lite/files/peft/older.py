"""Methods that PEFT has given another name: files under the older one, whose tensors are the same."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

NOW = {"BONE": "MISS"}
"""The older names with the present ones. Those of fields and tensors follow."""


def present_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a file under the present name of its method."""
    method = fields.get("peft_type")
    return {**fields, "peft_type": NOW[method]} if isinstance(method, str) and method in NOW else dict(fields)


def present_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors under the present names of their methods."""
    ends = re.compile(rf"\.({'|'.join(NOW).lower()})(_[a-z]+)$")
    return {ends.sub(lambda found: f".{NOW[found[1].upper()].lower()}{found[2]}", key): t for key, t in tensors.items()}
