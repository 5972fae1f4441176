"""Places where lines do not break: within a range, an error or a word of code.

`0.95 [0.91, 1.12]` breaks before the bracket alone, `64.2% ± 4.7%` nowhere, and `--write` not after its hyphens. Code with a word that is
wider than a phone is marked `long`, and breaks anywhere (`_static/pages.css`).
"""

import re
from typing import Any

from docutils import nodes
from sphinx.transforms.post_transforms import SphinxPostTransform

SPACE = "\N{NO-BREAK SPACE}"
WIDE = 36
"""The number of letters of code that fit a phone's line in a list."""


class Unbroken(SphinxPostTransform):
    """Put no-break spaces into the ranges and errors of tables' cells, and mark code with long words."""

    default_priority = 900

    def run(self, **options: Any) -> None:
        for cell in self.document.findall(nodes.entry):
            for text in list(cell.findall(nodes.Text)):
                whole = re.sub(r"(\[[\d.]+,) (?=[\d.]+\])", rf"\1{SPACE}", str(text)).replace(" ± ", f"{SPACE}±{SPACE}")
                if whole != text:
                    text.parent.replace(text, nodes.Text(whole))
        for code in self.document.findall(nodes.literal):
            if any(len(word) > WIDE for word in code.astext().split()):
                code["classes"].append("long")


def setup(app: Any) -> dict[str, Any]:
    """Add the transform."""
    app.add_post_transform(Unbroken)
    return {"parallel_read_safe": True}
