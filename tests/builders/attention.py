"""What tests of attention kernels share: tokens of one rank, arrays, and the plain mathematics to compare with.

Dims: B batch, T query tokens, S key tokens, K KV heads, G query heads per KV head, H head.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from tests.builders.arrays import normal, packed_batch
from tsp_jax.ops import reference
from tsp_jax.ops.kernels import Kernel, delta
from tsp_jax.ops.kernels.mask import MASKED, Scores, Tokens
from tsp_jax.ops.stream import vary_alike
from tsp_jax.training.data import sequence_order

S, H = 48, 10


class Case(NamedTuple):
    """Queries are the tokens of one rank; keys are all tokens, in the order of the ranks."""

    kv_heads: int = 3
    group: int = 2
    packed: bool = False
    ranks: int = 1
    rank: int = 0
    batch: int = 2

    def tokens(self) -> tuple[Tokens, Tokens]:
        """(queries, keys)"""
        order = sequence_order(S, self.ranks, "zigzag")
        batch = packed_batch(self.batch, S, 7)
        positions = batch.positions if self.packed else np.broadcast_to(np.arange(S, dtype=np.int32), (self.batch, S))
        segments = batch.segment_ids if self.packed else np.zeros((self.batch, S), np.int32)
        keys = Tokens(positions[:, order], segments[:, order])
        own = slice(self.rank * (S // self.ranks), (self.rank + 1) * (S // self.ranks))
        return Tokens(*(array[:, own] for array in keys)), keys

    def arrays(self) -> tuple[np.ndarray, ...]:
        """(q, k, v, dout)"""
        queries = self.batch, S // self.ranks, self.kv_heads, self.group, H
        keys = self.batch, S, self.kv_heads, H
        return normal(0, *queries, std=2.0), normal(1, *keys), normal(2, *keys), normal(3, *queries)

    def lonely_queries(self) -> tuple[Tokens, np.ndarray]:
        """(queries, every fifth of them in a segment that no key has; which these are, [B, T])."""
        queries, _ = self.tokens()
        alone = np.broadcast_to(np.arange(queries.positions.shape[1]) % 5 == 0, queries.positions.shape)
        return Tokens(queries.positions, np.where(alone, 99, queries.segments).astype(np.int32)), alone


def random_tokens(seed: int, num_segments: int, batch: int) -> tuple[Tokens, Tokens]:
    """(queries, keys) in random orders and random segments; some queries have no key."""
    rng = np.random.default_rng(seed)

    def tokens():
        positions = np.stack([rng.permutation(S) for _ in range(batch)])
        return Tokens(positions.astype(np.int32), rng.integers(0, num_segments, (batch, S), np.int32))

    return tokens(), tokens()


RULES = {
    "causal": Scores(),
    "window": Scores(window=9),
    "one key": Scores(window=1),
    "softcap": Scores(softcap=1.5),
    "scale": Scores(scale=0.7),
    "encoder": Scores(causal=False),
    "window of an encoder": Scores(causal=False, window=5),
    "all": Scores(window=11, softcap=2.0, scale=0.5),
}


def rule_of(scores: Scores) -> dict:
    """The arguments of the reference."""
    return {name: getattr(scores, name) for name in ("causal", "window", "softcap", "scale")}


def allowed_pairs(queries: Tokens, keys: Tokens, scores: Scores = Scores()) -> np.ndarray:
    """[B, T, S] bool: which pairs may attend, written apart from the kernels' own rule."""
    before = queries.positions[:, :, None] - keys.positions[:, None]
    forbidden = keys.segments[:, None] != queries.segments[:, :, None]
    if scores.causal:
        forbidden |= before < 0
    if scores.window is not None:
        forbidden |= abs(before) >= scores.window
    return ~forbidden


def run(kernel: Kernel, q, k, v, dout, queries, keys, scores=Scores()):
    """(out, lse, (dq, dk, dv))"""
    out, lse = kernel.attend(q, k, v, queries, keys, scores)
    return out, lse, kernel.attend_backward(q, k, v, queries, keys, delta(out, dout), lse, dout, scores)


jitted_run = functools.partial(jax.jit, static_argnums=(0, 7))(run)


def sharded_run(mesh: Mesh, kernel: Kernel, check_vma: bool = True):
    """`run` on each device's queries, over all keys; gradients of keys are summed over the mesh."""

    def local(*arrays):
        q, k, v, dout, *tokens = vary_alike(*arrays)
        out, lse, (dq, dk, dv) = run(kernel, q, k, v, dout, Tokens(*tokens[:2]), Tokens(*tokens[2:]))
        return out, lse, (dq, *jax.lax.psum((dk, dv), "tsp"))

    split, whole = P(None, "tsp"), P()
    specs = (split, whole, whole, split, split, split, whole, whole)
    out_specs = (split, split, (split, whole, whole))
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=out_specs, check_vma=check_vma)


@functools.partial(jax.jit, static_argnums=6)
def run_reference(q, k, v, dout, queries, keys, scores=Scores()):
    """`run` by the plain mathematics; every query must have a key."""

    def f(q, k, v):
        tokens = queries.positions, keys.positions, queries.segments, keys.segments
        return reference.softmax_attention(q, k, v, *tokens, **rule_of(scores))

    (out, lse), vjp = jax.vjp(f, q, k, v)
    return out, lse, vjp((dout, jnp.zeros_like(lse)))


@jax.jit
def run_reference_where(has_key, q, k, v, dout, queries, keys):
    """(out, (dq, dk, dv)), zero where a query has no key: the reference divides by zero there."""

    def f(q, k, v):
        scores = jnp.einsum("BTKGH,BSKH->BKGTS", q, k) / np.float32(np.sqrt(H))
        allowed = allowed_pairs(queries, keys)[:, None, None]
        weights = jax.nn.softmax(jnp.where(allowed, scores, MASKED), axis=-1)
        out = jnp.einsum("BKGTS,BSKH->BTKGH", weights, v)
        return jnp.where(has_key[:, :, None, None, None], out, 0.0)

    out, vjp = jax.vjp(f, q, k, v)
    return out, vjp(dout)


def poison(array: np.ndarray, where_t: np.ndarray) -> np.ndarray:
    """[B, T, ...] with NaN at some tokens of every row."""
    return np.where(where_t.reshape(1, -1, *(1,) * (array.ndim - 2)), np.nan, array).astype(np.float32)
