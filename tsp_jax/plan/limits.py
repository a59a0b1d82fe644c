"""What fits: the longest context of each layout, what is missing where nothing fits, and how many devices are enough.

All by closed forms, which are scaled to compiled steps where there are some.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from tsp_jax.config import Config, Remat
from tsp_jax.cost.memory import step_memory
from tsp_jax.errors import ConfigError
from tsp_jax.hardware.devices import HARDWARE, MOST_CPU_DEVICES, TPU_TOPOLOGIES, Hardware
from tsp_jax.hardware.targets import Target
from tsp_jax.layout import get_layout, num_ranks
from tsp_jax.mesh import parse_sizes
from tsp_jax.plan.budget import usable_bytes
from tsp_jax.plan.estimate import as_stored
from tsp_jax.plan.search import Candidate, Search, price
from tsp_jax.plan.space import Choice, choices

MOST_SEARCHED = 1024
"""largest number of devices that `device_counts` tries"""
PAYS = 1.5
"""a doubling of devices pays if a step becomes at least this many times faster: half of the ideal gain"""
_LEAN: tuple[Remat, ...] = ("none", "save_attention", "full", "offload_attention", "offload")
"""remat policies, those that keep less on the device last"""
_LONGEST = 1 << 30
"""tokens; no context is searched beyond"""


class Count(NamedTuple):
    """The best closed form for one number of devices."""

    num_devices: int
    candidate: Candidate | None
    """the fastest that fits; None if none does"""

    def device_seconds(self) -> float:
        """Of a step; infinite if none fits."""
        return self.num_devices * self.candidate.step_s if self.candidate else math.inf


def longest_contexts(config: Config, search: Search, hardware: Hardware, *, offload: bool = False) -> dict[str, int]:
    """Layout -> tokens of the longest sequence that fits, whatever else is chosen; 0 if none does.

    Lengths are multiples of 16,384 tokens (of 1,024 where the configuration has fewer than 16,384).

    Args:
      config: what all candidates share.
      search: its candidates and limit.
      hardware: the devices.
      offload: also with what backward needs in the host's memory, which is taken to be large enough.
    """
    least: dict[str, dict[str, tuple[float, Candidate]]] = {}
    for candidate in search.candidates:
        if candidate.choice.remat.startswith("offload") and not offload:
            continue
        peak = search.predicted(candidate)[2]
        of_layout = least.setdefault(candidate.choice.layout, {})
        if candidate.choice.where not in of_layout or peak < of_layout[candidate.choice.where][0]:
            of_layout[candidate.choice.where] = peak, candidate
    return {
        layout: max(
            _longest(config, c, hardware, peak / c.estimate.peak_bytes, search.limit_bytes) for peak, c in some.values()
        )
        for layout, some in least.items()
    }


def _longest(config: Config, candidate: Candidate, hardware: Hardware, scale: float, limit_bytes: float) -> int:
    choice = candidate.choice
    ranks = num_ranks(get_layout(choice.layout).sequence, parse_sizes(choice.mesh))
    grain = math.lcm(16384 if config.seq_len >= 16384 else 1024, 2 * ranks)

    def fits(count: int) -> bool:
        try:
            changed = dataclasses.replace(config, seq_len=count * grain, seq_len_schedule="")
        except ConfigError:  # more than any target holds
            return False
        return scale * _peak(changed, choice, hardware) <= limit_bytes

    high = 1
    while high * grain < _LONGEST and fits(high):
        high *= 2
    low = high // 2  # fits, or is 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * grain


def numbers_of_devices(hardware: Hardware) -> Iterator[int]:
    """Numbers of devices to try: powers of two, or the slices that a TPU has."""
    if hardware.platform == "tpu":
        yield from sorted(number for number in TPU_TOPOLOGIES[hardware.name] if number <= MOST_SEARCHED)
        return
    most = MOST_CPU_DEVICES if hardware.platform == "cpu" else MOST_SEARCHED
    yield from (1 << k for k in range(most.bit_length()) if 1 << k <= most)


def device_counts(
    config: Config, hardware: Hardware, limit_bytes: float, fixed: frozenset[str] = frozenset(), narrow: bool = False
) -> list[Count]:
    """The best closed form for growing numbers of devices, up to the first doubling that does not pay (`PAYS`).

    The tokens of a step stay as they are. Buckets have the configuration's size.
    """
    counts: list[Count] = []
    for number in numbers_of_devices(hardware):
        counts.append(Count(number, _fastest(config, Target(hardware, number), limit_bytes, fixed, narrow)))
        if len(counts) > 1 and speedup(*counts[-2:]) < PAYS:
            break
        if counts[-1].candidate is None and any(count.candidate for count in counts):
            break  # the tokens do not divide over so many
    return counts


def speedup(fewer: Count, more: Count) -> float:
    """How many times faster a step is, were the second number twice the first; infinite if one of them has no step."""
    if fewer.candidate is None or more.candidate is None:
        return math.inf
    doublings = math.log2(more.num_devices / fewer.num_devices)
    return (fewer.candidate.step_s / more.candidate.step_s) ** (1 / doublings)


def _fastest(
    config: Config, target: Target, limit_bytes: float, fixed: frozenset[str], narrow: bool
) -> Candidate | None:
    try:
        found = price(config, target, _plain(config, target.num_devices, fixed, narrow))
    except ConfigError:
        return None
    return min((c for c in found if c.peak_bytes <= limit_bytes), key=lambda c: c.step_s, default=None)


def _plain(config: Config, num_devices: int, fixed: frozenset[str], narrow: bool) -> list[Choice]:
    """Choices with buckets of the configuration's size."""
    return choices(config, num_devices, fixed | {"stream.bucket_mib"}, narrow)


def nothing_fits(
    name: str, config: Config, target: Target, candidates: Sequence[Candidate], limit_bytes: float, memory: float,
    fixed: frozenset[str] = frozenset(), narrow: bool = False,
) -> ConfigError:  # fmt: skip
    """The error of a model that does not fit: what is missing, and the nearest that fits."""
    least = min(candidates, key=lambda c: c.peak_bytes)
    parts = ", ".join(
        f"{part} {nbytes / 1e9:.1f}" for part, nbytes in sorted(least.estimate.memory.items(), key=lambda p: -p[1])
        if nbytes >= 0.05 * least.estimate.peak_bytes
    )  # fmt: skip
    use = ", or ".join(_remedies(config, target, limit_bytes, memory, fixed, narrow)) or "a smaller model"
    return ConfigError(
        f"target={target}: {name} at {config.batch} x {config.seq_len} tokens fits on no layout: the least is "
        f"{least.peak_bytes / 1e9:.1f} GB a device ({least.choice.text()}; {parts} GB), a device may fill "
        f"{limit_bytes / 1e9:.1f} GB; use {use}"
    )


def _remedies(
    config: Config, target: Target, limit_bytes: float, memory: float, fixed: frozenset[str], narrow: bool
) -> Iterator[str]:
    """The nearest that fits: more devices, shorter sequences, larger devices, what was fixed or excluded."""
    hardware = target.hardware
    for number in numbers_of_devices(hardware):
        if number > target.num_devices and _fits(config, Target(hardware, number), limit_bytes, fixed, narrow):
            yield f"--target {hardware.name}:{number}"
            break
    for shift in range(1, config.seq_len.bit_length()):
        shorter = dataclasses.replace(config, seq_len=config.seq_len >> shift, seq_len_schedule="")
        if _fits(shorter, target, limit_bytes, fixed, narrow):
            yield f"--seq-len {shorter.seq_len}"
            break
    larger = (each for each in HARDWARE.values() if each.platform == hardware.platform)
    for each in sorted(larger, key=lambda each: each.memory_bytes):
        room = usable_bytes(each, memory).usable_bytes
        if room > limit_bytes and _fits(config, Target(each, target.num_devices), room, fixed, narrow):
            yield f"--target {each.name}:{target.num_devices}"
            break
    for field in sorted(fixed & {"remat", "layout", "accumulate", "mesh"}):
        if _fits(config, target, limit_bytes, fixed - {field}, narrow):
            yield f"no --{field}"
    if not narrow and _fits(config, target, limit_bytes, fixed, True):
        yield "--narrow"


def _fits(config: Config, target: Target, limit_bytes: float, fixed: frozenset[str], narrow: bool) -> bool:
    """Whether the choice of least memory fits on some layout and mesh."""
    try:
        found = _plain(config, target.num_devices, fixed, narrow)
    except ConfigError:
        return False
    least = {choice.where: choice for choice in sorted(found, key=_leanness)}  # the leanest is the last
    return any(_peak(config, choice, target.hardware) <= limit_bytes for choice in least.values())


def _leanness(choice: Choice) -> tuple[Any, ...]:
    """Larger for choices that hold less memory on one layout and mesh."""
    narrow = (choice.moments_dtype, choice.grad_dtype).count("bfloat16")
    return _LEAN.index(choice.remat), choice.accumulate, choice.zero1, narrow


def _peak(config: Config, choice: Choice, hardware: Hardware) -> float:
    """Bytes at the peak by the closed form; infinite if no target holds the configuration."""
    sizes = parse_sizes(choice.mesh)
    layout = get_layout(choice.layout).without([name for name, size in sizes.items() if size == 1])
    try:
        return sum(step_memory(as_stored(choice.apply(config), hardware, sizes), layout, sizes).values())
    except ConfigError:
        return math.inf


def largest_that_pays(counts: Sequence[Count]) -> int | None:
    """The number of devices after which the first doubling does not pay; None if all do."""
    for fewer, more in itertools.pairwise(counts):
        if speedup(fewer, more) < PAYS:
            return fewer.num_devices
    return None
