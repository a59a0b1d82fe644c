"""Runs layers that keep something of forward for backward: on the device, or in the host's memory.

What a layer keeps, its `saved`, is (its input, what its attention has computed or None). On the device, saved arrays
share a buffer with the layer's gradients, which overwrite them in backward. From the host, backward fetches the saved
arrays of a layer while the layer after it is differentiated.

Dims: B batch, T tokens, D model, L layers; upper case is the full dimension.
"""

from collections.abc import Callable
from functools import partial
from operator import itemgetter
from typing import Any

import jax
from jax import lax

from tsp_jax.models.buffers import BufferFormat
from tsp_jax.models.scan import last_place, scan_layers

Params = tuple[Any, Any]
"""(parameters that get gradients, frozen parameters), of one layer or, each [L, ...], of all"""
Saved = tuple[jax.Array, Any]
"""(a layer's input [B, T, D], what its attention has computed or None)"""
Layer = Callable[[Params, jax.Array, Any, Callable[[], Saved] | None], tuple[jax.Array, Any, Any]]
"""(parameters of one layer, x [B, T, D], shared, recall) -> ([B, T, D] in x's dtype, what attention has computed, a
tree of small float arrays, such as losses of a router). In backward, `recall` reads what is saved for the same x; if
that has attention's results, attention need not run. In forward it is None."""
Layers = tuple[Layer, ...]
"""the layers of a period, after which their kinds repeat; one if all layers are alike"""


Outputs = tuple[jax.Array, Any]
"""(output of the last layer [B, T, D], the small arrays of all layers, each [L, ...])"""


def run_one(
    layer: Layer, keep_attention: bool, params: Params, x_BTD: jax.Array, shared: Any
) -> tuple[Any, Saved, Any]:
    """(the layer's output [B, T, D], what is saved of it, its small arrays)."""
    y_BTD, attended, small = layer(params, x_BTD, shared, None)
    return y_BTD, (x_BTD, attended if keep_attention else None), small


def _differentiate(
    layer: Layer, params: Params, shared: Any, recall: Callable[[], Saved], dy_BTD: jax.Array, dsmall: Any
) -> tuple[Any, Any]:
    """(gradients of the layer's parameters that are not frozen, of its input)."""
    trained, frozen = params

    def run(trained, x_BTD):
        y_BTD, _, small = layer((trained, frozen), x_BTD, shared, recall)
        return y_BTD, small

    return jax.vjp(run, trained, recall()[0])[1]((dy_BTD, dsmall))


# ------------------------------------------------------------------------------------------------ on the device


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def run_in_buffers(layers: Layers, keep_attention: bool, buffer_format: BufferFormat, x_BTD, params, shared) -> Outputs:
    """Applies the layers in sequence; saved arrays and gradients are in buffers of `buffer_format`."""
    return _run(layers, x_BTD, params, shared)


def _run(layers: Layers, x_BTD, params, shared) -> Outputs:
    def step(place, x_BTD, params, _):
        y_BTD, _, small = layers[place.number](params, x_BTD, shared, None)
        return y_BTD, small

    y_BTD, small = scan_layers(step, x_BTD, params, period=len(layers))
    return y_BTD, small.joined()


def _forward_in_buffers(layers: Layers, keep_attention: bool, buffer_format: BufferFormat, x_BTD, params, shared):
    def step(place, carry, params, _):
        x_BTD, buffers = carry
        y_BTD, saved, small = run_one(layers[place.number], keep_attention, params, x_BTD, shared)
        return (y_BTD, buffer_format.write_saved(buffers, place.layer, saved)), small

    (y_BTD, buffers), small = scan_layers(step, (x_BTD, buffer_format.zeros()), params, period=len(layers))
    return (y_BTD, small.joined()), (buffers, params, shared)


def _backward_in_buffers(layers: Layers, keep_attention: bool, buffer_format: BufferFormat, residuals, doutputs):
    buffers, params, shared = residuals
    dy_BTD, dsmall = doutputs

    def step(place, carry, params, dsmall):
        dy_BTD, buffers = carry

        def recall() -> Saved:
            return buffer_format.read_saved(buffers, place.layer)

        grads = _differentiate(layers[place.number], params, shared, recall, dy_BTD, dsmall)
        # The barrier orders every read of saved arrays before the write over them: without it both are kept.
        dparams, dx_BTD = lax.optimization_barrier(grads)
        return (dx_BTD, buffer_format.write_grads(buffers, place.layer, dparams)), None

    carry = dy_BTD, buffers
    (dx_BTD, buffers), _ = scan_layers(step, carry, params, period=len(layers), xs=dsmall, reverse=True)
    return dx_BTD, (buffer_format.read_grads(buffers, params[0]), None), None


run_in_buffers.defvjp(_forward_in_buffers, _backward_in_buffers)


# ------------------------------------------------------------------------------------------------ in the host's memory


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def run_with_host(layers: Layers, keep_attention: bool, grad_dtype: Any, x_BTD, params, shared) -> Outputs:
    """Applies the layers in sequence; saved arrays are in the host's memory, gradients wait in `grad_dtype`."""
    return _run(layers, x_BTD, params, shared)


def _forward_to_host(layers: Layers, keep_attention: bool, grad_dtype: Any, x_BTD, params, shared):
    def step(place, x_BTD, params, _):
        y_BTD, saved, small = run_one(layers[place.number], keep_attention, params, x_BTD, shared)
        return y_BTD, (jax.device_put(saved, jax.memory.Space.Host), small)

    y_BTD, stacks = scan_layers(step, x_BTD, params, period=len(layers))
    saved, small = (stacks.map(itemgetter(part)) for part in range(2))
    return (y_BTD, small.joined()), (saved, params, shared)


def _backward_from_host(layers: Layers, keep_attention: bool, grad_dtype: Any, residuals, doutputs):
    stacks, params, shared = residuals
    dy_BTD, dsmall = doutputs

    def fetch(place):
        return jax.device_put(stacks.read(place), jax.memory.Space.Device)

    def step(place, carry, params, dsmall):
        dy_BTD, saved = carry
        fetched = fetch(place.before)
        dparams, dx_BTD = _differentiate(layers[place.number], params, shared, lambda: saved, dy_BTD, dsmall)
        return (dx_BTD, fetched), jax.tree.map(lambda grad: grad.astype(grad_dtype), dparams)

    last = last_place(jax.tree.leaves(params)[0].shape[0], len(layers))
    carry = dy_BTD, fetch(last)
    (dx_BTD, _), grads = scan_layers(step, carry, params, period=len(layers), xs=dsmall, reverse=True)
    grads = jax.tree.map(lambda grad, param: grad.astype(param.dtype), grads.joined(), params[0])
    return dx_BTD, (grads, None), None


run_with_host.defvjp(_forward_to_host, _backward_from_host)
