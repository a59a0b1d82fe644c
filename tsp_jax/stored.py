"""How parameters are stored on a mesh: padded, and converted to and from their logical form.

The logical form of a parameter has only the rows of real heads, real ffn columns or real tokens, in order. It is the
same under every layout. The stored form depends on the mesh: it is padded, so that every rank holds equally many rows,
and its rows are in the order of the ranks that hold them. Dims: H head, D model.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from tsp_jax.config.experts import KERNEL_MULTIPLE
from tsp_jax.heads import HeadRows, HeadSharding
from tsp_jax.layout import num_ranks


@dataclasses.dataclass(frozen=True)
class HeadPadding:
    """Converts the rows of an attention projection from their logical to their stored form, and back.

    Logical rows are those of the real heads, in order. Stored rows are those of the padded heads, in the order of the
    ranks that hold them; see `HeadRows`.
    """

    sharding: HeadSharding
    queries: bool
    """True: the rows belong to query heads; False: to KV heads"""

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
        by_shard = by_head.reshape(*rows.shape[:-2], -1, stored.num_heads * heads.dim, rows.shape[-1])
        return stored.by_rank(by_shard, rows.ndim - 1).reshape(*rows.shape[:-2], -1, rows.shape[-1])

    def unpad(self, rows: jax.Array) -> jax.Array:
        """[..., stored rows, D] -> [..., logical rows, D]."""
        heads, stored = self.sharding.heads, self._rows
        by_shard = rows.reshape(*rows.shape[:-2], -1, stored.stored, rows.shape[-1])
        by_head = stored.by_head(by_shard, rows.ndim - 1).reshape(*rows.shape[:-2], -1, rows.shape[-1])
        by_head = self._by_head(by_head, heads.kv, heads.group)[..., : heads.num_kv_heads, : heads.real_group, :, :]
        return by_head.reshape(*rows.shape[:-2], -1, rows.shape[-1])


def _pad_dims(array: jax.Array, widths: tuple[int, ...]) -> jax.Array:
    """Appends zeros to the last dims of an array: `widths` has the number of zeros for each of these dims."""
    return jnp.pad(array, [(0, 0)] * (array.ndim - len(widths)) + [(0, width) for width in widths])


LARGEST_MULTIPLE = 64
"""largest power of two that padding uses. A rank's rows are padded to a multiple of a power of two, so that many bucket
sizes divide them"""


@dataclasses.dataclass(frozen=True)
class RowPadding:
    """Pads a weight whose rows are independent (ffn columns, tokens of a vocabulary) with zeros after its last row."""

    rows: int
    """logical rows"""
    stored: int
    """stored rows of all ranks together"""

    @classmethod
    def over(cls, rows: int, ranks: int) -> "RowPadding":
        """The padding of `rows` rows that are sharded over `ranks` ranks; none if the ranks divide the rows.

        Otherwise each rank holds ceil(rows / ranks) rows, rounded up to a multiple of a power of two: the largest one,
        up to `LARGEST_MULTIPLE`, that adds less than 1 %.
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
        return _pad_dims(rows, (self.stored - self.rows, 0)) if self.padded else rows

    def unpad(self, rows: jax.Array) -> jax.Array:
        """[..., stored rows, D] -> [..., logical rows, D]."""
        return rows[..., : self.rows, :] if self.padded else rows


@dataclasses.dataclass(frozen=True)
class ExpertPadding:
    """Converts the rows of all experts' weights from their logical to their stored form, and back.

    Logical rows are those of the experts, one expert after another, F rows each. Each tensor rank holds an equal part
    of every expert's rows, each folded rank equally many whole experts: stored rows are in the order [tensor rank,
    expert, row]. Experts are padded to a multiple of the folded ranks. Several tensor ranks hold equally many rows of
    an expert, padded with zeros, and a multiple of `KERNEL_MULTIPLE` where that adds less than 5 %.
    """

    experts: int
    """E, real experts"""
    rows: int
    """F, real rows of an expert"""
    tensor: int = 1
    """ranks that share each expert's rows"""
    folded: int = 1
    """ranks that share the experts"""

    @property
    def stored_experts(self) -> int:
        """Experts, padding included."""
        return -(-self.experts // self.folded) * self.folded

    @property
    def shard_rows(self) -> int:
        """Rows of an expert on each tensor rank, padding included."""
        fewest = -(-self.rows // self.tensor)
        more = -fewest % KERNEL_MULTIPLE if self.tensor > 1 else 0
        return fewest + more * (20 * more < fewest)

    @property
    def stored(self) -> int:
        """Stored rows of all ranks together."""
        return self.tensor * self.stored_experts * self.shard_rows

    @property
    def padded(self) -> bool:
        """Whether the logical and the stored form differ."""
        return self.tensor > 1 or self.stored_experts > self.experts

    def pad(self, rows: jax.Array) -> jax.Array:
        """[..., E F, D] -> [..., stored rows, D]."""
        *lead, _, width = rows.shape
        by_expert = rows.reshape(*lead, self.experts, self.rows, width)
        more = self.stored_experts - self.experts, self.tensor * self.shard_rows - self.rows, 0
        by_rank = _pad_dims(by_expert, more).reshape(*lead, self.stored_experts, self.tensor, self.shard_rows, width)
        return jnp.moveaxis(by_rank, -3, -4).reshape(*lead, self.stored, width)

    def unpad(self, rows: jax.Array) -> jax.Array:
        """[..., stored rows, D] -> [..., E F, D]."""
        *lead, _, width = rows.shape
        by_rank = rows.reshape(*lead, self.tensor, self.stored_experts, self.shard_rows, width)
        by_expert = jnp.moveaxis(by_rank, -4, -3).reshape(*lead, self.stored_experts, -1, width)
        return by_expert[..., : self.experts, : self.rows, :].reshape(*lead, self.experts * self.rows, width)


@dataclasses.dataclass(frozen=True)
class ExpertBiasPadding:
    """Converts a bias for each row of all experts' weights from its logical to its stored form, and back.

    Logical biases are [E F], one expert after another. On each shard an expert's biases are the elements of whole rows
    of the weights' width, filled up with zeros, so that they move with the rows of their expert: stored rows are in
    the order [tensor rank, expert, row].
    """

    weights: ExpertPadding
    """of the weights whose rows have these biases"""
    width: int
    """D"""

    padded = True

    @property
    def shard_rows(self) -> int:
        """Rows of an expert's biases on each tensor rank."""
        return -(-self.weights.shard_rows // self.width)

    @property
    def stored(self) -> int:
        """Stored rows of all ranks together."""
        return self.weights.tensor * self.weights.stored_experts * self.shard_rows

    def pad(self, biases: jax.Array) -> jax.Array:
        """[..., E F] -> [..., stored rows, D]."""
        lead, rows = biases.shape[:-1], self.weights.shard_rows
        by_expert = self.weights.pad(biases[..., None]).reshape(*lead, -1, rows)
        return _pad_dims(by_expert, (self.shard_rows * self.width - rows,)).reshape(*lead, self.stored, self.width)

    def unpad(self, rows: jax.Array) -> jax.Array:
        """[..., stored rows, D] -> [..., E F]."""
        lead = rows.shape[:-2]
        by_expert = rows.reshape(*lead, -1, self.shard_rows * self.width)[..., : self.weights.shard_rows]
        return self.weights.unpad(by_expert.reshape(*lead, -1, 1))[..., 0]


class NoPadding:
    """The padding of arrays whose logical and stored forms are equal under every layout, such as norm scales."""

    padded = False

    def pad(self, array: jax.Array) -> jax.Array:
        """Returns the array unchanged."""
        return array

    unpad = pad


Padding = HeadPadding | RowPadding | ExpertPadding | ExpertBiasPadding | NoPadding


def paddings(state: nnx.State) -> dict:
    """For each parameter, the object that converts it between its logical and its stored form."""

    def padding(param: nnx.Variable) -> Padding:
        return param.get_metadata().get("padding") or NoPadding()

    return nnx.to_pure_dict(
        jax.tree.map(lambda param: param.replace(padding(param)), state, is_leaf=lambda x: isinstance(x, nnx.Variable))
    )


FLOAT32_ALWAYS = ("selection_bias",)
"""names of parameters that are never rounded: their steps are smaller than those of bfloat16"""


def in_dtype(params: Any, dtype: jax.typing.DTypeLike) -> Any:
    """Shapes and shardings of parameters whose dtype is `dtype`, apart from `FLOAT32_ALWAYS`."""

    def abstract(path: Any, param: Any) -> jax.ShapeDtypeStruct:
        kept = path[-1].key in FLOAT32_ALWAYS
        return jax.ShapeDtypeStruct(param.shape, jnp.float32 if kept else dtype, sharding=param.sharding)

    return jax.tree_util.tree_map_with_path(abstract, params)


def to_logical(paddings: Any, stored: Any) -> Any:
    """Converts stored parameters, or a tree like theirs, to global logical arrays, the same under every layout."""
    return jax.tree.map(lambda padding, array: padding.unpad(array), paddings, stored)


def to_stored(paddings: Any, logical: Any) -> Any:
    """Inverse of `to_logical`; padding is zero."""
    return jax.tree.map(lambda padding, array: padding.pad(array), paddings, logical)


def abstract_logical(paddings: Any, stored: Any) -> Any:
    """Shapes, dtypes and shardings of the arrays that `to_logical` makes of `stored`.

    An array whose logical and stored forms are equal keeps its sharding. Any other is sharded by columns, so that the
    conversion is an all-to-all. If it were sharded by rows, whose order or number changes, XLA would gather all rows on
    every device. If a mesh axis does not divide the columns, it shards another dim instead: the last one that it
    divides. If it divides no dim, every rank of the axis holds the whole array. For example, 7 ranks seldom divide D.
    Each device then holds all rows of each padded weight and of its moments while it saves or restores a checkpoint.

    `stored`: arrays on a mesh, or ShapeDtypeStructs with shardings.
    """

    def abstract(padding: Any, array: Any) -> jax.ShapeDtypeStruct:
        shape, sharding = jax.eval_shape(padding.unpad, array).shape, array.sharding
        if padding.padded:
            sharding = NamedSharding(sharding.mesh, _dividing_spec(shape, sharding))
        return jax.ShapeDtypeStruct(shape, array.dtype, sharding=sharding)

    return jax.tree.map(abstract, paddings, stored)


def _dividing_spec(shape: tuple[int, ...], sharding: NamedSharding) -> PartitionSpec:
    """Puts each mesh axis of a sharding on the last dim that it divides; an axis that divides none is left out."""
    sizes = sharding.mesh.shape
    used: list[tuple[Any, ...]] = [()] * len(shape)
    for axis in (axis for names in sharding.spec for axis in ((names,) if isinstance(names, str) else names or ())):
        for dim in reversed(range(len(shape))):
            if shape[dim] % num_ranks((*used[dim], axis), sizes) == 0:
                used[dim] += (axis,)
                break
    return PartitionSpec(*(axes or None for axes in used))


def logical_params(state: nnx.State) -> dict:
    """Global logical arrays of a model's parameters."""
    return to_logical(paddings(state), nnx.to_pure_dict(state))
