"""To which part of the closed form of memory each buffer at a program's peak belongs."""

from collections.abc import Sequence

from tsp_jax.config import Config
from tsp_jax.inspect.peak import LiveBuffer, Peak

SHOWN = 3
"""largest buffers of a part that are named"""
_SCOPES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("keys_values", ("gather_sequence", "scatter_sequence", "window_halos", "pallas_call", "fmha")),
    ("products", ("btd,pd->btp",)),
    ("weights", ("btp,btd->pd", "/gather/", "/scatter/", "dynamic_index_in_dim)/dynamic_slice")),
)
"""part -> parts of the scopes of its buffers; the first that fits counts"""
_EXPERTS = "btp,btd->pd", "/gather/", "/scatter/", "/split/", "/concatenate/"
"""parts of the scopes of experts' weights and gradients, or of what fills these"""


def peak_parts(peak: Peak, config: Config) -> dict[str, tuple[int, str]]:
    """The buffers of a peak by part.

    A buffer belongs to a part by its kind and by the scope of what makes it. Buffers of layers hold both residuals and
    gradients of layers, so these two parts count as one, `residuals`.

    Args:
      peak: its buffers, the largest first.
      config: of the step.

    Returns:
      part, as in `tsp_jax.cost.memory.Parts` -> (bytes, the largest buffers in words).
    """
    found: dict[str, list[LiveBuffer]] = {}
    for buffer in peak.buffers:
        found.setdefault(_part(buffer, config), []).append(buffer)
    return {
        part: (
            sum(buffer.bytes for buffer in buffers),
            ", ".join(f"{b.dtype}{list(b.shape)} of {_short(b.scope)}" for b in buffers[:SHOWN]),
        )
        for part, buffers in found.items()
    }


def _part(buffer: LiveBuffer, config: Config) -> str:
    if buffer.kind == "state":
        return "state"
    filled = f"{buffer.scope}/{buffer.holds}/"
    if buffer.kind == "transient" and "tsp/experts/" in filled and _has(filled, _EXPERTS):
        return "weights"
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
