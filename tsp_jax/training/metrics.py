"""Metrics of a run: JSON lines, progress bar, loss curve, and the summary at the end."""

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from tsp_jax.config import Config
from tsp_jax.inspect import compiled_memory, list_collectives, parse
from tsp_jax.layout import Placement
from tsp_jax.training.distributed import is_writer, write_atomically
from tsp_jax.training.safety.finite import is_skipped


class MetricsFile:
    """``metrics.jsonl``: one line per step or evaluation. Numbers that are not finite are null.

    Lines later than `resume_step`, the step resumed from, are dropped. Lines that a full disk rejects are kept in
    memory until they can be written; `report` is called with one line about it.
    """

    def __init__(self, path: Path, resume_step: int, report: Callable[[str], Any] = print):
        self.path, self.report = path, report
        lines = [line for line in (read_metrics(path) if path.exists() else []) if line["step"] <= resume_step]
        self.earlier = [line for line in lines if "loss" in line]
        """lines of training steps up to the one resumed from"""
        self.evaluations = {line["step"] for line in lines if "eval_loss" in line}
        """steps that have an evaluation"""
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines))
        self._pending, self._fails = b"", False
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND) if is_writer() else None

    def write(self, line: dict) -> None:
        """Appends a line; does nothing on processes other than the writer."""
        if "eval_loss" in line:
            self.evaluations.add(line["step"])
        if self._file is None:
            return
        infinite = {name: None for name, value in line.items() if isinstance(value, float) and not math.isfinite(value)}
        self._pending += json.dumps(line | infinite, allow_nan=False).encode() + b"\n"
        try:
            while self._pending:
                self._pending = self._pending[os.write(self._file, self._pending) :]
            self._fails = False
        except OSError as error:
            if not self._fails:
                self.report(f"{self.path} cannot be written ({error.strerror}); its lines are kept in memory")
            self._fails = True

    def sync(self) -> None:
        """Flushes all lines to disk, so that every step in a checkpoint written afterwards has its line."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # `write` has reported it
                os.fsync(self._file)

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            os.close(self._file)


def read_metrics(path: Path) -> list[dict]:
    """Reads the complete lines of a metrics file; skips a last line that a crash left incomplete."""
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


class TrainProgress(Progress):
    """A progress bar on a terminal; otherwise about `LINES` lines per run."""

    LINES = 20

    def __init__(self, start: int, steps: int, console: Console):
        columns = ("[bold]train", BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"))
        times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        super().__init__(*columns, *times, console=console, disable=not console.is_terminal)
        self.bar = self.add_task("train", total=steps, completed=start, text="")
        self.began, self.first, self.steps, self.every = time.perf_counter(), start, steps, max(1, steps // self.LINES)

    def show(self, line: dict) -> None:
        """Shows the metrics of a step."""
        step = line["step"]
        text = f"loss {line['loss']:.4f}  {line['tokens_per_s']:,.0f} tokens/s"
        self.update(self.bar, completed=step, text=text)
        if not (self.console.quiet or self.console.is_terminal) and (step % self.every == 0 or step == self.steps):
            left = (time.perf_counter() - self.began) / (step - self.first) * (self.steps - step)
            print(f"step {step}/{self.steps}  {text}  {left:.0f} s left", file=sys.stdout, flush=True)

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        self.console.print(text, highlight=False, soft_wrap=True)


def plot_losses(metrics: list[dict], path: Path) -> bool:
    """Plots training loss, its running mean and held-out loss by step; returns False if matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    train = np.array([(line["step"], line["loss"]) for line in metrics if line.get("loss") is not None])
    held_out = np.array([(line["step"], line["eval_loss"]) for line in metrics if "eval_loss" in line])
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    if len(train):
        axes.plot(*train.T, color="tab:blue", alpha=0.35, linewidth=1, label="training")
        window = max(1, len(train) // 30)
        smooth = np.convolve(train[:, 1], np.ones(window) / window, mode="valid")
        axes.plot(train[window - 1 :, 0], smooth, color="tab:blue", label=f"mean of {window} steps")
    if len(held_out):
        axes.plot(*held_out.T, "o-", color="tab:orange", markersize=4, label="held out")
    axes.set(xlabel="step", ylabel="loss (nats/token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True


def summarize(config: Config, name: str, placement: Placement, compiled: Any, lines: list[dict]) -> dict:
    """The content of summary.json: last losses, median speed, memory and communication of the compiled step.

    `name` is that of the configuration; `lines` are all lines of the metrics file.
    """
    steps = [line for line in lines if "loss" in line]
    received = list_collectives(parse(compiled.as_text()), dict(placement.mesh.shape))
    return {
        "config": name,
        "layout": placement.layout.name,
        "mesh": ",".join(f"{axis}={size}" for axis, size in placement.mesh.shape.items()),
        "step": steps[-1]["step"],
        "loss": next((line["loss"] for line in reversed(steps) if not is_skipped(line)), math.nan),
        "eval_loss": next(line["eval_loss"] for line in reversed(lines) if "eval_loss" in line),
        "skipped_steps": sum(map(is_skipped, steps)),
        "tokens_per_s": float(np.median([line["tokens_per_s"] for line in steps])),
        "peak_bytes": compiled_memory(compiled).peak_bytes,
        "bytes_per_step": int(sum(collective.total_bytes for collective in received)),
        "num_params": config.model.num_params,
    }


def print_summary(summary: dict, console: Console) -> dict:
    """Prints the summary of a run as a table, and returns it."""
    table = Table(title=f"{summary['config']} · {summary['layout']} · {summary['mesh']}", show_header=False)
    rows = {
        "steps": f"{summary['step']:,}",
        "loss, last training step (nats/token)": f"{summary['loss']:.4f}",
        "loss, held-out files (nats/token)": f"{summary['eval_loss']:.4f}",
        "tokens/s, median step": f"{summary['tokens_per_s']:,.0f}",
        "peak bytes per device, compiled step": f"{summary['peak_bytes']:,}",
        "bytes received per device and step": f"{summary['bytes_per_step']:,}",
        "parameters": f"{summary['num_params']:,}",
    }
    if summary.get("skipped_steps"):
        rows["steps skipped, their numbers not finite"] = f"{summary['skipped_steps']:,}"
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
    return summary
