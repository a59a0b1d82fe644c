"""Layers one after another, under full remat, with the gradients of a layer where its input was kept.

Forward keeps each layer's input, [B, T, D], in one slot for each layer. Backward goes through the layers from the last
to the first: it takes the input out of the slot, runs the layer again, and puts the gradients of the layer's parameters
where the input was, so that gradients that wait for the update need no memory of their own as long as a device's
tokens are as many as its rows of a layer's weights.

A slot is rows of D numbers on each device: whatever is sharded or replicated, each device keeps its own.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec

from tsp_jax.layout import Placement

Params = Any
Layer = Callable[[Params, jax.Array, Any], jax.Array]


class _Leaf(NamedTuple):
    """An array of one layer as some rows of a slot."""

    spec: PartitionSpec
    shape: tuple[int, ...]
    """on one device"""
    dtype: Any
    first: int
    """row of the slot"""
    rows: int


class _Slots(NamedTuple):
    """What stands where in the slots; hashable. Leaves are in the order of `jax.tree.leaves`."""

    placement: Placement
    x: _Leaf
    grads: tuple[_Leaf, ...]
    num_layers: int
    width: int
    """numbers in a row"""

    @classmethod
    def of(cls, placement: Placement, x_BTD: jax.Array, grads: Params, specs: Params) -> "_Slots":
        """For layers' inputs like x, and gradients [L, ...] with these specs."""
        width, itemsize = x_BTD.shape[-1], x_BTD.dtype.itemsize

        def leaf(spec: PartitionSpec, shape: tuple[int, ...], dtype: Any, first: int) -> _Leaf:
            local = jax.sharding.NamedSharding(placement.mesh, spec).shard_shape(shape)
            rows = -(-math.prod(local) * jnp.dtype(dtype).itemsize // (width * itemsize))
            return _Leaf(spec, local, jnp.dtype(dtype), first, rows)

        leaves, first = [], 0
        for spec, grad in zip(jax.tree.leaves(specs), jax.tree.leaves(grads), strict=True):
            leaves.append(leaf(PartitionSpec(*spec[1:]), grad.shape[1:], grad.dtype, first))
            first += leaves[-1].rows
        x_spec = placement.layout.spec("batch", "sequence", None)
        x = leaf(x_spec, x_BTD.shape, x_BTD.dtype, 0)
        return cls(placement, x, tuple(leaves), jax.tree.leaves(grads)[0].shape[0], width)

    @property
    def rows(self) -> int:
        """In a slot, on one device."""
        return max(self.x.rows, sum(leaf.rows for leaf in self.grads))

    @property
    def _spec(self) -> PartitionSpec:
        return PartitionSpec(None, tuple(self.placement.mesh.axis_names), None)

    def _run(self, function: Callable, in_specs: Any, out_specs: Any) -> Callable:
        # Slots of devices that hold the same shard are equal, which the types of arrays cannot tell.
        return jax.shard_map(
            function, mesh=self.placement.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )

    def empty(self) -> jax.Array:
        """All slots, [L, devices x rows, D]."""
        shape = (self.num_layers, self.rows, self.width)
        return self._run(lambda: jnp.zeros(shape, self.x.dtype), (), self._spec)()

    def put_input(self, slots: jax.Array, index: jax.Array, x_BTD: jax.Array) -> jax.Array:
        """`slots` with the input of a layer."""

        def put(slots, index, x_BtD):
            return _row_major(lax.dynamic_update_slice(slots, _to_rows(x_BtD, self.x, slots), (index, 0, 0)))

        return self._run(put, (self._spec, PartitionSpec(), self.x.spec), self._spec)(slots, index, x_BTD)

    def input(self, slots: jax.Array, index: jax.Array) -> jax.Array:
        """The input of a layer, before its gradients replace it."""

        def read(slots, index):
            rows = lax.dynamic_slice(slots, (index, 0, 0), (1, self.x.rows, self.width))
            return _from_rows(rows, self.x)[0]

        return self._run(read, (self._spec, PartitionSpec()), self.x.spec)(slots, index)

    def put_grads(self, slots: jax.Array, index: jax.Array, grads: Params) -> jax.Array:
        """`slots` with the gradients of a layer in the place of its input."""

        def put(slots, index, *grads):
            for leaf, grad in zip(self.grads, grads, strict=True):
                slots = lax.dynamic_update_slice(slots, _to_rows(grad, leaf, slots), (index, leaf.first, 0))
            return _row_major(slots)

        specs = (self._spec, PartitionSpec(), *(leaf.spec for leaf in self.grads))
        return self._run(put, specs, self._spec)(slots, index, *jax.tree.leaves(grads))

    def grads_like(self, slots: jax.Array, grads: Params) -> Params:
        """The gradients of all layers, [L, ...]."""

        def read(slots):
            return tuple(_from_rows(slots[:, leaf.first : leaf.first + leaf.rows], leaf) for leaf in self.grads)

        specs = tuple(PartitionSpec(None, *leaf.spec) for leaf in self.grads)
        return jax.tree.unflatten(jax.tree.structure(grads), self._run(read, self._spec, specs)(slots))


def _row_major(rows: jax.Array) -> jax.Array:
    """[n, rows, D] in that order in memory.

    Where what reads or writes a slot likes another order, the TPU's compiler would else copy all slots to it.
    """
    return with_layout_constraint(rows, Layout(major_to_minor=(0, 1, 2)))


def _to_rows(array: jax.Array, leaf: _Leaf, slots: jax.Array) -> jax.Array:
    """An array on this device -> [1, rows, D] of the slots' dtype, bit for bit."""
    count = leaf.rows * slots.shape[-1] * slots.dtype.itemsize // leaf.dtype.itemsize
    flat = array.astype(leaf.dtype).reshape(-1)
    if count > flat.size:
        flat = jnp.pad(flat, (0, count - flat.size))
    narrower = leaf.dtype.itemsize < slots.dtype.itemsize
    if narrower:
        flat = flat.reshape(-1, slots.dtype.itemsize // leaf.dtype.itemsize)
    return lax.bitcast_convert_type(flat, slots.dtype).reshape(1, leaf.rows, slots.shape[-1])


def _from_rows(rows: jax.Array, leaf: _Leaf) -> jax.Array:
    """Inverse of `_to_rows`, of several layers: [n, rows, D] -> [n, ...]."""
    rows, wider = _row_major(rows), leaf.dtype.itemsize // rows.dtype.itemsize
    cut = rows.reshape(rows.shape[0], -1, wider) if wider > 1 else rows
    flat = lax.bitcast_convert_type(cut, leaf.dtype).reshape(rows.shape[0], -1)
    return flat[:, : math.prod(leaf.shape)].reshape(rows.shape[0], *leaf.shape)


def run_layers(
    layer: Layer, x_BTD: jax.Array, params: Params, sinks: Params, aux: Any, specs: Params, placement: Placement
) -> jax.Array:
    """``layer(params[L - 1], ... layer(params[0], x, aux) ..., aux)`` under full remat.

    Args:
      layer: (parameters of one layer, x [B, T, D], aux) -> [B, T, D] in x's dtype.
      x_BTD: input of the first layer, sharded like tokens.
      params: of all layers, each [L, ...].
      sinks: None, or arrays like `params` that get their gradients, in the dtype of each; their values are not read.
        Lets the gradients of float32 weights wait in bfloat16 without a bfloat16 copy of the weights.
      aux: what all layers read, without gradients.
      specs: PartitionSpecs like `params`.
      placement: layout and mesh.

    Keeps: max(an input, gradients) of each layer.
    """
    slots = _Slots.of(placement, x_BTD, params if sinks is None else sinks, specs)
    return _run_layers(layer, slots, x_BTD, params, sinks, aux)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _run_layers(layer: Layer, slots: _Slots, x_BTD, params, sinks, aux):
    del slots, sinks
    return lax.scan(lambda x, params: (layer(params, x, aux), None), x_BTD, params)[0]


def _forward(layer: Layer, slots: _Slots, x_BTD, params, sinks, aux):
    def turn(carry, scanned):
        x_BTD, kept = carry
        index, params = scanned
        return (layer(params, x_BTD, aux), slots.put_input(kept, index, x_BTD)), None

    (y_BTD, kept), _ = lax.scan(turn, (x_BTD, slots.empty()), (jnp.arange(slots.num_layers), params))
    return y_BTD, (kept, params, sinks, aux)


def _backward(layer: Layer, slots: _Slots, residuals, dy_BTD):
    kept, params, sinks, aux = residuals

    def turn(carry, scanned):
        dx_BTD, kept = carry
        index, params = scanned
        _, vjp = jax.vjp(lambda params, x: layer(params, x, aux), params, slots.input(kept, index))
        # The barrier holds everything that reads the input before what overwrites it: without it both are kept.
        dparams, dx_BTD = lax.optimization_barrier(vjp(dx_BTD))
        return (dx_BTD, slots.put_grads(kept, index, dparams)), None

    layers = jnp.arange(slots.num_layers), params
    (dx_BTD, kept), _ = lax.scan(turn, (dy_BTD, kept), layers, reverse=True)
    grads = slots.grads_like(kept, params)
    return (dx_BTD, None, grads, None) if sinks is not None else (dx_BTD, grads, None, None)


_run_layers.defvjp(_forward, _backward)
