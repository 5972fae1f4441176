"""Directives that pull a page's text out of the code, as Markdown: `{variant} lora`, `{variants}`, `{families}`, `{checks}`,
`{kind-checks}`, `{configs-api}`, `{functions-api}`, `{support} peft`, `{cells}`, `{kinds}`, `{integrations}`, `{architectures}`, `{rates}`,
`{members}`."""

from collections.abc import Callable
from typing import Any, ClassVar

import generate
import matrix
from docutils import nodes
from docutils.statemachine import StringList
from sphinx.util.docutils import SphinxDirective


class FromCode(SphinxDirective):
    """Parse the result of `text` as part of the page."""

    text: ClassVar[Callable[..., str]]

    def run(self) -> list[nodes.Node]:
        found = type(self).text(*self.arguments)
        part = nodes.Element()
        self.state.nested_parse(StringList(found.splitlines(), source=self.get_source_info()[0]), self.content_offset, part)
        return part.children


class Variant(FromCode):
    """The page of one variant, named by the argument."""

    required_arguments = 1
    text = staticmethod(generate.variant_page)


class Variants(FromCode):
    """The table of all variants."""

    text = staticmethod(lambda: generate.variants_table("variants/"))


class Families(FromCode):
    """The list of variants by family."""

    text = staticmethod(lambda: generate.families("variants/"))


class Costs(FromCode):
    """The table of each variant's trained numbers and multiply-adds on one layer."""

    text = staticmethod(generate.costs_table)


class Rates(FromCode):
    """The learning rates that were best where accuracies were measured."""

    text = staticmethod(generate.best_rates)


class Members(FromCode):
    """The time of one mixed step over a loop's."""

    text = staticmethod(generate.members)


class Checks(FromCode):
    """The table of the conformance kit's checks."""

    text = staticmethod(generate.checks_table)


class KindChecks(FromCode):
    """The table of the checks of a kind of layer."""

    text = staticmethod(generate.kind_checks_table)


class ConfigsApi(FromCode):
    """The API entries of the variants' configs."""

    text = staticmethod(generate.configs_api)


class FunctionsApi(FromCode):
    """The API entries of the pure functions."""

    text = staticmethod(generate.functions_api)


class Support(FromCode):
    """The matrix of variants and transforms of a library, named by the argument."""

    required_arguments = 1
    text = staticmethod(matrix.support_table)


class Cells(FromCode):
    """The table of the questions that the matrix's columns ask."""

    text = staticmethod(matrix.cells_table)


class Kinds(FromCode):
    """The grid of kinds of layers and their checks."""

    text = staticmethod(matrix.kinds_table)


class Integrations(FromCode):
    """The grid of a library's methods, named by the argument, and other libraries."""

    required_arguments = 1
    text = staticmethod(matrix.integrations_table)


class Architectures(FromCode):
    """The model classes of transformers that were tried."""

    text = staticmethod(matrix.architectures_list)


def setup(app: Any) -> dict[str, bool]:
    """Register the directives."""
    directives = {
        "variant": Variant,
        "variants": Variants,
        "families": Families,
        "costs": Costs,
        "checks": Checks,
        "support": Support,
        "cells": Cells,
    }
    directives |= {
        "kind-checks": KindChecks,
        "configs-api": ConfigsApi,
        "functions-api": FunctionsApi,
        "architectures": Architectures,
        "kinds": Kinds,
        "integrations": Integrations,
        "rates": Rates,
        "members": Members,
    }
    for name, directive in directives.items():
        app.add_directive(name, directive)
    return {"parallel_read_safe": True}
