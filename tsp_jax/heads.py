"""How heads are stored: the padded heads of a mesh, and arrays between their logical and their stored shape."""

import dataclasses
import itertools
import math
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from tsp_jax.layout import Placement


class Heads(NamedTuple):
    """Slots for attention heads, padded so that every rank holds the same number.

    Slot (k, g) is query head g of KV head k; real heads stand first along both. Rank p of R holds slots
    [p, p + 1) * kv * group / R in row-major order; with fewer KV slots than ranks, several ranks share a KV head.
    """

    kv: int
    """KV slots, real and padded"""
    group: int
    """query slots of each KV slot, real and padded"""
    num_kv_heads: int
    """K, real KV heads"""
    real_group: int
    """G = N / K, real query heads of a KV head"""
    dim: int
    """H, head size"""

    @property
    def query(self) -> int:
        """Query slots."""
        return self.kv * self.group

    @property
    def padded(self) -> bool:
        """Whether any slot is not a real head."""
        return (self.kv, self.group) != (self.num_kv_heads, self.real_group)


def pad_heads(num_heads: int, num_kv_heads: int, head_dim: int, *axes: int) -> Heads:
    """Fewest head slots that the ranks of mesh axes of these sizes, outermost first, can share evenly.

    KV slots are a multiple of the ranks, or divide them (then each KV head's columns are stored in equal parts by the
    ranks that share it). No ranks that an inner axis groups use parts of several KV heads.
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
    """Rows of a projection over heads: logical (real heads only) or stored (padded slots)."""

    heads: Heads
    queries: bool
    """query slots; else KV slots"""

    @property
    def padded(self) -> bool:
        """Whether logical and stored rows differ."""
        return self.heads.padded

    def _cut(self, rows: jax.Array, kv: int, group: int) -> jax.Array:
        return rows.reshape(*rows.shape[:-2], kv, group if self.queries else 1, self.heads.dim, rows.shape[-1])

    def pad(self, rows: jax.Array) -> jax.Array:
        """[..., logical rows, D] -> [..., stored rows, D], zeros in the slots of no head."""
        heads = self.heads
        cut = self._cut(rows, heads.num_kv_heads, heads.real_group)
        more = (heads.kv - heads.num_kv_heads, heads.group - heads.real_group if self.queries else 0)
        widths = [(0, 0)] * (cut.ndim - 4) + [(0, more[0]), (0, more[1]), (0, 0), (0, 0)]
        return jnp.pad(cut, widths).reshape(*rows.shape[:-2], -1, rows.shape[-1])

    def unpad(self, rows: jax.Array) -> jax.Array:
        """[..., stored rows, D] -> [..., logical rows, D]."""
        heads = self.heads
        cut = self._cut(rows, heads.kv, heads.group)[..., : heads.num_kv_heads, : heads.real_group, :, :]
        return cut.reshape(*rows.shape[:-2], -1, rows.shape[-1])


class NoPadding:
    """For arrays whose stored shape is the logical one: all but projections over padded heads."""

    padded = False

    def pad(self, array: jax.Array) -> jax.Array:
        return array

    def unpad(self, array: jax.Array) -> jax.Array:
        return array


def paddings(state: nnx.State) -> dict:
    """For each parameter, the object that pads its layout-independent array to the stored shape and back."""

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


def logical_params(state: nnx.State) -> dict:
    """Global logical arrays of a model's parameters."""
    return to_logical(paddings(state), nnx.to_pure_dict(state))
