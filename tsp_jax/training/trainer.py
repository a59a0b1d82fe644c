"""Train: what a run is made of, from its configuration to its summary."""

import contextlib
import dataclasses
import json
from pathlib import Path

import jax
from rich.console import Console

from tsp_jax.config import Config
from tsp_jax.errors import RunStopped
from tsp_jax.hardware.compiler_options import compiler_options
from tsp_jax.training.checkpoint import Checkpoints
from tsp_jax.training.distributed import is_writer, report, write_whole
from tsp_jax.training.initial import check_init_from, initial_state
from tsp_jax.training.metrics import MetricsFile, TrainProgress, plot_losses, print_summary, read_metrics
from tsp_jax.training.run import Run
from tsp_jax.training.safety.preemption import StopSignals
from tsp_jax.training.safety.watchdog import Watchdog
from tsp_jax.training.setup import describe, load_data, open_workdir, place_run
from tsp_jax.training.step import make_program
from tsp_jax.training.summary import summarise


def train(config: Config, name: str = "run") -> dict:
    """Trains, or resumes, the run of a configuration. With several processes, each makes this call.

    Everything that can be refused is refused before anything compiles or is written.

    Returns:
      The summary (see `print_summary`); {} on processes that do not write.

    Raises:
      ConfigError: the configuration does not fit the machine, the data or the working directory.
      RunStopped: the run ended early: a signal, bad numbers, or a checkpoint that could not be saved.
    """
    with StopSignals() as signals:
        return _train(config, name, signals)


def _train(config: Config, name: str, signals: StopSignals) -> dict:
    console = Console(quiet=not is_writer())
    placement = place_run(config)
    check_init_from(config, placement)
    data = load_data(config, placement)
    workdir = open_workdir(config)
    program = make_program(config, placement)
    checkpoints = Checkpoints(workdir / "checkpoints", program, config, data.digest, report)
    start = checkpoints.newest_whole() or 0
    for difference in checkpoints.check(start) if start else []:
        console.print(f"resuming with a difference: {difference}", highlight=False, soft_wrap=True)
    if start >= config.steps and (workdir / "summary.json").exists():
        return _already_complete(config, start, console)

    write_whole(workdir / "config.json", json.dumps(dataclasses.asdict(config), indent=1))
    with console.status("compiling the training step"):
        shape = (config.accumulate, config.batch // config.accumulate, config.seq_len)
        lowered = program.step.lower(program.abstract_state, program.abstract_batch(shape))
        compiled = lowered.compile(compiler_options(jax.devices()[0]))
    console.print(
        f"restored step {start}" if start else "starting afresh", f"on {describe(placement)}", highlight=False
    )
    with contextlib.ExitStack() as stack:
        metrics = stack.enter_context(contextlib.closing(MetricsFile(workdir / "metrics.jsonl", start, report)))
        progress = stack.enter_context(TrainProgress(start, config.steps, console))
        watchdog = stack.enter_context(Watchdog(config.faults.hang_s))
        state = checkpoints.restore(start) if start else initial_state(config, program, placement)
        run = Run(config, program, compiled, data, metrics, checkpoints, progress, signals, watchdog)
        try:
            run.go(state, start)
        except RunStopped:
            checkpoints.wait()  # what is being saved is whole, whatever came after
            raise
    if not is_writer():
        return {}
    lines = read_metrics(metrics.path)
    if not plot_losses(lines, workdir / "loss.png"):
        console.print('no loss.png: pip install "tsp-jax[viz]" brings matplotlib', highlight=False, soft_wrap=True)
    summary = summarise(config, name, placement, compiled, lines)
    write_whole(workdir / "summary.json", json.dumps(summary, indent=1))
    print_summary(summary, console)
    return summary


def _already_complete(config: Config, step: int, console: Console) -> dict:
    text = f"workdir={Path(config.workdir)} is complete at step {step}; --steps {2 * step} trains on"
    console.print(text, highlight=False, soft_wrap=True)
    summary = json.loads((Path(config.workdir) / "summary.json").read_text())
    print_summary(summary, console)
    return summary
