"""Prints what differs between two programs as tables."""

from collections.abc import Callable, Sequence

from rich.console import Console
from rich.table import Table

from tsp_jax.hardware.rates import Band
from tsp_jax.inspect.diff import Diff, Pair, Row
from tsp_jax.inspect.render import new_table
from tsp_jax.inspect.units import format_band, format_bytes, format_seconds

Format = Callable[[float], str]
UNKNOWN = "unknown"


def format_flops(value: float) -> str:
    """Floating-point operations in PFLOP, TFLOP or GFLOP."""
    unit, name = next((pair for pair in _FLOPS if abs(value) >= pair[0] / 10), _FLOPS[-1])
    return f"{value / unit:.2f} {name}"


_FLOPS = ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"))


_TOTALS: dict[str, tuple[str, Format]] = {
    "step_s": ("step", format_seconds),
    "compute_s": ("computation", format_seconds),
    "contention_s": ("computation is slowed by communication", format_seconds),
    "exposed_comm_s": ("exposed communication", format_seconds),
    "exposed_host_s": ("exposed copies to and from the host", format_seconds),
    "comm_s": ("communication", format_seconds),
    "matmul_s": ("matrix products alone", format_seconds),
    "peak_bytes": ("peak memory", format_bytes),
    "state": ("state at the peak", format_bytes),
    "residual": ("residuals at the peak", format_bytes),
    "transient": ("everything else at the peak", format_bytes),
    "host_bytes": ("peak in the host's memory", format_bytes),
    "received": ("received", format_bytes),
    "flops": ("matrix products", format_flops),
}


def show_diff(found: Diff, names: tuple[str, str], out: Console, *, largest: int = 12) -> None:
    """Prints what differs between two programs, A and B."""
    for letter, name in zip("AB", names, strict=True):
        out.print(f"{letter}: {name}", soft_wrap=True, highlight=False)
    for line in found.unknown:
        out.print(line, soft_wrap=True, highlight=False)
    if found.same:
        out.print("no difference in what is known of both")
        return
    out.print(_totals(found))
    if line := verdict(found):
        out.print(line, soft_wrap=True, highlight=False)
    tables = {
        "Time by scope, exposed communication included, simulated": (found.scopes, _scope_columns()),
        "Collectives": (found.collectives, _collective_columns()),
        "Buffers at the peak": (found.buffers, _buffer_columns()),
    }
    for title, (rows, columns) in tables.items():
        if rows:
            out.print(_table(title, rows, columns, largest))


def verdict(found: Diff) -> str:
    """One line: whether B's step is shorter or longer, and whether that holds at all rates; empty without times."""
    differences = {name: pair.difference for name, pair in found.scenarios.items()}
    known = [value for value in differences.values() if value is not None]
    typical = found.totals["step_s"].difference
    if typical is None or not known or found.holds is None:
        return ""
    if found.holds:
        word = "shorter" if typical < 0 else "longer"
        low, high = sorted(map(abs, (min(known), max(known))))
        return f"B's step is {word} at all rates, by {format_band(Band(low, abs(typical), high))}"
    each = ", ".join(
        f"{signed(value, format_seconds)} at {name}" for name, value in differences.items() if value is not None
    )
    return f"the order of the steps depends on the rates, so it is a tie within their uncertainty: {each}"


def signed(value: float | None, show: Format) -> str:
    """A difference with its sign; none if it is 0, unknown if it is None."""
    if not value:
        return UNKNOWN if value is None else "none"
    return f"{'+' if value > 0 else '-'}{show(abs(value))}"


def _text(value: float | None, show: Format) -> str:
    return UNKNOWN if value is None else show(value)


def _totals(found: Diff) -> Table:
    table = new_table("A step of one device", "part", ">A", ">B", ">difference", ">B / A")
    for key, (name, show) in _TOTALS.items():
        pair = found.totals[key]
        if not (pair.before is None and pair.after is None) and (pair.before or pair.after or pair.differs):
            ratio = f"{pair.ratio:.3f}" if pair.ratio is not None else ""
            difference = signed(pair.difference, show) if pair.differs else "none"
            table.add_row(name, _text(pair.before, show), _text(pair.after, show), difference, ratio)
    return table


Columns = dict[str, Callable[[Row], str]]


def _table(title: str, rows: Sequence[Row], columns: Columns, largest: int) -> Table:
    table = new_table(f"{title}: what differs", *columns, overflow="fold")
    for row in rows[:largest]:
        table.add_row(*(cell(row) for cell in columns.values()))
    if len(rows) > largest:
        table.add_row(f"{len(rows) - largest} more", *[""] * (len(columns) - 1))
    return table


def _scope_columns() -> Columns:
    return {
        "scope": lambda row: row.key[0],
        **_pair_columns("seconds", format_seconds),
        ">received": lambda row: _arrow(row.figures["received"], format_bytes),
        ">operations": lambda row: _arrow(row.figures["flops"], format_flops),
    }


def _collective_columns() -> Columns:
    return {
        "collective": lambda row: f"{row.key[0]} over {row.key[1]}",
        "scope": lambda row: row.key[2],
        "": lambda row: row.state,
        **_pair_columns("bytes", format_bytes),
        ">count": lambda row: _arrow(row.figures["count"], "{:g}".format),
        ">overlapped": lambda row: _arrow(row.figures["hidden"], "{:.0%}".format),
    }


def _buffer_columns() -> Columns:
    return {
        "array": lambda row: row.key[1],
        "kind": lambda row: row.key[0],
        "made by": lambda row: row.key[2],
        "": lambda row: row.state,
        **_pair_columns("bytes", format_bytes),
        ">count": lambda row: _arrow(row.figures["count"], "{:g}".format),
    }


def _pair_columns(name: str, show: Format) -> Columns:
    def cell(value: float | None) -> str:
        return "" if value == 0 else _text(value, show)

    return {
        ">A": lambda row: cell(row.figures[name].before),
        ">B": lambda row: cell(row.figures[name].after),
        ">difference": lambda row: signed(row.figures[name].difference, show),
    }


def _arrow(pair: Pair, show: Format) -> str:
    """Both figures, or one if they look alike or the other one is 0 or not known."""
    texts = [show(value) for value in (pair.before, pair.after) if value]
    return " -> ".join(dict.fromkeys(texts))
