"""Figures with their spread stay on one line: `0.95 [0.91, 1.12]` breaks before the bracket alone, `64.2% ± 4.7%` nowhere."""

import re
from typing import Any

from docutils import nodes
from sphinx.transforms.post_transforms import SphinxPostTransform

SPACE = "\N{NO-BREAK SPACE}"


class WholeRanges(SphinxPostTransform):
    """Put no-break spaces into the ranges and errors of tables' cells."""

    default_priority = 900

    def run(self, **options: Any) -> None:
        for cell in self.document.findall(nodes.entry):
            for text in cell.findall(nodes.Text):
                whole = re.sub(r"(\[[\d.]+,) (?=[\d.]+\])", rf"\1{SPACE}", str(text)).replace(" ± ", f"{SPACE}±{SPACE}")
                if whole != text:
                    text.parent.replace(text, nodes.Text(whole))


def setup(app: Any) -> dict[str, Any]:
    """Add the transform."""
    app.add_post_transform(WholeRanges)
    return {"parallel_read_safe": True}
