"""Training: `train` trains or resumes a configuration; everything before and after the loop of steps."""

import contextlib
import dataclasses
import json
from functools import partial
from pathlib import Path

import jax
from rich.console import Console

from tsp_jax.config import Config
from tsp_jax.errors import ConfigError, RunStopped, install_hint
from tsp_jax.hardware.compiler_options import compiler_options
from tsp_jax.hardware.devices import data_sheet
from tsp_jax.hardware.memory import check_room, host_bytes, memory_bytes, shard_bytes
from tsp_jax.layout import Placement, check_fits, get_layout, parse_mesh
from tsp_jax.mesh import make_mesh
from tsp_jax.models.lora import describe
from tsp_jax.ops.kernels import describe_kernel
from tsp_jax.ops.kernels.mask import Scores
from tsp_jax.training.checkpoint import METRICS, Checkpoints
from tsp_jax.training.corpus import name_tokenizer
from tsp_jax.training.data_report import describe_data, report_data
from tsp_jax.training.distributed import is_writer, report, report_once, write_or_report
from tsp_jax.training.evaluation import load_held_out
from tsp_jax.training.frozen import digest_weights, load_frozen
from tsp_jax.training.init_from import check_init_from, init_state
from tsp_jax.training.loggers import check_loggers, open_loggers
from tsp_jax.training.loop import TrainLoop
from tsp_jax.training.metrics import MetricsFile
from tsp_jax.training.optimizer import Optimizer, check_optimizer, describe_shorter_warmup
from tsp_jax.training.pictures import plot_losses, plot_positions
from tsp_jax.training.profile import Profile
from tsp_jax.training.progress import TrainProgress
from tsp_jax.training.safety.preemption import StopSignals
from tsp_jax.training.safety.watchdog import Watchdog
from tsp_jax.training.schedule import CompiledSteps, describe_schedule
from tsp_jax.training.splits import load_splits
from tsp_jax.training.step import TrainProgram, make_program
from tsp_jax.training.summary import print_summary, read_summary, summarize
from tsp_jax.training.throughput import Throughput
from tsp_jax.training.workdir import open_workdir


def train(config: Config, name: str = "run", optimizer: Optimizer = None) -> dict:
    """Trains or resumes a configuration. With several processes, each of them makes this call.

    Everything that can be refused is refused before anything is compiled or written.

    Args:
      config: what to train.
      name: name of the configuration, for the summary.
      optimizer: the user's own, whose schedule does not follow `config.steps`; None: AdamW from `config.optimizer`.

    Returns:
      The summary (`summarize`); {} on processes other than the writer.

    Raises:
      ConfigError: the configuration does not fit the machine, the data or the working directory.
      RunStopped: training ended early: by a signal, bad numbers, or a checkpoint that could not be saved.
    """
    with StopSignals() as signals, contextlib.ExitStack() as held:
        return _train(config, name, optimizer, signals, held)


def _train(config: Config, name: str, optimizer: Optimizer, signals: StopSignals, held: contextlib.ExitStack) -> dict:
    console = Console(quiet=not is_writer(), markup=False, emoji=False)  # nothing from a file is markup
    say = partial(console.print, highlight=False, soft_wrap=True)
    placement = _place(config)
    check_optimizer(optimizer)
    config = name_tokenizer(config)
    remarks = check_init_from(config, placement)
    check_loggers(config.loggers())
    splits = load_splits(config, placement.size("sequence"))
    held_out = load_held_out(config, placement.size("sequence"), splits.held_out)
    program = make_program(config, placement, optimizer)
    _check_room(config, placement, program)
    workdir = held.enter_context(open_workdir(config.workdir))
    checkpoints = Checkpoints(workdir / "checkpoints", program, config, splits.train.digest, report)
    start = checkpoints.newest_undamaged() or 0
    for line in (*remarks, *_remarks(config, optimizer, checkpoints, start)):
        say(line)
    open_metrics = partial(MetricsFile, workdir / METRICS, start, report, checkpoints.folder / str(start) / METRICS)
    if start >= config.steps:
        say(f"workdir={workdir} is complete at step {start}; --steps {2 * start} trains on")
        if summary := read_summary(workdir / "summary.json", start, report_once):
            open_metrics().close()  # writes what a full disk has kept from it
            return print_summary(summary, console)

    loggers = held.enter_context(open_loggers(config, name, start, report))
    frozen = load_frozen(config, program, placement)
    checkpoints.check_frozen(digest_weights(program.paddings.frozen, frozen), start)
    if frozen:
        say(describe(config.lora, program.abstract_state.params))
    write_or_report(workdir / "config.json", json.dumps(dataclasses.asdict(config), indent=1))
    for line in describe_data(config, placement, splits.train):
        say(line)
    with console.status("compiling the training step"):
        compiled = CompiledSteps(program, config, start, dict(compiler_options(jax.devices()[0])))
    speed = Throughput(config.model, placement.mesh.size, data_sheet(jax.devices()[0]), bool(frozen))
    say(f"{f'restored step {start}' if start else 'starting afresh'} on {_describe(config, placement)}; {speed}")
    with contextlib.ExitStack() as stack:
        metrics = stack.enter_context(contextlib.closing(open_metrics()))
        progress = stack.enter_context(TrainProgress(start, config.steps, console))
        watchdog = stack.enter_context(Watchdog(config.faults.hang_s))
        profile = stack.enter_context(Profile(config.profiled_steps(), workdir / "profile", progress.say))
        state = checkpoints.restore(start, frozen) if start else init_state(config, program, placement, frozen)
        loop = TrainLoop(
            config, program, compiled, splits.train, held_out, speed, metrics, loggers, checkpoints, progress, signals,
            watchdog, profile,
        )  # fmt: skip
        try:
            loop.run(state, start)
        except RunStopped:
            checkpoints.wait()  # a save in progress is completed
            raise
    if not is_writer():
        return {}
    data = report_data(config, placement, splits.train, config.steps)
    summary = summarize(config, name, placement, compiled.longest, speed, metrics.lines, max(start, config.steps), data)
    return _finish(workdir, summary, metrics.lines, console)


# ------------------------------------------------------------------------------------------------ before and after


def _place(config: Config) -> Placement:
    """Places the layout; raises ConfigError if tokens do not divide over the mesh, or a process has no device in it."""
    layout = get_layout(config.layout)
    sizes = parse_mesh(config.mesh, layout, jax.device_count())
    check_fits(config, layout, sizes)
    mesh = make_mesh(sizes)
    idle = set(range(jax.process_count())) - {device.process_index for device in mesh.devices.flat}
    if idle:
        raise ConfigError(
            f"mesh={config.mesh} leaves processes {sorted(idle)} without a device; "
            f"use a mesh of all {jax.device_count()} devices, or fewer processes"
        )
    return Placement(layout, mesh)


def _check_room(config: Config, placement: Placement, program: TrainProgram) -> None:
    """Raises ConfigError if the state, a layer's input, or the prefetched batches are too large for the memory."""
    batch, length = config.batch, config.seq_len
    layer_input = jax.ShapeDtypeStruct(
        (batch // config.accumulate, length, config.model.d_model), config.compute_dtype,
        sharding=placement.sharding("batch", "sequence"),
    )  # fmt: skip
    memory, batches = memory_bytes(jax.local_devices()), jax.tree.leaves(program.abstract_batch((1, batch, length)))
    for what, nbytes, room, advice in (
        ("on each device the state", shard_bytes(program.abstract_state), memory, "a smaller model, or more devices"),
        (f"on each device a layer's input of {batch=}, seq_len={length}", shard_bytes(layer_input), memory,
         f"--batch {config.accumulate} --accumulate {config.accumulate}, a smaller seq_len, or more devices"),
        (f"on the host data.prefetch={config.data.prefetch}", config.data.prefetch * shard_bytes(batches), host_bytes(),
         "--data.prefetch 1, or a smaller batch"),
    ):  # fmt: skip
        check_room(what, nbytes, room, f"use {advice}")


def _describe(config: Config, placement: Placement) -> str:
    """A text such as ``tsp, data=1 x tsp=8, cpu``, with the number of processes if there are several."""
    mesh = " x ".join(f"{name}={size}" for name, size in placement.mesh.shape.items())
    processes = f", {jax.process_count()} processes" if jax.process_count() > 1 else ""
    kernel = describe_kernel(
        config.stream.kernel, placement.mesh, config.model.head_dim, config.compute_dtype, Scores.of(config.model)
    )
    return f"{placement.layout.name}, {mesh}, {jax.devices()[0].device_kind}{processes}, attention kernel {kernel}"


def _remarks(config: Config, optimizer: Optimizer, checkpoints: Checkpoints, start: int) -> list[str]:
    """Lines about how this run differs from the one that saved the checkpoint, or from its own configuration."""
    lines = [f"resuming with a difference: {text}" for text in (checkpoints.check(start) if start else ())]
    warmup = describe_shorter_warmup(config.optimizer, config.steps, optimizer)
    return [*lines, *filter(None, (warmup, describe_schedule(config)))]


def _finish(workdir: Path, summary: dict, lines: list[dict], console: Console) -> dict:
    """Writes the pictures and summary.json if possible, and prints the summary."""
    for plot, picture in ((plot_losses, workdir / "loss.png"), (plot_positions, workdir / "eval_positions.png")):
        try:
            if not plot(lines, picture):
                hint = f"no {picture.name}: matplotlib is not installed; {install_hint('viz')}"
                console.print(hint, highlight=False, soft_wrap=True)
        except Exception as error:  # a picture never fails a run
            report(f"{picture} cannot be drawn ({' '.join(str(error).split()):.200})")
    write_or_report(workdir / "summary.json", json.dumps(summary, indent=1))
    return print_summary(summary, console)
