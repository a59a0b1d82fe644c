"""How parameters are stored on a mesh: padded, and converted to and from their logical form.

The logical form of a parameter has the rows of the real heads alone, in order, and is the same under every layout. The
stored form has the rows of padded heads, in the order of the ranks of one mesh. Dims: H head, D model.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from tsp_jax.heads import HeadRows, HeadSharding
from tsp_jax.layout import num_ranks


@dataclasses.dataclass(frozen=True)
class HeadPadding:
    """Converts the rows of a projection over heads from their logical to their stored form, and back.

    Logical rows are those of the real heads, in order. Stored rows are those of the padded heads, in the order of the
    ranks that have them; see `HeadRows`.
    """

    sharding: HeadSharding
    queries: bool
    """whether the rows belong to query heads; else to KV heads"""

    @property
    def padded(self) -> bool:
        """Whether the logical and the stored form differ."""
        return self.sharding.heads.padded or not self._rows.in_order

    @property
    def _rows(self) -> HeadRows:
        return self.sharding.queries if self.queries else self.sharding.keys_values

    def _by_head(self, rows: jax.Array, kv: int, group: int) -> jax.Array:
        """[..., rows, D] -> [..., kv, group, H, D]."""
        group = group if self.queries else 1
        return rows.reshape(*rows.shape[:-2], kv, group, self.sharding.heads.dim, rows.shape[-1])

    def pad(self, rows: jax.Array) -> jax.Array:
        """[..., logical rows, D] -> [..., stored rows, D], with zeros for padding."""
        heads, stored = self.sharding.heads, self._rows
        by_head = self._by_head(rows, heads.num_kv_heads, heads.real_group)
        more = (heads.kv - heads.num_kv_heads, heads.group - heads.real_group if self.queries else 0)
        by_head = _pad_dims(by_head, (*more, 0, 0))
        by_unit = by_head.reshape(*rows.shape[:-2], -1, stored.unit * heads.dim, rows.shape[-1])
        by_unit = _pad_dims(by_unit, (stored.ranks * stored.rows_of_unit - stored.unit * heads.dim, 0))
        by_rank = by_unit.reshape(*rows.shape[:-2], -1, stored.units, stored.ranks, stored.rows_of_unit, rows.shape[-1])
        return by_rank.swapaxes(-4, -3).reshape(*rows.shape[:-2], -1, rows.shape[-1])

    def unpad(self, rows: jax.Array) -> jax.Array:
        """[..., stored rows, D] -> [..., logical rows, D]."""
        heads, stored = self.sharding.heads, self._rows
        by_rank = rows.reshape(*rows.shape[:-2], -1, stored.ranks, stored.units, stored.rows_of_unit, rows.shape[-1])
        by_unit = by_rank.swapaxes(-4, -3)
        by_unit = by_unit.reshape(*rows.shape[:-2], -1, stored.ranks * stored.rows_of_unit, rows.shape[-1])
        by_unit = by_unit[..., : stored.unit * heads.dim, :]
        by_head = self._by_head(by_unit.reshape(*rows.shape[:-2], -1, rows.shape[-1]), heads.kv, heads.group)
        by_head = by_head[..., : heads.num_kv_heads, : heads.real_group, :, :]
        return by_head.reshape(*rows.shape[:-2], -1, rows.shape[-1])


def _pad_dims(array: jax.Array, widths: tuple[int, ...]) -> jax.Array:
    """`array` with so many zeros after each of its last dims."""
    return jnp.pad(array, [(0, 0)] * (array.ndim - len(widths)) + [(0, width) for width in widths])


class NoPadding:
    """For arrays whose stored shape is the logical one: all but projections over padded heads."""

    padded = False

    def pad(self, array: jax.Array) -> jax.Array:
        """The array itself."""
        return array

    unpad = pad


def paddings(state: nnx.State) -> dict:
    """For each parameter, the object that converts between its logical and its stored shape."""

    def padding(param: nnx.Variable) -> NoPadding | HeadPadding:
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
    """Shapes of logical arrays, sharded as the stored arrays, but padded arrays by columns instead of rows.

    Converting then takes an all-to-all. Between rows of different order or number, XLA would gather all rows on every
    device. Dims that do not divide evenly are replicated. `stored`: arrays on a mesh, or ShapeDtypeStructs with
    shardings.
    """

    def abstract(padding: Any, array: Any) -> jax.ShapeDtypeStruct:
        shape, mesh, spec = jax.eval_shape(padding.unpad, array).shape, array.sharding.mesh, list(array.sharding.spec)
        if padding.padded:
            spec[-2:] = spec[-1], spec[-2]
        for dim, names in enumerate(spec):
            if shape[dim] % num_ranks((names,) if isinstance(names, str) else names or (), mesh.shape):
                spec[dim] = None
        return jax.ShapeDtypeStruct(shape, array.dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    return jax.tree.map(abstract, paddings, stored)


def logical_params(state: nnx.State) -> dict:
    """Global logical arrays of a model's parameters."""
    return to_logical(paddings(state), nnx.to_pure_dict(state))
