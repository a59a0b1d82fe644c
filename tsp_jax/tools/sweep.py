"""Compare layouts on one target: peak memory, communication, step time, and the largest sizes that fit."""

import bisect
import csv
import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tsp_jax.config import Config, ModelConfig
from tsp_jax.cost.memory import step_memory
from tsp_jax.errors import ConfigError
from tsp_jax.hardware.devices import Hardware
from tsp_jax.hardware.targets import Target
from tsp_jax.layout import Layout, get_layout, num_ranks, spread
from tsp_jax.mesh import format_sizes, parse_size, parse_sizes
from tsp_jax.plan.budget import usable_bytes
from tsp_jax.plan.compile import Step, compile_step, place_step
from tsp_jax.plan.estimate import as_stored
from tsp_jax.training.optimizer import Optimizer

PAPER = "Shyam, Golubeva, Anthony, arXiv 2604.26294"
_PAPER_MODEL = ModelConfig(
    vocab_size=32000, d_model=4096, num_layers=32, num_heads=32, num_kv_heads=32, head_dim=128, d_ff=16384
)
_PAPER_PEAKS = {
    ("tsp:8", 16384): "31.0", ("tsp:8", 131072): "38.8", ("tp:8", 16384): "31.5", ("tp:8", 131072): "70.0",
    ("tp_sp:2x4", 131072): "85-140", ("tp_sp:4x2", 131072): "85-140",
}  # fmt: skip
"""(layout, tokens) -> the paper's peak GB per GPU on 8 x MI300X, one sequence; for TP+SP a range over factorizations"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One layout at one sequence length. Bytes and seconds are per device and step."""

    layout: str
    mesh: str
    seq_len: int
    batch: int
    """sequences over all devices"""
    fits: bool | None = None
    peak_bytes: int | None = None
    predicted_bytes: float | None = None
    """peak memory by the closed form"""
    received_bytes: float | None = None
    comm_s: float | None = None
    exposed_comm_s: float | None = None
    step_s: float | None = None
    """at typical rates, as all other times; its band goes from `step_low_s` to `step_high_s`"""
    step_low_s: float | None = None
    step_high_s: float | None = None
    matmul_s: float | None = None
    """time of the step's matrix products alone, at the rate of the fastest product"""
    tokens_per_s: float | None = None
    """over all devices"""
    largest_seq_len: int | None = None
    """longest multiple of 16384 tokens that fits with this batch: closed form scaled to the compiled peak"""
    largest_batch: int | None = None
    """largest number of sequences per replica that fit at this length: closed form scaled to the compiled peak"""
    compile_s: float | None = None
    paper_peak_gb: str = ""
    by_kind: dict[str, int] = dataclasses.field(default_factory=dict)
    scenario_steps_s: dict[str, float] = dataclasses.field(default_factory=dict)
    """name in `SCENARIOS` -> step at its rates, which are the same for every row"""
    note: str = ""
    """why there are no figures, or the memory limit that the peak exceeds"""


def parse_layout(text: str, num_devices: int) -> tuple[Layout, dict[str, int]]:
    """Parses a layout and the sizes of its axes, such as ``tp_sp:2x4``; returns (layout, mesh sizes).

    Sizes of tensor axes come first, then those of batch axes, then those of sequence axes. A first batch axis that
    shards no weights gets no size: it takes the remaining devices. ``dp`` and ``fsdp`` need no size, since their only
    axis is a batch axis.

    Raises:
      ConfigError: the layout is unknown, or its sizes do not divide the devices.
    """
    name, colon, shape = (part.strip() for part in text.partition(":"))
    layout = get_layout(name)
    tensor = [axis for axis in layout.axis_names if axis not in layout.tokens]
    rest = [axis for axis in layout.batch[:1] if axis in layout.replica_batch]
    sized = [axis for axis in (*tensor, *layout.tokens) if axis not in rest] or rest
    fills = not rest or sized == rest  # no axis takes the remaining devices
    example = f"{layout.name}:{'x'.join(map(str, spread(sized, num_devices).values()))}"
    if not colon and fills and len(sized) == 1:
        shape = str(num_devices)
    sizes = dict(zip(sized, map(parse_size, shape.split("x")), strict=False))
    if shape.count("x") != len(sized) - 1 or not all(sizes.values()):
        raise ConfigError(f"layouts={text} does not give a size to each of {', '.join(sized)}; use {example}")
    used = math.prod(sizes.values())
    if num_devices % used:
        raise ConfigError(f"layouts={text}: {used} devices per replica do not divide {num_devices}; use {example}")
    if fills and used != num_devices:
        raise ConfigError(f"layouts={text} uses {used} of {num_devices} devices; use {example}")
    found = dict.fromkeys(rest, num_devices // used) | sizes
    # In the layout's order: weight axes innermost, on neighbouring devices.
    return layout, {axis: found[axis] for axis in layout.axis_names}


def configure(config: Config, text: str, seq_len: int, batch: int, num_devices: int) -> Config:
    """Returns `config` with the layout and mesh in `text`, this `seq_len`, and `batch` sequences per replica."""
    layout, sizes = parse_layout(text, num_devices)
    batch *= num_ranks(layout.batch, sizes)
    return dataclasses.replace(config, layout=layout.name, mesh=format_sizes(sizes), seq_len=seq_len, batch=batch)


def compare_layouts(
    config: Config, target: Target, layouts: Sequence[str], seq_lens: Sequence[int], *,
    batch: int = 1, step: Step = "train", chunk: int = 0, optimizer: Optimizer = None,
    progress: Callable[[str], object] = lambda _: None,
) -> list[Row]:  # fmt: skip
    """Compiles every layout at every sequence length and inspects the programs.

    If a layout cannot be compiled, its row says why.

    Args:
      config: the model and everything else that all rows share.
      target: devices to compile for.
      layouts: for example tsp:8, tp_sp:2x4 and tsp(weights=data+tsp):2x4; see `parse_layout`.
      seq_lens: tokens per sequence.
      batch: sequences per replica.
      step, chunk, optimizer: as in `compile_step`.
      progress: called with a line of text before each compilation.

    Raises:
      ConfigError: a layout is unknown or does not fit the target; raised before anything is compiled.
    """
    pairs = itertools.product(layouts, seq_lens)
    jobs = [(text, configure(config, text, length, batch, target.num_devices)) for text, length in pairs]
    jobs = [(job.layout + "".join(text.partition(":")[1:]), job) for text, job in jobs]  # one name for one row
    for _, job in jobs:
        place_step(job, target, step, chunk)
    rows = []
    for number, (name, job) in enumerate(jobs, start=1):
        progress(f"{number} of {len(jobs)}: {name} at {job.seq_len} tokens")
        rows.append(_row(name, job, target, step, chunk, optimizer))
    return rows


def _row(name: str, config: Config, target: Target, step: Step, chunk: int, optimizer: Optimizer) -> Row:
    row = Row(layout=name, mesh=config.mesh, seq_len=config.seq_len, batch=config.batch)
    try:
        compiled = compile_step(config, target, step, chunk, optimizer)
    except ConfigError:
        raise
    except Exception as error:  # compilers refuse programs in many ways; the other rows are still wanted
        return dataclasses.replace(row, fits=False, note=f"does not compile: {str(error).splitlines()[0][:200]}")
    found = compiled.report()
    t, limit = found.timeline, usable_bytes(target.hardware).usable_bytes
    total = target.hardware.memory_bytes
    assert t is not None
    row = dataclasses.replace(
        row,
        fits=found.peak_bytes <= limit,
        peak_bytes=found.peak_bytes,
        received_bytes=sum(c.total_bytes for c in found.collectives),
        **{name: getattr(t, name) for name in ("comm_s", "exposed_comm_s", "step_s", "matmul_s")},
        step_low_s=t.band().low,
        step_high_s=t.band().high,
        scenario_steps_s={name: times.step_s for name, times in t.scenarios.items()},
        tokens_per_s=config.batch * (1 if step == "decode" else chunk or config.seq_len) / t.step_s,
        compile_s=round(compiled.compile_s, 1),
        paper_peak_gb=_paper_peak_gb(name, config, target, step),
        by_kind=dict(found.peak.by_kind),
        note="" if found.peak_bytes <= limit else f"does not fit {limit / 1e9:.0f} of {total / 1e9:.0f} GB",
    )
    return _with_limits(row, config, target.hardware, limit) if step == "train" else row


def _paper_peak_gb(name: str, config: Config, target: Target, step: Step) -> str:
    same = config.model == _PAPER_MODEL and config.batch == 1 and str(target) == "mi300x:8" and step == "train"
    return _PAPER_PEAKS.get((name, config.seq_len), "") if same else ""


def _with_limits(row: Row, config: Config, hardware: Hardware, limit: float) -> Row:
    """Adds to a row the closed-form estimate of peak memory, and the largest sizes that fit into `limit` bytes."""
    layout, sizes = get_layout(config.layout), parse_sizes(config.mesh)
    replicas = num_ranks(layout.batch, sizes)

    def predicted(seq_len: int, batch: int) -> float:
        changed = dataclasses.replace(config, seq_len=seq_len, batch=batch * replicas)
        return sum(step_memory(as_stored(changed, hardware, sizes), layout, sizes).values())

    per_replica = config.batch // replicas
    predicted_bytes = predicted(config.seq_len, per_replica)
    scale = (row.peak_bytes or predicted_bytes) / predicted_bytes
    length = 16384 * _largest(lambda n: scale * predicted(16384 * n, per_replica) <= limit)
    batch = _largest(lambda n: scale * predicted(config.seq_len, n) <= limit)
    return dataclasses.replace(row, predicted_bytes=predicted_bytes, largest_seq_len=length, largest_batch=batch)


def _largest(fits: Callable[[int], bool]) -> int:
    """Returns the largest n for which fits(n) is true, or 0 if there is none; fits(n) must imply fits(n - 1)."""
    high = 1
    while fits(high) and high < 1 << 20:
        high *= 2
    return bisect.bisect_left(range(high), True, lo=high // 2 + 1, key=lambda n: not fits(n)) - 1


def rows_json(rows: Sequence[Row], facts: dict[str, Any]) -> dict[str, Any]:
    """All rows and the facts that they share, as plain numbers and strings."""
    return {**facts, "rows": [dataclasses.asdict(row) for row in rows]}


def write_json(rows: Sequence[Row], facts: dict[str, Any], path: Path) -> None:
    """Writes all rows and the facts that they share."""
    path.write_text(json.dumps(rows_json(rows, facts), indent=1) + "\n")


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Writes a line for each row."""
    fields = [field.name for field in dataclasses.fields(Row) if field.name not in ("by_kind", "scenario_steps_s")]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(dataclasses.asdict(row) for row in rows)
