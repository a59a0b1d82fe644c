"""How parameters are stored on a mesh: padded, and converted to and from their logical form.

The logical shape of a parameter has real heads, ffn columns or tokens alone, and is the same under every layout; in the
stored shape they are padded, so that every rank of one mesh holds equally many. Dims: H head, D model.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from tsp_jax.heads import Heads
from tsp_jax.layout import num_ranks


@dataclasses.dataclass(frozen=True)
class HeadPadding:
    """Pads the rows of a projection over heads from the logical to the stored shape, and back."""

    heads: Heads
    queries: bool
    """whether the rows belong to query heads; else to KV heads"""

    @property
    def padded(self) -> bool:
        """Whether the logical and the stored shape differ."""
        return self.heads.padded

    def _by_head(self, rows: jax.Array, kv: int, group: int) -> jax.Array:
        """[..., rows, D] -> [..., kv, group, H, D]."""
        return rows.reshape(*rows.shape[:-2], kv, group if self.queries else 1, self.heads.dim, rows.shape[-1])

    def pad(self, rows: jax.Array) -> jax.Array:
        """[..., logical rows, D] -> [..., stored rows, D], with zeros for padded heads."""
        heads = self.heads
        by_head = self._by_head(rows, heads.num_kv_heads, heads.real_group)
        more = (heads.kv - heads.num_kv_heads, heads.group - heads.real_group if self.queries else 0)
        widths = [(0, 0)] * (by_head.ndim - 4) + [(0, more[0]), (0, more[1]), (0, 0), (0, 0)]
        return jnp.pad(by_head, widths).reshape(*rows.shape[:-2], -1, rows.shape[-1])

    def unpad(self, rows: jax.Array) -> jax.Array:
        """[..., stored rows, D] -> [..., logical rows, D]."""
        heads = self.heads
        by_head = self._by_head(rows, heads.kv, heads.group)[..., : heads.num_kv_heads, : heads.real_group, :, :]
        return by_head.reshape(*rows.shape[:-2], -1, rows.shape[-1])


LARGEST_MULTIPLE = 64
"""rows of a rank are padded to a multiple of a power of two, at most this, so that buckets of many sizes divide them"""


@dataclasses.dataclass(frozen=True)
class RowPadding:
    """Pads the rows of a weight that are independent (ffn columns, tokens of a vocabulary): zeros after the last."""

    rows: int
    """logical rows"""
    stored: int
    """stored rows, those of all ranks together"""

    @classmethod
    def over(cls, rows: int, ranks: int) -> "RowPadding":
        """The padding of so many rows over so many ranks; none if they divide.

        A rank holds ceil(rows / ranks) rows, rounded up to a multiple of the largest power of two, up to
        `LARGEST_MULTIPLE`, that adds less than 1 %.
        """
        if rows % ranks == 0:
            return cls(rows, rows)
        fewest, multiple = -(-rows // ranks), LARGEST_MULTIPLE
        while -fewest % multiple * 100 >= fewest:
            multiple //= 2
        return cls(rows, ranks * (fewest + -fewest % multiple))

    @property
    def padded(self) -> bool:
        """Whether the logical and the stored shape differ."""
        return self.stored > self.rows

    def pad(self, rows: jax.Array) -> jax.Array:
        """[..., logical rows, D] -> [..., stored rows, D]."""
        widths = [(0, 0)] * (rows.ndim - 2) + [(0, self.stored - self.rows), (0, 0)]
        return jnp.pad(rows, widths) if self.padded else rows

    def unpad(self, rows: jax.Array) -> jax.Array:
        """[..., stored rows, D] -> [..., logical rows, D]."""
        return rows[..., : self.rows, :] if self.padded else rows


class NoPadding:
    """For arrays whose stored shape is the logical one under every layout, such as scales of norms."""

    padded = False

    def pad(self, array: jax.Array) -> jax.Array:
        """The array itself."""
        return array

    unpad = pad


Padding = HeadPadding | RowPadding | NoPadding


def paddings(state: nnx.State) -> dict:
    """For each parameter, the object that converts between its logical and its stored shape."""

    def padding(param: nnx.Variable) -> Padding:
        return param.get_metadata().get("padding") or NoPadding()

    return nnx.to_pure_dict(
        jax.tree.map(lambda param: param.replace(padding(param)), state, is_leaf=lambda x: isinstance(x, nnx.Variable))
    )


def to_logical(paddings: Any, stored: Any) -> Any:
    """Global logical arrays of parameters, or of a tree like them: without padding, the same under every layout."""
    return jax.tree.map(lambda padding, array: padding.unpad(array), paddings, stored)


def to_stored(paddings: Any, logical: Any) -> Any:
    """Inverse of `to_logical`; padding is zero."""
    return jax.tree.map(lambda padding, array: padding.pad(array), paddings, logical)


def abstract_logical(paddings: Any, stored: Any) -> Any:
    """Shapes of logical arrays, sharded as the stored arrays as far as mesh axes divide their dims.

    A mesh axis that does not divide a logical dim shards another dim of the array, the last one that it divides. If it
    divides none, every rank of the axis holds the whole array. So on 7 ranks, say, which seldom divide D, a device that
    saves or restores a checkpoint holds all rows of each padded weight and of its moments for that time.

    `stored`: arrays on a mesh, or ShapeDtypeStructs with shardings.
    """

    def abstract(padding: Any, array: Any) -> jax.ShapeDtypeStruct:
        shape, sharding = jax.eval_shape(padding.unpad, array).shape, array.sharding
        if shape != array.shape:
            sharding = NamedSharding(sharding.mesh, _dividing_spec(shape, sharding))
        return jax.ShapeDtypeStruct(shape, array.dtype, sharding=sharding)

    return jax.tree.map(abstract, paddings, stored)


def _dividing_spec(shape: tuple[int, ...], sharding: NamedSharding) -> PartitionSpec:
    """The axes of a sharding, each on its own dim if it divides that, or on the last dim that it divides, if any."""
    sizes, names = sharding.mesh.shape, [(n,) if isinstance(n, str) else n or () for n in sharding.spec]
    used: list[tuple[str, ...]] = [()] * len(shape)
    for own, axis in ((dim, axis) for dim, axes in enumerate(names) for axis in axes):
        for dim in (own, *reversed(range(len(shape)))):
            if shape[dim] % num_ranks((*used[dim], axis), sizes) == 0:
                used[dim] += (axis,)
                break
    return PartitionSpec(*(axes or None for axes in used))


def logical_params(state: nnx.State) -> dict:
    """Global logical arrays of a model's parameters."""
    return to_logical(paddings(state), nnx.to_pure_dict(state))
