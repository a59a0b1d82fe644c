"""The end of a run: its summary, as summary.json and as a table, and the plot of its losses."""

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tsp_jax.config import Config
from tsp_jax.files import Count, FileError, Finite, read_json
from tsp_jax.inspect import compiled_memory, list_collectives, parse
from tsp_jax.layout import Placement
from tsp_jax.mesh import format_sizes
from tsp_jax.training.data_report import DataReport
from tsp_jax.training.distributed import write_atomically
from tsp_jax.training.safety.finite import is_skipped


class Summary(msgspec.Struct, kw_only=True):
    """The content of summary.json. Null stands for a number that no step produced."""

    config: str
    layout: str
    mesh: str
    step: Count
    loss: Finite | None
    eval_loss: Finite | None
    skipped_steps: Count = 0
    tokens_per_s: Finite | None
    peak_bytes: Count
    bytes_per_step: Count
    num_params: Count
    data: DataReport | None = None


def summarize(
    config: Config, name: str, placement: Placement, compiled: Any, lines: list[dict], step: int, data: DataReport
) -> dict:
    """The content of summary.json: last losses, median speed, memory and communication of the compiled step.

    `name` is the configuration's name; `lines` are all lines of the metrics file; `step` is the last step; `data` is
    what the steps read.
    """
    steps = [line for line in lines if "loss" in line]
    speeds = [line["tokens_per_s"] for line in steps if line["tokens_per_s"] is not None]
    received = list_collectives(parse(compiled.as_text()), dict(placement.mesh.shape))
    summary = Summary(
        config=name,
        layout=placement.layout.name,
        mesh=format_sizes(placement.mesh.shape),
        step=step,
        loss=next((line["loss"] for line in reversed(steps) if not is_skipped(line)), None),
        eval_loss=next((line["eval_loss"] for line in reversed(lines) if "eval_loss" in line), None),
        skipped_steps=sum(map(is_skipped, steps)),
        tokens_per_s=float(np.median(speeds)) if speeds else None,
        peak_bytes=compiled_memory(compiled).peak_bytes,
        bytes_per_step=int(sum(collective.total_bytes for collective in received)),
        num_params=config.model.num_params,
        data=data,
    )
    return msgspec.to_builtins(summary)


def read_summary(path: Path, step: int, report: Callable[[str], Any]) -> dict | None:
    """Reads summary.json; None if it does not exist, is of another step, or is damaged (which is reported)."""
    if not os.path.lexists(path):
        return None
    try:
        summary = read_json(path, Summary)
    except FileError as error:
        report(f"{str(error).rpartition(';')[0]}; it is made anew")
        return None
    return msgspec.to_builtins(summary) if summary.step == step else None


def print_summary(summary: dict, console: Console) -> dict:
    """Prints the summary of a run as a table, and returns it."""
    table = Table(title=_plain(f"{summary['config']}, {summary['layout']}, {summary['mesh']}"), show_header=False)
    rows = {
        "steps": ("step", ",d"),
        "loss, last training step (nats/token)": ("loss", ".4f"),
        "loss, held-out files (nats/token)": ("eval_loss", ".4f"),
        "tokens/s, median step": ("tokens_per_s", ",.0f"),
        "peak bytes per device, compiled step": ("peak_bytes", ",d"),
        "bytes received per device and step": ("bytes_per_step", ",d"),
        "parameters": ("num_params", ",d"),
    }
    if summary["skipped_steps"]:
        rows["steps skipped, their numbers not finite"] = "skipped_steps", ",d"
    for label, (name, form) in rows.items():
        table.add_row(label, "none" if summary[name] is None else format(summary[name], form))
    console.print(table)
    return summary


def _plain(text: str) -> Text:
    """Text from a file, escaped so that none of it acts as markup or as a terminal control code."""
    return Text("".join(c if c.isprintable() else "?" for c in text))


def plot_losses(metrics: list[dict], path: Path) -> bool:
    """Plots training loss, its running mean and held-out loss by step; returns False if matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    train, held_out = (
        np.array([(line["step"], line[name]) for line in metrics if line.get(name) is not None], np.float64)
        for name in ("loss", "eval_loss")
    )
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
    if len(train) or len(held_out):
        axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120)
    pyplot.close(figure)
    write_atomically(path, picture.getvalue())
    return True
