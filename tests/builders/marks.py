"""Marks of single cases."""

import pytest


def soak(*values):
    """A case that `make soak` runs."""
    return pytest.param(*values, marks=pytest.mark.soak)
