"""One run holds a working directory: another is refused by name, and what died does not block the next."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest

from tests.builders.fuzz import check_door
from tests.builders.runs import ROOT
from tsp_jax.errors import REFUSED, ConfigError
from tsp_jax.training import workdir
from tsp_jax.training.workdir import Owner, open_workdir, this_process

HOLD = """
import sys, time
from tsp_jax.training import workdir
workdir.BEAT_S = 0.1
with workdir.open_workdir(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """A holder elsewhere counts as dead after half a second."""
    monkeypatch.setattr(workdir, "BEAT_S", 0.05)
    monkeypatch.setattr(workdir, "POLL_S", 0.05)
    monkeypatch.setattr(workdir, "STALE_S", 0.5)


@contextlib.contextmanager
def another(folder: Path):
    """A process that holds the folder."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    )
    try:
        assert process.stdout and process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def write_lock(folder: Path, owner: Owner | None, number: int = 1) -> Path:
    path = folder / f"lock.{number}"
    path.write_bytes(msgspec.json.encode(owner) if owner else b"")
    return path


@contextlib.contextmanager
def renewed(path: Path):
    """As its holder would renew it."""
    over = threading.Event()

    def renew():
        while not over.wait(0.05):
            os.utime(path)

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def hold(folder: Path) -> float:
    """Holds the folder and gives it free; returns the seconds that it waited."""
    began = time.monotonic()
    with open_workdir(str(folder)) as opened:
        assert opened == folder
        return time.monotonic() - began


# ------------------------------------------------------------------------------------------------ this machine


def test_a_second_run_is_refused_by_host_and_process_and_kill_9_frees_at_once(tmp_path):
    with another(tmp_path) as process:
        expected = rf"held by process {process.pid} on {re.escape(os.uname().nodename)}, which is running; .*--workdir"
        with pytest.raises(ConfigError, match=expected) as error:
            hold(tmp_path)
        assert "\n" not in str(error.value)
        os.kill(process.pid, signal.SIGSTOP)  # it still runs
        with pytest.raises(ConfigError, match=expected):
            hold(tmp_path)
        process.kill()  # and is a zombie until it is waited for
        deadline = time.monotonic() + 10
        while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            assert time.monotonic() < deadline
        assert hold(tmp_path) < workdir.STALE_S
    assert hold(tmp_path) < workdir.STALE_S


def test_a_run_may_follow_another_in_the_same_process_but_not_join_it(tmp_path):
    for _ in range(3):
        with open_workdir(str(tmp_path)), pytest.raises(ConfigError, match=f"held by process {os.getpid()} on"):
            hold(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("change", [{"started": "1"}, {"pid": 2**22 + 1}, {"pid": 2**63 - 1}], ids=str)
def test_a_process_that_is_gone_or_has_the_number_of_another_holds_nothing(change, tmp_path):
    write_lock(tmp_path, msgspec.structs.replace(this_process(), **change))
    assert hold(tmp_path) < workdir.STALE_S


# ------------------------------------------------------------------------------------------------ other machines

ELSEWHERE = {
    "another host": {"host": "node7"},
    "before a reboot, or in another container": {"machine": "0-0 pid:[1]"},
    "unknown": {"machine": ""},
}


@pytest.mark.parametrize("case", [*ELSEWHERE, "damaged"])
def test_elsewhere_renewals_decide(case, tmp_path, capsys):
    owner = msgspec.structs.replace(this_process(), pid=41, **ELSEWHERE[case]) if case in ELSEWHERE else None
    path = write_lock(tmp_path, owner)
    who = f"process 41 on {owner.host}" if owner else "an unknown process"
    with renewed(path), pytest.raises(ConfigError, match=f"is held by {who}, which is running"):
        hold(tmp_path)
    assert hold(tmp_path) >= workdir.STALE_S
    assert f"was held by {who}; waiting up to" in capsys.readouterr().err.splitlines()[-1]
    assert hold(tmp_path) < workdir.STALE_S


def test_a_run_that_ended_elsewhere_holds_nothing(tmp_path):
    os.utime(write_lock(tmp_path, msgspec.structs.replace(this_process(), host="node7")), (0, 0))
    assert hold(tmp_path) < workdir.STALE_S


def test_of_many_that_take_over_one_succeeds(tmp_path):
    write_lock(tmp_path, msgspec.structs.replace(this_process(), host="node7"))
    held, most = [], []

    def take(_):
        try:
            with open_workdir(str(tmp_path)):
                held.append(1)
                most.append(len(held))
                time.sleep(0.2)
                held.pop()
        except ConfigError:
            return 0
        return 1

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(take, range(8))) >= 1
    assert max(most) == 1


# ------------------------------------------------------------------------------------------------ losing it


@pytest.mark.parametrize("number", [1, 2])
def test_a_run_that_slept_while_another_took_over_stops(number, tmp_path):
    with another(tmp_path) as process:
        write_lock(tmp_path, this_process(), number)
        assert process.wait(10) == REFUSED
        assert process.stderr
        assert f"another run took workdir={tmp_path}" in process.stderr.read()


@pytest.mark.parametrize("lose", [lambda path: path.unlink(), lambda path: path.write_text("")], ids=["gone", "empty"])
def test_a_lock_that_is_lost_to_nobody_stops_nothing(lose, tmp_path):
    with open_workdir(str(tmp_path)):
        lose(tmp_path / "lock.1")
        time.sleep(0.3)
    renamed_to = tmp_path / "renamed"
    (tmp_path / "run").mkdir()
    with open_workdir(str(tmp_path / "run")):
        (tmp_path / "run").rename(renamed_to)
        time.sleep(0.3)
    assert hold(renamed_to) < workdir.STALE_S


# ------------------------------------------------------------------------------------------------ paths


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match=r"workdir=.* cannot be written"):
            hold(path)
    monkeypatch.setattr(os, "write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(ConfigError, match=r"workdir=.* cannot be written \(No space left on device\)"):
        hold(tmp_path)


@pytest.mark.soak
def test_fuzz_of_a_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(workdir, "POLL_S", 0.0)
    monkeypatch.setattr(workdir, "STALE_S", 0.0)
    monkeypatch.setattr(workdir, "report", lambda text: None)
    whole = msgspec.json.encode(msgspec.structs.replace(this_process(), started="1"))

    def read(content: bytes):
        for path in tmp_path.iterdir():
            path.unlink()
        (tmp_path / "lock.1").write_bytes(content)
        hold(tmp_path)

    check_door(read, [whole], (ConfigError,))
