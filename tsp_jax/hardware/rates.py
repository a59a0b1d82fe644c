"""Rates of a device: matrix products by shape, attention kernels, memory, collectives, and what they cost each other.

Every figure is a band (low, typical, high) with its source. A simulation takes all figures at one `Level`: at level
slow, rates at their low end and costs at their high end.

`tsp_jax.hardware.rate_tables` has the figures of each kind of device, `tsp_jax.hardware.rates_file` those of a file.
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import Literal, NamedTuple

from tsp_jax.errors import ConfigError

Level = Literal["slow", "typical", "fast"]
Direction = Literal["forward", "backward"]
ATTENTION_KERNELS = ("aiter", "cudnn", "tpu", "triton", "xla")
"""attention kernels that rates know: those of `tsp_jax.ops.kernels.KERNELS`, and AITER for comparison"""
COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
"""kinds of collectives with rates of their own; a collective-broadcast counts as an all-gather"""


class Scenario(NamedTuple):
    """Levels of a simulation."""

    compute: Level = "typical"
    """of products, attention and memory"""
    links: Level = "typical"
    """of collectives, of the link to the host, and of contention"""


SCENARIOS = {
    "typical rates": Scenario(),
    "slow rates": Scenario("slow", "slow"),
    "fast rates": Scenario("fast", "fast"),
    "slow links, fast computation": Scenario("fast", "slow"),
    "fast links, slow computation": Scenario("slow", "fast"),
}
"""what a report simulates: the typical case, and the corners of the rates' bands"""


class Band(NamedTuple):
    """Low end, typical value and high end of a figure."""

    low: float
    typical: float
    high: float

    def rate(self, level: Level) -> float:
        """The figure as a rate: at level slow its low end."""
        return {"slow": self.low, "typical": self.typical, "fast": self.high}[level]

    def cost(self, level: Level) -> float:
        """The figure as a cost, such as seconds: at level slow its high end."""
        return {"slow": self.high, "typical": self.typical, "fast": self.low}[level]

    def times(self, factor: float) -> "Band":
        """The band times a number."""
        return Band(self.low * factor, self.typical * factor, self.high * factor)

    def text(self, unit: float = 1.0) -> str:
        """Such as ``335 to 460 (400)``, in multiples of `unit`."""
        low, typical, high = (f"{value / unit:.3g}" for value in self)
        return typical if low == high else f"{low} to {high} ({typical})"


def exactly(value: float) -> Band:
    """A band without width."""
    return Band(value, value, value)


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """Where a figure comes from."""

    basis: Literal["measured", "assumed", "extrapolated"]
    """measured: by the named source on the named device; extrapolated: from another device, size or kernel"""
    text: str
    device: str = ""
    date: str = ""

    def __str__(self) -> str:
        where = ", ".join(filter(None, (self.device, self.date)))
        return f"{self.basis}: {self.text}" + f" ({where})" * bool(where)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """Rate of the matrix product [m, k] x [k, n]; a multiply-add is two operations."""

    m: int
    n: int
    k: int
    flops_per_s: Band
    source: Source
    dtype: str = "bfloat16"
    """of the operands"""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """Rate of an attention kernel, in operations of the matrix products that it executes (`declare_products`)."""

    kernel: str
    """one of `ATTENTION_KERNELS`; empty: any"""
    direction: Direction
    head_dim: int
    flops_per_s: Band
    source: Source


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Collective:
    """A collective takes fixed_s + received bytes / bytes_per_s.

    Within a node `bytes_per_s` is what a device receives over all its links, in a permute over one; between nodes, what
    one network card receives.
    """

    fixed_s: Band
    bytes_per_s: Band
    source: Source


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Contention:
    """Shares by which computation and communication slow each other while both run."""

    compute: Band
    """share of its rate that computation loses"""
    links: Band
    """share of its rate that communication loses"""
    source: Source


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes/s of main memory, or of the link to the host."""

    bytes_per_s: Band
    source: Source


class Work(NamedTuple):
    """Matrix products of one kernel."""

    flops: float
    shape: tuple[float, float, float] | None = None
    """(m, n, k), with a batch counted in m; None: not known"""
    dtype: str = "bfloat16"
    direction: Direction | None = None
    """of an attention kernel; None: other products"""
    kernel: str = ""
    """name of an attention kernel; grouped: products of rows grouped by expert (`GROUPED`)"""
    head_dim: int = 0


GROUPED = (
    Band(0.6, 0.75, 1.0),
    Source("measured", "0.63 to 0.99, benchmarks/experts.md; assumed of other GPUs", "H100 SXM", "2026-11-27"),
)
"""share of the rate of one product of the same size that a kernel for rows grouped by expert reaches, and its source"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rates:
    """All rates of a kind of device."""

    products: tuple[Product, ...]
    attention: tuple[Attention, ...]
    default_kernel: str
    """kernel whose rates count for programs that do not name theirs, and for kernels without rates"""
    memory: Memory
    host: Memory
    collectives: tuple[tuple[str, Collective], ...]
    """(one of `COLLECTIVES`, its rates within a node)"""
    between_nodes: Collective
    contention: Contention
    tile: int = 1
    """a dimension of a product takes the time of the next multiple of this number"""
    origin: str = ""
    """file that some of the rates come from, with its device and date; empty: the tables of this package"""

    @property
    def best_flops(self) -> Band:
        """The rate of the fastest product in the table."""
        return max((p.flops_per_s for p in self.products), key=lambda band: band.typical)

    def seconds(self, work: Work, level: Level) -> float:
        """Time of a kernel's matrix products."""
        if work.direction:
            return work.flops / self.attention_row(work).flops_per_s.rate(level)
        share = GROUPED[0].rate(level) if work.kernel == "grouped" else 1.0
        return work.flops / (share * self.product_flops(work, level))

    def product_flops(self, work: Work, level: Level) -> float:
        """Operations/s of a plain matrix product [m, k] x [k, n].

        In the table for the operands' dtype (bfloat16's, if there is none), a point at distance d in (log2 m n, log2 k)
        weighs 1 / d^4 in the geometric mean. m n and k beyond the table's largest count as the largest; below its
        smallest, the rate falls with them. A dimension that is no multiple of `tile` costs as much as the next one. In
        XLA's tables, shapes of the same m n and k differ by some 15 %.
        """
        if work.shape is None:
            return self.best_flops.rate(level)
        points = [p for p in self.products if p.dtype == work.dtype] or self.products
        m, n, k = padded = [self.tile * math.ceil(dim / self.tile) for dim in work.shape]
        factor = math.prod(dim / whole for dim, whole in zip(work.shape, padded, strict=True))
        known = [(float(p.m * p.n), float(p.k)) for p in points]
        place = []
        for size, sizes in zip((m * n, k), zip(*known, strict=True), strict=True):
            factor *= min(1.0, size / min(sizes))
            place.append(min(max(size, min(sizes)), max(sizes)))
        return factor * _interpolated(place, known, [p.flops_per_s.rate(level) for p in points])

    def attention_row(self, work: Work) -> Attention:
        """The row for an attention kernel: of its name, else of any kernel, else of `default_kernel`; nearest head."""
        rows = [row for row in self.attention if row.direction == work.direction]
        names = (work.kernel, "", self.default_kernel)
        found = next((some for name in names if (some := [row for row in rows if row.kernel == name])), rows)
        if not found:
            best = Source("assumed", "no attention kernel is known on this device: as fast as plain products")
            return Attention(
                kernel="", direction=work.direction or "forward", head_dim=0, flops_per_s=self.best_flops, source=best
            )
        return min(found, key=lambda row: abs(math.log2((row.head_dim or 128) / (work.head_dim or 128))))

    def collective(self, op: str) -> Collective:
        """The rates of a kind of collective within a node."""
        known = dict(self.collectives)
        return known.get(op) or known["all-gather"]

    def with_attention(self, efficiency: float) -> "Rates":
        """A copy whose attention kernels all reach this share of `best_flops`.

        Raises:
          ConfigError: `efficiency` is not in (0, 1].
        """
        if not 0 < efficiency <= 1:
            raise ConfigError(f"attention_efficiency={efficiency} must be above 0 and at most 1; use 0.6")
        band, source = self.best_flops.times(efficiency), Source("assumed", f"{efficiency:g} of products, as asked for")
        rows = (
            Attention(kernel="", direction=direction, head_dim=0, flops_per_s=band, source=source)
            for direction in ("forward", "backward")
        )
        return dataclasses.replace(self, attention=tuple(rows))


def _interpolated(place: Iterable[float], shapes: Iterable[Iterable[float]], rates: list[float]) -> float:
    """Geometric mean of rates, weighted by 1 / d^4; the rate of a point itself at that point."""
    squares = [sum(math.log2(x / y) ** 2 for x, y in zip(place, shape, strict=True)) for shape in shapes]
    if (nearest := min(squares)) < 1e-12 or len(rates) == 1:
        return rates[squares.index(nearest)]
    weights = [square**-2 for square in squares]
    logs = sum(weight * math.log(rate) for weight, rate in zip(weights, rates, strict=True))
    return math.exp(logs / sum(weights))


def flat_rates(
    *, flops: float, memory: float, host: float, link: float, between_nodes: float, num_links: int = 1, note: str = ""
) -> Rates:
    """Rates without band, fixed cost or contention: of placeholders and tests. `link` is the rate of one link."""
    source, free = Source("assumed", note), exactly(0.0)
    whole = Collective(fixed_s=free, bytes_per_s=exactly(link * num_links), source=source)
    single = dataclasses.replace(whole, bytes_per_s=exactly(link))
    return Rates(
        products=(Product(m=1, n=1, k=1, flops_per_s=exactly(flops), source=source),), attention=(), default_kernel="",
        memory=Memory(bytes_per_s=exactly(memory), source=source),
        host=Memory(bytes_per_s=exactly(host), source=source),
        collectives=tuple((op, single if op == "collective-permute" else whole) for op in COLLECTIVES),
        between_nodes=dataclasses.replace(whole, bytes_per_s=exactly(between_nodes)),
        contention=Contention(compute=free, links=free, source=source),
    )  # fmt: skip
