"""What fits: longest contexts, the error of a model that fits nowhere, numbers of devices."""

import dataclasses
import itertools
import math

import pytest

from tests.builders.plans import closed_form
from tests.builders.steps import CONFIG, CPU
from tsp_jax.cost.memory import step_memory
from tsp_jax.hardware.targets import parse_target
from tsp_jax.layout import get_layout
from tsp_jax.mesh import parse_sizes
from tsp_jax.plan.limits import (
    PAYS,
    Count,
    device_counts,
    largest_that_pays,
    longest_contexts,
    nothing_fits,
    numbers_of_devices,
    speedup,
)
from tsp_jax.plan.search import Candidate, Search, price
from tsp_jax.plan.space import Choice, choices

FULL = frozenset({"remat", "stream.bucket_mib"})
LONG = dataclasses.replace(CONFIG, seq_len=1024, remat="full")
LIMIT = 20e6


def peak(config, choice, seq_len: int) -> float:
    changed = choice.apply(dataclasses.replace(config, seq_len=seq_len))
    sizes = parse_sizes(choice.mesh)
    layout = get_layout(choice.layout).without([name for name, size in sizes.items() if size == 1])
    return sum(step_memory(changed, layout, sizes).values())


def test_the_longest_context_fits_and_the_next_does_not():
    found = price(LONG, CPU, choices(LONG, 8, FULL))
    longest = longest_contexts(LONG, Search(found, LIMIT), CPU.hardware)
    assert {*longest} == {c.choice.layout for c in found}
    for layout, tokens in longest.items():
        of_layout = [c.choice for c in found if c.choice.layout == layout]
        assert min(peak(LONG, choice, tokens) for choice in of_layout) <= LIMIT
        assert min(peak(LONG, choice, tokens + 1024) for choice in of_layout) > LIMIT
    assert longest["tsp"] > longest["tp"] > 0


def test_a_layout_on_which_nothing_fits_has_no_context():
    search = Search(price(LONG, CPU, choices(LONG, 8, FULL)), 1e3)
    assert {*longest_contexts(LONG, search, CPU.hardware).values()} == {0}


def test_the_error_of_what_fits_nowhere_names_what_would_fit():
    target = parse_target("mi300x:8")
    config = dataclasses.replace(CONFIG, batch=1, seq_len=1 << 14, remat="none")
    candidates = price(config, target, choices(config, 8, FULL))
    limit = 0.9 * min(c.peak_bytes for c in candidates)
    line = str(nothing_fits("big", config, target, candidates, limit, 0.9, FULL))
    assert line.startswith("target=mi300x:8: big at 1 x 16384 tokens fits on no layout: the least is ")
    assert "--target mi300x:16" in line and "--seq-len 8192" in line and "no --remat" in line and "\n" not in line


def test_numbers_of_devices_are_those_that_a_target_can_have():
    assert list(numbers_of_devices(parse_target("mi300x:8").hardware))[:5] == [1, 2, 4, 8, 16]
    assert list(numbers_of_devices(parse_target("v5p:8").hardware))[:3] == [4, 8, 16]


def count(number: int, step_s: float) -> Count:
    return Count(number, Candidate(Choice.of(CONFIG), closed_form(step_s, 1.0)) if step_s else None)


def test_a_doubling_pays_down_to_half_of_the_ideal_gain():
    assert speedup(count(2, 3.0), count(4, 2.0)) == pytest.approx(PAYS)
    assert speedup(count(4, 4.0), count(16, 1.0)) == pytest.approx(2.0)  # two doublings
    assert speedup(count(1, 0.0), count(2, 2.0)) == math.inf
    assert largest_that_pays([count(1, 0.0), count(2, 8.0), count(4, 5.0), count(8, 3.4)]) == 4
    assert largest_that_pays([count(1, 8.0), count(2, 5.0)]) is None


def test_counts_go_from_the_first_that_fits_to_the_first_that_does_not_pay():
    hardware = parse_target("mi300x:8").hardware
    needed = min(c.peak_bytes for c in price(LONG, parse_target("mi300x:2"), choices(LONG, 2, FULL)))
    counts = device_counts(LONG, hardware, needed, FULL)
    assert [c.num_devices for c in counts][:2] == [1, 2]
    assert counts[0].candidate is None and counts[1].candidate is not None
    assert all(speedup(*pair) >= PAYS for pair in itertools.pairwise(counts[1:-1]))
    assert counts[-1].candidate is None or speedup(*counts[-2:]) < PAYS or counts[-1].num_devices == 1024
