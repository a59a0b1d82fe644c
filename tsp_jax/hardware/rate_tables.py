"""Rates of each kind of device, from measurements that others published; what nobody measured is marked as assumed.

No figure is fitted to a published run of a whole step. Attention counts the operations that a kernel executes.
Published rates of backward count 5 products for each pair of query and key; a kernel that executes 7, as Triton's
tutorial and this package's do, executes 7 / 5 of that (`_seven`).
"""

import dataclasses
from collections.abc import Mapping

from tsp_jax.hardware import product_tables
from tsp_jax.hardware.rates import (
    COLLECTIVES,
    Attention,
    Band,
    Collective,
    Contention,
    Direction,
    Memory,
    Product,
    Rates,
    Source,
    flat_rates,
)

T, G, US = 1e12, 1e9, 1e-6


def _band(low: float, typical: float, high: float, unit: float) -> Band:
    return Band(low * unit, typical * unit, high * unit)


def _measured(text: str, device: str, date: str) -> Source:
    return Source("measured", text, device, date)


def _assumed(text: str) -> Source:
    return Source("assumed", text)


# ------------------------------------------------------------------------------------------------ attention


def _heads(
    kernel: str, direction: Direction, bands: Mapping[int, tuple[float, float, float]], sources: Mapping[int, Source]
) -> list[Attention]:
    """Rows by head size, TFLOP/s; sizes without a source of their own take that of size 0."""
    return [
        Attention(
            kernel=kernel, direction=direction, head_dim=head_dim, flops_per_s=_band(*band, T),
            source=sources.get(head_dim, sources[0]),
        )
        for head_dim, band in bands.items()
    ]  # fmt: skip


def _seven(low: float, typical: float, high: float) -> tuple[float, float, float]:
    """Executed TFLOP/s of a backward kernel that were counted with 5 products a pair: low as counted, others 7 / 5."""
    return low, 1.4 * typical, 1.4 * high


def _by_heads(band: tuple[float, float, float], small: float, large: float) -> dict[int, tuple[float, float, float]]:
    """Bands for heads of 64 and 256 that reach a share of the typical rate for 128, and as much less at the low end."""
    low, typical, high = band
    return {128: band} | {
        size: (0.85 * share * low, share * typical, max(share, 1.0) * high)
        for size, share in ((64, small), (256, large))
    }


_OTHER_HEADS = Source("extrapolated", "from heads of 128, lower end lowered by 0.85")
_OURS = Source(
    "measured", "this package's benchmarks/gpu_h100.md, 16 K tokens, causal, jax 0.11.2", "H100 SXM", "2026-11-26"
)
_CUDNN = Source(
    "measured", "jax.nn.dot_product_attention in benchmarks/gpu_h100.md, 16 K tokens, causal; FlashAttention-3's "
    "figures (arXiv 2407.08608) have 539 forward, causal, and 516 backward", "H100 SXM", "2026-11-26",
)  # fmt: skip
_ATTENTION_H100 = [
    *_heads("triton", "forward", {64: (314, 324, 327), 128: (378, 424, 433), 256: (451, 457, 462)}, {0: _OURS}),
    *_heads("triton", "backward", {64: (419, 428, 444), 128: (509, 522, 534), 256: (325, 327, 331)}, {0: _OURS}),
    *_heads("cudnn", "forward", {64: (409, 415, 452), 128: (529, 548, 607), 256: (605, 620, 632)}, {0: _CUDNN}),
    *_heads("cudnn", "backward", {64: (392, 414, 417), 128: (480, 514, 524), 256: (323, 349, 379)}, {0: _CUDNN}),
]  # fmt: skip
_HIPKITTENS = "figure data of HipKittens (arXiv 2511.08083), 16 K tokens, causal"
_ATTENTION_GFX950 = [
    *_heads("triton", "forward", _by_heads((750, 790, 845), 0.85, 0.8), {
        0: _OTHER_HEADS, 128: _measured(_HIPKITTENS + ": 750 to 845", "MI355X", "2025-11"),
    }),
    *_heads("triton", "backward", _by_heads(_seven(215, 233, 251), 0.85, 0.8), {
        0: _OTHER_HEADS, 128: _measured(_HIPKITTENS + ": 215 to 251 by 5 products a pair", "MI355X", "2025-11"),
    }),
    *_heads("aiter", "forward", _by_heads((1180, 1300, 1392), 0.85, 0.8), {
        0: _OTHER_HEADS, 128: _measured("ROCm/aiter op_tests/cpp/mha/README.md (high)", "MI355X", "2025-10-31"),
    }),
    *_heads("aiter", "backward", _by_heads((990, 1080, 1163), 0.85, 0.8), {
        0: _OTHER_HEADS, 128: _measured("ROCm/aiter op_tests/cpp/mha/README.md (high)", "MI355X", "2025-10-31"),
    }),
]  # fmt: skip
_ATTENTION_GFX942 = [
    *_heads("triton", "forward", _by_heads((335, 400, 460), 0.85, 0.8), {
        0: _OTHER_HEADS,
        128: Source("extrapolated", "AITER's rate over its lead of 1.18 to 1.62 on Triton", "MI300X", "2025-10"),
    }),
    *_heads("triton", "backward", _by_heads(_seven(112, 122, 155), 0.85, 0.8), {
        0: _OTHER_HEADS,
        128: Source(
            "extrapolated", "MI355X's 215 to 251 by 5 products a pair times the ratio of the peaks; high: a quarter of "
            "the rate of products", "MI355X", "2025-11",
        ),
    }),
    *_heads("aiter", "forward", _by_heads((460, 505, 542), 0.85, 0.8), {
        0: _OTHER_HEADS, 128: _measured("ROCm/aiter op_tests/cpp/mha/README.md (high)", "MI300X", "2025-10-31"),
    }),
    *_heads("aiter", "backward", _by_heads((390, 425, 458), 0.85, 0.8), {
        0: _OTHER_HEADS, 128: _measured("ROCm/aiter op_tests/cpp/mha/README.md (high)", "MI300X", "2025-10-31"),
    }),
]  # fmt: skip


_LARGE_PRODUCTS = (0.7, 0.8, 0.9)
"""shares of a TPU's peak that large matrix products reach: assumed"""
_BUSY: dict[str, dict[Direction, dict[int, float]]] = {
    "v5p": {"forward": {128: 0.88, 256: 0.99}, "backward": {128: 1.0, 256: 1.0}},
    "v7x": {"forward": {128: 0.31, 256: 0.52}, "backward": {128: 0.48, 256: 0.89}},
}
"""kind of TPU -> share of the peak that the inner loop of splash attention reaches by its schedule, by head size"""


def _tpu_attention(peak: float, schedule: str) -> list[Attention]:
    """From the peak, in TFLOP/s, and the kind of TPU whose schedule counts."""
    text = (
        f"products' shares of the peak (assumed) times the share in which {schedule}'s schedule of splash attention "
        "keeps the matrix units busy (benchmarks/tpu_attention_schedule.md); no TPU attention kernel's own rate is "
        "published"
    )
    source = {0: Source("extrapolated", text, f"{schedule}, libtpu 0.0.42.1", "2026-11")}
    low, typical, high = (products * peak for products in _LARGE_PRODUCTS)
    rows = []
    for direction, busy in _BUSY[schedule].items():
        # Heads of 64 use half of the depth of the matrix units that heads of 128 use.
        shares = {64: 0.5 * busy[128], **busy}
        rows += _heads("tpu", direction, {n: (low * x, typical * x, high * x) for n, x in shares.items()}, source)
    return rows


# ------------------------------------------------------------------------------------------------ links


def _links(gather: Collective, reduce: Collective, permute: Collective) -> tuple[tuple[str, Collective], ...]:
    """`gather` counts for all-gather, reduce-scatter and all-to-all too."""
    special = {"all-reduce": reduce, "collective-permute": permute}
    return tuple((op, special.get(op, gather)) for op in COLLECTIVES)


def _collective(fixed_us: tuple[float, float, float], gb_per_s: tuple[float, float, float], source: Source):
    return Collective(fixed_s=_band(*fixed_us, US), bytes_per_s=_band(*gb_per_s, G), source=source)


_XLA_LINKS = "line through openxla/xla default_collective_perf_table.txtpb, 1 MiB to 1 GiB"
_NICS = _collective(
    (20, 40, 100), (41, 45, 48),
    _measured("send and receive 47 to 48 GB/s a GPU, a gather of two nodes 330 to 350 GB/s a node; fixed cost assumed",
              "400 Gb/s a GPU", "before 2026-11"),
)  # fmt: skip
_LINKS_GFX942 = _links(
    _collective((12, 25, 105), (300, 330, 340), Source(
        "extrapolated", "from all-reduce: 12 to 25 us, 330 GB/s over 7 links; highest fixed cost: gfx950's in XLA's "
        "table", "MI300X", "before 2026-11")),
    _collective((12, 25, 105), (300, 330, 340), _measured(
        "RCCL, 12 to 25 us and 330 GB/s", "8 x MI300X", "before 2026-11")),
    _collective((12, 35, 40), (40, 45, 48), _measured(
        "an xGMI link 45 to 48 GB/s (AMD's ROCm blog); fixed cost of gfx950", "MI300X", "2025-03")),
)  # fmt: skip
_LINKS_GFX950 = _links(
    _collective((85, 105, 118), (400, 450, 480), _measured(_XLA_LINKS, "8 x gfx950", "2026")),
    _collective((85, 105, 118), (400, 450, 480), Source("extrapolated", "as all-gather", "8 x gfx950", "2026")),
    _collective((30, 35, 45), (58, 63, 65), _measured(_XLA_LINKS, "8 x gfx950", "2026")),
)  # fmt: skip
_LINKS_H100 = _links(
    _collective((25, 30, 45), (320, 355, 370), _measured(_XLA_LINKS, "8 x H100", "2026")),
    _collective((25, 30, 45), (320, 355, 450), Source(
        "extrapolated", "as all-gather; NVLS may do more", "8 x H100", "2026")),
    _collective((28, 32, 40), (112, 130, 145), _measured(_XLA_LINKS + ", 32 to 128 MiB", "8 x H100", "2026")),
)  # fmt: skip


def _tpu_links(link: float, number: int) -> tuple[tuple[str, Collective], ...]:
    """Links of a TPU, from the GB/s of each of `number` links."""
    source = _assumed("0.8 to 1 of the links' rate on the data sheet; 1 to 20 us, since a hop takes about 1 us")
    whole = _collective((1, 5, 20), (0.8 * link * number, 0.9 * link * number, link * number), source)
    single = _collective((1, 5, 20), (0.8 * link, 0.9 * link, link), source)
    return _links(whole, whole, single)


def _slices(network: float) -> Collective:
    """Between slices of TPUs, from the network's GB/s."""
    return _collective((20, 50, 200), (0.7 * network, 0.9 * network, network), _assumed("shares of the network's rate"))


_AMD_CONTENTION = Contention(
    compute=Band(0.0, 0.1, 0.2), links=Band(0.0, 0.2, 0.5),
    source=_assumed(
        "after DeepSpeed's ZeRO-3 step on 8 x MI300X, 10.9 % faster with gathers off the compute units (2026-05), and "
        "XLA on gfx950, which hid 8 to 50 % of the traffic that was scheduled apart (openxla/xla PR 47515, 2026-08)"
    ),
)  # fmt: skip
_NVIDIA_CONTENTION = Contention(
    compute=Band(0.0, 0.05, 0.15),
    links=Band(0.0, 0.1, 0.25),
    source=_assumed("NCCL takes some of the SMs; half of AMD's shares, no measurement known"),
)
_TPU_CONTENTION = Contention(
    compute=Band(0.0, 0.02, 0.1),
    links=Band(0.0, 0.02, 0.1),
    source=_assumed("copy engines share nothing with computation but memory; no measurement known"),
)


# ------------------------------------------------------------------------------------------------ devices


def _memory(low: float, typical: float, high: float, source: Source) -> Memory:
    return Memory(bytes_per_s=_band(low, typical, high, T), source=source)


def _host(low: float, typical: float, high: float, source: Source) -> Memory:
    return Memory(bytes_per_s=_band(low, typical, high, G), source=source)


def _tpu(
    peak: float, bandwidth: float, host: float, network: float, link: float, links: int, schedule: str = "v5p"
) -> Rates:
    """From a TPU's data sheet: peak TFLOP/s, TB/s, and GB/s of the host, of the network and of each of its links.

    `schedule`: the kind of TPU whose schedule of attention counts.
    """
    source = _assumed("shares of the peak: products 0.7 to 0.9, small ones less; memory 0.8 to 0.95")
    points = {(128, 128, 128): 0.02, (1024, 128, 128): 0.15, (1024, 1024, 128): 0.4, (1024, 1024, 1024): 0.65}
    small = [
        Product(m=m, n=n, k=k, flops_per_s=_band(0.7 * share, share, 1.2 * share, peak * T), source=source)
        for (m, n, k), share in points.items()
    ]
    large = Product(m=4096, n=4096, k=4096, flops_per_s=_band(*_LARGE_PRODUCTS, peak * T), source=source)
    return Rates(
        products=(*small, large), attention=tuple(_tpu_attention(peak, schedule)), default_kernel="tpu", tile=128,
        memory=_memory(0.8 * bandwidth, 0.9 * bandwidth, 0.95 * bandwidth, source),
        host=_host(0.6 * host, host, 1.2 * host, _assumed("PCIe to the host")), contention=_TPU_CONTENTION,
        collectives=_tpu_links(link, links), between_nodes=_slices(network),
    )  # fmt: skip


_MI300X = Rates(
    products=product_tables.MI300X, attention=tuple(_ATTENTION_GFX942),
    collectives=_LINKS_GFX942, contention=_AMD_CONTENTION,
    memory=_memory(4.0, 4.1, 4.3, _measured("copies like BabelStream's", "MI300X", "2024")),
    host=_host(50, 55, 56, _measured("copies to and from pinned memory", "MI300X", "before 2026-11")),
    default_kernel="triton", between_nodes=_NICS, tile=64,
)  # fmt: skip
_MI355X = Rates(
    products=product_tables.MI355X, attention=tuple(_ATTENTION_GFX950),
    collectives=_LINKS_GFX950, contention=_AMD_CONTENTION,
    memory=_memory(5.6, 6.2, 6.6, _assumed("the share of the peak that MI300X reaches")),
    host=_host(50, 55, 56, Source("extrapolated", "MI300X's", "MI300X", "before 2026-11")),
    default_kernel="triton", between_nodes=_NICS, tile=64,
)  # fmt: skip
_H100_RATES = Rates(
    products=product_tables.H100, attention=tuple(_ATTENTION_H100),
    collectives=_LINKS_H100, contention=_NVIDIA_CONTENTION,
    memory=_memory(2.5, 2.8, 3.0, _measured(
        "this package's benchmarks/gpu_h100.md: 2.52 read and written (low); high: 0.9 of the peak; typical between",
        "H100 SXM", "2026-11-26")),
    host=_host(51, 52, 55, _measured(
        "this package's benchmarks/gpu_h100.md: 51.3 and 52.8; high assumed", "H100 SXM", "2026-11-26")),
    default_kernel="triton", between_nodes=_NICS, tile=64,
)  # fmt: skip
_B200_RATES = dataclasses.replace(
    _H100_RATES, products=product_tables.B200, memory=_memory(6.4, 7.2, 7.6, _assumed("0.8 to 0.95 of the peak")),
    attention=tuple(
        dataclasses.replace(
            row, flops_per_s=Band(row.flops_per_s.low, 2 * row.flops_per_s.typical, 2.3 * row.flops_per_s.high),
            source=_assumed("H100's rate (low) to 2.3 times it, the ratio of the peaks (high)"),
        )
        for row in _ATTENTION_H100
    ),
    collectives=_links(*(
        _collective((20, 30, 45), rate, _assumed("H100's fixed cost; twice its rates"))
        for rate in ((600, 700, 800), (600, 700, 900), (220, 260, 520))
    )),
)  # fmt: skip

RATES = {
    "cpu": flat_rates(
        flops=5e10, memory=10e9, host=10e9, link=10e9, between_nodes=1e9,
        note="placeholders of a small host: virtual devices share one memory",
    ),
    "mi300x": _MI300X,
    "mi325x": dataclasses.replace(_MI300X, memory=_memory(4.4, 4.6, 4.9, _assumed("MI300X's share of the peak"))),
    "mi355x": _MI355X,
    "h100": _H100_RATES,
    "h200": dataclasses.replace(_H100_RATES, memory=_memory(3.9, 4.3, 4.5, _assumed("H100's share of the peak"))),
    "b200": _B200_RATES,
    "v5p": _tpu(459, 2.765, 16, 25, 100, 6),
    "v5e": _tpu(197, 0.819, 16, 3, 50, 4),
    "v6e": _tpu(918, 1.638, 50, 12, 100, 4, "v7x"),
    "v7x": _tpu(1153.5, 3.685, 25, 6, 50, 7, "v7x"),
}  # fmt: skip
"""name of a kind of device in `tsp_jax.hardware.devices.HARDWARE` -> its rates"""
