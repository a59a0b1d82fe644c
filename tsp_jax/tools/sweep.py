"""Layouts side by side on one target: memory, traffic, exposed communication, step time, and what fits."""

import csv
import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tsp_jax.config import Config, ModelConfig
from tsp_jax.cost.training import step_memory
from tsp_jax.errors import ConfigError
from tsp_jax.hardware.targets import Target
from tsp_jax.layout import Layout, get_layout, parse_sizes
from tsp_jax.tools.compile import Optimizer, Step, check_chunk, compile_step, place_on, tokens_of

PAPER = "Shyam, Golubeva, Anthony, arXiv 2604.26294"
_PAPER_MODEL = ModelConfig(
    vocab_size=32000, d_model=4096, num_layers=32, num_heads=32, num_kv_heads=32, head_dim=128, d_ff=16384
)
_PAPER_PEAKS = {
    ("tsp:8", 16384): "31.0", ("tsp:8", 131072): "38.8", ("tp:8", 16384): "31.5", ("tp:8", 131072): "70.0",
    ("tp_sp:2x4", 131072): "85-140", ("tp_sp:4x2", 131072): "85-140",
}  # fmt: skip
"""GB per GPU on 8 x MI300X, one sequence; of TP+SP the paper gives the range over factorisations"""
USABLE = 0.92
"""share of a device's memory that a program may fill; the rest is the runtime's and lost to fragmentation"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One layout at one sequence length. Bytes and seconds are of one device and one step."""

    layout: str
    mesh: str
    seq_len: int
    batch: int
    """sequences over all devices"""
    fits: bool | None = None
    peak_bytes: int | None = None
    predicted_bytes: float | None = None
    """by the closed form"""
    received_bytes: float | None = None
    comm_s: float | None = None
    exposed_comm_s: float | None = None
    step_s: float | None = None
    matmul_s: float | None = None
    """the step's matrix products alone, at the sustained rate"""
    tokens_per_s: float | None = None
    """of all devices"""
    largest_seq_len: int | None = None
    """that fits with this batch, by the closed form scaled to what was compiled; a multiple of 16384"""
    largest_batch: int | None = None
    """sequences a replica that fit at this length, likewise"""
    compile_s: float | None = None
    paper_peak_gb: str = ""
    by_kind: dict[str, int] = dataclasses.field(default_factory=dict)
    note: str = ""
    """why there are no figures, or that it does not fit"""


def parse_layout(text: str, num_devices: int) -> tuple[Layout, dict[str, int]]:
    """``tp_sp:2x4`` -> (layout, mesh sizes): sizes of weight axes, then of sequence axes; data takes what is left.

    Raises:
      ConfigError: unknown layout, or sizes that do not divide the devices.
    """
    name, _, shape = text.partition(":")
    layout = get_layout(name)
    own = [axis for axis in dict.fromkeys((*layout.heads, *layout.sequence)) if axis not in layout.batch]
    example = f"{name}:{'x'.join(['2'] * (len(own) - 1) + ['4'])}" if own else name
    sizes = shape.split("x") if shape else []
    if len(sizes) != len(own) or not all(size.isdecimal() and int(size) for size in sizes):
        raise ConfigError(
            f"layouts={text} does not give a size to each of {', '.join(own) or 'no axes'}; use {example}"
        )
    replica = math.prod(int(size) for size in sizes)
    if num_devices % replica:
        raise ConfigError(f"layouts={text}: {replica} devices a replica do not divide {num_devices}; use {example}")
    found = {layout.batch[0]: num_devices // replica} | dict(zip(own, map(int, sizes), strict=True))
    # In the layout's order: weight axes innermost, on neighbouring devices.
    return layout, {axis: found[axis] for axis in layout.axis_names}


def configure(config: Config, text: str, seq_len: int, batch: int, num_devices: int) -> Config:
    """`config` under a layout: `batch` sequences for each replica."""
    layout, sizes = parse_layout(text, num_devices)
    mesh = ",".join(f"{name}={size}" for name, size in sizes.items())
    replicas = sizes[layout.batch[0]]
    return dataclasses.replace(config, layout=layout.name, mesh=mesh, seq_len=seq_len, batch=batch * replicas)


def compare_layouts(
    config: Config,
    target: Target,
    layouts: Sequence[str],
    seq_lens: Sequence[int],
    *,
    batch: int = 1,
    step: Step = "train",
    chunk: int = 0,
    optimizer: Optimizer = None,
    progress: Callable[[str], object] = lambda _: None,
) -> list[Row]:
    """Compiles every layout at every length and reads the programs. What cannot be compiled is a row that says why.

    Args:
      config: the model and all else that the rows share.
      target: devices.
      layouts: such as tsp:8, tp_sp:2x4; see `parse_layout`.
      seq_lens: tokens of a sequence.
      batch: sequences a replica.
      step: what to compile.
      chunk: tokens of each prompt that one prefill takes; 0: all of them.
      optimizer: the user's own; None: AdamW from `config.optimizer`.
      progress: called with a line before each program.

    Raises:
      ConfigError: a layout is unknown or does not fit the target, before anything compiles.
    """
    jobs = [configure(config, text, length, batch, target.num_devices) for text in layouts for length in seq_lens]
    names = [text for text in layouts for _ in seq_lens]
    for job in jobs:
        place_on(job, target)
        check_chunk(job, step, chunk)
    rows = []
    for number, (name, job) in enumerate(zip(names, jobs, strict=True), start=1):
        progress(f"{number} of {len(jobs)}: {name} at {job.seq_len} tokens")
        rows.append(_row(name, job, target, step, chunk, optimizer))
    return rows


def _row(name: str, config: Config, target: Target, step: Step, chunk: int, optimizer: Optimizer) -> Row:
    row = Row(layout=name, mesh=config.mesh, seq_len=config.seq_len, batch=config.batch)
    try:
        compiled = compile_step(config, target, step, chunk, optimizer)
    except Exception as error:  # compilers refuse programs in many ways; the other rows are still wanted
        if isinstance(error, ConfigError):
            raise
        return dataclasses.replace(row, fits=False, note=f"does not compile: {str(error).splitlines()[0][:200]}")
    found = compiled.report()
    t, limit = found.timeline, USABLE * target.hardware.memory_bytes
    assert t is not None
    row = dataclasses.replace(
        row,
        fits=found.peak_bytes <= limit,
        peak_bytes=found.peak_bytes,
        received_bytes=sum(c.total_bytes for c in found.collectives),
        comm_s=t.comm_s,
        exposed_comm_s=t.exposed_comm_s,
        step_s=t.step_s,
        matmul_s=t.matmul_s,
        tokens_per_s=tokens_of(config, step, chunk) / t.step_s,
        compile_s=round(compiled.compile_s, 1),
        paper_peak_gb=_paper(name, config, target, step),
        by_kind=dict(found.peak.by_kind),
        note="" if found.peak_bytes <= limit else f"does not fit {target.hardware.memory_bytes / 1e9:.0f} GB",
    )
    return _with_limits(row, config, limit) if step == "train" else row


def _paper(name: str, config: Config, target: Target, step: Step) -> str:
    same = config.model == _PAPER_MODEL and config.batch == 1 and str(target) == "mi300x:8" and step == "train"
    return _PAPER_PEAKS.get((name, config.seq_len), "") if same else ""


def _with_limits(row: Row, config: Config, limit: float) -> Row:
    """Adds the closed form's peak, and what would still fit by it."""
    layout, sizes = get_layout(config.layout), parse_sizes(config.mesh)
    replicas = math.prod(sizes[name] for name in layout.batch)

    def predicted(seq_len: int, batch: int) -> float:
        changed = dataclasses.replace(config, seq_len=seq_len, batch=batch * replicas)
        return sum(step_memory(changed, layout, sizes).values())

    here = config.batch // replicas
    own = predicted(config.seq_len, here)
    scale = (row.peak_bytes or own) / own
    length = _largest(lambda n: scale * predicted(16384 * n, here) <= limit)
    batch = _largest(lambda n: scale * predicted(config.seq_len, n) <= limit)
    return dataclasses.replace(row, predicted_bytes=own, largest_seq_len=16384 * length, largest_batch=batch)


def _largest(fits: Callable[[int], bool]) -> int:
    """The largest n for which `fits`, which is true below some n and false above; 0 if none."""
    high = 1
    while fits(high) and high < 1 << 20:
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def write_json(rows: Sequence[Row], facts: dict[str, Any], path: Path) -> None:
    """All rows, with what they share."""
    path.write_text(json.dumps({**facts, "rows": [dataclasses.asdict(row) for row in rows]}, indent=1) + "\n")


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """A line for each row."""
    fields = [field.name for field in dataclasses.fields(Row) if field.name != "by_kind"]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(dataclasses.asdict(row) for row in rows)
