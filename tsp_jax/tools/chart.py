"""Charts of a comparison of layouts (memory by kind, step time and its band), and of a plan's front."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

from tsp_jax.hardware.targets import Target
from tsp_jax.plan.choose import Plan
from tsp_jax.tools.sweep import Row

matplotlib.use("Agg")
import matplotlib.pyplot as plt

KINDS = {"state": "#34618d", "residual": "#6ba292", "transient": "#d9a441"}


def draw(rows: Sequence[Row], target: Target, path: Path) -> None:
    """Writes a PNG with a row of two panels for each sequence length."""
    lengths = list(dict.fromkeys(row.seq_len for row in rows))
    figure, panels = plt.subplots(len(lengths), 2, figsize=(11, 1.2 + 2.6 * len(lengths)), squeeze=False, sharey="row")
    for (left, right), length in zip(panels, lengths, strict=True):
        found = [row for row in rows if row.seq_len == length]
        _memory(left, found, target.hardware.memory_bytes / 1e9, length)
        _time(right, found)
    legend = {  # each label once
        label: handle for panel in panels[-1] for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(legend.values(), legend.keys(), loc="lower center", ncols=len(legend), fontsize=8)
    batches = ", ".join(str(batch) for batch in sorted({row.batch for row in rows}))
    figure.suptitle(f"{batches} sequence(s) on {target}, per device, compiled and simulated", fontsize=10)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _memory(panel, rows: Sequence[Row], limit: float, length: int) -> None:
    names, base = [row.layout for row in rows], [0.0] * len(rows)
    for kind, color in KINDS.items():
        values = [row.by_kind.get(kind, 0) / 1e9 for row in rows]
        panel.barh(names, values, left=base, color=color, label=kind)
        base = [a + b for a, b in zip(base, values, strict=True)]
    for row in rows:
        if row.paper_peak_gb:
            ends = [float(end) for end in row.paper_peak_gb.split("-")]
            panel.plot(ends, [row.layout] * len(ends), "k|-", markersize=11, label="paper")
    panel.axvline(limit, color="crimson", linewidth=1, linestyle="--", label="device")
    panel.invert_yaxis()  # of both panels, which share it
    panel.set_xlabel("peak memory, GB per device")
    panel.set_title(f"{length:,} tokens", fontsize=10, loc="left")


def _time(panel, rows: Sequence[Row]) -> None:
    names = [row.layout for row in rows]
    exposed = [row.exposed_comm_s or 0.0 for row in rows]
    busy = [(row.step_s or 0.0) - wait for row, wait in zip(rows, exposed, strict=True)]
    panel.barh(names, busy, color="#34618d", label="computation")
    panel.barh(names, exposed, left=busy, color="crimson", label="exposed communication")
    for row in rows:
        panel.plot([row.step_low_s or 0.0, row.step_high_s or 0.0], [row.layout] * 2, "k|-", markersize=7, label="band")
    panel.set_xlabel("step, s (simulated)")


def draw_front(plan: Plan, path: Path) -> None:
    """Writes a PNG of step time over peak memory: a point for each step, a line through those of the front."""
    figure, panel = plt.subplots(figsize=(9, 5.5))
    places = [k for k, c in enumerate(plan.candidates) if c.compiled or k in plan.front]
    layouts = dict.fromkeys(plan.candidates[k].choice.layout for k in places)
    for layout in layouts:
        of_layout = [plan.candidates[k] for k in places if plan.candidates[k].choice.layout == layout]
        panel.plot([c.peak_bytes / 1e9 for c in of_layout], [c.step_s for c in of_layout], "o", label=layout)
    front = [plan.candidates[k] for k in plan.front]
    panel.plot([c.peak_bytes / 1e9 for c in front], [c.step_s for c in front], "k-", linewidth=1, label="front")
    panel.plot([plan.chosen.peak_bytes / 1e9], [plan.chosen.step_s], "k*", markersize=14, label="best")
    panel.axvline(plan.budget.usable_bytes / 1e9, color="crimson", linewidth=1, linestyle="--", label="budget")
    panel.set_xlabel("peak memory, GB per device")
    panel.set_ylabel("step, s (simulated)")
    tokens = f"{plan.base.batch} x {plan.base.seq_len:,} tokens"
    panel.set_title(f"{plan.name} on {plan.target}, {tokens}, compiled and simulated", fontsize=10, loc="left")
    panel.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
