"""Rates of matrix products by shape, from XLA's own measurements and others'."""

import math
from collections.abc import Mapping, Sequence

from tsp_jax.hardware.rates import Band, Product, Source

T = 1e12
Points = Mapping[tuple[int, int, int], float]
"""(m, n, k) -> TFLOP/s"""


def _table(points: Points, single: Points, device: str, commit: str, *others: Product) -> tuple[Product, ...]:
    """Rows of XLA's table, `points` of bfloat16 and `single` of float32, and other rows.

    The band, 0.85 to 1.1 of a figure, is assumed; the table's own rows for bfloat16 and float32 results differ as much.
    """
    text = f"openxla/xla default_matmul_perf_table.txtpb, commit {commit}; band of 0.85 to 1.1 assumed"
    rows = [
        Product(
            m=m, n=n, k=k, flops_per_s=Band(0.85 * rate, rate, 1.1 * rate).times(T), dtype=dtype,
            source=Source("measured", text, device, "2026"),
        )
        for dtype, table in (("bfloat16", points), ("float32", single)) for (m, n, k), rate in table.items()
    ]  # fmt: skip
    return *rows, *_wide(points, others), *others


def _wide(points: Points, others: Sequence[Product]) -> list[Product]:
    """Rows for m = n = 8192 and small k: XLA's at 4096, faster by as much as the largest product is than 4096^3."""
    gain = others[-1].flops_per_s.typical / T / points.get((4096, 4096, 4096), math.inf)
    source = Source("extrapolated", "XLA's table at m = n = 4096, times the ratio of large products to 4096^3")
    rates = {k: gain * points[4096, 4096, k] * T for k in (256, 1024) if gain}
    return [
        Product(m=8192, n=8192, k=k, flops_per_s=Band(0.85, 1, 1.1).times(rate), source=source)
        for k, rate in rates.items()
    ]


def _large(low: float, typical: float, high: float, source: Source) -> Product:
    return Product(m=8192, n=8192, k=8192, flops_per_s=Band(low, typical, high).times(T), source=source)


MI300X = _table(
    {
        (256, 256, 256): 7.5, (256, 1024, 256): 15.2, (4096, 256, 256): 66.0, (4096, 1024, 256): 185,
        (4096, 4096, 256): 324,
        (256, 256, 1024): 29.5, (256, 1024, 1024): 75.3, (4096, 256, 1024): 125, (4096, 1024, 1024): 333,
        (4096, 4096, 1024): 495,
        (256, 256, 4096): 67.9, (256, 1024, 4096): 217, (4096, 256, 4096): 462, (2048, 1024, 4096): 325,
        (2048, 2048, 4096): 433, (4096, 2048, 4096): 489, (4096, 4096, 4096): 583,
    },
    {(4096, 256, 256): 43.7, (4096, 4096, 256): 130, (2048, 2048, 2048): 147, (4096, 4096, 4096): 235},
    "gfx942", "336bb15",
    _large(583, 620, 765, Source(
        "measured",
        "XLA's table at 4096^3 (low), SemiAnalysis (typical), hipBLASLt's 708 to 765 on large shapes (high)", "MI300X",
        "2024-12 to 2026")),
)  # fmt: skip
MI355X = _table(
    {
        (2048, 256, 256): 55.7, (4096, 256, 256): 85.8, (2048, 2048, 256): 227, (4096, 4096, 256): 495,
        (2048, 256, 1024): 125, (4096, 256, 1024): 231, (4096, 1024, 1024): 466, (4096, 4096, 1024): 970,
        (2048, 256, 4096): 486, (4096, 256, 4096): 623, (2048, 2048, 4096): 754, (4096, 2048, 4096): 1028,
        (4096, 4096, 4096): 1300,
    },
    {(4096, 256, 1024): 68.1, (4096, 4096, 256): 116, (2048, 2048, 2048): 128, (4096, 4096, 4096): 132},
    "gfx950", "8b82b7b",
    _large(1180, 1300, 1400, Source(
        "extrapolated", "XLA's table at 4096^3: 1213 with float32, 1397 with bfloat16 results", "gfx950", "2026")),
)  # fmt: skip
H100 = _table(
    {
        (2048, 256, 256): 45.3, (1024, 1024, 256): 80.9, (2048, 2048, 256): 220, (4096, 4096, 256): 399,
        (1024, 256, 1024): 69.8, (1024, 1024, 1024): 253, (2048, 2048, 1024): 498, (4096, 4096, 1024): 685,
        (1024, 256, 4096): 187, (1024, 1024, 4096): 473, (4096, 1024, 4096): 752, (4096, 4096, 4096): 780,
    },
    {(2048, 256, 256): 33.0, (1024, 1024, 1024): 117, (4096, 4096, 256): 188, (4096, 4096, 4096): 403},
    "H100", "336bb15",
    _large(619, 700, 780, Source(
        "measured",
        "this package's benchmarks/gpu_h100.md: 619 at 16384 x 4096 x 14336 (low), 697 at 8192^3, 717 at 4096^3; "
        "SemiAnalysis: 720; XLA's table at 4096^3 (high)", "H100 SXM", "2024-12 to 2026-11-26")),
)  # fmt: skip
B200 = _table(
    {
        (256, 256, 256): 6.8, (1024, 256, 256): 18.6, (4096, 256, 256): 89.2, (512, 512, 1024): 80.3,
        (4096, 256, 1024): 292, (256, 256, 4096): 53.1, (1024, 256, 4096): 206, (4096, 256, 4096): 651,
    },
    {(4096, 256, 256): 67.4, (4096, 256, 4096): 424},
    "B200", "336bb15",
    Product(
        m=2048, n=2048, k=4096, flops_per_s=Band(900, 1300, 1700).times(T),
        source=Source("extrapolated", "between 0.55 of the large products' rate and all of it", "B200", "2026"),
    ),
    _large(1400, 1640, 1800, Source("assumed", "0.62 to 0.8 of the peak, H100's shares")),
)  # fmt: skip
