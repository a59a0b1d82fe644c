"""Several processes over gloo are one run: the same losses, each its own data, and they end together."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import chex
import pytest

from tests.builders.runs import ROOT, finish, numbers, small_config, start_processes, write_config
from tsp_jax.config import ClusterConfig, FaultsConfig
from tsp_jax.errors import HUNG, PREEMPTED, REFUSED, ConfigError
from tsp_jax.tools import cli
from tsp_jax.training import trainer
from tsp_jax.training.checkpoint import saved_steps
from tsp_jax.training.workdir import open_workdir

pytestmark = pytest.mark.usefixtures("optax_promotes")

LOSS_TOLERANCE = 1e-6
"""relative: the same program on the same mesh; only the library that sums is another"""


def config_of(folder: Path, **changes):
    return small_config(folder, **({"layout": "tsp", "mesh": "data=2,tsp=2", "steps": 6} | changes))


RECORD = """
import json, jax
from tsp_jax.training.data import Batches
read = Batches._read
def recording(self, windows, columns):
    if self._shuffle:
        with open(f"FOLDER/{jax.process_index()}.read", "a") as file:
            file.write(json.dumps([windows.ravel().tolist(), columns.tolist()]) + "\\n")
    return read(self, windows, columns)
Batches._read = recording
"""


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.soak)])
def test_losses_equal_one_process_and_data_is_disjoint_and_complete(count, tmp_path):
    config = config_of(tmp_path, checkpoint_every=3, eval_every=3)
    alone = dataclasses.replace(config, workdir=str(tmp_path / "alone"))
    trainer.train(alone, "alone")
    many = dataclasses.replace(config, cpu_devices=4 // count)
    path = write_config(many, tmp_path / "config.py", RECORD.replace("FOLDER", str(tmp_path)))
    assert finish(start_processes(count, path), 280) == [0] * count, (tmp_path / "0.err").read_text()
    want, got = numbers(Path(alone.workdir)), numbers(Path(many.workdir))
    chex.assert_trees_all_close(got, want, rtol=LOSS_TOLERANCE)
    assert saved_steps(Path(many.workdir) / "checkpoints") == [3, 6]
    assert not list(Path(many.workdir).rglob("*.partial"))
    read = Counter()
    for rank in range(count):
        lines = [json.loads(line) for line in (tmp_path / f"{rank}.read").read_text().splitlines()]
        read.update((window, column) for windows, columns in lines for window in windows for column in columns)
    assert set(read.values()) == {1}, "a token was read by two processes"
    assert len(read) == config.steps * config.batch * config.seq_len


@pytest.mark.soak
def test_two_processes_are_refused_a_working_directory_that_is_held(tmp_path):
    config = config_of(tmp_path, cpu_devices=2)
    path = write_config(config, tmp_path / "config.py")
    with open_workdir(config.workdir):
        assert finish(start_processes(2, path), 60) == [REFUSED] * 2
    errors = [(tmp_path / f"{rank}.err").read_text() for rank in range(2)]
    assert f"held by process {os.getpid()} on" in errors[0]
    assert "cannot be held by process 0, which says why" in errors[1]
    assert [error.count("\n") for error in errors] == [1, 1]
    assert [file.name for file in Path(config.workdir).iterdir()] == ["lock.1"]


SLOW = """
import time
from tsp_jax.training.trainer import TrainLoop
log = TrainLoop._log
def slow(self, unseen):
    time.sleep(0.3)
    return log(self, unseen)
TrainLoop._log = slow
"""


@pytest.fixture
def two(tmp_path):
    """Starts a run of two processes and returns them once some steps are done."""

    def start(patch: str, **changes):
        config = config_of(tmp_path, steps=1000, cpu_devices=2, checkpoint_every=4, **changes)
        processes = start_processes(2, write_config(config, tmp_path / "config.py", patch))
        metrics = Path(config.workdir) / "metrics.jsonl"
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline and not (metrics.exists() and metrics.read_text().count("\n") >= 6):
            time.sleep(0.1)
        return processes, Path(config.workdir), lambda: [(tmp_path / f"{rank}.err").read_text() for rank in range(2)]

    return start


@pytest.mark.soak
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_process_saves_and_ends_all(rank, two):
    processes, workdir, errors = two(SLOW)
    processes[rank].send_signal(signal.SIGTERM)
    assert finish(processes, 60) == [PREEMPTED] * 2, errors()
    (*_, before, newest) = saved_steps(workdir / "checkpoints")
    assert [line["step"] for line in numbers(workdir) if "loss" in line] == list(range(1, newest + 1))
    # and all of them resume, from the one before where the newest is damaged
    (victim,) = (workdir / "checkpoints" / str(newest) / "state").glob("manifest.ocdbt")
    victim.write_bytes(victim.read_bytes()[:-1])
    processes = start_processes(2, workdir.parent / "config.py", f"--steps={newest + 3}")
    assert finish(processes, 200) == [0, 0], errors()
    assert [line["step"] for line in numbers(workdir) if "loss" in line] == list(range(1, newest + 4))
    assert any(f"checkpoint {newest} is damaged: state/manifest.ocdbt" in err for err in errors())
    assert (workdir / "checkpoints" / f"{newest}.damaged").exists()
    assert before < newest


@pytest.mark.soak
def test_the_local_launcher_passes_signals_on_and_ends_as_its_processes_do(tmp_path):
    config = config_of(tmp_path, steps=1000, cpu_devices=2, checkpoint_every=50)
    path = write_config(config, tmp_path / "config.py", SLOW)
    command = [sys.executable, str(ROOT / "scripts" / "train_processes.py"), "2", str(path)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    launcher = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics, deadline = Path(config.workdir) / "metrics.jsonl", time.monotonic() + 200
    while time.monotonic() < deadline and not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        time.sleep(0.1)
    launcher.send_signal(signal.SIGINT)
    assert launcher.wait(60) == PREEMPTED
    assert saved_steps(Path(config.workdir) / "checkpoints") == [len(numbers(Path(config.workdir)))]


def test_the_local_launcher_wants_a_number():
    command = [sys.executable, str(ROOT / "scripts" / "train_processes.py"), "tiny"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


@pytest.mark.soak
@pytest.mark.parametrize("rank", [0, 1])
def test_where_one_process_is_killed_the_other_exits(rank, two):
    heartbeat_s = 10
    processes, _, errors = two(SLOW, cluster=ClusterConfig(heartbeat_s=heartbeat_s))
    processes[rank].kill()
    codes = finish(processes, heartbeat_s + 5)
    assert codes[1 - rank] != 0, errors()


STUCK = """
import time, jax
from tsp_jax.training.trainer import TrainLoop
log = TrainLoop._log
def stuck(self, unseen):
    if unseen and unseen[0] == 8 and jax.process_index() == 1:
        time.sleep(1000)
    return log(self, unseen)
TrainLoop._log = stuck
"""


@pytest.mark.soak
def test_where_one_process_is_stuck_all_exit_with_stacks(two):
    deadline_s = 30
    processes, _, errors = two(STUCK, faults=FaultsConfig(hang_s=deadline_s))
    assert finish(processes, deadline_s + 5) == [HUNG] * 2, errors()
    for rank, err in enumerate(errors()):
        assert f"hang: process {rank} of 2" in err
        assert "most recent call first" in err
        assert "trainer.py" in err
    assert 'config.py", line' in errors()[1], "the line that is stuck"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"process_id": 2, "num_processes": 2}, "cluster.process_id=2"),
        ({"launcher": "explicit"}, "cluster.coordinator=''"),
        ({"coordinator": "host"}, "cluster.coordinator='host'"),
        ({"launcher": "pbs"}, "cluster.launcher=pbs"),
        ({"heartbeat_s": 0}, "cluster.heartbeat_s=0"),
    ],
)
def test_bad_clusters_are_refused(fields, words):
    with pytest.raises(ConfigError, match=words):
        ClusterConfig(**fields)


def test_a_launcher_that_is_not_there_is_refused_in_a_line(tmp_path):
    path = write_config(config_of(tmp_path), tmp_path / "config.py")
    processes = start_processes(1, path, "--cluster.coordinator=")
    assert finish(processes, 60) == [2]


# ------------------------------------------------------------------------------------------------ Slurm


@pytest.mark.parametrize(
    ("code", "attempts", "ends_with", "requeues"),
    [(0, 0, 0, False), (2, 0, 2, False), (75, 0, 0, True), (75, 99, 0, True), (76, 0, 0, True), (76, 20, 76, False),
     (77, 0, 77, False), (78, 0, 78, False), (137, 3, 0, True), (137, 20, 137, False)],
)  # fmt: skip
def test_the_slurm_script_requeues_what_another_attempt_can_finish(code, attempts, ends_with, requeues, tmp_path):
    for name, exit_code in (("srun", code), ("scontrol", 0)):
        stub = tmp_path / name
        stub.write_text(f'#!/bin/bash\necho {name} "$@" >> {tmp_path}/called\nexit {exit_code}\n')
        stub.chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "41", "SLURM_RESTART_COUNT": str(attempts)}
    script = ROOT / "scripts" / "train.slurm"
    done = subprocess.run(["bash", str(script), "llama_7b", "--mesh", "data=2,tsp=8"], env=env, capture_output=True)
    srun, *others = (tmp_path / "called").read_text().splitlines()
    assert done.returncode == ends_with
    assert others == (["scontrol requeue 41"] if requeues else [])
    flags = srun.split("train.py ")[1].split()
    config = cli.parse(flags)[1]
    assert (config.cluster.launcher, config.mesh) == ("slurm", "data=2,tsp=8")
