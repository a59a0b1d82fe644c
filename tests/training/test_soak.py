"""The long proofs: killed twenty times, damaged a hundred times, disks that fill up, devices that come and go."""

import contextlib
import dataclasses
import gc
import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.builders.cli import BAD, SMALL
from tests.builders.runs import ROOT, compile_once, finish, numbers, small_config, start_train, write_config
from tsp_jax.config import FaultsConfig
from tsp_jax.errors import NOT_SAVED, REFUSED, ConfigError, RunStopped
from tsp_jax.layout import place
from tsp_jax.stored import to_logical
from tsp_jax.training import trainer
from tsp_jax.training.checkpoint import Checkpoints, saved_steps
from tsp_jax.training.checkpoint_manifest import find_damage
from tsp_jax.training.corpus import load_corpus
from tsp_jax.training.data import Batches
from tsp_jax.training.trainer import TrainLoop

pytestmark = [pytest.mark.soak, pytest.mark.usefixtures("optax_promotes")]
make_program = compile_once(trainer.make_program)
KILLS = 20
DAMAGES = 100


@pytest.fixture(autouse=True)
def programs(monkeypatch):
    monkeypatch.setattr(trainer, "make_program", make_program)
    monkeypatch.setattr(trainer, "plot_losses", lambda lines, path: True)
    yield
    gc.collect()  # what Orbax leaves behind when it fails is complained of here, where it is expected


def final(config) -> list:
    program = make_program(config, place("single", data=1))
    state = Checkpoints(Path(config.workdir) / "checkpoints", program, config, "").restore(config.steps)
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


# ------------------------------------------------------------------------------------------------ kill -9


def inode(path: Path) -> int:
    return path.stat().st_ino if path.exists() else 0


def wait_for(process: subprocess.Popen, metrics: Path, step: int, before: int) -> None:
    """Returns when this process has begun its own metrics file and the file has a step, or the process has ended."""
    while process.poll() is None:
        if inode(metrics) != before and f'"step": {step}, "loss"' in metrics.read_text():
            return
        time.sleep(0.005)


def test_a_run_killed_twenty_times_is_the_run_that_was_not(tmp_path):
    """Of the twenty, five come while a process starts, compiles or restores, the rest at a random step."""
    config = small_config(tmp_path, steps=200, checkpoint_every=5, eval_every=25)
    alone = dataclasses.replace(config, workdir=str(tmp_path / "alone"))
    assert finish([start_train(write_config(alone, tmp_path / "alone.py"))], 300) == [0]
    path, workdir = write_config(config, tmp_path / "config.py"), Path(config.workdir)
    rng = random.Random(0)
    moments = sorted([*rng.sample(range(2, 199), KILLS - 5), *rng.choices(range(2, 199), k=5)])
    early = set(rng.sample(range(KILLS), 5))
    resumed_from = []
    for kill, step in enumerate(moments):
        before = inode(workdir / "metrics.jsonl")
        process = start_train(path)
        if kill in early:
            late = time.monotonic() + rng.uniform(0.5, 8)
            while time.monotonic() < late and inode(workdir / "metrics.jsonl") == before:  # a quick machine steps soon
                time.sleep(0.005)
        else:
            wait_for(process, workdir / "metrics.jsonl", step, before)
            time.sleep(rng.uniform(0, 0.05))
        assert process.poll() is None, "it should be running when it is killed"
        process.kill()
        out, _ = process.communicate()
        if kill not in early and resumed_from and resumed_from[-1]:
            assert f"restored step {resumed_from[-1]} " in out
        steps = saved_steps(workdir / "checkpoints")
        resumed_from.append(steps[-1] if steps else 0)
        assert not any(find_damage(workdir / "checkpoints" / str(step)) for step in steps), "an unreadable checkpoint"
    assert finish([start_train(path)], 300) == [0]
    print("killed at or after steps", moments, "with the newest checkpoint at", resumed_from)
    assert len(set(resumed_from)) > 5
    assert numbers(workdir) == numbers(Path(alone.workdir))
    assert final(config) == final(alone)
    left = [str(path) for path in workdir.rglob("*") if "tmp" in path.name or "partial" in path.name]
    assert left == []


# ------------------------------------------------------------------------------------------------ corruption


def truncate(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: rng.randrange(max(1, path.stat().st_size))])


def delete(path: Path, rng: random.Random) -> None:
    path.unlink()


def flip(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def test_a_hundred_damages_are_all_found(tmp_path):
    config = small_config(tmp_path)
    program = make_program(config, place("single", data=1))
    first, folder, said = program.init(), tmp_path / "checkpoints", []
    states = {step: jax.tree.map(lambda x, step=step: x + jnp.asarray(step, x.dtype), first) for step in (1, 2)}
    checkpoints = Checkpoints(folder, program, config, "")
    for step, state in states.items():
        checkpoints.save(state, step)
    checkpoints.close(2)
    files = sorted(path.relative_to(folder) for path in (folder / "2").rglob("*") if path.is_file())
    rng, fell_back = random.Random(0), 0
    for trial in range(DAMAGES):
        kind, victim = (truncate, delete, flip)[trial % 3], files[(trial // 3) % len(files)]
        if kind is flip and (folder / victim).stat().st_size == 0:
            kind = delete
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        kind(copy / victim, rng)
        again = Checkpoints(copy, program, config, "", said.append)
        step = again.newest_undamaged()
        assert step is not None
        restored = jax.device_get(again.restore(step))
        pairs = zip(jax.tree.leaves(restored), jax.tree.leaves(jax.device_get(states[step])), strict=True)
        assert all(np.array_equal(a, b) for a, b in pairs), f"{kind.__name__} {victim}: a silent wrong restore"
        fell_back += step == 1
    print(f"{DAMAGES} damages to {len(files)} files: {fell_back} fell back, {len(said)} named their file")
    assert fell_back == len(said) == DAMAGES


# ------------------------------------------------------------------------------------------------ disks


@contextlib.contextmanager
def small_disk(folder: Path, size: str):
    """A file system of its own; needs the right to mount one."""
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)], capture_output=True
    ).returncode:
        pytest.skip("cannot mount a small disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("policy", ["continue", "stop"])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of Orbax's event loop, as it fails
def test_a_full_disk_is_reported_and_loses_nothing(policy, tmp_path, capsys, monkeypatch):
    """The disk is full from step 8 to step 16 of 20: the saves of steps 10 and 15 fail."""
    with small_disk(tmp_path / "disk", "4m") as disk:
        config = small_config(
            tmp_path, workdir=str(disk / "run"), checkpoint_every=5, faults=FaultsConfig(failed_save=policy)
        )
        log, ballast = TrainLoop._log, disk / "ballast"

        def fill(run, unseen):
            if unseen and unseen[0] == 8:
                run.checkpoints.wait()
                with contextlib.suppress(OSError), ballast.open("wb") as file:
                    while True:
                        file.write(bytes(512))
                        file.flush()
            if unseen and unseen[0] == 16:
                run.checkpoints.wait()
                ballast.unlink()
            return log(run, unseen)

        monkeypatch.setattr(TrainLoop, "_log", fill)
        checkpoints = disk / "run" / "checkpoints"
        if policy == "stop":
            with pytest.raises(RunStopped, match=r"checkpoint 10 could not be saved.*the newest is 5") as stopped:
                trainer.train(config, "disk")
            assert stopped.value.code == NOT_SAVED
            assert saved_steps(checkpoints) == [5]
        else:
            trainer.train(config, "disk")
            assert saved_steps(checkpoints) == [5, 20]
            steps = [line["step"] for line in numbers(disk / "run") if "loss" in line]
            assert steps == list(range(1, 21)), "a line of the metrics is missing"
        assert not any(find_damage(checkpoints / str(step)) for step in saved_steps(checkpoints))
        said = capsys.readouterr().err
        assert "checkpoint 10 could not be saved" in said
        print("\n".join(line for line in said.splitlines() if line.startswith("warning")))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of Orbax's event loop, as it fails
def test_a_disk_that_becomes_read_only_is_reported_and_loses_nothing(tmp_path, capsys, monkeypatch):
    """From step 8 to step 16 of 20."""
    config = small_config(tmp_path, checkpoint_every=5)
    (tmp_path / "run").mkdir()
    log = TrainLoop._log

    def remount(run, unseen):
        if unseen and unseen[0] in (8, 16):
            run.checkpoints.wait()
            mode = "ro" if unseen[0] == 8 else "rw"
            subprocess.run(["mount", "-o", f"remount,{mode}", str(checkpoints)], check=True)
        return log(run, unseen)

    with small_disk(tmp_path / "run" / "checkpoints", "8m") as checkpoints:
        monkeypatch.setattr(TrainLoop, "_log", remount)
        trainer.train(config, "disk")
        assert saved_steps(checkpoints) == [5, 20]
        assert not any(find_damage(checkpoints / str(step)) for step in (5, 20))
    said = capsys.readouterr().err
    assert "checkpoint 10 could not be saved" in said
    assert "Read-only file system" in said
    print("\n".join(line for line in said.splitlines() if line.startswith("warning")))


# ------------------------------------------------------------------------------------------------ devices

CHAIN = [
    ("tsp", {"data": 1, "tsp": 8}),
    ("tp", {"data": 1, "model": 4}),
    ("sp", {"data": 2, "seq": 1}),
    ("single", {"data": 1}),
    ("fsdp_cp", {"data": 2, "tsp": 4}),
    ("tp_sp", {"data": 2, "model": 2, "seq": 2}),
]
"""8 -> 4 -> 2 -> 1 -> 8 -> 8 devices"""


def test_devices_come_and_go_and_the_run_goes_on(tmp_path, monkeypatch):
    """Three steps on each: parameters bitwise, losses within 1e-5 of one device, no sample twice or missed."""
    config = small_config(tmp_path, steps=20)
    windows, read = [], Batches._windows
    monkeypatch.setattr(Batches, "_windows", lambda self, step: windows.append(read(self, step)) or windows[-1])
    corpus = load_corpus(config.data, config.model.vocab_size, "train")

    def steps_on(layout, mesh, start, stop, restore):
        placement = place(layout, **mesh)
        program = trainer.make_program(config, placement)
        data = Batches(
            corpus, batch=config.batch, seq_len=config.seq_len, seed=0, order="zigzag",
            sequence_shards=placement.size("sequence"), shuffle=True,
        )  # fmt: skip
        checkpoints = Checkpoints(tmp_path / f"checkpoints{restore}", program, config, "")
        state = checkpoints.restore(start) if start else program.init()
        before = jax.device_get(to_logical(program.paddings, state))
        batch = program.abstract_batch((1, config.batch, config.seq_len))
        compiled = program.step.lower(program.abstract_state, batch).compile()
        losses = []
        for step in range(start, stop):
            state, metrics = compiled(state, data.place(step, program.batch_sharding, accumulate=1))
            losses.append(float(metrics.loss))
        checkpoints.save(state, stop)
        checkpoints.close(stop)
        return losses, before, jax.device_get(to_logical(program.paddings, state))

    want = steps_on("single", {"data": 1}, 0, 18, "one")[0]
    alone, windows[:] = list(windows), []
    losses, after = [], None
    for number, (layout, mesh) in enumerate(CHAIN):
        more, before, then = steps_on(layout, mesh, 3 * number, 3 * number + 3, "many")
        if after is not None:
            pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
            assert all(np.array_equal(a, b) for a, b in pairs), f"{layout} restored other parameters"
        losses, after = losses + more, then
    np.testing.assert_allclose(losses, want, rtol=1e-5)
    assert np.array_equal(np.stack(windows), np.stack(alone))
    print("largest relative difference of a loss:", np.max(np.abs(np.array(losses) / want - 1)))


# ------------------------------------------------------------------------------------------------ bad input


def test_sixty_bad_inputs_are_refused_within_seconds(tmp_path):
    """As processes: exit code 2, one line, under 5 s of processor time, nothing compiled, nothing written."""
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("for line in text: print(line)\n" * 300)
    extra = {
        f"{flag}={value}": [f"--{flag}={value}"]
        for flag, values in {
            "batch": ("0", "x", "2147483648", "1.5"),
            "seq-len": ("0", "-96", "97"),
            "steps": ("0", "nan", ""),
            "seed": ("-1", "1e99"),
            "accumulate": ("0", "5"),
            "mesh": ("tsp", "tsp=", "=2", "tsp=x", "data=1;tsp=2", ",", "tsp=-1", "model=8"),
            "layout": ("", "TSP"),
            "compute-dtype": ("float16", "int8"),
            "remat": ("True",),
            "model.num-heads": ("0", "7"),
            "model.vocab-size": ("-5",),
            "model.rope-theta": ("inf", "-1"),
            "optimizer.learning-rate": ("nan", "0"),
            "optimizer.b1": ("1", "-0.1"),
            "optimizer.weight-decay": ("-1", "nan"),
            "data.prefetch": ("0",),
            "data.order": ("zag",),
            "stream.bucket-mib": ("0",),
            "faults.failed-save": ("maybe",),
            "faults.hang-s": ("-1", "inf"),
            "faults.skip-limit": ("0",),
            "cluster.process-id": ("1",),
            "cluster.launcher": ("pbs", "explicit"),
            "keep-every": ("-1",),
            "keep-checkpoints": ("0",),
            "workdir": ("", "/proc/run"),
        }.items()
        for value in values
    }
    cases = {name: flags for name, (flags, _) in BAD.items()} | extra
    assert len(cases) >= 60
    base = [
        "tiny",
        *SMALL,
        "--data.files",
        str(tmp_path / "text" / "*.txt"),
        "--data.cache-dir",
        str(tmp_path / "cache"),
    ]
    worst = 0.0
    for name, flags in cases.items():
        command = ["bash", "-c", 'time "$@"', "_", sys.executable, str(ROOT / "scripts" / "train.py"), *base, *flags]
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path,
            env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "TIMEFORMAT": "%U %S", "JAX_PLATFORMS": "cpu"},
        )  # fmt: skip
        *lines, times = done.stderr.splitlines()
        assert done.returncode == REFUSED, (name, done.stderr)
        assert len(lines) == 1 and lines[0].startswith("error: "), (name, done.stderr)
        assert done.stdout == "", name
        assert {path.name for path in tmp_path.iterdir()} <= {"text", "cache"}, name
        worst = max(worst, sum(map(float, times.split())))
    print(f"{len(cases)} bad inputs, the slowest took {worst:.1f} s of processor time")
    assert worst < 5


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_afresh(tmp_path):
    config = small_config(tmp_path, checkpoint_every=10)
    trainer.train(config, "first")
    for step in saved_steps(tmp_path / "run" / "checkpoints"):
        truncate(tmp_path / "run" / "checkpoints" / str(step) / "manifest.json", random.Random(0))
    with pytest.raises(ConfigError, match="no checkpoint that is not damaged"):
        trainer.train(config, "again")


def test_lines_that_a_disk_has_no_room_for_are_in_the_checkpoint(tmp_path, capsys, monkeypatch):
    """The disk of the metrics is full from step 8 to the end; that of the checkpoints never is."""
    log = TrainLoop._log
    with small_disk(tmp_path / "run", "256k") as disk, small_disk(disk / "checkpoints", "8m"):

        def fill(run, unseen):
            if unseen and unseen[0] == 8:
                with contextlib.suppress(OSError), (disk / "ballast").open("wb", buffering=0) as file:
                    while True:
                        file.write(bytes(512))
            return log(run, unseen)

        monkeypatch.setattr(TrainLoop, "_log", fill)
        config = small_config(tmp_path, checkpoint_every=5)
        trainer.train(config, "disk")
        warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
        said = [json.loads(line[line.index("{") :])["step"] for line in warnings if "not in " in line]
        on_disk = [line["step"] for line in numbers(disk) if "loss" in line]
        assert on_disk + sorted(set(said)) == list(range(1, 21))
        (disk / "ballast").unlink()
        trainer.train(config, "disk")
        assert [line["step"] for line in numbers(disk) if "loss" in line] == list(range(1, 21))
