"""A plan as tables and lines."""

from collections.abc import Iterator, Sequence

import jax
from rich.table import Column, Table

from tsp_jax.config import Config
from tsp_jax.hardware.targets import standins_note
from tsp_jax.inspect.render import console
from tsp_jax.plan.choose import Plan
from tsp_jax.plan.limits import PAYS, Count, largest_that_pays
from tsp_jax.plan.search import Candidate


def show_plan(plan: Plan) -> None:
    """Prints the compiled steps, the longest contexts, and why the best is best."""
    out, base = console(), plan.base
    how = f"compiled with jax {jax.__version__}" if plan.chosen.compiled else "by closed forms alone"
    heading = (
        f"{plan.name}, {base.model.num_params / 1e9:.2f} B parameters, {base.batch} x {base.seq_len} tokens a step on "
        f"{plan.target}, {how}"
    )
    out.print(", ".join(filter(None, [heading, standins_note()])), soft_wrap=True, highlight=False)
    out.print(_steps(plan), soft_wrap=True)
    out.print(
        "front: no other step found beats it in both time and memory; step: low to high over the bands of the rates "
        "(typical), simulated; peak GB: compiled; formula: the closed form",
        soft_wrap=True, highlight=False,
    )  # fmt: skip
    out.print(_longest(plan), soft_wrap=True)
    for line in plan.budget.lines():
        out.print(line, soft_wrap=True, highlight=False, markup=False)
    for line in (*plan.why, *plan.ties, *plan.notes, *_differences(plan)):
        out.print(line, soft_wrap=True, highlight=False, markup=False)


def _differences(plan: Plan) -> Iterator[str]:
    """For each compiled step whose peak is far from its closed form, which buffers differ."""
    for candidate in plan.candidates:
        parts = plan.differences(candidate)
        if parts and candidate.compiled:
            peak, formula = candidate.compiled.peak_bytes / 1e9, candidate.estimate.peak_bytes / 1e9
            yield f"{candidate.choice.text()}: {peak:.2f} GB compiled, {formula:.2f} by the closed form"
            yield from (f"  {each}" for each in parts)


def show_counts(counts: Sequence[Count], config: Config) -> None:
    """Prints what each number of devices would bring."""
    title = f"Devices for {config.batch} x {config.seq_len} tokens a step, by closed forms"
    right = [Column(name, justify="right") for name in ("devices", "step s", "peak GB", "tokens/device-hour")]
    table = Table(*right, Column("with", overflow="fold"), title=title, title_justify="left")
    for number, best in counts:
        if best is None:
            table.add_row(str(number), "", "", "", "does not fit")
            continue
        tokens = 3600 * config.batch * config.seq_len / best.step_s / number
        cells = f"{best.step_s:.3g}", f"{best.peak_bytes / 1e9:.1f}", f"{tokens:,.0f}"
        table.add_row(str(number), *cells, best.choice.text())
    console().print(table, soft_wrap=True)
    smallest = next(count.num_devices for count in counts if count.candidate)
    most = largest_that_pays(counts)
    rule = f"a doubling pays if it makes a step at least {PAYS:g} times faster, half of the ideal gain"
    pays = f"more than {most} do not pay" if most else f"{counts[-1].num_devices} still pay"
    console().print(f"{smallest} devices are enough; {pays} ({rule})", soft_wrap=True, highlight=False)


def _steps(plan: Plan) -> Table:
    names = ("buckets MiB", "step s", "exposed", "peak GB", "formula", "tokens/s", "tokens/device-hour")
    right = [Column(name, justify="right", no_wrap=name == "step s") for name in names]
    left = [Column(name, overflow="fold") for name in ("", "layout", "mesh", "remat", "besides")]
    title = f"One device may fill {plan.budget.usable_bytes / 1e9:.1f} GB"
    table = Table(*left, *right, title=title, title_justify="left")
    shown = [k for k, c in enumerate(plan.candidates) if c.compiled or c.note or k in plan.front]
    for place in shown:
        mark = "best" if place == plan.best else "front" if place in plan.front else ""
        table.add_row(mark, *_cells(plan, plan.candidates[place]))
    return table


def _cells(plan: Plan, candidate: Candidate) -> list[str]:
    choice, found = candidate.choice, candidate.compiled
    besides = [f"{choice.accumulate} micro-batches"] * (choice.accumulate > 1) + ["zero1"] * choice.zero1
    besides += [f"{choice.moments_dtype} moments"] * (choice.moments_dtype != "float32")
    besides += [candidate.note] * bool(candidate.note)
    cells = [choice.layout, choice.mesh, choice.remat, ", ".join(besides), f"{choice.bucket_mib:g}"]
    formula = f"{candidate.estimate.peak_bytes / 1e9:.1f}"
    if found is None and candidate.note:
        return [*cells, "", "", "", formula]
    step, exposed, peak = f"{candidate.step_s:.4g}", "", ""
    if found:
        step = f"{found.step_low_s:.3g} to {found.step_high_s:.3g} ({step})"
        exposed = f"{found.exposed_comm_s / found.step_s:.1%}"
        peak = f"{found.peak_bytes / 1e9:.1f}"
    rates = plan.tokens_per_s(candidate), plan.tokens_per_device_hour(candidate)
    return [*cells, step, exposed, peak, formula, *(f"{rate:,.0f}" for rate in rates)]


def _longest(plan: Plan) -> Table:
    title = f"Longest context of each layout, {plan.base.batch} sequences a step (closed form, scaled to compiled)"
    right = [Column(name, justify="right") for name in ("tokens", "with offload")]
    table = Table(Column("layout", overflow="fold"), *right, title=title, title_justify="left")
    for layout in sorted(plan.longest_offloaded, key=lambda layout: -plan.longest_offloaded[layout]):
        lengths = plan.longest.get(layout, 0), plan.longest_offloaded[layout]
        table.add_row(layout, *(f"{tokens:,}" if tokens else "does not fit" for tokens in lengths))
    return table
