"""Rotary position embedding, halves rotated against each other (the Llama and Qwen convention)."""

import jax
import jax.numpy as jnp


def rope(x_BtNH: jax.Array, positions_Bt: jax.Array, theta: float) -> jax.Array:
    """Rotates pairs (i, i + H/2) of each head by ``position * theta^(-2i/H)``.

    Args:
      x_BtNH: queries or keys, any float dtype; the rotation is computed in float32.
      positions_Bt: int32 positions, in any order.
      theta: base of the frequencies.

    Returns:
      Like `x_BtNH`.

    Source: Su et al., arXiv 2104.09864.
    """
    half = x_BtNH.shape[-1] // 2
    frequency_h = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle_Bt1h = positions_Bt[:, :, None, None].astype(jnp.float32) * frequency_h[None, None, None, :]
    sin, cos = jnp.sin(angle_Bt1h), jnp.cos(angle_Bt1h)
    first, second = jnp.split(x_BtNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BtNH.dtype)
