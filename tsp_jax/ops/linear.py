"""Products with weights stored [rows, D]: operands in the compute dtype, accumulation and results in float32.

Dims: B batch, t tokens, D model, p rows of a weight.
"""

import jax
import jax.numpy as jnp


def matmul_t(x_BtD: jax.Array, w_pD: jax.Array) -> jax.Array:
    """``x w^T``: [B, t, D] x [p, D] -> [B, t, p]."""
    return jnp.einsum("btd,pd->btp", x_BtD, w_pD, preferred_element_type=jnp.float32)


def matmul(x_Btp: jax.Array, w_pD: jax.Array) -> jax.Array:
    """``x w``: [B, t, p] x [p, D] -> [B, t, D]."""
    return jnp.einsum("btp,pd->btd", x_Btp, w_pD, preferred_element_type=jnp.float32)


def outer(x_Btp: jax.Array, y_BtD: jax.Array) -> jax.Array:
    """``x^T y`` over all tokens: [B, t, p] x [B, t, D] -> [p, D]."""
    return jnp.einsum("btp,btd->pd", x_Btp, y_BtD, preferred_element_type=jnp.float32)
