"""The command tsp-compare: layouts side by side, as a table, JSON, CSV, a page and a chart."""

import dataclasses
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro
from rich.table import Column, Table

from tsp_jax.config import Config
from tsp_jax.errors import ConfigError, install_hint
from tsp_jax.hardware.devices import Hardware
from tsp_jax.hardware.targets import Target, parse_target, standins_note, use_target
from tsp_jax.inspect.render import console
from tsp_jax.plan.compile import Step
from tsp_jax.plan.ranking import turns
from tsp_jax.tools import cli
from tsp_jax.tools.inspect import check_writable
from tsp_jax.tools.page import write_page
from tsp_jax.tools.sweep import PAPER, Row, compare_layouts, rows_json, write_csv, write_json
from tsp_jax.training.optimizer import Optimizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """Layouts and sequence lengths to compare on one target."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    target: str = "mi300x:8"
    """devices to compile for, which need not be present: cpu:8, mi300x:8, mi325x:8, mi355x:8, h100:8, h200:8,
    b200:8, v5e:8, v5p:8, v6e:8, v7x:8"""
    layouts: str = ""
    """layouts, separated by commas, such as tsp:8,tp_sp:2x4,tsp(weights=data+tsp):2x4. Each is written as for --layout,
    then a colon and the sizes of its axes: first tensor axes (they shard weights alone), then batch axes, then sequence
    axes. A first batch axis that shards no weights gets no size: it takes the remaining devices. Empty: the layouts of
    docs/layouts.md"""
    seq_lens: str = ""
    """tokens per sequence, such as 16384,131072; empty: as in the configuration"""
    per_replica: int = 1
    """sequences per replica"""
    step: Step = "train"
    """train (an optimizer step), forward (the loss of a batch), prefill, or decode (one token per sequence)"""
    hardware: str = ""
    """file of measured rates, as JSON, which replace the target's; empty: published and assumed rates"""
    attention_efficiency: float = 0.0
    """share of the fastest product's FLOP/s that attention is assumed to reach; 0: by kernel, heads and direction"""
    chunk: int = 0
    """prompt tokens that one prefill step processes; 0: all of them"""
    json: str = ""
    """file for the rows, as JSON"""
    csv: str = ""
    """file for the rows, as CSV"""
    html: str = ""
    """file for the rows and charts as a page, .html, that any browser opens without a network"""
    png: str = ""
    """file for a chart (needs matplotlib)"""


def compare(name: str, options: CompareOptions, optimizer: Optimizer = None) -> None:
    """Compiles every program, prints the table and writes the files."""
    target = parse_target(options.target, options.attention_efficiency, options.hardware)
    check_writable(json=options.json, csv=options.csv, html=options.html, png=options.png)
    draw = _drawer() if options.png else None
    lengths = _parse_lengths(options.seq_lens) or [options.config.seq_len]
    layouts = _items(options.layouts, _OUTER_COMMA) or _default_layouts(target.num_devices)
    if options.config.plan:
        raise ConfigError(f"plan={options.config.plan} chooses a layout, and compare compares given ones; leave it out")
    if options.per_replica < 1:
        raise ConfigError(f"per_replica={options.per_replica} must be positive; use 1")
    use_target(target)
    with console(stderr=True).status("") as status:
        rows = compare_layouts(
            options.config, target, layouts, lengths,
            batch=options.per_replica, step=options.step, chunk=options.chunk, optimizer=optimizer,
            progress=lambda line: status.update(f"compiling {line}"),
        )  # fmt: skip
    if options.csv:
        write_csv(rows, Path(options.csv))
    facts = _facts(name, rows, target, options)
    if options.json:
        write_json(rows, facts, Path(options.json))
    if options.html:
        title = f"{name}: layouts for one {options.step} step on {target}"
        write_page(Path(options.html), rows_json(rows, facts), kind="compare", title=title, lines=_page_lines(target))
    if draw:
        draw(rows, target, Path(options.png))
    _print_table(name, rows, target, options.step, turns(rows))  # after the files, which need no standard output
    if options.chunk:
        print("chunk: figures are averages per chunk; the time of attention to earlier chunks is underestimated")


def _facts(name: str, rows: Sequence[Row], target: Target, options: CompareOptions) -> dict[str, Any]:
    """What all rows share."""
    hardware = target.hardware
    return {
        "config": name, "target": str(target), "step": options.step, "chunk": options.chunk, "jax": jax.__version__,
        "paper": PAPER, "turns": turns(rows), "rates": hardware.rates.origin,
        "device": {"name": hardware.name, "memory_bytes": hardware.memory_bytes},
    }  # fmt: skip


def _page_lines(target: Target) -> list[str]:
    """What a page of a comparison says below its heading."""
    rates = target.hardware.rates.origin
    lines = [f"compiled with jax {jax.__version__}", standins_note(), f"rates of {rates}" if rates else ""]
    return [", ".join(filter(None, lines))]


def _drawer():
    try:
        from tsp_jax.tools.chart import draw
    except ImportError:
        raise ConfigError(f"png: matplotlib is not installed; {install_hint('viz')}") from None
    return draw


def _default_layouts(devices: int) -> list[str]:
    size = min(devices, 8)
    tp_sp = [f"tp_sp:{n}x{size // n}" for n in (2, 4) if size % n == 0 and size // n > 1]
    layouts = [f"tsp:{size}", f"tp:{size}", f"sp:{size}", *tp_sp, f"fsdp_cp:{size}", "fsdp"]
    if half := size // 2:
        layouts += [f"tsp(weights=data+tsp):{devices // half}x{half}", f"tsp(sequence=node+tsp):2x{half}"]
    return layouts


_OUTER_COMMA = r",(?![^(]*\))"
"""pattern of a comma that is not inside parentheses"""


def _items(text: str, comma: str = ",") -> list[str]:
    return [item.strip() for item in re.split(comma, text) if item.strip()]


def _parse_lengths(text: str) -> list[int]:
    for item in _items(text):
        if not item.isdecimal() or not int(item):
            raise ConfigError(f"seq_lens={text}: '{item}' is not a number of tokens; use 16384,131072, for example")
    return [int(item) for item in _items(text)]


def _print_table(name: str, rows: Sequence[Row], target: Target, step: str, turned: Sequence[str]) -> None:
    out = console()
    heading = f"{name}, {step} step on {target}, compiled with jax {jax.__version__}"
    out.print(f"{heading}, {standins_note()}" if standins_note() else heading, soft_wrap=True, highlight=False)
    out.print(_table(rows, target.hardware), soft_wrap=True)
    for row in rows:
        if row.note:
            out.print(f"{row.layout} at {row.seq_len}: {row.note}", soft_wrap=True, highlight=False, markup=False)
    for line in turned:
        out.print(line, soft_wrap=True, highlight=False)
    if any(row.paper_peak_gb for row in rows):
        out.print(f"paper: peak GB per GPU, {PAPER}; for TP+SP its range over factorizations", soft_wrap=True)
    out.print(
        "step: low to high over the bands of the rates (typical), simulated; tsp-inspect prints the assumptions; comm, "
        "exposed: at typical rates; / matmul: step over the time of its matrix products alone, at the fastest one's "
        "rate; received: per device and step; batch: sequences over all devices",
        soft_wrap=True, highlight=False,
    )  # fmt: skip
    if target.hardware.rates.origin:
        out.print(f"rates of {target.hardware.rates.origin}", soft_wrap=True, highlight=False)


def _gb(value: float | None) -> str:
    """Text of a table cell in GB; small values, such as the bytes received per decoded token, get more digits."""
    return "" if value is None else f"{value / 1e9:.{1 if value >= 5e7 else 4}f}"


def _seconds(value: float) -> str:
    return f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def _step(row: Row) -> str:
    """The band of a step, and its typical value."""
    band = (row.step_low_s or 0.0, row.step_s or 0.0, row.step_high_s or 0.0)
    low, typical, high = (f"{value:.3g}" if value < 100 else f"{value:.0f}" for value in band)
    return typical if low == high else f"{low} to {high} ({typical})"


def _table(rows: Sequence[Row], hardware: Hardware) -> Table:
    columns = "tokens,batch,peak GB,formula,paper,received GB,comm s,exposed,step s,/ matmul,tokens/s,largest tokens"
    right = [
        Column(column, justify="right", no_wrap=column == "step s", overflow="fold")
        for column in (*columns.split(","), "largest batch")
    ]
    title = f"One device of {hardware.memory_bytes / 1e9:.0f} GB"
    table = Table(Column("layout", overflow="fold"), *right, title=title, title_justify="left")
    for _, group in itertools.groupby(rows, lambda row: row.layout):
        for row in group:
            table.add_row(*_cells(row), style="" if row.fits else "red")
        table.add_section()
    return table


def _cells(row: Row) -> list[str]:
    if row.peak_bytes is None or row.step_s is None or row.comm_s is None or row.exposed_comm_s is None:
        return [row.layout, str(row.seq_len), str(row.batch), "does not compile"]
    peak = _gb(row.peak_bytes) + ("" if row.fits else " (does not fit)")
    exposed = f"{row.exposed_comm_s / row.comm_s:.0%}" if row.comm_s else "-"
    return [
        row.layout, str(row.seq_len), str(row.batch), peak, _gb(row.predicted_bytes), row.paper_peak_gb,
        _gb(row.received_bytes),
        _seconds(row.comm_s), exposed, _step(row),
        f"{row.step_s / row.matmul_s:.2f}" if row.matmul_s else "-", f"{row.tokens_per_s:,.0f}",
        "" if row.largest_seq_len is None else f"{row.largest_seq_len // 1024:,} K",
        "" if row.largest_batch is None else str(row.largest_batch),
    ]  # fmt: skip


def main() -> None:
    """Runs the command."""
    cli.main(
        compare,
        lambda config: CompareOptions(config=config),
        about="Compare layouts on hardware that need not be present: peak memory, communication, simulated time.",
    )
