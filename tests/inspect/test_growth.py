"""The work of an inspection grows linearly with the text: counted in executed lines, not in seconds."""

import sys
from types import FrameType

import pytest

from tests.builders.hlo_growth import FORMS
from tsp_jax import inspect
from tsp_jax.inspect import queues

SIZES = (30, 60, 120)


def lines_executed(text: str) -> int:
    """How many lines of this package run while a text is inspected; each iteration in a line counts."""
    count = 0

    def trace(frame: FrameType, event: str, argument: object):
        nonlocal count
        if event == "call" and "tsp_jax" not in frame.f_code.co_filename:
            return None
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        inspect.report(text, target="h100").to_json()
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("form", FORMS)
def test_work_grows_with_the_text(form, monkeypatch):
    monkeypatch.setattr(queues, "_FEW", 0)  # so that small programs take the path of large ones
    small, middle, large = (lines_executed(FORMS[form](n)) for n in SIZES)
    assert large - middle < 2.05 * (middle - small) + 100
