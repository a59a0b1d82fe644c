"""The working directory of a run: writable, and held by one run at a time.

A run that takes the directory makes a file ``lock.N`` with the next N; the lock with the largest N is in force. A lock
names the host and process that hold it. Its modification time is renewed every `BEAT_S` seconds, and set to 0 when the
run ends. A run that finds a lock takes over, with ``lock.(N + 1)``, if the holder has ended or is dead. Otherwise the
new run is refused. It decides as follows whether a holder is dead:

- A holder on this machine is dead if its process does not run. So a restart after kill -9 need not wait.
- A holder on another machine is dead if no renewal of its lock is seen for `STALE_S` seconds: then the process, its
  container or its node has died. Clocks of two hosts are never compared.

The file system only has to make O_EXCL atomic, and shared file systems do so too. Of several runs that make the same N,
one succeeds. A lock in force is never deleted or renamed. flock is not used: NFS and Lustre may keep it within one
host, refuse it, or leave a dead node's lock in force, so renewals would be needed all the same.
"""

import contextlib
import os
import re
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import jax
import msgspec

from tsp_jax.errors import REFUSED, ConfigError, printable
from tsp_jax.files import FileError, Size, read_json
from tsp_jax.training.distributed import broadcast_from_writer, is_writer, report

BEAT_S = 5.0
"""seconds between renewals of a lock"""
STALE_S = 60.0
"""seconds without a renewal after which a holder on another machine counts as dead"""
POLL_S = 1.0
"""seconds between two checks of another machine's lock"""

_WAITING, _HELD, _REFUSED = range(3)


class Owner(msgspec.Struct, frozen=True):
    """The content of a lock."""

    host: str
    pid: Size
    machine: str
    """boot id and process-id namespace, within which `pid` and `started` identify one process; empty if unknown"""
    started: str
    """when the process started, in clock ticks since the boot"""
    run: str = ""
    """random text, different for each lock"""

    def runs(self) -> bool | None:
        """Whether the process runs; None if this machine cannot tell."""
        here = this_process()
        if not self.machine or (self.host, self.machine) != (here.host, here.machine):
            return None
        started = _started(self.pid)
        return None if started is None else started == self.started


@contextlib.contextmanager
def open_workdir(path: str) -> Iterator[Path]:
    """Context manager that creates the working directory if it is missing, and holds it for the run.

    Every process of a run makes this call. The writer holds the directory for all of them.

    Raises:
      ConfigError: the directory cannot be written, or another run holds it.
    """
    workdir = Path(path)
    _check_writable(workdir)
    lock = Lock(workdir) if is_writer() else None
    while (state := broadcast_from_writer(lock.take() if lock else _WAITING)) == _WAITING:
        time.sleep(POLL_S)
    if state == _REFUSED:
        reason = lock.refusal if lock else "cannot be held by process 0, which says why; use another --workdir"
        raise ConfigError(f"workdir={workdir} {reason}")
    try:
        yield workdir
    finally:
        if lock:
            lock.release()


def _check_writable(workdir: Path) -> None:
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / f".writable.{jax.process_index()}.{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"workdir={workdir} cannot be written ({error.strerror}); use --workdir runs/NAME") from error


class Lock:
    """This run's lock on the working directory, and what the run has seen of another run's lock."""

    def __init__(self, folder: Path):
        self.folder, self.me = folder, this_process()
        self.refusal = ""
        """why the directory cannot be held, once that is known"""
        self._number = 0
        self._seen = Path(), 0, 0.0  # lock of another run, its renewal, and when that was first seen
        self._over = threading.Event()
        self._renewals = threading.Thread(target=self._renew, name="tsp_lock", daemon=True)

    def take(self) -> int:
        """Tries to take the directory. Returns whether this run holds it, is refused, or must retry after `POLL_S`."""
        try:
            newest = max(self._all(), default=0)
            if newest and not self._is_free(self._path(newest)):
                return _REFUSED if self.refusal else _WAITING
            self._number = newest + 1
            self._file = os.open(self._path(self._number), os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            os.write(self._file, msgspec.json.encode(self.me))
            os.utime(self._file)
        except FileExistsError:  # another run was quicker
            return _WAITING
        except OSError as error:
            self.refusal = f"cannot be written ({error.strerror}); use --workdir runs/NAME"
            return _REFUSED
        if self._is_lost():  # this process slept for so long that others came and went
            os.close(self._file)
            return _WAITING
        for older in self._all() - {self._number}:
            with contextlib.suppress(OSError):
                self._path(older).unlink()
        self._renewals.start()
        return _HELD

    def release(self) -> None:
        """Lets another run take the directory at once."""
        self._over.set()
        self._renewals.join(BEAT_S)
        with contextlib.suppress(OSError):
            os.utime(self._file, (0, 0))
        os.close(self._file)

    def _all(self) -> set[int]:
        return {int(p.name[5:]) for p in self.folder.iterdir() if re.fullmatch("lock[.][1-9][0-9]*", p.name)}

    def _path(self, number: int) -> Path:
        return self.folder / f"lock.{number}"

    def _is_free(self, path: Path) -> bool:
        """Whether the holder of a lock has ended or is dead.

        If the holder runs, returns False and sets `refusal`. If it is not yet known whether the holder runs, returns
        False and leaves `refusal` empty.
        """
        owner, now = _read(path), time.monotonic()
        try:
            renewal = path.stat().st_mtime_ns
        except FileNotFoundError:  # there is a newer one
            return False
        runs = owner.runs() if owner else None
        if renewal == 0 or runs is False:
            return True
        first = self._seen[0] != path
        if first:
            self._seen = path, renewal, now
        who = f"process {owner.pid} on {owner.host}" if owner else "an unknown process"
        if runs or renewal != self._seen[1]:
            advice = f"wait until it ends, or use another --workdir (if this is a copy of its own, delete {path})"
            self.refusal = f"is held by {who}, which is running; {advice}"
        elif first:
            report(f"workdir={self.folder} was held by {who}; waiting up to {STALE_S:g} s to see whether it runs")
        return not self.refusal and now > self._seen[2] + STALE_S

    def _is_lost(self) -> bool:
        newest = max(self._all(), default=0)
        return newest > self._number or _read(self._path(newest)) not in (None, self.me)

    def _renew(self) -> None:
        while not self._over.wait(BEAT_S):
            with contextlib.suppress(OSError):  # the file system may come back
                os.utime(self._file)
                if self._is_lost():
                    self._leave()

    def _leave(self) -> None:
        text = f"another run took workdir={self.folder}, because this one was suspended; it saves nothing more"
        print(f"stopped: {printable(text)}", file=sys.stderr, flush=True)
        os._exit(REFUSED)


def this_process() -> Owner:
    """The `Owner` record of this process, with a new `run`."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        machine = f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        machine = ""
    return Owner(socket.gethostname(), os.getpid(), machine, _started(os.getpid()) or "", uuid.uuid4().hex)


def _started(pid: int) -> str | None:
    """When a process of this machine started, "" if it does not run; None: unknown (it belongs to another user)."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return "" if state in "ZX" else fields[18]
    except OSError:
        pass
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return ""
    except OSError:
        pass
    return None


def _read(path: Path) -> Owner | None:
    try:
        return read_json(path, Owner)
    except FileError:  # it was just made, is damaged, or gone
        return None
