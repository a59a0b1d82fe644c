"""--profile: a trace of the steps that were asked for, and bad ranges refused."""

import dataclasses
import shutil
from pathlib import Path

import jax
import pytest

from tests.builders.runs import compile_once, small_config
from tsp_jax.errors import ConfigError
from tsp_jax.training import trainer
from tsp_jax.training.profile import Profile

pytestmark = pytest.mark.usefixtures("optax_promotes")


@pytest.fixture(scope="module")
def make_program():
    return compile_once(trainer.make_program)


@pytest.fixture
def log(make_program, monkeypatch):
    """What happens between the steps: "start", "stop", and the numbers of steps that are dispatched."""
    happened: list = []
    monkeypatch.setattr(trainer, "make_program", make_program)
    for name in ("plot_losses", "plot_positions"):
        monkeypatch.setattr(trainer, name, lambda lines, path: True)
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: happened.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: happened.append("stop"))
    write = trainer.TrainLoop._write
    monkeypatch.setattr(
        trainer.TrainLoop, "_write", lambda loop, line: (happened.append(line["step"]), write(loop, line))
    )
    return happened


@pytest.mark.parametrize(
    ("steps", "desired"),
    [
        ("3:4", [1, 2, "start", 3, 4, "stop", 5, 5]),
        ("1", ["start", 1, "stop", 2, 3, 4, 5, 5]),
        ("5:5", [1, 2, 3, 4, "start", 5, "stop", 5]),
    ],
)
def test_the_trace_has_these_steps_and_no_evaluation(steps, desired, log, tmp_path):
    trainer.train(small_config(tmp_path, steps=5, profile=steps), "traced")
    assert log == desired


def test_a_resumed_run_traces_the_steps_that_are_left_and_says_so(log, tmp_path, capsys):
    config = small_config(tmp_path, steps=4, checkpoint_every=2)
    trainer.train(config, "whole")
    for name, steps, desired, says in (
        ("a", "2:3", ["start", 3, "stop", 4, 4], "steps up to 2 are done already; steps 3 to 3 are traced"),
        ("b", "1:2", [3, 4, 4], "steps 1 to 2 are done already; nothing is traced"),
    ):
        folder = tmp_path / name
        shutil.copytree(Path(config.workdir) / "checkpoints" / "2", folder / "checkpoints" / "2")
        log.clear()
        trainer.train(dataclasses.replace(config, workdir=str(folder), profile=steps), "resumed")
        assert log == desired
        assert says in capsys.readouterr().out.replace("\n", " ")


def test_the_profiler_writes_an_xplane(tmp_path):
    said = []
    with Profile((1, 2), tmp_path / "profile", said.append) as profile:
        profile.resume(0)
        jax.block_until_ready(jax.jit(lambda x: x @ x)(jax.numpy.ones((64, 64))))
        assert profile.is_due(2) and not profile.is_due(1)
        profile.end(2)
    assert list((tmp_path / "profile").glob("plugins/profile/*/*.xplane.pb"))
    assert said == [f"profile: a trace of steps 1 to 2 is in {tmp_path / 'profile'}"]


def test_a_run_that_ends_early_ends_its_trace(monkeypatch, tmp_path):
    happened = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: happened.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: happened.append("stop"))
    with pytest.raises(KeyboardInterrupt), Profile((1, 9), tmp_path, happened.append) as profile:
        profile.resume(0)
        raise KeyboardInterrupt
    assert happened == ["start", "stop", f"profile: a trace of the steps before the run ended is in {tmp_path}"]


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("10:13", "has steps after the last one, steps=5; use profile=5:5"),
        ("4:2", "is no range of steps"),
        ("0", "is no range of steps"),
        ("-1:2", "is no range of steps"),
        ("1:2:3", "is no range of steps"),
        ("3:", "is no range of steps"),
        ("all", "is no range of steps"),
    ],
)
def test_bad_ranges_are_refused(value, why, tmp_path):
    with pytest.raises(ConfigError, match=rf"^profile='{value}' {why}"):
        small_config(tmp_path, steps=5, profile=value)
