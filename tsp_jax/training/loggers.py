"""Loggers beside metrics.jsonl: TensorBoard's event files, and Weights & Biases.

metrics.jsonl is the record; a logger that fails is reported once and left out, and never fails or delays a run.
"""

import contextlib
import dataclasses
import importlib
import importlib.util
import math
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from tsp_jax.config import Config
from tsp_jax.config.run import Logger
from tsp_jax.errors import ConfigError, import_optional, install_hint
from tsp_jax.training.distributed import is_writer

_MODULES: dict[Logger, tuple[str, str]] = {
    "tensorboard": ("tensorboardX", install_hint("tensorboard")),
    "wandb": ("wandb", "use pip install wandb"),
}
"""logger -> (module, how to install it)"""


class Sink(Protocol):
    """Takes numbers by name."""

    def write(self, step: int, numbers: dict[str, float]) -> None:
        """Writes the numbers of a step."""

    def close(self) -> None:
        """Writes what waits."""


def check_loggers(names: Sequence[Logger]) -> None:
    """Raises ConfigError if a logger is not installed; imports nothing."""
    for name in names:
        module, advice = _MODULES[name]
        if importlib.util.find_spec(module) is None:
            raise ConfigError(f"log={name} needs {module}, which is not installed; {advice}, or leave out log={name}")


class TensorBoard:
    """An event file in ``workdir/tensorboard``, written at once: tensorboardX, without its thread.

    Its `SummaryWriter` hands events to a thread through a queue, where a full disk would end the thread and then block
    the run. A run that resumes starts a new file, whose first event tells TensorBoard to leave out what earlier files
    have of the steps that are done again.
    """

    def __init__(self, config: Config, name: str, start: int):
        events = import_optional("tensorboardX.event_file_writer", "tensorboard")
        event_pb2 = import_optional("tensorboardX.proto.event_pb2", "tensorboard")
        self._event = event_pb2.Event
        self._summary = import_optional("tensorboardX.proto.summary_pb2", "tensorboard").Summary
        folder = Path(config.workdir) / "tensorboard"
        folder.mkdir(exist_ok=True)
        # Files are read in the order of their names, which have seconds; two of one second must not be one.
        self._writer = events.EventsWriter(
            str(folder / "events"), f".{start:010d}.{os.getpid()}.{uuid.uuid4().hex[:8]}"
        )
        restart = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._writer.write_event(self._event(wall_time=time.time(), step=start + 1, session_log=restart))

    def write(self, step: int, numbers: dict[str, float]) -> None:
        """Writes one event with all numbers."""
        values = [self._summary.Value(tag=name, simple_value=number) for name, number in numbers.items()]
        event = self._event(wall_time=time.time(), step=step, summary=self._summary(value=values))
        self._writer.write_event(event)
        self._writer.flush()

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()


class Wandb:
    """A run of Weights & Biases, whose id is kept in the working directory, so that a resumed run goes on with it.

    Steps that are done again have the same numbers, and wandb takes no step twice.
    """

    def __init__(self, config: Config, name: str, start: int):
        wandb = importlib.import_module("wandb")
        path = Path(config.workdir) / "wandb_id"
        known = path.read_text().strip() if path.is_file() else ""
        run_id = known or uuid.uuid4().hex[:12]
        path.write_text(run_id)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "tsp_jax"), name=name, id=run_id, resume="allow",
            dir=config.workdir, config=dataclasses.asdict(config) | {"host": socket.gethostname()},
        )  # fmt: skip

    def write(self, step: int, numbers: dict[str, float]) -> None:
        """Logs the numbers; those of an evaluation join those of its step."""
        self._run.log(numbers, step=step)

    def close(self) -> None:
        """Ends the run."""
        self._run.finish()


_SINKS: dict[Logger, Callable[[Config, str, int], Sink]] = {"tensorboard": TensorBoard, "wandb": Wandb}


class Loggers:
    """The loggers of a run, each of which is left out once it fails."""

    def __init__(self, sinks: dict[Logger, Sink], report: Callable[[str], Any]):
        self._sinks, self._report = dict(sinks), report

    def write(self, line: dict[str, Any]) -> None:
        """Writes the finite numbers of a line of metrics.jsonl."""
        numbers = {
            name: float(value) for name, value in line.items()
            if name != "step" and isinstance(value, int | float) and math.isfinite(value)
        }  # fmt: skip
        self._each(lambda sink: sink.write(line["step"], numbers))

    def close(self) -> None:
        """Closes all loggers."""
        self._each(lambda sink: sink.close())

    def _each(self, call: Callable[[Sink], None]) -> None:
        for name, sink in list(self._sinks.items()):
            try:
                call(sink)
            except Exception as error:  # metrics.jsonl has the numbers
                self._report(f"log={name} fails and is left out ({' '.join(str(error).split()):.200})")
                del self._sinks[name]
                with contextlib.suppress(Exception):
                    sink.close()


@contextlib.contextmanager
def open_loggers(config: Config, name: str, start: int, report: Callable[[str], Any]) -> Iterator[Loggers]:
    """Context manager: the loggers that a configuration asks for, on the writer only.

    Args:
      config: of the run, whose working directory exists.
      name: of the configuration.
      start: the step that the run resumes from.
      report: called with one line about a logger that fails.

    Raises:
      ConfigError: a logger does not start, for example wandb without a login.
    """
    sinks: dict[Logger, Sink] = {}
    for logger in config.loggers() if is_writer() else ():
        try:
            sinks[logger] = _SINKS[logger](config, name, start)
        except Exception as error:
            text = " ".join(str(error).split())
            raise ConfigError(f"log={logger} does not start ({text:.200}); use another --log, or none") from error
    loggers = Loggers(sinks, report)
    try:
        yield loggers
    finally:
        loggers.close()
