"""How heads are stored: padded, so that every rank holds equally many.

The logical shape of a parameter has the real heads alone, and is the same under every layout; the stored shape has the
padded heads of one mesh. Dims: N query heads, K KV heads, G = N / K, H head, D model, R ranks.
"""

import dataclasses
import itertools
import math
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from tsp_jax.layout import Placement, num_ranks


class Heads(NamedTuple):
    """Attention heads, padded so that every rank holds equally many.

    Padded query head (k, g) is query head g of KV head k; real heads come first along both dimensions. In
    row-major order rank p of R holds padded query heads p n up to (p + 1) n, n = kv * group / R. If there are
    fewer padded KV heads than ranks, several ranks share a KV head.
    """

    kv: int
    """number of padded KV heads, the real ones included"""
    group: int
    """number of padded query heads per padded KV head, the real ones included"""
    num_kv_heads: int
    """K, number of real KV heads"""
    real_group: int
    """G = N / K, number of real query heads per KV head"""
    dim: int
    """H, width of a head"""

    @property
    def query(self) -> int:
        """Number of padded query heads, the real ones included."""
        return self.kv * self.group

    @property
    def padded(self) -> bool:
        """Whether there is any head that is not real."""
        return (self.kv, self.group) != (self.num_kv_heads, self.real_group)


def pad_heads(num_heads: int, num_kv_heads: int, head_dim: int, *axes: int) -> Heads:
    """The fewest padded heads that the ranks of mesh axes of these sizes, outermost first, can share evenly.

    The number of padded KV heads is a multiple of the number of ranks, or divides it. If it divides it, the
    ranks that share a KV head store equal parts of its rows. A group of ranks along inner axes has whole KV
    heads or parts of a single one.
    """
    ranks = math.prod(axes)
    groups = list(itertools.accumulate(axes, operator.mul))

    def can_share(kv: int) -> bool:
        if kv % ranks and (ranks % kv or head_dim % (ranks // kv)):
            return False
        return all(kv % count == 0 or count % kv == 0 for count in groups)

    kv = next(kv for kv in itertools.count(num_kv_heads) if can_share(kv))
    real_group = num_heads // num_kv_heads
    sharing = max(1, ranks // kv)
    group = -(-real_group // sharing) * sharing
    return Heads(kv=kv, group=group, num_kv_heads=num_kv_heads, real_group=real_group, dim=head_dim)


def padded_heads(placement: Placement, num_heads: int, num_kv_heads: int, head_dim: int) -> Heads:
    """`pad_heads` for the ranks of a placement."""
    axes = (placement.mesh.shape[name] for name in placement.layout.heads)
    return pad_heads(num_heads, num_kv_heads, head_dim, *axes)


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
