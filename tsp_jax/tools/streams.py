"""Guards for standard output and standard error, which may be closed, full, or unable to encode what is printed."""

import contextlib
import errno
import io
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from tsp_jax.errors import ConfigError


@contextlib.contextmanager
def guarded_streams(needs_output: bool) -> Iterator[None]:
    """Context manager that guards stdout and stderr: if they fail, the command does not end with a traceback.

    Characters that a stream's encoding lacks are written as escapes. When standard output fails for the first time,
    the command ends if `needs_output` is set. Otherwise a line on stderr says so, the command goes on, and further
    output is lost. When standard error fails, what is printed there is lost.

    Raises:
      ConfigError: standard output cannot be written, and `needs_output` is set.
    """
    before = sys.stdout, sys.stderr
    _occupy_closed_descriptors()
    sys.stdout, sys.stderr = _Guarded(before[0], _output_failed(needs_output)), _Guarded(before[1], lambda error: None)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def _output_failed(needs_output: bool) -> Callable[[OSError], None]:
    def failed(error: OSError) -> None:
        text = f"standard output cannot be written ({error.strerror})"
        if needs_output:
            raise ConfigError(f"{text}; use a file or a program that takes all of it")
        print(f"warning: {text}; the command goes on without it", file=sys.stderr, flush=True)

    return failed


def _occupy_closed_descriptors() -> None:
    """Opens /dev/null on those of the descriptors 0, 1 and 2 that are closed.

    Otherwise the next file to be opened would take such a number, and receive what is printed.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free


class _Closed(io.StringIO):
    """A stream that was closed before the process began."""

    def write(self, text: str) -> int:
        raise OSError(errno.EBADF, "it is closed")


class _Guarded:
    """A text stream that calls `failed` when it fails for the first time, and writes nothing from then on."""

    def __init__(self, stream: TextIO | None, failed: Callable[[OSError], None]):
        self._stream, self._failed, self._lost = stream or _Closed(), failed, False
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        """Writes a text; returns its length."""
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        """Writes what is buffered."""
        self._try(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _try(self, action: Callable, *arguments: str) -> None:
        if self._lost:
            return
        try:
            action(*arguments)
        except OSError as error:
            self._lost = True
            with contextlib.suppress(OSError), open(os.devnull, "w") as null:
                os.dup2(null.fileno(), self._stream.fileno())  # what is buffered must not fail again at exit
            self._failed(error)
