"""Attention heads, padded so that every rank holds equally many.

Dims: N query heads, K KV heads, G = N / K, H head, R ranks.
"""

import itertools
import math
import operator
from typing import NamedTuple

from tsp_jax.layout import Placement


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
