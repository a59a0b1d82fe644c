"""Where the closed form of memory and a compiled program differ: part by part, with the program's buffers."""

import dataclasses
from collections.abc import Iterable, Sequence

from tsp_jax.config import Config
from tsp_jax.inspect.peak import LiveBuffer
from tsp_jax.inspect.program_report import Report
from tsp_jax.plan.estimate import Estimate

_SCOPES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("keys_values", ("gather_sequence", "scatter_sequence", "window_halos", "pallas_call", "fmha")),
    ("products", ("btd,pd->btp",)),
    ("weights", ("btp,btd->pd", "/gather/", "/scatter/", "dynamic_index_in_dim)/dynamic_slice")),
)
"""part -> parts of the scopes of its buffers; the first that fits counts"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """One part of the peak."""

    part: str
    """as in `tsp_jax.cost.memory.step_memory`"""
    closed_form: float
    """bytes"""
    compiled: float
    """bytes of the buffers of the program that belong to it"""
    buffers: tuple[LiveBuffer, ...]
    """these buffers, the largest first"""

    def __str__(self) -> str:
        more, name = self.compiled - self.closed_form, self.part
        text = f"{name}: {self.closed_form / 1e9:.3f} GB by the closed form, {self.compiled / 1e9:.3f} compiled"
        shown = ", ".join(f"{b.dtype}{list(b.shape)} of {_short(b.scope)}" for b in self.buffers[:3])
        return f"{text} ({more / 1e9:+.3f}): {shown}" if shown else f"{text} ({more / 1e9:+.3f})"


def explain(estimate: Estimate, report: Report) -> list[Difference]:
    """The parts of the peak, the largest difference first.

    The closed form is that of the moment at which the program has its peak, if its scope tells. A buffer belongs to a
    part by its kind and by the scope of what makes it. Buffers of layers hold both residuals and gradients of layers,
    so these two parts count as one, `residuals`.

    Args:
      estimate: closed form of a training step.
      report: of the same step, compiled.

    Raises:
      ConfigError: the program is not scheduled.
    """
    found: dict[str, list[LiveBuffer]] = {}
    at = f"{report.peak.at}/".replace("/queries", "/keys_values").replace("attention/keys_values", "projections")
    for buffer in report.peak.buffers:
        found.setdefault(_part(buffer, estimate.config), []).append(buffer)
    closed = dict(next((parts for name, parts in estimate.moments.items() if f"tsp/{name}/" in at), estimate.memory))
    closed["residuals"] = closed.get("residuals", 0.0) + closed.pop("gradients", 0.0)
    differences = [
        Difference(part=part, closed_form=closed.get(part, 0.0), compiled=_bytes(buffers), buffers=tuple(buffers))
        for part in dict.fromkeys([*closed, *found])
        if (buffers := found.get(part, [])) or closed.get(part)
    ]
    return sorted(differences, key=lambda each: -abs(each.compiled - each.closed_form))


def _bytes(buffers: Iterable[LiveBuffer]) -> float:
    return float(sum(buffer.bytes for buffer in buffers))


def _part(buffer: LiveBuffer, config: Config) -> str:
    if buffer.kind == "state":
        return "state"
    if buffer.kind == "residual" or buffer.shape[:1] == (config.model.num_layers,):
        return "residuals"
    if "tsp/loss" in buffer.scope or "tsp/embed" in buffer.scope:
        is_table = buffer.dtype == "f32" and buffer.shape[-1:] == (config.model.d_model,)
        return "residuals" if is_table else "logits"
    return next((part for part, scopes in _SCOPES if _has(buffer.scope, scopes)), "activations")


def _has(scope: str, parts: Sequence[str]) -> bool:
    return any(part in f"{scope}/" for part in parts)


def _short(scope: str) -> str:
    """The last two parts of a scope."""
    return "/".join(scope.split("/")[-2:]) or "no scope"
