"""A run that was stopped, in whatever phase, and started again is the run that was not stopped."""

import dataclasses
import os
import shutil
import signal
import time
from concurrent.futures import Future
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.builders.runs import compile_once, finish, numbers, small_config, start_train, write_config
from tsp_jax.errors import PREEMPTED, RunStopped
from tsp_jax.layout import place
from tsp_jax.training import trainer
from tsp_jax.training.checkpoint import Checkpoints, saved_steps
from tsp_jax.training.data import Batches, prefetch
from tsp_jax.training.safety.preemption import SIGNALS, Agreement, StopSignals
from tsp_jax.training.trainer import TrainLoop

pytestmark = pytest.mark.usefixtures("optax_promotes")

make_program = compile_once(trainer.make_program)


@pytest.fixture(autouse=True)
def programs(monkeypatch):
    monkeypatch.setattr(trainer, "make_program", make_program)
    monkeypatch.setattr(trainer, "plot_losses", lambda lines, path: True)


def everything(config) -> tuple:
    """Metrics and the final state of a run."""
    program = make_program(config, place("single", data=1))
    state = Checkpoints(Path(config.workdir) / "checkpoints", program, config, "").restore(config.steps)
    return numbers(Path(config.workdir)), [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


@pytest.fixture(scope="module", params=["float32", pytest.param("bfloat16", marks=pytest.mark.soak)])
def whole(request, tmp_path_factory):
    """An uninterrupted run with a checkpoint of every step, and an evaluation of every fifth."""
    folder = tmp_path_factory.mktemp("whole")
    changes = {"compute_dtype": request.param, "checkpoint_every": 1, "keep_checkpoints": 20, "eval_every": 5}
    config = small_config(folder, **changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "make_program", make_program)
        trainer.train(config, "whole")
    return config, everything(config)


@pytest.fixture
def moved(whole, tmp_path):
    """The same configuration with another folder."""
    return dataclasses.replace(whole[0], workdir=str(tmp_path / "run"))


QUICK = (1, 5, 10, 19)
EVERY_STEP = [pytest.param(step, marks=() if step in QUICK else pytest.mark.soak) for step in range(1, 20)]


@pytest.mark.parametrize("step", EVERY_STEP)
def test_resuming_at_any_step_is_bitwise(step, whole, moved, capsys):
    original, folder = Path(whole[0].workdir), Path(moved.workdir)
    shutil.copytree(original / "checkpoints" / str(step), folder / "checkpoints" / str(step))
    shutil.copy(original / "metrics.jsonl", folder)
    data = dataclasses.replace(moved.data, prefetch=1 + step % 4)
    trainer.train(dataclasses.replace(moved, data=data), "resumed")
    assert f"restored step {step} " in capsys.readouterr().out
    assert everything(moved) == whole[1]


def test_a_run_that_is_past_its_steps_is_complete(whole, moved, capsys):
    """It was preempted at step 8, and is started again with fewer steps; without and with an old summary."""
    original, folder = Path(whole[0].workdir), Path(moved.workdir)
    shutil.copytree(original / "checkpoints" / "8", folder / "checkpoints" / "8")
    shutil.copy(original / "metrics.jsonl", folder)
    shutil.copy(original / "summary.json", folder)  # of step 20
    shorter = dataclasses.replace(moved, steps=3)
    for _ in range(2):
        summary = trainer.train(shorter, "shorter")
        assert summary["step"] == 8
        assert summary["eval_loss"] is not None
        said = capsys.readouterr().out
        assert "is complete at step 8; --steps 16 trains on" in said
        assert "optimizer.warmup_steps=3 is not less than steps=3; the warm-up has 1" in said
    assert saved_steps(folder / "checkpoints") == [8]
    assert numbers(folder)[-1]["step"] == 8


# ------------------------------------------------------------------------------------------------ signals


class Killer:
    """Sends the signal once, and knows how many steps had been dispatched then."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.patch, self.steps, self.steps_then = patch, 0, None
        agree = Agreement.__call__

        def counting(agreement):
            self.steps += 1
            return agree(agreement)

        patch.setattr(Agreement, "__call__", counting)

    def before(self, owner, name: str, condition, delay_s: float = 0.0, rest_s: float = 0.0) -> None:
        """Sends it before a method, the first time that its arguments meet a condition."""
        method = getattr(owner, name)

        def patched(this, *args, **kwargs):
            if self.steps_then is None and condition(*args):
                time.sleep(delay_s)
                self.steps_then = self.steps
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(rest_s)
            return method(this, *args, **kwargs)

        self.patch.setattr(owner, name, patched)


PHASES = {
    "step": lambda killer: killer.before(TrainLoop, "_log", lambda unseen: unseen and unseen[0] == 7),
    "evaluation": lambda killer: killer.before(TrainLoop, "_evaluate", lambda _, step: step == 10),
    "save in flight": lambda killer: killer.before(Checkpoints, "_commit", lambda _, step, __: step == 8, rest_s=1),
    "waiting for data": lambda killer: killer.before(Batches, "place", lambda step, _: step == 9, 1, 1),
}


@pytest.mark.parametrize("whole", ["float32"], indirect=True)
@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_saves_at_most_a_step_later_and_nothing_is_lost(phase, whole, moved, capsys):
    config = dataclasses.replace(moved, checkpoint_every=4)
    with pytest.MonkeyPatch.context() as patch:
        killer = Killer(patch)
        PHASES[phase](killer)
        with pytest.raises(RunStopped, match="is saved; start again") as stopped:
            trainer.train(config, "signalled")
    assert stopped.value.code == PREEMPTED
    (*_, newest) = saved_steps(Path(config.workdir) / "checkpoints")
    assert killer.steps_then <= newest <= killer.steps_then + 1
    assert [line["step"] for line in numbers(Path(config.workdir)) if "loss" in line] == list(range(1, newest + 1))
    trainer.train(config, "again")
    assert f"restored step {newest} " in capsys.readouterr().out
    assert everything(config) == whole[1]


def test_signals_are_as_before_after_a_run():
    handlers = [signal.getsignal(number) for number in SIGNALS]
    with StopSignals():
        assert [signal.getsignal(number) for number in SIGNALS] != handlers
    assert [signal.getsignal(number) for number in SIGNALS] == handlers


COMPILING = """
import jax, os, signal, threading, time
compile = jax.stages.Lowered.compile
def patched(self, *args, **kwargs):
    threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    return compile(self, *args, **kwargs), time.sleep(100)  # seconds that no Python handler would cut short
jax.stages.Lowered.compile = patched
"""
HANGING = """
import os, signal, time
from tsp_jax.training.data import Batches
place = Batches.place
def patched(self, step, *args, **kwargs):
    if step == 3:
        time.sleep(2)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1000)
    return place(self, step, *args, **kwargs)
Batches.place = patched
"""
TWICE = """
import os, signal, time
from tsp_jax.training.checkpoint import Checkpoints
def patched(*_):
    for _ in range(2):
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(1000)
Checkpoints._commit = patched
"""


@pytest.mark.parametrize(
    ("patch", "code", "saved", "says"),
    [
        (COMPILING, PREEMPTED, [], "SIGINT before the first step"),
        (HANGING, PREEMPTED, [3], "of 20 is saved"),
        (TWICE, 128 + signal.SIGTERM, [], "second signal"),
    ],
    ids=["compiling", "data that never comes", "a second signal"],
)
def test_exit_codes_of_a_process(patch, code, saved, says, tmp_path):
    config = small_config(tmp_path, checkpoint_every=4)
    with (tmp_path / "err").open("w") as stderr:
        process = start_train(write_config(config, tmp_path / "config.py", patch), stderr=stderr)
    (got,) = finish([process], timeout_s=240)
    err = (tmp_path / "err").read_text()
    assert got == code, err
    assert says in err
    assert saved_steps(tmp_path / "run" / "checkpoints") == saved


# ------------------------------------------------------------------------------------------------ pieces


def test_prefetching_ends_where_it_is_interrupted_and_leaves_what_hangs():
    interrupt: Future[int] = Future()
    release: Future[int] = Future()
    got = prefetch(lambda step: release.result() if step == 2 else step, 0, 9, 2, interrupt)
    assert [next(got), next(got)] == [(0, 0), (1, 1)]
    interrupt.set_result(15)
    assert list(got) == []
    release.set_result(0)


def test_what_is_ready_is_not_interrupted():
    interrupt: Future[int] = Future()
    interrupt.set_result(15)
    got = prefetch(lambda step: step, 0, 3, 2, interrupt)
    assert all(step == made for step, made in got)
