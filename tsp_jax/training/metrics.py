"""``metrics.jsonl``: a line for every step and evaluation of a run."""

import contextlib
import errno
import itertools
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from tsp_jax.files import Count, FileError, Finite, check_json, parse_json, read_bytes
from tsp_jax.training.distributed import is_writer, write_atomically

MAX_BYTES = 2**30
"""largest metrics file that is read, in bytes"""


class EvaluationLine(msgspec.Struct):
    """The content of an evaluation's line. Null stands for a number that was not finite."""

    step: Count
    eval_loss: Finite | None


class StepLine(msgspec.Struct):
    """The content of a step's line. A line may hold further numbers."""

    step: Count
    loss: Finite | None
    grad_norm: Finite | None
    tokens_per_s: Finite | None


class MetricsFile:
    """The metrics file of one run. Its lines are also kept in memory, so none is lost if the file is damaged.

    At the start, lines of steps after `resume_step` are dropped, and so are damaged lines. Anything at `path` that is
    not a regular file is renamed to ``metrics.jsonl.damaged``. Later, lines that cannot be written are tried again
    with each new line, and a file that was removed is written anew.

    Args:
      path: path of the file.
      resume_step: the step that the run resumes from.
      report: called with one line about each fault, on the writer only.
      saved: file with the lines that `sync` returned when `resume_step` was saved, if it returned any.
    """

    def __init__(self, path: Path, resume_step: int, report: Callable[[str], Any] = print, saved: Path | None = None):
        self.path, self._report = path, report if is_writer() else lambda text: None
        found, lines = self._read()
        waiting = read_metrics(saved) if saved and saved.exists() else []
        kept = {_place(line): line for line in (*lines, *waiting) if line["step"] <= resume_step}
        lines = [kept[place] for place in sorted(kept)]
        self.earlier = [line for line in lines if "eval_loss" not in line]
        """lines of the training steps up to `resume_step`"""
        self.evaluations = {line["step"] for line in lines if "eval_loss" in line}
        """steps that have an evaluation"""
        self._report_gaps(resume_step)
        self._content = bytearray().join(map(_encode, lines if is_writer() else ()))
        self._file: int | None = None
        self._written = self._synced = 0
        self._fails = False
        if is_writer():
            self._start(found)

    @property
    def lines(self) -> list[dict]:
        """All lines of the run, whether they are on disk or not."""
        return [json.loads(line) for line in self._content.splitlines()]

    def write(self, line: dict) -> None:
        """Appends a line; does nothing on processes other than the writer."""
        if "eval_loss" in line:
            self.evaluations.add(line["step"])
        if is_writer():
            self._content += _encode(line)
            self._flush()

    def sync(self) -> str:
        """Flushes all lines to disk, so that every step up to the next checkpoint has its line there.

        Returns:
          The lines that are not on disk; the checkpoint should keep them.
        """
        self._flush()
        if self._file is not None:
            try:
                os.fsync(self._file)
                self._synced = self._written
            except OSError as error:  # the disk has not taken what it seemed to take
                self._written = self._synced
                self._failed(error)
        start = self._content.rfind(b"\n", 0, self._synced) + 1
        return self._content[start:].decode()

    def close(self) -> None:
        """Closes the file; reports each line that could not be written."""
        for line in self.sync().splitlines():
            self._report(f"not in {self.path}: {line}")
        self._close_file()

    # ---------------------------------------------------------------------------------------------- reading

    def _read(self) -> tuple[bytes, list[dict]]:
        """Reads (content, lines) of the file; both are empty if it does not exist or is not a regular file."""
        if not os.path.lexists(self.path):
            return b"", []
        try:
            content = read_bytes(self.path, MAX_BYTES)
        except FileError as error:
            aside = self.path.with_name(f"{self.path.name}.damaged")
            self._report(f"{str(error).partition(';')[0]}; it is renamed to {aside.name}")
            if is_writer():
                with contextlib.suppress(OSError):  # `_flush` reports it
                    os.replace(self.path, aside)
            return b"", []
        lines, damaged = _parse(content)
        if damaged:
            self._report(f"{damaged} line{'s' * (damaged > 1)} of {self.path} cannot be read and are left out")
        return content, lines

    def _report_gaps(self, resume_step: int) -> None:
        steps = [0, *(line["step"] for line in self.earlier), resume_step + 1]
        gaps = [(before + 1, after - 1) for before, after in itertools.pairwise(steps) if after - before > 1]
        if gaps:
            texts = [str(first) if first == last else f"{first}-{last}" for first, last in gaps[:20]]
            self._report(f"{self.path} has no line of steps {', '.join(texts)}{', ...' * (len(gaps) > 20)}")

    # ---------------------------------------------------------------------------------------------- writing

    def _start(self, found: bytes) -> None:
        """Replaces the file, whose content was `found`, by the lines that are kept."""
        try:
            write_atomically(self.path, bytes(self._content))
            found = bytes(self._content)
        except OSError:  # a full disk: what the file has of these lines stays, the others wait
            pairs = zip(found, self._content, strict=False)
            found = found[: sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))]
        self._written = len(found)
        self._flush()

    def _flush(self) -> None:
        """Writes the lines that are not in the file yet."""
        if not is_writer():
            return
        try:
            file = self._open()
            while self._written < len(self._content):
                self._written += os.write(file, bytes(self._content[self._written :]))
            self._fails = False
        except OSError as error:
            self._failed(error)

    def _failed(self, error: OSError) -> None:
        if not self._fails:
            self._report(f"{self.path} cannot be written ({error.strerror}); its lines are kept in memory")
        self._fails = True

    def _open(self) -> int:
        """Opens the file, creates it if it has vanished, and cuts off what follows the lines that this run wrote.

        Raises:
          OSError: the file cannot be opened, or something else is in its place.
        """
        there = os.stat(self.path) if os.path.exists(self.path) else None
        mine = None if self._file is None else os.fstat(self._file)
        if not there:
            self._written = self._synced = 0
            self.path.parent.mkdir(parents=True, exist_ok=True)
        file = self._file
        if file is None or not (there and mine and os.path.samestat(there, mine)):
            if there and mine and not self._is_copy():
                self._written = self._synced = 0
                raise OSError(errno.EEXIST, "something else is in its place")
            self._close_file()
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC
            self._file = file = os.open(self.path, flags, 0o666)
        if mine and not there:
            self._report(f"{self.path} was removed or renamed while training; it is written anew")
        size = os.fstat(file).st_size
        if size != self._written:
            self._written = min(size, self._written)
            self._synced = min(self._synced, self._written)
            os.ftruncate(file, self._written)
        return file

    def _is_copy(self) -> bool:
        """Whether the file at `path` ends with the lines that this run wrote, as when an editor has saved a copy."""
        try:
            tail = read_bytes(self.path, MAX_BYTES)[-4096:]
        except FileError:
            return False
        return tail == self._content[: self._written][-4096:]

    def _close_file(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


def read_metrics(path: Path) -> list[dict]:
    """Reads the lines of a metrics file, except damaged ones, such as a last line that a crash cut short.

    Raises:
      FileError: the file is missing, not a regular one, or larger than `MAX_BYTES`.
    """
    return _parse(read_bytes(path, MAX_BYTES))[0]


def _parse(content: bytes) -> tuple[list[dict], int]:
    """(lines, number of damaged lines). A last line that a crash cut short is in neither."""
    *whole, last = content.split(b"\n")
    lines = [_parse_line(text) for text in whole]
    kept = [line for line in (*lines, _parse_line(last)) if line is not None]
    return kept, lines.count(None)


def _parse_line(text: bytes) -> dict | None:
    try:
        line = parse_json(text.decode(), "")
        check_json(line, "", EvaluationLine if "eval_loss" in line else StepLine)
    except (FileError, UnicodeDecodeError):
        return None
    return line


def _place(line: dict) -> tuple[int, bool]:
    """Sort key of a line: by step, and the line of a step before the line of its evaluation."""
    return line["step"], "eval_loss" in line


def _encode(line: dict) -> bytes:
    """The line as it is written, with null for numbers that are not finite."""
    return json.dumps(_finite(line), allow_nan=False).encode() + b"\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
