"""Tests with other libraries; their warnings are their own."""

import pytest


def pytest_collection_modifyitems(items):
    """Let the libraries warn as they do."""
    for item in items:
        if "integrations" in item.path.parts:
            item.add_marker(pytest.mark.filterwarnings("ignore"))
