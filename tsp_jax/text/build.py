"""Builds a folder once, though several processes may ask for it, and continues what a killed process has begun."""

import contextlib
import fcntl
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from tsp_jax.errors import ConfigError
from tsp_jax.text.readers import Meter

LOCK = "lock"
"""file in the folder that the process holds whose turn it is"""
_POLL_S = 0.2
_REPORT_S = 60  # between lines of progress where stderr is no terminal


def build_once(folder: Path, build: Callable[[Path], None], is_worth_keeping: Callable[[Path], bool]) -> None:
    """Calls `build` with ``FOLDER.partial`` and renames it to `folder`, unless that exists.

    Processes on the same file system take turns; the others wait, and then find the folder. What a process that is
    killed or interrupted has written is given to the next one. It is deleted if the input is wrong (ConfigError), or it
    is not worth keeping.
    """
    while not folder.is_dir():
        with _turn(folder) as mine:
            if mine is None:
                continue  # another process has finished or given up
            try:
                build(mine)
                os.rename(mine, folder)
            except BaseException as error:
                if isinstance(error, ConfigError) or not is_worth_keeping(mine):
                    _delete(mine)
                if not folder.is_dir():  # else another process has built it, where there are no locks
                    raise


def _delete(folder: Path) -> None:
    """Deletes a folder that another process may want to make anew."""
    doomed = folder.with_name(f"{uuid.uuid4().hex}.partial")
    with contextlib.suppress(OSError):
        os.rename(folder, doomed)
        shutil.rmtree(doomed)


@contextlib.contextmanager
def _turn(folder: Path) -> Iterator[Path | None]:
    """Context manager: the folder in which this process may build; None if another process has ended its turn.

    The lock is of the operating system, which releases it when a process ends, however it ends.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(partial / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except FileNotFoundError:  # another process has just renamed the folder
        yield None
        return
    try:
        if not _lock(descriptor, folder):
            partial = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}.partial")
            partial.mkdir()
        elif not _is_open_at(descriptor, partial / LOCK):
            yield None
            return
        elif folder.is_dir():
            _delete(partial)
            yield None
            return
        yield partial
    finally:
        os.close(descriptor)


def _is_open_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _lock(descriptor: int, folder: Path) -> bool:
    """Waits for the lock; returns False if the file system has none."""
    waiting = False
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if not waiting:
                print(f"waiting for another process that builds {folder}", file=sys.stderr, flush=True)
            waiting = True
            time.sleep(_POLL_S)
        except OSError:
            return False


@contextlib.contextmanager
def progress(meter: Meter, what: str) -> Iterator[Callable[[], None]]:
    """Context manager: a function that shows on stderr how much is read; a bar, or a line each minute."""
    console = Console(stderr=True, markup=False, emoji=False)
    if not console.is_terminal:
        yield _Lines(meter, what)
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task(what, total=meter.total, completed=meter.read)
        yield lambda: bar.update(task, completed=meter.read)


class _Lines:
    """Prints a line each minute."""

    def __init__(self, meter: Meter, what: str):
        self._meter, self._what, self._last = meter, what, time.monotonic()

    def __call__(self) -> None:
        if time.monotonic() - self._last > _REPORT_S:
            self._last = time.monotonic()
            read, total = self._meter.read / 1e6, self._meter.total / 1e6
            print(f"{self._what}: {read:,.0f} of {total:,.0f} MB", file=sys.stderr, flush=True)
