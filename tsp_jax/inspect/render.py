"""Prints a report as tables."""

from typing import Literal

from rich.console import Console
from rich.table import Table

from tsp_jax.inspect.program_report import Report
from tsp_jax.inspect.scopes import readable_scope
from tsp_jax.inspect.units import format_band, format_bytes, format_seconds


def show(report: Report, out: Console, *, largest: int = 12) -> None:
    """Prints memory, the largest buffers at the peak, communication and timeline of one device."""
    if report.missing:
        out.print(f"No peak and no timeline: {report.missing}", soft_wrap=True, highlight=False)
        out.print(_known(report, largest))
    else:
        out.print(_memory(report))
        out.print(_buffers(report, largest))
    if report.collectives:
        out.print(_traffic(report, largest))
    if report.timeline:
        out.print(_timeline(report))
        _show_bottlenecks(report, out)
        for line in report.timeline.assumptions:
            out.print(f"  assumed: {line}", style="dim", soft_wrap=True, highlight=False)
    for figure, reason in report.unknown.items():
        out.print(f"  unknown ({figure}): {reason}", style="dim", soft_wrap=True, highlight=False)


def console(*, stderr: bool = False) -> Console:
    """A console for the tables, which treats no text as markup.

    Output that does not go to a terminal is 150 columns wide.
    """
    width = None if Console(stderr=stderr).is_terminal else 150
    return Console(stderr=stderr, width=width, markup=False, emoji=False)


_KINDS = {
    "state": "state (arguments of the program) at the peak, from the text",
    "residual": "residuals (forward to backward) at the peak, from the text",
    "transient": "everything else at the peak, from the text",
}


def new_table(title: str, *names: str, overflow: Literal["fold", "ellipsis"] = "ellipsis") -> Table:
    """An empty table; a > in the name of a column aligns it right."""
    table = Table(title=title, title_justify="left")
    for name in names:
        table.add_column(name.lstrip(">"), justify="right" if name.startswith(">") else "left", overflow=overflow)
    return table


def _memory(report: Report) -> Table:
    source = "compiled" if report.memory else "from the text of the program"
    table = new_table(f"Memory of one device, {source}", "part", ">bytes")
    if m := report.memory:
        parts = {"arguments": m.argument_bytes, "outputs": m.output_bytes, "aliased": -m.alias_bytes}
        constants = {"constants of the program": m.constant_bytes} if m.constant_bytes else {}
        for name, value in (parts | {"temporaries": m.temp_bytes} | constants).items():
            table.add_row(name, format_bytes(value))
        table.add_section()
    table.add_row("peak memory", format_bytes(report.peak_bytes), style="bold")
    table.add_section()
    for kind, value in report.peak.by_kind.items():
        table.add_row(_KINDS[kind], format_bytes(value))
    if report.peak.host_bytes:
        table.add_row("peak in the host's memory", format_bytes(report.peak.host_bytes))
    return table


def _known(report: Report, largest: int) -> Table:
    """What is known about a program that is not scheduled."""
    devices, found = report.module.num_devices, report.shardings
    whole = f"; where it is not partitioned yet, of all {devices} devices" if devices > 1 else ""
    table = new_table("What the text tells", "part", "value", overflow="fold")
    table.add_row(f"matrix products{whole}", f"{report.flops / 1e15:.6g} PFLOP")
    for name, sharding in list(found.items())[:largest]:
        table.add_row(f"sharding of {name}", sharding)
    if len(found) > largest:
        table.add_row(f"shardings of {len(found) - largest} more arguments", "")
    if devices > 1 and not report.collectives:
        table.add_row("communication", "not in the text yet")
    return table


def _buffers(report: Report, largest: int) -> Table:
    title = f"Largest of {len(report.peak.buffers)} buffers alive at the peak, from the text of the program"
    table = new_table(title, ">bytes", "array", "kind", "made by", "source", overflow="fold")
    for b in report.peak.buffers[:largest]:
        source = "/".join(b.source.split("/")[-2:])
        shape = ",".join(map(str, b.shape))
        maker = b.scope if b.opcode == "parameter" else readable_scope(b.scope)
        table.add_row(format_bytes(b.bytes), f"{b.dtype}[{shape}]", b.kind, maker, source)
    return table


def _traffic(report: Report, largest: int) -> Table:
    total = sum(c.total_bytes for c in report.collectives)
    title = f"Communication of one device in a step, compiled: receives {format_bytes(total)}"
    if report.missing:
        title = f"Collectives that the text holds so far: a device receives {format_bytes(total)}"
    table = new_table(title, ">received", "op", "axis", ">count", ">each", "async", ">overlapped", "scope")
    found = sorted(report.collectives, key=lambda c: -c.total_bytes)
    for c in found[:largest]:
        hidden = report.hidden_fraction(c)
        share = "" if hidden is None else f"{hidden:.0%}"
        received, each, count = format_bytes(c.total_bytes), format_bytes(c.bytes), f"{c.count:g}"
        table.add_row(
            received, c.op, c.axis, count, each, "yes" if c.is_async else "no", share, readable_scope(c.scope)
        )
    if rest := found[largest:]:
        table.add_row(format_bytes(sum(c.total_bytes for c in rest)), f"{len(rest)} more")
    return table


def _timeline(report: Report) -> Table:
    t = report.timeline
    assert t is not None
    table = new_table("Time of a step, simulated: low to high (typical)", "part", ">time", ">share of the step")
    rows = {
        "step": "step_s", "computation": "compute_s",
        "computation is slowed by communication": "contention_s", "communication": "comm_s",
        f"exposed communication ({report.exposed_fraction:.0%} of communication)": "exposed_comm_s",
        f"matrix products alone ({t.flops / 1e15:.1f} PFLOP)": "matmul_s",
    }  # fmt: skip
    if t.host_s:
        rows |= {"copies to and from the host": "host_s", "exposed copies to and from the host": "exposed_host_s"}
    for name, field in rows.items():
        table.add_row(name, format_band(t.band(field)), _share(getattr(t, field), t.step_s))
    if t.matmul_ratio:
        table.add_row("step over matrix products alone", f"{t.matmul_ratio:.2f} x")
    table.add_section()
    for scope, value in list(t.by_scope.items())[:8]:
        table.add_row(f"computation of {scope}", format_seconds(value), _share(value, t.step_s))
    return table


def _show_bottlenecks(report: Report, out: Console) -> None:
    found, t = report.bottlenecks, report.timeline
    assert found is not None and t is not None
    if found.found:
        title = "What would shorten the step most, simulated one at a time: low to high (typical)"
        table = new_table(title, ">shorter by", ">of the step", "if", "mostly", "what may do it", overflow="fold")
        for each in found.found:
            share = _share(each.gain_s.typical, t.step_s)
            table.add_row(format_band(each.gain_s), share, each.what, each.mostly, each.remedy)
        out.print(table)
    together = f"{format_seconds(found.together_s)} with all of them; " if len(found.found) > 1 else ""
    out.print(f"{together}{found.verdict}", soft_wrap=True, highlight=False)


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.0%}" if whole else ""
