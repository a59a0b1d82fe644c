"""A hardware file: rates that somebody measured on a machine, as JSON, which replace those of a kind of device.

The file has ``format``, ``name``, ``base`` (a row of `HARDWARE`) and ``date``, and of ``products``, ``memory``,
``collectives``, ``attention`` and ``host`` what was measured. What it lacks is the base's.
"""

import dataclasses
import math
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from tsp_jax.errors import ConfigError
from tsp_jax.files import FileError, read_json
from tsp_jax.hardware.devices import HARDWARE, Hardware
from tsp_jax.hardware.rates import (
    ATTENTION_KERNELS,
    COLLECTIVES,
    Attention,
    Band,
    Collective,
    Direction,
    Memory,
    Product,
    Source,
    exactly,
)

_ADVICE = "measure it again"
_MAX_BYTES = 2**24
Positive = Annotated[float, msgspec.Meta(gt=0, le=1e30)]
Size = Annotated[int, msgspec.Meta(ge=1, le=2**40)]


class _Strict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An object of the file; a key that is not known is refused, since it may be a misspelt one."""


class _Bounds(_Strict, frozen=True, kw_only=True):
    low: Positive | None = None
    """None: as the figure itself; `high` likewise"""
    high: Positive | None = None


class _Product(_Bounds, frozen=True, kw_only=True):
    m: Size
    n: Size
    k: Size
    flops_per_s: Positive
    dtype: Literal["bfloat16", "float32"] = "bfloat16"


class _Memory(_Bounds, frozen=True, kw_only=True):
    bytes_per_s: Positive


class _Point(_Strict, frozen=True, kw_only=True):
    received_bytes: Positive
    seconds: Positive


class _Collective(_Bounds, frozen=True, kw_only=True):
    fixed_s: Annotated[float, msgspec.Meta(ge=0, le=1e3)]
    bytes_per_s: Positive
    points: tuple[_Point, ...] = ()
    """what the line was drawn through"""


class _Collectives(_Strict, frozen=True, kw_only=True, rename="kebab"):
    """A field for each of `COLLECTIVES`."""

    all_gather: _Collective | None = None
    reduce_scatter: _Collective | None = None
    all_reduce: _Collective | None = None
    all_to_all: _Collective | None = None
    collective_permute: _Collective | None = None


class _Attention(_Bounds, frozen=True, kw_only=True):
    kernel: str
    direction: Direction
    head_dim: Size
    flops_per_s: Positive


class _Host(_Strict, frozen=True, kw_only=True):
    to_host_bytes_per_s: Positive
    from_host_bytes_per_s: Positive


class _File(_Strict, frozen=True, kw_only=True):
    format: Literal[1]
    name: Annotated[str, msgspec.Meta(min_length=1, max_length=100)]
    base: str
    date: Annotated[str, msgspec.Meta(pattern=r"^\d{4}-\d{2}-\d{2}$")]
    device_kind: str = ""
    num_devices: Size = 1
    versions: dict[str, str] = {}
    products: tuple[_Product, ...] = ()
    memory: _Memory | None = None
    collectives: _Collectives = _Collectives()
    attention: tuple[_Attention, ...] = ()
    host: _Host | None = None


def read_hardware(path: str | Path) -> Hardware:
    """Reads a hardware file: its base with the rates that were measured.

    Raises:
      FileError: the file cannot be read or does not fit the schema, names something unknown, holds a rate that is not
        positive and finite, or a band that does not contain its figure. The message names the field's path.
    """
    path = str(path)
    file = read_json(path, _File, _MAX_BYTES, _ADVICE)
    if file.base not in HARDWARE:
        raise FileError(f"{path}: base={file.base:.80} is unknown; use one of {', '.join(HARDWARE)}")
    base = HARDWARE[file.base]
    source = Source("measured", f"{file.name} ({path})", file.device_kind or file.base, file.date)
    rates, changes = base.rates, {}
    if file.products:
        changes["products"] = _products(path, file, source, rates.products)
    if file.memory:
        band = _band(path, "memory", "bytes_per_s", file.memory.bytes_per_s, file.memory)
        changes["memory"] = Memory(bytes_per_s=band, source=source)
    if file.host:
        ways = sorted((file.host.to_host_bytes_per_s, file.host.from_host_bytes_per_s))
        changes["host"] = Memory(bytes_per_s=Band(ways[0], sum(ways) / 2, ways[1]), source=source)
    if file.attention:
        changes["attention"] = _attention(path, file, source, rates.attention)
    changes["collectives"] = _collectives(path, file, source, base)
    where = f"{path}: measured on {file.name}, {file.num_devices} x {file.device_kind or file.base}, {file.date}"
    return dataclasses.replace(base, rates=dataclasses.replace(rates, origin=where, **changes))


def check_base(path: str | Path, hardware: Hardware, target: str) -> None:
    """Raises ConfigError if a hardware file's base is not the kind of device of a target."""
    name = target.partition(":")[0]
    if hardware.name != name:
        use = target.replace(name, hardware.name, 1)
        raise ConfigError(f"hardware={path} has base {hardware.name}, target={target}; use target={use}")


def _band(path: str, place: str, field: str, figure: float, bounds: _Bounds) -> Band:
    """The band of a figure; its ends must contain it."""
    low, high = bounds.low or figure, bounds.high or figure
    for name, end, fits in (("low", low, low <= figure), ("high", high, figure <= high)):
        if not fits:
            reason = f"the band does not contain {field}={figure:g}"
            raise FileError(f"{path}: {place}.{name}={end:g}: {reason}; {_ADVICE}")
    return Band(low, figure, high)


def _products(path: str, file: _File, source: Source, base: tuple[Product, ...]) -> tuple[Product, ...]:
    measured = tuple(
        Product(
            m=row.m, n=row.n, k=row.k, dtype=row.dtype, source=source,
            flops_per_s=_band(path, f"products[{number}]", "flops_per_s", row.flops_per_s, row),
        )
        for number, row in enumerate(file.products)
    )  # fmt: skip
    known = {row.dtype for row in measured}
    return measured + tuple(row for row in base if row.dtype not in known)


def _attention(path: str, file: _File, source: Source, base: tuple[Attention, ...]) -> tuple[Attention, ...]:
    measured = []
    for number, row in enumerate(file.attention):
        place = f"attention[{number}]"
        if row.kernel not in ATTENTION_KERNELS:
            known = ", ".join(ATTENTION_KERNELS)
            raise FileError(f"{path}: {place}.kernel={row.kernel:.80} is unknown; use one of {known}")
        band = _band(path, place, "flops_per_s", row.flops_per_s, row)
        measured.append(
            Attention(
                kernel=row.kernel, direction=row.direction, head_dim=row.head_dim, flops_per_s=band, source=source
            )
        )
    known = {(row.kernel, row.direction, row.head_dim) for row in measured}
    return (*measured, *(row for row in base if (row.kernel, row.direction, row.head_dim) not in known))


def _collectives(path: str, file: _File, source: Source, base: Hardware) -> tuple[tuple[str, Collective], ...]:
    """Rates over all links; those that were measured on part of a full mesh used as many links as other devices."""
    links = 1.0
    if base.links == "full_mesh" and file.num_devices > 1:
        links = max(1.0, base.num_links / (file.num_devices - 1))
    rows = dict(base.rates.collectives)
    for op in COLLECTIVES:
        if (row := getattr(file.collectives, op.replace("-", "_"))) is None:
            continue
        band = _band(path, f"collectives.{op}", "bytes_per_s", row.bytes_per_s, row)
        factor = 1.0 if op == "collective-permute" else links
        rows[op] = Collective(
            fixed_s=exactly(row.fixed_s), bytes_per_s=band if math.isclose(factor, 1) else band.times(factor),
            source=source,
        )  # fmt: skip
    return tuple(rows.items())
