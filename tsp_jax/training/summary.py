"""The end of a run: its summary, as summary.json and as a table."""

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
from tsp_jax.training.safety.finite import is_skipped
from tsp_jax.training.throughput import COUNTED, Throughput


class Summary(msgspec.Struct, kw_only=True):
    """The content of summary.json. Null stands for a number that no step produced."""

    config: str
    layout: str
    mesh: str
    step: Count
    loss: Finite | None
    eval_loss: Finite | None
    eval_losses: dict[str, Finite | None] = {}
    """of the sets of data.eval"""
    skipped_steps: Count = 0
    tokens_per_s: Finite | None
    tflops_per_device: Finite | None = None
    flops_counted: str = ""
    """what counts as an operation there"""
    mfu: Finite | None = None
    peak_tflops: Finite | None = None
    """of a device, which `mfu` is the share of"""
    peak_bytes: Count
    bytes_per_step: Count
    num_params: Count
    data: DataReport | None = None


def summarize(
    config: Config,
    name: str,
    placement: Placement,
    compiled: Any,
    speed: Throughput,
    lines: list[dict],
    step: int,
    data: DataReport,
) -> dict:
    """The content of summary.json: last losses, median speed, memory and communication of the compiled step.

    `name` is the configuration's name; `lines` are all lines of the metrics file; `step` is the last step; `data` is
    what the steps read.
    """
    steps = [line for line in lines if "loss" in line]
    received = list_collectives(parse(compiled.as_text()), dict(placement.mesh.shape))
    evaluation = next((line for line in reversed(lines) if "eval_loss" in line), {})
    summary = Summary(
        config=name,
        layout=placement.layout.name,
        mesh=format_sizes(placement.mesh.shape),
        step=step,
        loss=next((line["loss"] for line in reversed(steps) if not is_skipped(line)), None),
        eval_loss=evaluation.get("eval_loss"),
        eval_losses={key[len("eval_loss/") :]: evaluation[key] for key in evaluation if key.startswith("eval_loss/")},
        skipped_steps=sum(map(is_skipped, steps)),
        tokens_per_s=_median(steps, "tokens_per_s"),
        tflops_per_device=_median(steps, "tflops_per_device"),
        flops_counted=COUNTED,
        mfu=_median(steps, "mfu"),
        peak_tflops=speed.hardware.peak_flops / 1e12 if speed.hardware else None,
        peak_bytes=compiled_memory(compiled).peak_bytes,
        bytes_per_step=int(sum(collective.total_bytes for collective in received)),
        num_params=config.model.num_params,
        data=data,
    )
    return msgspec.to_builtins(summary)


def _median(lines: list[dict], name: str) -> float | None:
    found = [line[name] for line in lines if line.get(name) is not None]
    return float(np.median(found)) if found else None


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
        "model TFLOP/s per device, median step": ("tflops_per_device", ",.4g"),
        "share of the device's peak (MFU)": ("mfu", ".1%"),
        "peak bytes per device, compiled step": ("peak_bytes", ",d"),
        "bytes received per device and step": ("bytes_per_step", ",d"),
        "parameters": ("num_params", ",d"),
    }
    if summary["skipped_steps"]:
        rows["steps skipped, their numbers not finite"] = "skipped_steps", ",d"
    for label, (name, form) in rows.items():
        table.add_row(label, "none" if summary[name] is None else format(summary[name], form))
        for held_out, loss in summary["eval_losses"].items() if name == "eval_loss" else ():
            table.add_row(_plain(f"loss, held-out set {held_out}"), "none" if loss is None else format(loss, ".4f"))
    console.print(table)
    return summary


def _plain(text: str) -> Text:
    """Text from a file, escaped so that none of it acts as markup or as a terminal control code."""
    return Text("".join(c if c.isprintable() else "?" for c in text))
