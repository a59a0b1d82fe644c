"""Python's garbage collection while a program is inspected."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def paused_collection() -> Iterator[None]:
    """Context manager and decorator: Python searches for no cycles of references meanwhile.

    An inspection makes millions of objects and no cycles. The search visits them again and again: a third of the time.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
