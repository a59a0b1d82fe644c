"""Which rows of a sharded weight are real, and which are padding that makes every rank hold equally many.

Padding holds zeros, but ops do not rely on it: other values there change no result and no gradient.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from tsp_jax.layout import Axes
from tsp_jax.ops.stream import Bucket


class RealRows(NamedTuple):
    """The first `rows` of all ranks' rows, joined in rank order, are real; the others are padding. Static."""

    rows: int
    stored: int
    """rows of all ranks, padding included"""
    axes: Axes

    @classmethod
    def of(cls, shard: jax.Array, axes: Axes, rows: int | None) -> "RealRows":
        """The real rows of a weight of which `shard` is this device's shard; all rows are real if `rows` is None."""
        ranks = axes.tensor + axes.folded
        stored = shard.shape[0] * (lax.axis_size(ranks) if ranks else 1)
        return cls(stored if rows is None else rows, stored, axes)

    @property
    def padded(self) -> bool:
        """Whether there is padding."""
        return self.rows < self.stored

    def keep(self, values: jax.Array, bucket: Bucket, otherwise: float) -> jax.Array:
        """`values` [..., rows of a bucket], one for each row, with `otherwise` in place of those of padding rows."""
        if not self.padded:
            return values
        tensor = self.axes.tensor
        first = lax.axis_index(tensor) * (self.stored // lax.axis_size(tensor)) if tensor else 0
        return jnp.where(first + bucket.rows() < self.rows, values, otherwise)
