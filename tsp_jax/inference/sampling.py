"""The next token from logits: pure functions of logits and keys.

Dims: B batch, V vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from tsp_jax.errors import ConfigError

LEAST_TEMPERATURE = 1e-6
"""below this, logits over temperature may leave the range of float32"""
MAX_SEED = 2**32 - 1
"""largest seed: JAX takes 32 bits of a seed and drops the rest"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn; greedy by default. Temperature is applied first, then top-k, then top-p."""

    temperature: float = 0.0
    """logits are divided by this; 0: the likeliest token (greedy)"""
    top_k: int = 0
    """draw from this many likeliest tokens; 0: from all"""
    top_p: float = 1.0
    """draw from the smallest set of likeliest tokens whose probabilities sum to at least this"""
    seed: int = 0
    """the randomness of a draw depends only on this, the index of the prompt and the position"""

    def __post_init__(self):
        for name, least, most in (
            ("temperature", LEAST_TEMPERATURE, 1e6),
            ("top_k", 1, 2**31 - 1),
            ("seed", 1, MAX_SEED),
        ):
            value = getattr(self, name)
            if value != 0 and not least <= value <= most:
                raise ConfigError(f"sampling.{name}={value} must be 0, or lie in [{least}, {most}]; use 0")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"sampling.top_p={self.top_p} must lie in (0, 1]; use 1.0")


def sample(logits_BV: jax.Array, keys_B: jax.Array, sampling: Sampling) -> jax.Array:
    """One token per row, [B] int32, drawn from float32 logits; the keys are unused if `sampling` (static) is greedy."""
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = filter_top_p(filter_top_k(logits_BV / sampling.temperature, sampling.top_k), sampling.top_p)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)


def filter_top_k(logits_BV: jax.Array, k: int) -> jax.Array:
    """Replaces logits below the k-th largest by -inf. Ties with the k-th are kept. Changes nothing if k is 0."""
    if not 0 < k < logits_BV.shape[-1]:
        return logits_BV
    least_B1 = lax.top_k(logits_BV, k)[0][:, -1:]
    return jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)


def filter_top_p(logits_BV: jax.Array, p: float) -> jax.Array:
    """Replaces the logit of a token by -inf if the tokens likelier than it together have probability p or more.

    The likeliest token is always kept.
    """
    if p >= 1:
        return logits_BV
    sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
    probs_BV = jax.nn.softmax(sorted_BV, axis=-1)
    before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV
    least_B1 = jnp.where(before_BV < p, sorted_BV, jnp.inf).min(axis=-1, keepdims=True)
    return jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)


def row_keys(seed: int, rows_B: jax.Array, positions_B: jax.Array) -> jax.Array:
    """[B] random keys, one per row. Each depends only on the seed, the row's number and the row's position."""

    def key(row: jax.Array, position: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), row), position)

    return jax.vmap(key)(rows_B, positions_B)
