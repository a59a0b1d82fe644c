"""Rates: looking up products, attention kernels and collectives, with known answers."""

import dataclasses
import itertools

import pytest

from tsp_jax.errors import ConfigError
from tsp_jax.hardware.devices import HARDWARE
from tsp_jax.hardware.links import collective_seconds
from tsp_jax.hardware.rate_tables import RATES
from tsp_jax.hardware.rates import (
    ATTENTION_KERNELS,
    Attention,
    Band,
    Collective,
    Direction,
    Product,
    Rates,
    Source,
    Work,
    exactly,
    flat_rates,
)
from tsp_jax.ops.kernels import KERNELS

TEST = Source("assumed", "a test")
FLAT = flat_rates(flops=1.0, memory=1.0, host=1.0, link=1.0, between_nodes=1.0)


def product(m: int, n: int, k: int, rate: float, dtype: str = "bfloat16") -> Product:
    return Product(m=m, n=n, k=k, flops_per_s=Band(rate / 2, rate, 2 * rate), source=TEST, dtype=dtype)


TABLE = dataclasses.replace(
    FLAT, products=(product(64, 64, 64, 4.0), product(1024, 1024, 64, 64.0), product(1024, 1024, 1024, 1024.0)), tile=8
)


@pytest.mark.parametrize(
    ("shape", "rate"),
    [
        ((1024, 1024, 1024), 1024),
        ((4096, 256, 1024), 1024),  # m n decides, not m and n
        ((8192, 8192, 8192), 1024),  # beyond the largest: as the largest
        ((1024, 1024, 64), 64),
        ((1024, 1024, 256), 256),  # between two points, far from the third: their geometric mean
        ((64, 64, 16), 1),  # a quarter of the smallest k
        ((32, 64, 64), 2),  # half of the smallest m n
        ((1024, 1021, 1024), 1024 * 1021 / 1024),  # as slow as the next multiple of a tile
    ],
)
def test_products_are_looked_up_by_shape(shape, rate):
    assert TABLE.product_flops(Work(1.0, shape), "typical") == pytest.approx(rate, rel=0.05)


def test_a_product_of_unknown_shape_is_as_fast_as_the_fastest():
    assert TABLE.seconds(Work(2048.0), "typical") == 2.0


def test_products_of_another_dtype_have_rates_of_their_own():
    both = dataclasses.replace(TABLE, products=(*TABLE.products, product(1024, 1024, 1024, 8.0, "float32")))
    work = Work(1.0, (1024, 1024, 1024), "float32")
    assert both.product_flops(work, "typical") == 8
    assert TABLE.product_flops(work, "typical") == 1024  # without a table for the dtype


def row(kernel: str, direction: Direction, head_dim: int, rate: float) -> Attention:
    return Attention(kernel=kernel, direction=direction, head_dim=head_dim, flops_per_s=exactly(rate), source=TEST)


KNOWN = dataclasses.replace(
    FLAT,
    attention=(
        row("triton", "forward", 64, 2.0), row("triton", "forward", 256, 4.0), row("cudnn", "forward", 128, 8.0),
    ),
    default_kernel="triton",
)  # fmt: skip


@pytest.mark.parametrize(
    ("kernel", "head_dim", "rate"),
    [("cudnn", 128, 8), ("cudnn", 64, 8), ("triton", 64, 2), ("triton", 80, 2), ("triton", 512, 4), ("tpu", 64, 2)],
)
def test_attention_is_looked_up_by_kernel_then_by_heads(kernel, head_dim, rate):
    work = Work(1.0, direction="forward", kernel=kernel, head_dim=head_dim)
    assert KNOWN.attention_row(work).flops_per_s.typical == rate


def test_attention_without_any_row_is_as_fast_as_products():
    assert KNOWN.seconds(Work(3.0, direction="backward", kernel="triton", head_dim=64), "typical") == 3.0


def test_a_share_for_attention_replaces_every_kernel():
    changed = KNOWN.with_attention(0.25)
    works = [Work(1.0, direction=d, kernel=k, head_dim=64) for d in ("forward", "backward") for k in ("cudnn", "")]
    assert {changed.seconds(work, "slow") for work in works} == {4.0}


def test_a_collective_has_a_fixed_cost_and_a_rate():
    line = Collective(fixed_s=Band(1.0, 2.0, 4.0), bytes_per_s=Band(5.0, 10.0, 20.0), source=TEST)
    rates = dataclasses.replace(FLAT, collectives=(("all-gather", line),))
    hardware = dataclasses.replace(HARDWARE["h100"], rates=rates)
    whole = [tuple(range(8))]
    assert collective_seconds(hardware, "all-gather", 100.0, whole) == 2 + 10
    assert collective_seconds(hardware, "all-gather", 100.0, whole, "slow") == 4 + 20
    assert collective_seconds(hardware, "all-gather", 100.0, whole, "fast") == 1 + 5
    assert collective_seconds(hardware, "collective-broadcast", 100.0, whole) == 12  # as an all-gather
    assert collective_seconds(hardware, "all-gather", 100.0, [(0,)]) == 0


def test_the_network_has_a_fixed_cost_of_its_own():
    network = Collective(fixed_s=exactly(3.0), bytes_per_s=exactly(1.0), source=TEST)
    hardware = dataclasses.replace(HARDWARE["h100"], rates=dataclasses.replace(FLAT, between_nodes=network))
    assert collective_seconds(hardware, "all-gather", 15.0, [tuple(range(16))]) == max(3 + 15 * 8 / 15 / 8, 15 - 1)
    assert collective_seconds(hardware, "collective-permute", 15.0, [(0, 8)]) == 3 + 15


def _bands(rates: Rates) -> list[tuple[Band, Source]]:
    found = [(p.flops_per_s, p.source) for p in (*rates.products, *rates.attention)]
    found += [(each.bytes_per_s, each.source) for each in (rates.memory, rates.host)]
    lines = [line for _, line in rates.collectives] + [rates.between_nodes]
    found += [(band, line.source) for line in lines for band in (line.fixed_s, line.bytes_per_s)]
    return found + [(band, rates.contention.source) for band in (rates.contention.compute, rates.contention.links)]


@pytest.mark.parametrize("rates", RATES.values(), ids=RATES)
def test_every_figure_is_a_band_with_a_source(rates):
    for band, source in _bands(rates):
        assert 0 <= band.low <= band.typical <= band.high, (band, source)
        assert source.text and (source.basis != "measured" or source.date), source


@pytest.mark.parametrize("name", [name for name in RATES if name != "cpu"])
def test_every_direction_and_head_size_of_the_default_kernel_is_known(name):
    rates = RATES[name]
    assert rates.default_kernel in KERNELS or rates.default_kernel in ATTENTION_KERNELS
    for direction, head_dim in itertools.product(("forward", "backward"), (64, 128, 256)):
        found = rates.attention_row(Work(1.0, direction=direction, kernel=rates.default_kernel, head_dim=head_dim))
        assert (found.kernel, found.head_dim) == (rates.default_kernel, head_dim)


@pytest.mark.parametrize("rates", RATES.values(), ids=RATES)
def test_a_product_is_never_slower_at_faster_rates(rates):
    for shape in [(2048, 2048, 4096), (100, 1000, 10), (1, 1, 1), (4096, 256, 512)]:
        slow, typical, fast = (rates.seconds(Work(1.0, shape), level) for level in ("slow", "typical", "fast"))
        assert slow >= typical >= fast > 0


def test_rates_know_every_kernel_of_the_table():
    assert set(KERNELS) <= set(ATTENTION_KERNELS)


@pytest.mark.parametrize(("share", "hint"), [(0.0, "use 0.6"), (1.01, "use 0.6")])
def test_a_share_out_of_range_is_refused(share, hint):
    with pytest.raises(ConfigError, match=f"attention_efficiency={share} .*{hint}"):
        FLAT.with_attention(share)
