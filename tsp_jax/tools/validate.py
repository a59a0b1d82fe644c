"""Predicted beside measured: rebuilds published training runs, and compares simulated time and compiled memory.

For each row of a file of published runs (`tsp_jax.tools.published`), the step of the nearest configuration is compiled
for the run's devices (`tsp_jax.tools.rebuilt`), with a stand-in that carries the published attention kernel's rate
(`tsp_jax.tools.priced`). Its simulated time and its compiled peak memory stand beside the published figures, with
signed errors: predicted over measured, minus 1. Rates are those of `tsp_jax.hardware.rates`; none is fitted to a row.
"""

import dataclasses
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from tsp_jax.config import Remat
from tsp_jax.errors import ConfigError
from tsp_jax.files import read_json
from tsp_jax.hardware.targets import parse_target
from tsp_jax.inspect import Timeline, parse, simulate
from tsp_jax.plan.budget import usable_bytes
from tsp_jax.tools import cli
from tsp_jax.tools.inspect import check_writable
from tsp_jax.tools.published import (
    NotRebuilt,
    Rebuilt,
    Run,
    measured_seconds,
    read_runs,
    rebuild,
    remat_is_published,
    run_flops,
)
from tsp_jax.tools.rebuilt import CompiledRun, OutOfMemory, compile_run

WORSE = 1
"""exit code if errors grew over those of the baseline"""
LARGE = 0.3
"""an error of time above this needs an explanation that is checked"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """One published run beside its prediction. Figures are None for a run that is not rebuilt; `reason` says why."""

    id: str
    hardware: str
    program: str
    """model, tokens and devices of the published run"""
    source: str
    date: str
    reason: str = ""
    layout: str = ""
    mesh: str = ""
    remat: str = ""
    kernel: str = ""
    measured_s: float | None = None
    measured_as: str = ""
    """figure that the seconds come from: step, tokens/s or TFLOP/s"""
    other_measured_s: tuple[float, ...] = ()
    """other runs of the same program"""
    step_s: float | None = None
    """simulated, at typical rates"""
    low_s: float | None = None
    """the shortest step over the bands of the rates; `high_s` the longest"""
    high_s: float | None = None
    error: float | None = None
    attention_s: float | None = None
    """part of the step that attention kernels take"""
    exposed_comm_s: float | None = None
    exposed_host_s: float | None = None
    flops: float | None = None
    """operations of the products that a device executes in a step"""
    peak_gb: float | None = None
    """compiled"""
    measured_gb: float | None = None
    memory_error: float | None = None
    remarks: tuple[str, ...] = ()
    explanation: str = ""
    """of an error above `LARGE`, as checked by `explain`"""
    compiler: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the command."""

    json: str = ""
    """file for all figures, as JSON"""
    md: str = ""
    """file for the table, as Markdown"""
    rows: str = ""
    """ids of the rows to rebuild, such as T3,T5; empty: all"""
    timeout: float = 1200.0
    """seconds after which a program that does not compile is given up"""
    baseline: str = ""
    """JSON of an earlier comparison: exit code 1 if an error is larger than there by more than `tolerance`"""
    tolerance: float = 0.02
    """growth of an error that is accepted, as a share of the measured figure"""


def compare_run(run: Run, path: str | Path, timeout_s: float) -> Comparison:
    """Rebuilds one run. What cannot be rebuilt or compiled gets a reason."""
    row = Comparison(
        id=run.id, hardware=f"{run.devices} x {run.hardware}", program=_program(run), source=run.source, date=run.date,
        measured_gb=run.peak_gb,
    )  # fmt: skip
    try:
        rebuilt = rebuild(run)
        return _predicted(row, rebuilt, *_figures(rebuilt, path, timeout_s))
    except NotRebuilt as why:
        return dataclasses.replace(row, reason=str(why))


def _program(run: Run) -> str:
    tokens = f"{run.seq_len:,} tokens" if run.seq_len else "unknown length"
    return f"{run.framework}, {run.model}, {run.global_batch or '?'} x {tokens}"


def _figures(rebuilt: Rebuilt, path: str | Path, timeout_s: float) -> tuple[CompiledRun, dict[str, float], bool]:
    """(a compiled program, its figures, whether it fits) under the first remat policy whose peak memory fits.

    If none fits, the last one counts. A program that the compiler refuses for its memory is compiled with two smaller
    numbers of layers: layers are alike, so that every figure is a line in their number.
    """
    memory = usable_bytes(parse_target(rebuilt.target).hardware).usable_bytes / 1e9
    for remat in rebuilt.remats:
        try:
            compiled = compile_run(path, rebuilt, remat, timeout_s)
        except OutOfMemory:
            if remat != rebuilt.remats[-1]:
                continue
            return _of_fewer_layers(rebuilt, path, remat, timeout_s)
        figures = _of_program(compiled, rebuilt)
        if figures["peak_gb"] <= memory or remat == rebuilt.remats[-1]:
            return compiled, figures, figures["peak_gb"] <= memory
    raise AssertionError("a run has a remat policy")


def _of_fewer_layers(rebuilt: Rebuilt, path: str | Path, remat: Remat, timeout_s: float):
    layers = rebuilt.config.model.num_layers
    some = [compile_run(path, rebuilt, remat, timeout_s, layers // parts) for parts in (16, 8)]
    few, more = (_of_program(compiled, rebuilt) for compiled in some)
    times = (layers - some[0].layers) / (some[1].layers - some[0].layers)
    return some[1], {name: few[name] + times * (more[name] - few[name]) for name in few}, False


def _of_program(compiled: CompiledRun, rebuilt: Rebuilt) -> dict[str, float]:
    """Figures of `Comparison` that are read from a program."""
    timeline = simulate(parse(compiled.text), parse_target(rebuilt.target).hardware)
    low, step, high = timeline.band()
    return {
        "step_s": step, "low_s": low, "high_s": high, "attention_s": _attention_seconds(timeline),
        "exposed_comm_s": timeline.exposed_comm_s, "exposed_host_s": timeline.exposed_host_s,
        "flops": timeline.flops, "peak_gb": compiled.peak_bytes / 1e9,
    }  # fmt: skip


def _predicted(
    row: Comparison, rebuilt: Rebuilt, compiled: CompiledRun, figures: dict[str, float], fits: bool
) -> Comparison:
    measured, measured_as = measured_seconds(rebuilt.run)
    assert measured is not None
    remarks = rebuilt.remarks if fits else (*rebuilt.remarks, "the rebuilt program does not fit the device")
    if compiled.layers < rebuilt.config.model.num_layers:
        remarks = (*remarks, f"its figures are extrapolated from {compiled.layers // 2} and {compiled.layers} layers")
    return dataclasses.replace(
        row, layout=rebuilt.config.layout, mesh=rebuilt.config.mesh, remat=compiled.remat, kernel=rebuilt.kernel,
        measured_s=measured, measured_as=measured_as, other_measured_s=rebuilt.run.step_s[1:],
        error=figures["step_s"] / measured - 1, remarks=remarks, compiler=compiled.compiler,
        memory_error=figures["peak_gb"] / row.measured_gb - 1 if row.measured_gb else None, **figures,
    )  # fmt: skip


def _attention_seconds(timeline: Timeline) -> float:
    return sum(total.seconds for total in timeline.kernels if "mean_flops[attention" in total.task.scope)


# ------------------------------------------------------------------------------------------------ explained


def explain(rows: Sequence[Comparison], runs: Mapping[str, Run]) -> list[Comparison]:
    """Adds explanations to rows with an error above `LARGE`, where a computation supports one."""

    def explained(row: Comparison) -> str:
        if row.error is None or abs(row.error) <= LARGE:
            return ""
        return recomputed_attention(row, rows, runs) or less_recomputation(row, runs[row.id])

    return [dataclasses.replace(row, explanation=explained(row)) for row in rows]


def less_recomputation(row: Comparison, run: Run) -> str:
    """Says that the program recomputes products which the run keeps, or may keep; empty if that is not enough.

    It applies where the run keeps its products, since MLPs and the loss of this package always recompute some of
    theirs, and where the run's remat is not published. Without these products, in the time that products take in the
    mean, and without the communication that compute waits for, the step must come within `LARGE` of the measured one,
    at the fast end of the rates at least.
    """
    may_keep = row.remat == "none" or not remat_is_published(run)
    if not may_keep or not (row.flops and row.low_s and row.step_s and row.measured_s):
        return ""
    share, exposed_s = run_flops(run) / run.devices / row.flops, row.exposed_comm_s or 0.0
    typical, fast = (share * (seconds - exposed_s) / row.measured_s - 1 for seconds in (row.step_s, row.low_s))
    if abs(fast) > LARGE:
        return ""
    return (
        f"the program executes {1 / share:.2f} x the model's own products and waits {exposed_s:.2g} s for "
        f"communication: without both the error is {typical:+.1%} ({fast:+.1%} at the fast end of the rates)"
    )


def recomputed_attention(row: Comparison, rows: Sequence[Comparison], runs: Mapping[str, Run]) -> str:
    """Says that recomputing attention costs the run's program more than its products; empty if that is not so.

    The cost is taken from another run of the same program that recomputes attention, relative to one that keeps its
    output: its measured over its predicted ratio. With this factor, the error of `row` must be at most `LARGE`.
    """
    if row.remat not in ("full", "offload"):
        return ""
    alike = [r for r in rows if r.error is not None and r.id != row.id and _same_program(runs[r.id], runs[row.id])]
    keeps = [r for r in alike if r.remat == "save_attention"]
    again = [r for r in alike if r.remat in ("full", "offload")]
    if not keeps or not again:
        return ""
    kept, other = max(keeps, key=_tokens(runs)), max(again, key=_tokens(runs))
    assert other.error is not None and kept.error is not None and row.error is not None
    factor = (1 + kept.error) / (1 + other.error)
    explained = (1 + row.error) * factor - 1
    if abs(explained) > LARGE:
        return ""
    return (
        f"recomputing attention costs {factor:.2f} x what its products do, by {other.id} over {kept.id}: with this "
        f"factor the error is {explained:+.1%}"
    )


def _same_program(a: Run, b: Run) -> bool:
    return (a.hardware, a.framework, a.model, a.attention) == (b.hardware, b.framework, b.model, b.attention)


def _tokens(runs: Mapping[str, Run]) -> Callable[[Comparison], int]:
    return lambda row: runs[row.id].seq_len or 0


# ------------------------------------------------------------------------------------------------ shown


def summary(rows: Sequence[Comparison]) -> list[str]:
    """Lines with the median absolute error over all rows, and for each kind of device."""
    found = [row for row in rows if row.error is not None]
    groups = {"all": found} | {
        name: [row for row in found if kind(row) == name] for name in sorted({kind(row) for row in found})
    }
    lines = []
    for name, some in groups.items():
        if some:
            errors = [abs(row.error or 0.0) for row in some]
            lines.append(
                f"{name}: {len(some)} rows, median absolute error of time {statistics.median(errors):.1%}, "
                f"largest {max(errors):.1%}"
            )
    memory = [abs(row.memory_error) for row in found if row.memory_error is not None]
    if memory:
        lines.append(f"memory: {len(memory)} rows, median absolute error {statistics.median(memory):.1%}")
    return lines


def kind(row: Comparison) -> str:
    """The kind of device of a row, such as TPU v5p."""
    return row.hardware.partition(" x ")[2].partition(" (")[0]


def markdown(rows: Sequence[Comparison], name: str) -> str:
    """The note of a comparison, as Markdown; `name` is that of the file of published runs."""
    found, others = [r for r in rows if r.error is not None], [r for r in rows if r.error is None]
    compilers = ", ".join(sorted({row.compiler for row in found}))
    lines = [
        "# Predicted beside measured", "",
        "Question: how far are simulated steps and compiled peaks from runs that others published?", "",
        f"Command: `python benchmarks/validate.py {name} --json benchmarks/validation.json --md "
        "benchmarks/validation.md`.", "",
        "Each row is compiled for its devices, which are absent, as the nearest configuration, with a stand-in for the "
        "published attention kernel that declares its products. Seconds are **simulated** at the rates of "
        "`tsp_jax/hardware/rate_tables.py` (shortest, typical and longest over their bands), peaks are **compiled**, "
        "published figures were **measured** by their sources. An error is predicted over measured, minus 1. No rate "
        f"is fitted to a row. jax {jax.__version__}; {compilers}.", "",
        *(f"- {line}" for line in summary(rows)), "",
        "A published peak is that of the run's own program; the rebuilt one streams weights and multiplies tokens in "
        "chunks, so that its peak is another program's, not an estimate of the run's.", "",
        "| row | hardware | published program | layout, mesh, remat | predicted s | measured s | error | attention | "
        "peak GB | measured | error |",
        "|" + "---|" * 11, *map(_line, found), "",
        "How the rebuilt programs differ, and what explains errors above 30 %:", "",
        *(f"- {row.id}: {'; '.join(filter(None, (*row.remarks, row.explanation)))}." for row in found
          if row.remarks or row.explanation), "",
        "Not rebuilt:", "", *(f"- {row.id} ({row.hardware}): {row.reason}." for row in others), "",
        "Sources:", "", *(f"- {row.id}: {row.source}, {row.date}." for row in rows), "",
    ]  # fmt: skip
    return "\n".join(lines)


def _line(row: Comparison) -> str:
    also = "".join(f", {value:.5g}" for value in row.other_measured_s)
    from_ = "" if row.measured_as == "step" else f" (by {row.measured_as})"
    memory = ["", "", ""] if row.peak_gb is None else [f"{row.peak_gb:.1f}", "", ""]
    if row.memory_error is not None:
        memory[1:] = [f"{row.measured_gb:.1f}", f"{row.memory_error:+.1%}"]
    cells = (
        row.id, row.hardware, row.program, f"`{row.layout}`, {row.mesh}, {row.remat}",
        f"{row.low_s:.4g} to {row.high_s:.4g} ({row.step_s:.4g})", f"{row.measured_s:.5g}{also}{from_}",
        f"{row.error:+.1%}", f"{(row.attention_s or 0.0) / (row.step_s or 1.0):.0%}", *memory,
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def grown(rows: Sequence[Comparison], baseline: Mapping[str, Any], tolerance: float) -> list[str]:
    """A line for each row whose error is larger than in an earlier comparison, or that is no longer rebuilt."""
    lines = []
    before = {row["id"]: row for row in baseline["rows"]}
    for row in rows:
        for name in ("error", "memory_error"):
            old, new = before.get(row.id, {}).get(name), getattr(row, name)
            if old is not None and new is None:
                lines.append(f"{row.id}: {name} was {old:+.1%}, now there is none: {row.reason}")
            elif old is not None and abs(new) > abs(old) + tolerance:
                lines.append(f"{row.id}: {name} was {old:+.1%}, is {new:+.1%}")
    return lines


def validate(path: str, options: Options, progress: Callable[[str], object] = print) -> int:
    """Compares every run of a file, writes and prints the result; returns the exit code."""
    runs = {run.id: run for run in read_runs(path)}
    wanted = [name.strip() for name in options.rows.split(",")] if options.rows else list(runs)
    if unknown := [name for name in wanted if name not in runs]:
        raise ConfigError(f"rows={options.rows}: {path} has no row {unknown[0]}; use some of {','.join(runs)}")
    check_writable(json=options.json, md=options.md)
    baseline = read_json(options.baseline, advice="use the JSON of an earlier comparison") if options.baseline else None
    rows = []
    for number, name in enumerate(wanted, start=1):
        row = compare_run(runs[name], path, options.timeout)
        rows.append(row)
        progress(f"{number} of {len(wanted)}: {_short(row)}")
    rows = explain(rows, runs)
    if options.json:
        facts = {"jax": jax.__version__, "rows": [dataclasses.asdict(row) for row in rows]}
        Path(options.json).write_text(json.dumps(facts, indent=1) + "\n")
    if options.md:
        Path(options.md).write_text(markdown(rows, Path(path).name))
    for line in [f"{row.id}: {row.explanation}" for row in rows if row.explanation] + summary(rows):
        progress(line)
    worse = grown(rows, baseline, options.tolerance) if baseline else []
    for line in worse:
        progress(f"worse: {line}")
    return WORSE if worse else 0


def _short(row: Comparison) -> str:
    if row.error is None:
        return f"{row.id}: not rebuilt: {row.reason}"
    memory = "" if row.memory_error is None else f"; {row.peak_gb:.1f} GB, measured {row.measured_gb:.1f}"
    memory += "" if row.memory_error is None else f", {row.memory_error:+.1%}"
    return (
        f"{row.id} on {row.hardware}: {row.low_s:.4g} to {row.high_s:.4g} ({row.step_s:.4g}) s, measured "
        f"{row.measured_s:.5g} s, {row.error:+.1%}{memory}; {row.layout} {row.mesh}, {row.remat}"
    )


def main() -> int:
    """Runs the command: FILE [--flag value ...]."""
    with cli.errors_in_a_line():
        about = "Compare simulated steps and compiled memory with published training runs, row by row of a CSV file."
        path, options = cli.first_argument(Options(), about=about)
        return validate(path, options, lambda line: print(line, flush=True))
