"""Runs the layers of a decoder in sequence: every remat policy, and gradients narrower than the weights.

Backward recomputes whatever forward does not keep. Under each policy, forward keeps of a layer:
  none            everything that backward reads.
  save_attention  the layer's input, and attention's outputs and their log-sum-exps.
  full            the layer's input, in a buffer that the layer's gradients overwrite in backward.
  offload         the layer's input, in the host's memory.

Under `full`, gradients that wait for the optimizer need no memory of their own if a device has at least as
many tokens as it has rows of a layer's weights.

Autodiff requires gradients in the dtype of the weights. But until backward is done with all layers, their gradients are
kept in `grad_dtype`. The conversion comes last, so that the compiler fuses it into the optimizer.

Dims: B batch, T tokens, D model, L layers; upper case is the full dimension, lower case this device's shard.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from tsp_jax.config import Remat
from tsp_jax.errors import ConfigError
from tsp_jax.layout import Placement
from tsp_jax.models.buffers import BufferFormat
from tsp_jax.ops.attention.train import SAVED_NAMES

Params = Any
Layer = Callable[[Params, jax.Array, Any], jax.Array]

_LAYER_INPUT = "layer_input"
_SAVE_ATTENTION = jax.checkpoint_policies.save_only_these_names(*SAVED_NAMES)
_OFFLOAD_INPUT = jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[], names_which_can_be_offloaded=[_LAYER_INPUT],
    offload_src="device", offload_dst="pinned_host",
)  # fmt: skip


def run_layers(
    layer: Layer, x_BTD: jax.Array, params: Params, shared: Any, *, specs: Params, placement: Placement,
    policy: Remat, grad_dtype: jax.typing.DTypeLike,
) -> jax.Array:  # fmt: skip
    """Applies the layers in sequence: ``layer(params[L - 1], ... layer(params[0], x, shared) ..., shared)``.

    Args:
      layer: (parameters of one layer, x [B, T, D], shared) -> [B, T, D] in x's dtype.
      x_BTD: input of the first layer, sharded like tokens.
      params: parameters of all layers, each [L, ...].
      shared: arrays that every layer reads; they get no gradients.
      specs: PartitionSpecs like `params`.
      placement: layout and mesh.
      policy: what forward keeps.
      grad_dtype: dtype of the layers' gradients until backward is done.

    Returns:
      [B, T, D] in x's dtype.

    Keeps: under `full`, one buffer per layer, for its input and later its gradients. Otherwise what the
      policy says, and all gradients.
    """
    grad_dtype = jnp.dtype(grad_dtype)
    x_BTD, params = _differentiable_once((x_BTD, params))
    if policy == "full":
        buffers = BufferFormat.of(placement, x_BTD, params, specs, grad_dtype)
        return _run_in_buffers(layer, buffers, x_BTD, params, shared)

    def step(x_BTD, scanned):
        return layer(_use_proxies(grad_dtype, *scanned), checkpoint_name(x_BTD, _LAYER_INPUT), shared), None

    if policy != "none":
        kept = _SAVE_ATTENTION if policy == "save_attention" else _OFFLOAD_INPUT
        step = jax.checkpoint(step, policy=kept, prevent_cse=False)
    proxies = jax.tree.map(lambda param: param.astype(grad_dtype), params)
    return lax.scan(step, x_BTD, (lax.stop_gradient(params), proxies))[0]


def add_attention(attend: Callable[[jax.Array], tuple[jax.Array, Any]], x_BTD: jax.Array, policy: Remat):
    """Adds an attention branch to the residual stream: (x + y, extra) where (y, extra) = attend(x).

    Under `full` and `offload`, the backward pass of a layer runs the branch again, but keeps only attention's outputs
    and their log-sum-exps. It projects queries, keys and values once more after the MLP's backward, so that they take
    no memory while the MLP's backward runs.
    """
    if policy not in ("full", "offload"):
        y_BTD, extra = attend(x_BTD)
        return x_BTD + y_BTD, extra
    y_BTD, extra = jax.checkpoint(attend, policy=_SAVE_ATTENTION)(x_BTD)
    return lax.optimization_barrier(x_BTD + y_BTD), extra


# ------------------------------------------------------------------------------------------------ one derivative


@jax.custom_jvp
def _no_derivative(tree: Any) -> Any:
    return tree


@_no_derivative.defjvp
def _refuse(primals, tangents):
    raise ConfigError("the decoder has no second derivatives; build a model of your own from tsp_jax.nn for them")


@jax.custom_vjp
def _differentiable_once(tree: Any) -> Any:
    """Returns the tree, and refuses second derivatives.

    Gradients through proxies or buffers ignore the inputs on which they depend: second derivatives would be wrong.
    """
    return tree


# Only a second derivative differentiates the forward rule of a VJP.
_differentiable_once.defvjp(lambda tree: (_no_derivative(tree), None), lambda _, grads: (grads,))


# ------------------------------------------------------------------------------------------------ proxies


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _use_proxies(grad_dtype: Any, params: Params, proxies: Params) -> Params:
    """Returns `params`, but their gradients go to `proxies`, a tree like `params` in `grad_dtype`.

    Autodiff gives a gradient the dtype of its primal. With bfloat16 proxies, float32 weights get bfloat16
    gradients, without a bfloat16 copy of the weights: the values of proxies are never read. Used inside the
    scan over layers, so that gradients are stacked in the narrower dtype.
    """
    return params


def _proxies_forward(grad_dtype, params, proxies):
    return params, None


def _proxies_backward(grad_dtype, _, grads):
    return None, jax.tree.map(lambda grad: grad.astype(grad_dtype), grads)


_use_proxies.defvjp(_proxies_forward, _proxies_backward)


# ------------------------------------------------------------------------------------------------ full


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _run_in_buffers(layer: Layer, buffer_format: BufferFormat, x_BTD, params, shared):
    return lax.scan(lambda x, params: (layer(params, x, shared), None), x_BTD, params)[0]


def _forward(layer: Layer, buffer_format: BufferFormat, x_BTD, params, shared):
    def step(carry, scanned):
        x_BTD, buffers = carry
        index, params = scanned
        return (layer(params, x_BTD, shared), buffer_format.write_input(buffers, index, x_BTD)), None

    layers = jnp.arange(buffer_format.num_layers), params
    (y_BTD, buffers), _ = lax.scan(step, (x_BTD, buffer_format.zeros()), layers)
    return y_BTD, (buffers, params, shared)


def _backward(layer: Layer, buffer_format: BufferFormat, residuals, dy_BTD):
    buffers, params, shared = residuals

    def step(carry, scanned):
        dx_BTD, buffers = carry
        index, params = scanned
        x_BTD = buffer_format.read_input(buffers, index)
        _, vjp = jax.vjp(lambda params, x: layer(params, x, shared), params, x_BTD)
        # The barrier orders every read of the input before the write over it: without it both are kept.
        dparams, dx_BTD = lax.optimization_barrier(vjp(dx_BTD))
        return (dx_BTD, buffer_format.write_grads(buffers, index, dparams)), None

    layers = jnp.arange(buffer_format.num_layers), params
    (dx_BTD, buffers), _ = lax.scan(step, (dy_BTD, buffers), layers, reverse=True)
    return dx_BTD, buffer_format.read_grads(buffers, params), None


_run_in_buffers.defvjp(_forward, _backward)
