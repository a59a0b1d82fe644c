"""One buffer for each layer, which holds what forward saves of the layer and later the layer's gradients.

A buffer is [rows, D] on each device, however arrays are sharded; `BufferFormat` says which rows hold which array.

Dims: B batch, T tokens, D model, L layers; upper case is the full dimension, lower case this device's shard.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import NamedSharding, PartitionSpec

from tsp_jax.layout import Placement

Params = Any


class _Leaf(NamedTuple):
    """An array of one layer as some rows of a buffer."""

    spec: PartitionSpec
    shape: tuple[int, ...]
    """shape on one device"""
    dtype: Any
    first: int
    """its first row in the buffer"""
    rows: int


class BufferFormat(NamedTuple):
    """Which rows of a buffer hold which array; hashable. Leaves are in the order of `jax.tree.leaves`."""

    placement: Placement
    saved: tuple[_Leaf, ...]
    grads: tuple[_Leaf, ...]
    saved_tree: Any
    """structure of what is saved of a layer"""
    num_layers: int
    width: int
    """D"""
    dtype: Any
    """of the buffers"""

    @classmethod
    def of(
        cls, placement: Placement, saved: Any, saved_specs: Any, params: Params, specs: Params, grad_dtype: Any
    ) -> "BufferFormat":
        """The format of buffers that hold arrays shaped like `saved`, and gradients of `params` [L, ...].

        The first array of `saved` is the layer's input, [B, T, D]. Buffers have its D, and the wider one of its dtype
        and the gradients': gradients of all layers are read at once, and would be copied to be put together.
        """
        x_BTD = jax.tree.leaves(saved)[0]
        width, dtype = x_BTD.shape[-1], max(x_BTD.dtype, jnp.dtype(grad_dtype), key=lambda dtype: dtype.itemsize)

        def leaves(arrays: list[tuple[PartitionSpec, tuple[int, ...], Any]]) -> tuple[_Leaf, ...]:
            found, first = [], 0
            for spec, shape, array_dtype in arrays:
                local = NamedSharding(placement.mesh, spec).shard_shape(shape)
                rows = -(-math.prod(local) * array_dtype.itemsize // (width * dtype.itemsize))
                rows += rows * width * dtype.itemsize % array_dtype.itemsize > 0  # whole words, also if D is odd
                found.append(_Leaf(spec, local, array_dtype, first, rows))
                first += rows
            return tuple(found)

        all_saved = zip(jax.tree.leaves(saved_specs), jax.tree.leaves(saved), strict=True)
        all_params = zip(jax.tree.leaves(specs), jax.tree.leaves(params), strict=True)
        saved_leaves = leaves([(spec, array.shape, array.dtype) for spec, array in all_saved])
        grads = leaves([(PartitionSpec(*spec[1:]), param.shape[1:], grad_dtype) for spec, param in all_params])
        num_layers = jax.tree.leaves(params)[0].shape[0]
        return cls(placement, saved_leaves, grads, jax.tree.structure(saved), num_layers, width, dtype)

    @property
    def rows(self) -> int:
        """Rows of a buffer on one device."""
        return max(sum(leaf.rows for leaf in leaves) for leaves in (self.saved, self.grads))

    @property
    def _spec(self) -> PartitionSpec:
        return PartitionSpec(None, tuple(self.placement.mesh.axis_names), None)

    def _shard_map(self, function: Callable, in_specs: Any, out_specs: Any) -> Callable:
        # Devices that hold the same shard hold equal buffers, which the varying-axes check cannot infer.
        return jax.shard_map(
            function, mesh=self.placement.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )

    def zeros(self) -> jax.Array:
        """The buffers of all layers, [L, devices x rows, D]."""
        shape = (self.num_layers, self.rows, self.width)
        return self._shard_map(lambda: jnp.zeros(shape, self.dtype), (), self._spec)()

    def write_saved(self, buffers: jax.Array, index: jax.Array, saved: Any) -> jax.Array:
        """`buffers` after what is saved of layer `index` has been written."""
        return self._write(buffers, index, self.saved, saved)

    def write_grads(self, buffers: jax.Array, index: jax.Array, grads: Params) -> jax.Array:
        """`buffers` after the gradients of layer `index` have overwritten what was saved of it."""
        return self._write(buffers, index, self.grads, grads)

    def _write(self, buffers: jax.Array, index: jax.Array, leaves: tuple[_Leaf, ...], arrays: Any) -> jax.Array:
        def write(buffers, index, *arrays):
            for leaf, array in zip(leaves, arrays, strict=True):
                buffers = lax.dynamic_update_slice(buffers, _to_rows(array, leaf, buffers), (index, leaf.first, 0))
            return _row_major(buffers)

        specs = (self._spec, PartitionSpec(), *(leaf.spec for leaf in leaves))
        return self._shard_map(write, specs, self._spec)(buffers, index, *jax.tree.leaves(arrays))

    def read_saved(self, buffers: jax.Array, index: jax.Array) -> Any:
        """What is saved of layer `index`; call it before the layer's gradients overwrite the buffer."""

        def read(buffers, index):
            def rows(leaf: _Leaf) -> jax.Array:
                return lax.dynamic_slice(buffers, (index, leaf.first, 0), (1, leaf.rows, self.width))

            return tuple(_from_rows(rows(leaf), leaf)[0] for leaf in self.saved)

        arrays = self._shard_map(read, (self._spec, PartitionSpec()), tuple(leaf.spec for leaf in self.saved))
        return jax.tree.unflatten(self.saved_tree, arrays(buffers, index))

    def read_grads(self, buffers: jax.Array, params: Params) -> Params:
        """The gradients of all layers, shaped and typed like `params`."""

        def read(buffers):
            return tuple(_from_rows(buffers[:, leaf.first : leaf.first + leaf.rows], leaf) for leaf in self.grads)

        specs = tuple(PartitionSpec(None, *leaf.spec) for leaf in self.grads)
        grads = jax.tree.unflatten(jax.tree.structure(params), self._shard_map(read, self._spec, specs)(buffers))
        return jax.tree.map(lambda grad, param: grad.astype(param.dtype), grads, params)


def _row_major(rows: jax.Array) -> jax.Array:
    """Constrains the memory layout of an array [n, rows, D] to this order of dims.

    Without the constraint, the TPU compiler copies all buffers to the order that suits a single reader or writer.
    """
    return with_layout_constraint(rows, Layout(major_to_minor=(0, 1, 2)))


def _to_rows(array: jax.Array, leaf: _Leaf, buffers: jax.Array) -> jax.Array:
    """This device's shard of an array -> [1, rows, D] of the buffers' dtype, bit for bit."""
    count = leaf.rows * buffers.shape[-1] * buffers.dtype.itemsize // leaf.dtype.itemsize
    flat = array.astype(leaf.dtype).reshape(-1)
    if count > flat.size:
        flat = jnp.pad(flat, (0, count - flat.size))
    return _regroup(flat[None], buffers.dtype).reshape(1, leaf.rows, buffers.shape[-1])


def _from_rows(rows: jax.Array, leaf: _Leaf) -> jax.Array:
    """Inverse of `_to_rows` for several layers: [n, rows, D] -> [n, ...]."""
    flat = _regroup(_row_major(rows).reshape(rows.shape[0], -1), leaf.dtype)
    return flat[:, : math.prod(leaf.shape)].reshape(rows.shape[0], *leaf.shape)


def _regroup(words: jax.Array, dtype: Any) -> jax.Array:
    """[n, s] -> the same bits in words of another dtype, [n, s times the ratio of the sizes].

    Part i of the narrower words, all of one place in the wider ones, is block i of the result or of the argument.
    `lax.bitcast_convert_type` has a last dimension of these parts, which TPUs pad to 128.
    """
    have, want = (jnp.dtype(each).itemsize for each in (words.dtype, dtype))
    if have == want:
        return lax.bitcast_convert_type(words, dtype)
    bits, wanted = lax.bitcast_convert_type(words, f"uint{8 * have}"), jnp.dtype(f"uint{8 * want}")
    if have > want:
        shifts = (bits.dtype.type(8 * want * part) for part in range(have // want))
        found = jnp.concatenate([(bits >> shift).astype(wanted) for shift in shifts], axis=1)
    else:
        blocks = bits.reshape(len(bits), want // have, -1).astype(wanted)
        shifted = (blocks[:, part] << wanted.type(8 * have * part) for part in range(want // have))
        found = functools.reduce(lax.bitwise_or, shifted)
    return lax.bitcast_convert_type(found, dtype)
