"""Where the closed form of memory and a compiled program differ: part by part, with the program's buffers."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from tsp_jax.plan.estimate import Estimate

LARGE = 0.05
"""share of its closed form by which a compiled peak must differ to be explained"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """One part of the peak."""

    part: str
    """as in `tsp_jax.cost.memory.step_memory`"""
    closed_form: float
    """bytes"""
    compiled: float
    """bytes of the buffers of the program that belong to it"""
    buffers: str
    """the largest of these buffers"""

    def __str__(self) -> str:
        text = f"{self.part}: {self.closed_form / 1e9:.3f} GB by the closed form, {self.compiled / 1e9:.3f} compiled"
        text += f" ({(self.compiled - self.closed_form) / 1e9:+.3f})"
        return f"{text}: {self.buffers}" if self.buffers else text


def explain(estimate: Estimate, at: str, parts: Mapping[str, Sequence[Any]], peak_bytes: float) -> list[Difference]:
    """The parts of the peak, the largest difference first.

    The closed form is that of the moment at which the program has its peak, if its scope tells. What the compiler
    reports beyond all buffers of the peak is a part of its own, `gaps`: buffers are placed at other times too.

    Args:
      estimate: closed form of a training step.
      at: scope of the instruction that runs at the peak of the same step, compiled.
      parts: of that peak; see `tsp_jax.plan.peak_parts.peak_parts`.
      peak_bytes: peak memory as the compiler reports it.
    """
    gaps = peak_bytes - sum(nbytes for nbytes, _ in parts.values())
    parts = {**parts, "gaps": (gaps, "memory that no buffer of the peak uses")} if gaps > 0 else parts
    at = f"{at}/".replace("/queries", "/keys_values").replace("attention/keys_values", "projections")
    closed = dict(next((parts for name, parts in estimate.moments.items() if f"tsp/{name}/" in at), estimate.memory))
    closed["residuals"] = closed.get("residuals", 0.0) + closed.pop("gradients", 0.0)
    names = [part for part in dict.fromkeys([*closed, *parts]) if closed.get(part) or part in parts]
    found = [
        Difference(part=part, closed_form=closed.get(part, 0.0), compiled=float(nbytes), buffers=buffers)
        for part in names
        for nbytes, buffers in [parts.get(part, (0, ""))]
    ]
    return sorted(found, key=lambda each: -abs(each.compiled - each.closed_form))


def differs(compiled_bytes: float, closed_bytes: float) -> bool:
    """Whether a compiled peak is so far from its closed form that a report must say why."""
    return abs(compiled_bytes - closed_bytes) > LARGE * closed_bytes
