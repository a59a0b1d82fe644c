"""Loggers: TensorBoard's events have each step once, wandb is called as it should be, and neither ends a run."""

import dataclasses
import struct
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.builders.runs import compile_once, small_config
from tsp_jax.errors import ConfigError
from tsp_jax.training import trainer
from tsp_jax.training.loggers import Loggers, Wandb, check_loggers, open_loggers
from tsp_jax.training.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("optax_promotes")


@pytest.fixture(scope="module")
def make_program():
    return compile_once(trainer.make_program)


@pytest.fixture(autouse=True)
def quick(make_program, monkeypatch):
    monkeypatch.setattr(trainer, "make_program", make_program)
    for name in ("plot_losses", "plot_positions"):
        monkeypatch.setattr(trainer, name, lambda lines, path: True)


def events(folder: Path) -> list:
    """All events of a folder's files in the order in which TensorBoard reads them."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    found = []
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        while content:  # length, its checksum, the event, its checksum
            (length,) = struct.unpack("<Q", content[:8])
            found.append(event_pb2.Event.FromString(content[12 : 12 + length]))
            content = content[16 + length :]
    return found


def shown(folder: Path) -> Counter:
    """(step, tag) -> how often TensorBoard shows it: a restart purges what came before from its step on."""
    counts = Counter()
    for event in events(folder):
        if event.HasField("session_log"):
            counts = Counter({key: count for key, count in counts.items() if key[0] < event.step})
        counts.update((event.step, value.tag) for value in event.summary.value)
    return counts


# ------------------------------------------------------------------------------------------------ TensorBoard


def test_a_resumed_run_has_each_step_once(tmp_path):
    """It is stopped after step 3, and resumes from the checkpoint of step 2."""
    config = small_config(tmp_path, steps=6, checkpoint_every=2, eval_every=2, log="tensorboard")
    write = Loggers.write

    class Killed(BaseException):
        pass

    def killed(loggers, line):
        write(loggers, line)
        if line["step"] == 3:
            raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Loggers, "write", killed)
        trainer.train(config, "stopped")
    trainer.train(config, "resumed")
    folder = Path(config.workdir)
    counts = shown(folder / "tensorboard")
    lines = read_metrics(folder / "metrics.jsonl")
    named = [
        (line["step"], name)
        for line in lines
        for name, value in line.items()
        if name != "step" and isinstance(value, float | int)
    ]
    assert counts == Counter(named)
    assert {"loss", "learning_rate", "tokens_per_s", "tflops_per_device", "eval_loss"} <= {tag for _, tag in counts}
    assert len(list((folder / "tensorboard").iterdir())) == 2
    step_3 = [event for event in events(folder / "tensorboard") if event.step == 3 and event.summary.value]
    assert len(step_3) == 2, "the file of the stopped run has it too"


def test_a_logger_that_fails_is_said_once_and_ends_no_run(tmp_path, capsys):
    config = small_config(tmp_path, steps=3, log="tensorboard")
    writer = pytest.importorskip("tensorboardX.event_file_writer").EventsWriter
    write = writer.write_event

    def full(self, event):
        if event.step > 1 and event.summary.value:
            raise OSError(28, "No space left on device")
        return write(self, event)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "write_event", full)
        assert trainer.train(config, "full")["step"] == 3
    warnings = [line for line in capsys.readouterr().err.splitlines() if "log=tensorboard" in line]
    assert len(warnings) == 1 and "No space left on device" in warnings[0]
    assert {step for step, _ in shown(Path(config.workdir) / "tensorboard")} == {1}


# ------------------------------------------------------------------------------------------------ wandb


class FakeRun:
    def __init__(self):
        self.logged, self.finished = [], False

    def log(self, numbers, step):
        self.logged.append((step, numbers))

    def finish(self):
        self.finished = True


@pytest.fixture
def wandb(monkeypatch):
    """A module in wandb's place, which records how it is called."""
    module = SimpleNamespace(runs=[], calls=[], __spec__=SimpleNamespace(name="wandb"))

    def init(**kwargs):
        module.calls.append(kwargs)
        module.runs.append(FakeRun())
        return module.runs[-1]

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_wandb_goes_on_with_the_run_of_the_working_directory(wandb, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    config = small_config(tmp_path, steps=4, log="wandb")
    trainer.train(config, "first")
    trainer.train(dataclasses.replace(config, steps=6), "second")
    first, second = wandb.calls
    assert first["id"] == second["id"] and first["resume"] == "allow"
    assert first["project"] == "mine" and first["name"] == "first" and first["dir"] == config.workdir
    assert first["config"]["model"]["d_model"] == 24
    steps = [step for step, numbers in wandb.runs[1].logged if "loss" in numbers]
    assert steps == [5, 6]
    assert all(run.finished for run in wandb.runs)
    assert all("mfu" not in numbers for _, numbers in wandb.runs[0].logged), "it is null on a CPU"


def test_wandb_that_does_not_start_is_refused_before_compiling(wandb, tmp_path, monkeypatch):
    def init(**_):
        raise RuntimeError("api_key not configured (no-tty).\ncall wandb.login(key=[your_api_key])")

    monkeypatch.setattr(wandb, "init", init)
    config = small_config(tmp_path, steps=4, log="wandb")
    message = r"^log=wandb does not start \(api_key not configured .*\); use another --log, or none$"
    with pytest.raises(ConfigError, match=message):
        trainer.train(config, "refused")
    assert not (Path(config.workdir) / "config.json").exists()


def test_numbers_that_are_not_finite_and_curves_are_left_out():
    written = []
    sink = SimpleNamespace(write=lambda step, numbers: written.append((step, numbers)), close=lambda: None)
    Loggers({"wandb": sink}, print).write(  # pyright: ignore
        {
            "step": 3,
            "loss": float("nan"),
            "mfu": None,
            "grad_norm": 1.0,
            "eval_nll_by_position": {"held out": {"1": 2.0}},
        }
    )
    assert written == [(3, {"grad_norm": 1.0})]


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("name", "use"),
    [("tensorboard", 'use pip install ".[tensorboard]" in a clone'), ("wandb", "use pip install wandb")],
)
def test_what_is_not_installed_is_refused_before_anything_is_written(name, use, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
    config = small_config(tmp_path, log=name)
    with pytest.raises(ConfigError, match=rf"^log={name} needs .*, which is not installed; ") as error:
        trainer.train(config, "refused")
    assert use in str(error.value)
    assert not Path(config.workdir).exists()


@pytest.mark.parametrize("value", ["tensorboad", "wandb,wandb", "wandb,", "wandb;tensorboard"])
def test_an_unknown_logger_is_refused(value, tmp_path):
    with pytest.raises(ConfigError, match=r"^log=.* has .*; use tensorboard, wandb, or tensorboard,wandb$"):
        small_config(tmp_path, log=value)


def test_several_loggers_may_be_asked_for(tmp_path, wandb):
    config = small_config(tmp_path, log="tensorboard, wandb")
    assert config.loggers() == ("tensorboard", "wandb")
    Path(config.workdir).mkdir()
    pytest.importorskip("tensorboardX")
    check_loggers(config.loggers())
    with open_loggers(config, "both", 0, print) as loggers:
        loggers.write({"step": 1, "loss": 2.0})
    assert wandb.runs[0].logged == [(1, {"loss": 2.0})]
    assert shown(Path(config.workdir) / "tensorboard") == Counter({(1, "loss"): 1})
    assert isinstance(loggers._sinks["wandb"], Wandb)
