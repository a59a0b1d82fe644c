"""Root-mean-square norm."""

import jax
import jax.numpy as jnp
from jax import lax


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """``x / sqrt(mean(x^2) + eps) * scale`` over the last dimension.

    Args:
      x: [..., D], any float dtype; the norm is computed in float32.
      scale: [D].
      eps: added to the mean square.

    Returns:
      [..., D] in x's dtype.

    Source: Zhang and Sennrich, arXiv 1910.07467.
    """
    x32 = x.astype(jnp.float32)
    scale = jnp.expand_dims(scale.astype(jnp.float32), tuple(range(x.ndim - 1)))
    return (x32 * lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps) * scale).astype(x.dtype)
