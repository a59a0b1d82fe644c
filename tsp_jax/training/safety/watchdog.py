"""Ends a run that hangs, and prints where it hangs."""

import faulthandler
import os
import sys
import threading
import time

import jax

from tsp_jax.errors import HUNG

LINGER_S = 2.0
"""seconds between printing the stacks and exiting, if there are other processes, so that they can print theirs"""
_STDERR = 2  # file descriptor; sys.stderr may have none


class Watchdog:
    """Context manager: if `pet` is not called in time, prints the stack of every thread and exits with code 76.

    Each process has its own watchdog. So if one process hangs, those that wait for it exit too. `deadline_s` is the
    time allowed between two calls of `pet`; 0: no limit.
    """

    def __init__(self, deadline_s: float):
        self.deadline_s = deadline_s
        self._last, self._what = time.monotonic(), "the start"
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="tsp_watchdog", daemon=True)

    def __enter__(self):
        if self.deadline_s:
            self.pet("the start")
            self._thread.start()
        return self

    def __exit__(self, *_):
        if self.deadline_s:
            self._over.set()
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()

    def pet(self, what: str) -> None:
        """Restarts the deadline. `what` says what was done last; the message about a hang repeats it."""
        self._last, self._what = time.monotonic(), what
        if self.deadline_s:
            # from C, with exit code 1, in case something hangs while it holds Python's lock
            faulthandler.dump_traceback_later(self.deadline_s + LINGER_S + 1, exit=True, file=_STDERR)

    def _watch(self) -> None:
        while not self._over.wait(max(0.0, self._last + self.deadline_s - time.monotonic())):
            if time.monotonic() >= self._last + self.deadline_s:
                self._bark()

    def _bark(self) -> None:
        who = f"process {jax.process_index()} of {jax.process_count()}: "
        message = f"hang: {who}nothing done in {self.deadline_s:g} s since {self._what}; the stack of every thread:"
        print(message, file=sys.stderr, flush=True)
        faulthandler.dump_traceback(_STDERR, all_threads=True)
        if jax.process_count() > 1:
            time.sleep(LINGER_S)
        os._exit(HUNG)
