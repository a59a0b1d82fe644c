"""Rotary position embedding that pairs element i with i + H/2 (the Llama and Qwen convention).

Dims: B batch, t this device's tokens, N heads, H head, h frequencies, by default H/2.
"""

import math

import jax
import jax.numpy as jnp

from tsp_jax.config import RopeScaling

NO_SCALING = RopeScaling()


def rope(x_BtNH: jax.Array, positions_Bt: jax.Array, theta: float, scaling: RopeScaling = NO_SCALING) -> jax.Array:
    """Rotates the pair (i, i + h) of each head by ``a = position * frequency_i``, for i < h.

        forward:  y_i = c (x_i cos(a) - x_j sin(a))    y_j = c (x_j cos(a) + x_i sin(a))    with j = i + h

    c is `attention_factor`. Elements from 2h on, where ``2h = scaling.fraction * H``, stay as they are.

    Args:
      x_BtNH: queries or keys, any float dtype; the rotation is computed in float32.
      positions_Bt: int32 positions, in any order.
      theta: base of the frequencies.
      scaling: scaling of the frequencies for longer contexts, which must not depend on the length of the sequence
        (`RopeScaling.at`).

    Returns:
      [B, t, N, H] in x's dtype.

    Source: Su et al., arXiv 2104.09864.
    """
    frequency_h = frequencies(x_BtNH.shape[-1], theta, scaling)
    angle_Bt1h = positions_Bt[:, :, None, None].astype(jnp.float32) * frequency_h[None, None, None, :]
    sin, cos = (trig(angle_Bt1h) * attention_factor(scaling) for trig in (jnp.sin, jnp.cos))
    half = frequency_h.shape[0]
    first, second, rest = jnp.split(x_BtNH.astype(jnp.float32), (half, 2 * half), axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1).astype(x_BtNH.dtype)


def attention_factor(scaling: RopeScaling) -> float:
    """c, the factor of rotated queries and of rotated keys, so that scores have the factor c^2.

    YaRN: ``1 + ln(factor) / 10``; LongRoPE: ``sqrt(1 + ln(factor) / ln(original_context))``; else 1.
    """
    if scaling.attention_factor is not None and scaling.kind in ("yarn", "longrope"):
        return scaling.attention_factor
    longer = math.log(max(scaling.factor, 1.0))
    if scaling.kind == "yarn":
        return 1.0 + 0.1 * longer
    return math.sqrt(1.0 + longer / math.log(scaling.original_context)) if scaling.kind == "longrope" else 1.0


def frequencies(head_dim: int, theta: float, scaling: RopeScaling = NO_SCALING) -> jax.Array:
    """The rotary frequencies ``theta^(-i/h)``, scaled: radians per token, [h] float32.

    h is half of the elements that are rotated. Linear scaling divides frequencies by `factor`, LongRoPE by a number for
    each. Llama 3 and YaRN multiply them by ``s + (1 - s) / factor``. In Llama 3, ``s`` rises from 0 to 1 as the number
    of rotations that the frequency makes in the original context rises from `low_freq_factor` to `high_freq_factor`.
    In YaRN, it falls from 1 to 0 as i rises from the frequency that makes `beta_fast` rotations there to the one that
    makes `beta_slow`.
    Source: YaRN, arXiv 2309.00071; LongRoPE, arXiv 2402.13753; where they leave a choice, modeling_rope_utils.py of
    transformers 5.24.
    """
    half = scaling.rotated(head_dim) // 2
    frequency_h = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if scaling.kind == "linear":
        return frequency_h / scaling.factor
    if scaling.kind == "longrope":
        assert not scaling.depends_on_length, "the length of the sequence is not known: use RopeScaling.at"
        return frequency_h / jnp.asarray(scaling.short_factors, jnp.float32)
    if scaling.kind == "llama3":
        rotations_h = frequency_h * (scaling.original_context / (2 * math.pi))
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        s_h = jnp.clip((rotations_h - low) / (high - low), 0.0, 1.0)
        return frequency_h * (s_h + (1.0 - s_h) / scaling.factor)
    if scaling.kind == "yarn":
        first, last = _yarn_range(half, theta, scaling)
        s_h = 1.0 - jnp.clip((jnp.arange(half, dtype=jnp.float32) - first) / (last - first), 0.0, 1.0)
        return frequency_h * (s_h + (1.0 - s_h) / scaling.factor)
    return frequency_h


def _yarn_range(half: int, theta: float, scaling: RopeScaling) -> tuple[float, float]:
    """The numbers of the frequencies between which YaRN interpolates, as transformers bounds them."""

    def number(rotations: float) -> float:
        return half * math.log(scaling.original_context / (2 * math.pi * rotations)) / math.log(theta)

    first, last = number(scaling.beta_fast), number(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * half - 1)
    return first, last + 0.001 if first == last else last
