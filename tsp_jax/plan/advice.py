"""Why the best choice is best, when TSP is not, and which rankings are ties. Every line states its figures."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

from tsp_jax.config import Config
from tsp_jax.errors import ConfigError
from tsp_jax.hardware.targets import Target
from tsp_jax.layout import get_layout, num_ranks
from tsp_jax.mesh import parse_sizes
from tsp_jax.plan.estimate import kernel_of, rival_kernels
from tsp_jax.plan.ranking import turns
from tsp_jax.plan.search import Candidate, price
from tsp_jax.plan.space import Choice, choices

_TERMS = {
    "compute_s": "computation", "contention_s": "contention", "exposed_comm_s": "exposed communication",
    "exposed_host_s": "exposed copies to and from the host",
}  # fmt: skip
"""field of `Compiled` -> its words; the terms add up to a step"""
CLOSE = 0.02
"""share by which a step must be longer than another to be called slower"""
SHORTEST = 1024
"""tokens; no shorter context is compared"""


def is_tsp(choice: Choice) -> bool:
    """Whether an axis that shards the sequence is folded, bucket by bucket."""
    layout, sizes = get_layout(choice.layout), parse_sizes(choice.mesh)
    folded = [name for name in layout.sequence if name in layout.axes("mlp").folded]
    return num_ranks(tuple(folded), sizes) > 1 and not layout.whole_weights


def reasons(best: Candidate, others: Sequence[Candidate]) -> list[str]:
    """Why the best candidate beats the fastest one of each other layout, at most three lines."""
    return [_against(best, other) for other in _fastest_of_layouts(best, others)[:3]]


def _fastest_of_layouts(best: Candidate, others: Sequence[Candidate]) -> list[Candidate]:
    """The fastest candidate of every layout but the best's, the fastest first."""
    found: dict[str, Candidate] = {}
    for candidate in sorted(others, key=lambda c: c.step_s):
        if candidate.choice.layout != best.choice.layout:
            found.setdefault(candidate.choice.layout, candidate)
    return list(found.values())


def _against(best: Candidate, other: Candidate) -> str:
    first, second = _terms(best), _terms(other)
    for term in {*first, *second}:  # a closed form names only what there is
        first.setdefault(term, 0.0)
        second.setdefault(term, 0.0)
    differing = max(sorted(first), key=lambda term: abs(second[term] - first[term]))
    more = "less" if first[differing] < second[differing] else "more"
    line = (
        f"{best.choice.where} takes {best.step_s:.3g} s and {best.peak_bytes / 1e9:.1f} GB, {other.choice.where} "
        f"{other.step_s:.3g} s and {other.peak_bytes / 1e9:.1f} GB: most of the difference is {more} {differing} "
        f"({first[differing]:.3g} and {second[differing]:.3g} s)"
    )
    if best.compiled and other.compiled:
        received = best.compiled.received_bytes / 1e9, other.compiled.received_bytes / 1e9
        line += "; a device receives {:.4g} and {:.4g} GB".format(*received)
    return line


def _terms(candidate: Candidate) -> dict[str, float]:
    """Term -> seconds: of the compiled step, else of the closed form."""
    if candidate.compiled:
        return {words: getattr(candidate.compiled, name) for name, words in _TERMS.items()}
    return dict(candidate.estimate.seconds)


def kernel_line(config: Config, target: Target, best: Candidate) -> str:
    """Which attention kernel the best choice runs, and what it would take with others that have rates.

    By closed forms at typical rates.
    """
    own = best.choice.apply(config)
    name = kernel_of(own, target.hardware)[0]
    rivals = rival_kernels(own, target.hardware)
    if not rivals:
        return f"attention kernel {name}: no other one with rates of its own runs these heads on {target.hardware.name}"
    steps = {
        kernel: price(config, target, [dataclasses.replace(best.choice, kernel=kernel)])[0].estimate.step_s
        for kernel in (name, *rivals)
    }
    others = ", ".join(f"{steps[kernel]:.3g} s with {kernel}" for kernel in rivals)
    return f"attention kernel {name}: {steps[name]:.3g} s a step by closed forms at the kernels' rates, {others}"


class _Row(NamedTuple):
    layout: str
    seq_len: int
    batch: int
    scenario_steps_s: dict[str, float]


def ties(config: Config, best: Candidate, others: Sequence[Candidate]) -> list[str]:
    """A line for each layout that is faster than the best one at some rates within their bands."""

    def row(candidate: Candidate) -> _Row:
        found = candidate.compiled
        return _Row(candidate.choice.where, config.seq_len, config.batch, found.scenario_steps_s if found else {})

    return [line for other in _fastest_of_layouts(best, others) for line in turns([row(best), row(other)])]


def when_not_tsp(config: Config, target: Target, best: Candidate, limit_bytes: float, fixed: frozenset[str]) -> str:
    """At which lengths another layout is faster than TSP, by closed forms, with as many tokens in a step.

    Every length has the remat policy and the bucket size of the best choice, with more sequences where they are
    shorter. Empty if the layout is fixed.
    """
    if fixed & {"layout", "mesh"}:
        return ""
    same = fixed | {"remat", "stream.bucket_mib", "accumulate"}
    config = dataclasses.replace(best.choice.apply(config), seq_len_schedule="", accumulate=1)
    lengths = [config.seq_len >> shift for shift in range(config.seq_len.bit_length())]
    found: dict[int, tuple[Candidate, Candidate]] = {}
    for length in (n for n in lengths if n >= SHORTEST or n == config.seq_len):
        changed = dataclasses.replace(config, seq_len=length, batch=config.batch * (config.seq_len // length))
        if pair := _tsp_and_other(changed, target, limit_bytes, same):
            found[length] = pair
    if not found:
        return ""
    return _describe(found, config)


def _tsp_and_other(
    config: Config, target: Target, limit_bytes: float, fixed: frozenset[str]
) -> tuple[Candidate, Candidate] | None:
    """The fastest candidate of TSP and of other layouts; None if there is one kind alone."""
    try:
        candidates = price(config, target, choices(config, target.num_devices, fixed))
    except ConfigError:
        return None
    fitting = [c for c in candidates if c.peak_bytes <= limit_bytes]
    key: Callable[[Candidate], float] = lambda c: c.estimate.step_s
    tsp = min((c for c in fitting if is_tsp(c.choice)), key=key, default=None)
    other = min((c for c in fitting if not is_tsp(c.choice)), key=key, default=None)
    return (tsp, other) if tsp and other else None


def _describe(found: dict[int, tuple[Candidate, Candidate]], config: Config) -> str:
    tokens = config.batch * config.seq_len
    slower = {length: pair for length, pair in found.items() if pair[1].step_s * (1 + CLOSE) < pair[0].step_s}
    head = f"by closed forms, with {tokens:,} tokens a step"
    if not slower:
        return f"{head}, no layout is faster than TSP by {CLOSE:.0%} from {min(found):,} to {max(found):,} tokens"
    length = max(slower)
    tsp, other = slower[length]
    times = f"{other.choice.where} {other.step_s:.3g} s, {tsp.choice.where} {tsp.step_s:.3g} s"
    upto = f"up to {length:,} tokens" if len(slower) == sum(n <= length for n in found) else f"at {length:,} tokens"
    return f"when not to use TSP: {head}, another layout is faster {upto} ({times})"
