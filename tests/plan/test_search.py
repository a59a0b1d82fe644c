"""The search with compilers that are functions: what it finds, what it compiles, and where it stops."""

import dataclasses
import math
import zlib

import pytest

from tests.builders.plans import closed_form, compiled_row
from tests.builders.steps import CONFIG
from tsp_jax.plan.compiled import Refused
from tsp_jax.plan.search import ROUND, Candidate, Search, pareto
from tsp_jax.plan.space import Choice, choices

BATCHED = dataclasses.replace(CONFIG, batch=8)
CHOICES = choices(BATCHED, 8, frozenset({"accumulate"}))
GB = 1e9


def wrong_by(choice: Choice, share: float) -> float:
    """A factor between 1 - share and 1 + share that depends on layout, mesh and remat, and a little on the rest."""

    def unit(text: str) -> float:
        return zlib.crc32(text.encode()) / 2**31 - 1

    return (1 + share * unit(f"{choice.where} {choice.remat}")) * (1 + 0.01 * unit(choice.text()))


def true_figures(choice: Choice) -> tuple[float, float]:
    """(seconds, bytes) of a compiled step: a bucket size of its own is best for each layout."""
    cost = zlib.crc32(choice.where.encode()) % 7 / 10
    best_bucket = 32 * 2 ** (zlib.crc32(choice.layout.encode()) % 4)
    recomputed = {"none": 0.0, "full": 0.3, "save_attention": 0.1, "offload": 0.32, "offload_attention": 0.12}
    kept = {"none": 90, "full": 15, "save_attention": 25, "offload": 8, "offload_attention": 10}
    buckets = 0.03 * abs(math.log2(choice.bucket_mib / best_bucket)) + 0.05 * (choice.accumulate - 1)
    return 10 * (1 + cost + recomputed[choice.remat] + buckets), kept[choice.remat] * GB + choice.bucket_mib * 1e7


@pytest.fixture
def candidates():
    """Closed forms that are wrong by up to 5 %."""
    found = []
    for choice in CHOICES:
        step, peak = true_figures(choice)
        found.append(Candidate(choice, closed_form(step * wrong_by(choice, 0.04), peak * wrong_by(choice, 0.04))))
    return found


class Compiler:
    """Compiles by `true_figures`; the layouts in `broken` do not compile."""

    def __init__(self, broken: tuple[str, ...] = ()):
        self.jobs, self.rounds, self.broken = [], 0, broken

    def __call__(self, jobs):
        self.rounds += 1
        self.jobs += [Choice.of(job.config) for job in jobs]
        return [self.row(Choice.of(job.config)) for job in jobs]

    def row(self, choice: Choice):
        return Refused("broken") if choice.layout in self.broken else compiled_row(*true_figures(choice))


def best_step(limit: float, without: tuple[str, ...] = ()) -> float:
    steps = [true_figures(c)[0] for c in CHOICES if c.layout not in without and true_figures(c)[1] <= limit]
    return min(steps)


@pytest.mark.parametrize("limit", [200 * GB, 40 * GB, 12 * GB])
def test_the_best_of_twelve_is_near_the_best_of_all(candidates, limit):
    compiler = Compiler()
    search = Search(candidates, limit)
    search.run(BATCHED, compiler, compilations=12)
    best = search.best()
    assert best is not None and best.compiled is not None
    assert best.compiled.peak_bytes <= limit
    assert best.compiled.step_s <= 1.01 * best_step(limit)
    assert len(compiler.jobs) == len(set(compiler.jobs)) <= 12


def test_the_first_round_has_a_step_of_each_of_several_layouts(candidates):
    compiler = Compiler()
    Search(candidates, 200 * GB).run(BATCHED, compiler, compilations=ROUND)
    assert len({choice.layout for choice in compiler.jobs}) == ROUND


def test_a_search_whose_bounds_end_it_compiles_no_more_steps_than_it_needs(candidates):
    one = [c for c in candidates if c.choice.where == "tsp data=1,tsp=8" and c.choice.remat == "full"]
    compiler = Compiler()
    search = Search(one, 200 * GB)
    search.run(BATCHED, compiler, compilations=1000)
    assert len(compiler.jobs) < len(one) and not search.stopped


def test_what_does_not_compile_is_noted_and_not_chosen(candidates):
    broken = min(candidates, key=lambda c: c.estimate.step_s).choice.layout
    search = Search(candidates, 200 * GB)
    search.run(BATCHED, Compiler((broken,)), compilations=16)
    best = search.best()
    assert best is not None and best.choice.layout != broken
    assert {c.note for c in candidates if c.choice.layout == broken} == {"", "broken"}


def test_a_step_that_compiles_to_more_than_fits_is_not_the_best(candidates):
    """Its closed form fits."""
    candidate = candidates[0]
    candidate.estimate = closed_form(1.0, 10 * GB)
    search = Search([candidate], 12 * GB)
    search.run(BATCHED, lambda jobs: [compiled_row(1.0, 14 * GB)], compilations=1)
    assert search.best() is None
    assert candidate.note == "does not fit: 2.0 GB more than the 12.0 GB to be filled"


def test_least_memory_is_found(candidates):
    search = Search(candidates, 200 * GB, "memory")
    search.run(BATCHED, Compiler(), compilations=16)
    best = search.best()
    assert best is not None and best.peak_bytes <= 1.02 * min(true_figures(c)[1] for c in CHOICES)


def test_some_of_the_budget_goes_to_less_memory(candidates):
    search = Search(candidates, 200 * GB)
    search.run(BATCHED, Compiler(), compilations=12)
    best = search.best()
    assert best is not None
    assert min(c.peak_bytes for c in search.compiled()) < 0.5 * best.peak_bytes


def test_no_round_starts_that_would_end_too_late(candidates):
    now = [0.0]
    compiler = Compiler()

    def compile(jobs):
        now[0] += 40
        return compiler(jobs)

    search = Search(candidates, 200 * GB)
    search.run(BATCHED, compile, compilations=1000, seconds=100, clock=lambda: now[0])
    assert compiler.rounds == 2
    assert search.stopped == "the search stopped after 8 compilations: 100 s are over"


def test_a_spent_budget_is_said(candidates):
    search = Search(candidates, 200 * GB)
    search.run(BATCHED, Compiler(), compilations=4)
    assert search.stopped == "the search stopped after 4 compilations; more may find a faster step"


def test_the_same_search_twice_compiles_the_same(candidates):
    fresh = [dataclasses.replace(c) for c in candidates]
    first, second = Compiler(), Compiler()
    Search(candidates, 40 * GB).run(BATCHED, first, compilations=12)
    Search(fresh, 40 * GB).run(BATCHED, second, compilations=12)
    assert first.jobs == second.jobs


def test_a_front_has_no_point_that_another_beats():
    points = [(1.0, 9.0), (2.0, 9.0), (2.0, 5.0), (3.0, 5.0), (4.0, 1.0), (5.0, 2.0), (1.0, 9.0)]
    assert pareto(points) == [0, 2, 4]
