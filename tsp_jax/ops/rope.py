"""Rotary position embedding, halves rotated against each other (the Llama and Qwen convention)."""

import math

import jax
import jax.numpy as jnp

from tsp_jax.config import RopeScaling

NO_SCALING = RopeScaling()


def rope(x_BtNH: jax.Array, positions_Bt: jax.Array, theta: float, scaling: RopeScaling = NO_SCALING) -> jax.Array:
    """Rotates pairs (i, i + H/2) of each head by ``position * frequency_i``.

    Args:
      x_BtNH: queries or keys, any float dtype; the rotation is computed in float32.
      positions_Bt: int32 positions, in any order.
      theta: base of the frequencies.
      scaling: of the frequencies.

    Returns:
      Like `x_BtNH`.

    Source: Su et al., arXiv 2104.09864.
    """
    frequency_h = frequencies(x_BtNH.shape[-1], theta, scaling)
    angle_Bt1h = positions_Bt[:, :, None, None].astype(jnp.float32) * frequency_h[None, None, None, :]
    sin, cos = jnp.sin(angle_Bt1h), jnp.cos(angle_Bt1h)
    first, second = jnp.split(x_BtNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BtNH.dtype)


def frequencies(head_dim: int, theta: float, scaling: RopeScaling = NO_SCALING) -> jax.Array:
    """``theta^(-2i/H)`` radians a token, [H/2] float32, scaled.

    Llama 3 keeps a share ``s`` of each frequency and divides the rest by the factor; ``s`` goes from 0 to 1 as the
    turns that the frequency makes in the original context go from the low to the high bound.
    """
    half = head_dim // 2
    frequency_h = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if scaling.kind == "linear":
        return frequency_h / scaling.factor
    if scaling.kind == "llama3":
        turns_h = frequency_h * (scaling.original_context / (2 * math.pi))
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept_h = jnp.clip((turns_h - low) / (high - low), 0.0, 1.0)
        return frequency_h * (kept_h + (1.0 - kept_h) / scaling.factor)
    return frequency_h
