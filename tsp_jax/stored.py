"""How parameters are stored on a mesh: padded, and converted to and from their logical form.

The logical shape of a parameter has the real heads alone, and is the same under every layout; the stored shape has the
padded heads of one mesh. Dims: H head, D model.
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
    """Shapes of logical arrays, sharded as the stored arrays, but replicated along dims that do not divide evenly.

    `stored`: arrays on a mesh, or ShapeDtypeStructs with shardings.
    """

    def abstract(padding: Any, array: Any) -> jax.ShapeDtypeStruct:
        shape, mesh, spec = jax.eval_shape(padding.unpad, array).shape, array.sharding.mesh, list(array.sharding.spec)
        for dim, names in enumerate(spec):
            if shape[dim] % num_ranks((names,) if isinstance(names, str) else names or (), mesh.shape):
                spec[dim] = None
        return jax.ShapeDtypeStruct(shape, array.dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    return jax.tree.map(abstract, paddings, stored)


def logical_params(state: nnx.State) -> dict:
    """Global logical arrays of a model's parameters."""
    return to_logical(paddings(state), nnx.to_pure_dict(state))
