"""A child process, bounded in time and memory, that runs a folder's tokenizer and chat templates.

A regular expression of tokenizer.json may backtrack for years, a normalizer or chat template may make a text of any
size, and the package `tokenizers` aborts its process on some errors. Only a separate process bounds all of these: the
operating system ends it at its limits.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

PROGRAM = Path(__file__).with_name("process_main.py")


class TextError(Exception):
    """A call failed; the message gives the reason in one line."""


class TextProcess:
    """Calls methods of `process_main.Text` in a child process.

    The process starts at the first call. If a call ends it, the next call starts a new one. `load` has the arguments of
    `Text.load`, which is called first in each new process. If `load` is None, it is not called.
    """

    def __init__(self, load: dict[str, Any] | None = None):
        self._load, self._lock = load, threading.Lock()
        self._child: subprocess.Popen | None = None

    def call(self, name: str, **arguments: Any) -> Any:
        """Returns the result of a call; raises TextError if it fails."""
        with self._lock:
            if self._child is None:
                self._start()
                if self._load is not None:
                    self._ask({"call": "load", **self._load})
            return self._ask({"call": name, **arguments})

    def close(self) -> None:
        """Ends the child process, if one runs."""
        with self._lock:
            if self._child is not None:
                self._stop()

    def _start(self) -> None:
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}  # a thread's time is not bounded apart
        try:
            self._child = subprocess.Popen(
                [sys.executable, "-P", str(PROGRAM)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, env=environment, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise TextError(f"its process cannot start: {error}") from None
        self._end = weakref.finalize(self, _end, self._child)

    def _ask(self, request: dict[str, Any]) -> Any:
        assert self._child and self._child.stdin and self._child.stdout
        try:
            line = json.dumps(request).encode() + b"\n"
        except (TypeError, ValueError, RecursionError) as error:
            raise TextError(f"not JSON: {error}") from None
        try:
            self._child.stdin.write(line)
            self._child.stdin.flush()
            answer = self._child.stdout.readline()
        except BrokenPipeError:
            answer = b""
        except BaseException:  # an interrupt leaves an answer that belongs to no later call
            self._stop()
            raise
        if not answer.endswith(b"\n"):
            raise TextError(_reason(self._stop()))
        content = json.loads(answer)
        if "error" in content:
            if request["call"] == "load":
                self._stop()
            raise TextError(content["error"])
        return content["result"]

    def _stop(self) -> int:
        code = self._end()
        self._child = None
        return code or 0


def _end(child: subprocess.Popen) -> int:
    """Ends a child process; returns its exit code, or minus the number of the signal that ended it."""
    assert child.stdin and child.stdout
    child.stdout.close()
    with contextlib.suppress(BrokenPipeError):
        child.stdin.close()
    try:
        return child.wait(timeout=1)
    except subprocess.TimeoutExpired:
        child.kill()
        return child.wait()


def _reason(code: int) -> str:
    if code == -signal.SIGXCPU:
        return "it takes too long"
    if code == -signal.SIGABRT:
        return "it needs too much memory, or crashes"
    return f"its process ended with {signal.Signals(-code).name if code < 0 else code}"
