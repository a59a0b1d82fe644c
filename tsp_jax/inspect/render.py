"""Prints a report as tables."""

from rich.console import Console
from rich.table import Table

from tsp_jax.inspect.collectives import Collective
from tsp_jax.inspect.peak import LiveBuffer
from tsp_jax.inspect.program_report import Report
from tsp_jax.inspect.scopes import readable_scope
from tsp_jax.inspect.units import format_bytes, format_seconds


def show(report: Report, out: Console, *, largest: int = 12) -> None:
    """Prints memory, the largest buffers at the peak, communication and timeline of one device."""
    out.print(_memory(report))
    out.print(_buffers(report, largest))
    if report.collectives:
        out.print(_traffic(report, largest))
    if report.timeline:
        out.print(_timeline(report))
        for line in report.timeline.assumptions:
            out.print(f"  assumed: {line}", style="dim", soft_wrap=True, highlight=False)


def console() -> Console:
    """A console for the tables; output that goes elsewhere than to a terminal is 150 columns wide."""
    plain = Console()
    return plain if plain.is_terminal else Console(width=150)


def _memory(report: Report) -> Table:
    table = Table(title="Memory of one device", title_justify="left")
    for name in ("part", "bytes"):
        table.add_column(name, justify="right" if name == "bytes" else "left")
    if report.memory:
        m = report.memory
        parts = {"arguments": m.argument_bytes, "outputs": m.output_bytes, "aliased": -m.alias_bytes}
        for name, value in (parts | {"temporaries": m.temp_bytes}).items():
            table.add_row(name, format_bytes(value))
        table.add_section()
    table.add_row("peak", format_bytes(report.peak_bytes), style="bold")
    table.add_section()
    for kind, value in report.peak.by_kind.items():
        table.add_row(f"{kind} at the peak (by the text)", format_bytes(value))
    if report.peak.host_bytes:
        table.add_row("in the host's memory, at most", format_bytes(report.peak.host_bytes))
    return table


def _buffers(report: Report, largest: int) -> Table:
    table = Table(title=f"Largest of {len(report.peak.buffers)} buffers alive at the peak", title_justify="left")
    for name in ("bytes", "array", "kind", "made by", "source"):
        table.add_column(name, justify="right" if name == "bytes" else "left", overflow="fold")
    for b in report.peak.buffers[:largest]:
        source = "/".join(b.source.split("/")[-2:])
        shape = ",".join(map(str, b.shape))
        table.add_row(format_bytes(b.bytes), f"{b.dtype}\\[{shape}]", b.kind, _maker(b), source)
    return table


def _maker(b: LiveBuffer) -> str:
    """The name of a parameter; the scope of other buffers."""
    return b.scope if b.opcode == "parameter" else readable_scope(b.scope)


def _traffic(report: Report, largest: int) -> Table:
    total = sum(c.total_bytes for c in report.collectives)
    table = Table(title=f"Received by one device in a step: {format_bytes(total)}", title_justify="left")
    for name in ("bytes", "op", "axis", "runs", "each", "async", "hidden", "scope"):
        table.add_column(name, justify="right" if name in ("bytes", "runs", "each", "hidden") else "left")
    found = sorted(report.collectives, key=lambda c: -c.total_bytes)
    for c in found[:largest]:
        table.add_row(*_traffic_row(report, c))
    if rest := found[largest:]:
        table.add_row(format_bytes(sum(c.total_bytes for c in rest)), f"{len(rest)} more")
    return table


def _traffic_row(report: Report, c: Collective) -> list[str]:
    hidden = report.hidden_fraction(c)
    share = "" if hidden is None else f"{hidden:.0%}"
    yes = "yes" if c.is_async else "no"
    return [
        format_bytes(c.total_bytes),
        c.op,
        c.axis,
        f"{c.count:g}",
        format_bytes(c.bytes),
        yes,
        share,
        readable_scope(c.scope),
    ]


def _timeline(report: Report) -> Table:
    t = report.timeline
    assert t is not None
    table = Table(title="Timeline of a step, simulated", title_justify="left")
    table.add_column("part")
    table.add_column("time", justify="right")
    table.add_column("share of the step", justify="right")
    rows = {
        "step": t.step_s,
        "computation": t.compute_s,
        "communication": t.comm_s,
        f"exposed communication ({report.exposed_fraction:.0%} of it)": t.exposed_comm_s,
        f"matrix products alone ({t.flops / 1e15:.1f} PFLOP)": t.matmul_s,
    }
    if t.host_s:
        rows |= {"copies to and from the host": t.host_s, "exposed copies to and from the host": t.exposed_host_s}
    for name, value in rows.items():
        table.add_row(name, format_seconds(value), f"{value / t.step_s:.0%}" if t.step_s else "")
    if t.matmul_ratio:
        table.add_row("step over matrix products alone", f"{t.matmul_ratio:.2f} x")
    table.add_section()
    for scope, value in sorted(t.by_scope.items(), key=lambda item: -item[1])[:8]:
        table.add_row(f"computation of {scope}", format_seconds(value), f"{value / t.step_s:.0%}" if t.step_s else "")
    return table
