"""Tests with other libraries; their warnings are their own."""

import importlib.util

import pytest

# The main suite has tests of Opacus. These are those of the grid's cells, for the environment of all libraries.
collect_ignore = [] if importlib.util.find_spec("posteriors") else ["test_private.py"]


def pytest_collection_modifyitems(items):
    """Let the libraries warn as they do."""
    for item in items:
        if "integrations" in item.path.parts:
            item.add_marker(pytest.mark.filterwarnings("ignore"))
