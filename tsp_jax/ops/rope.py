"""Rotary position embedding that pairs element i with i + H/2 (the Llama and Qwen convention).

Dims: B batch, t this device's tokens, N heads, H head, h = H/2.
"""

import math

import jax
import jax.numpy as jnp

from tsp_jax.config import RopeScaling

NO_SCALING = RopeScaling()


def rope(x_BtNH: jax.Array, positions_Bt: jax.Array, theta: float, scaling: RopeScaling = NO_SCALING) -> jax.Array:
    """Rotates the pair (i, i + H/2) of each head by ``a = position * frequency_i``.

        forward:  y_i = x_i cos(a) - x_j sin(a)    y_j = x_j cos(a) + x_i sin(a)    with j = i + H/2

    Args:
      x_BtNH: queries or keys, any float dtype; the rotation is computed in float32.
      positions_Bt: int32 positions, in any order.
      theta: base of the frequencies.
      scaling: scaling of the frequencies for longer contexts.

    Returns:
      [B, t, N, H] in x's dtype.

    Source: Su et al., arXiv 2104.09864.
    """
    frequency_h = frequencies(x_BtNH.shape[-1], theta, scaling)
    angle_Bt1h = positions_Bt[:, :, None, None].astype(jnp.float32) * frequency_h[None, None, None, :]
    sin, cos = jnp.sin(angle_Bt1h), jnp.cos(angle_Bt1h)
    first, second = jnp.split(x_BtNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BtNH.dtype)


def frequencies(head_dim: int, theta: float, scaling: RopeScaling = NO_SCALING) -> jax.Array:
    """The rotary frequencies ``theta^(-2i/H)``, scaled: radians per token, [H/2] float32.

    Llama 3 multiplies each frequency by ``s + (1 - s) / factor``. ``s`` rises from 0 to 1 as the number of rotations
    that the frequency makes in the original context rises from `low_freq_factor` to `high_freq_factor`.
    """
    half = head_dim // 2
    frequency_h = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if scaling.kind == "linear":
        return frequency_h / scaling.factor
    if scaling.kind == "llama3":
        rotations_h = frequency_h * (scaling.original_context / (2 * math.pi))
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        s_h = jnp.clip((rotations_h - low) / (high - low), 0.0, 1.0)
        return frequency_h * (s_h + (1.0 - s_h) / scaling.factor)
    return frequency_h
