"""Trips that the XLA attention kernel declares for its loops."""

import jax
import jax.numpy as jnp

from tsp_jax.inspect import parse
from tsp_jax.inspect.scopes import declared_trips
from tsp_jax.ops.kernels import XlaKernel, delta
from tsp_jax.ops.kernels.mask import Tokens, mean_visits


def test_attention_declares_its_visits():
    """Of all loops of the compiled program, those of forward and backward declare their trips."""
    q_len, k_len, kernel = 16, 64, XlaKernel(8, 16)
    q, k = jnp.ones((1, q_len, 2, 1, 4)), jnp.ones((1, k_len, 2, 4))
    queries, keys = (Tokens(*jnp.zeros((2, 1, n), jnp.int32)) for n in (q_len, k_len))

    def step(q, k, queries, keys):
        out, lse = kernel.attend(q, k, k, queries, keys)
        return kernel.attend_backward(q, k, k, queries, keys, delta(out, out), lse, out)

    text = jax.jit(step).lower(q, k, queries, keys).compile().as_text()
    assert text
    loops = [i for i, _ in parse(text).walk() if i.opcode == "while"]
    declared = sorted(trips for i in loops if (trips := declared_trips(i)) is not None)
    assert declared == sorted(mean_visits(q_len, k_len, 8, 16)) == [1.25, 2.5]
