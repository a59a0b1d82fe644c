"""Runs the layers of a decoder in sequence: every remat policy, and gradients narrower than the weights.

Backward recomputes whatever forward does not keep. Under each policy, forward keeps of a layer:
  none               everything that backward reads.
  full               the layer's input, in a buffer that the layer's gradients overwrite in backward.
  save_attention     the layer's input, attention's outputs and their log-sum-exps, in such a buffer.
  offload            what `full` keeps, in the host's memory.
  offload_attention  what `save_attention` keeps, in the host's memory.

Under `full` and `save_attention`, gradients that wait for the optimizer need no memory of their own if a layer's
saved arrays are at least as large. Copies from the host are made one layer ahead, so that they overlap with backward.

Autodiff requires gradients in the dtype of the weights. But until backward is done with all layers, their gradients are
kept in `grad_dtype`. The conversion comes last, so that the compiler fuses it into the optimizer.

Dims: B batch, T tokens, D model, L layers; upper case is the full dimension, lower case this device's shard.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from tsp_jax.config import Remat
from tsp_jax.errors import ConfigError
from tsp_jax.layout import Placement
from tsp_jax.models.buffers import BufferFormat
from tsp_jax.models.keep import Layers, Outputs, Params, Saved, run_in_buffers, run_one, run_with_host
from tsp_jax.models.scan import scan_layers
from tsp_jax.ops.attention.train import SAVED_NAMES

_SAVE_ATTENTION = jax.checkpoint_policies.save_only_these_names(*SAVED_NAMES)


class _Kept(NamedTuple):
    """What forward keeps of a layer besides its input, and where."""

    attention: bool
    """attention's outputs and log-sum-exps too"""
    host: bool
    """in the host's memory, not in a buffer on the device"""


_KEPT: dict[Remat, _Kept] = {
    "full": _Kept(attention=False, host=False),
    "save_attention": _Kept(attention=True, host=False),
    "offload": _Kept(attention=False, host=True),
    "offload_attention": _Kept(attention=True, host=True),
}


def run_layers(
    layers: Layers, x_BTD: jax.Array, params: Params, shared: Any, *, specs: Any, attended_specs: Any,
    placement: Placement, policy: Remat, grad_dtype: jax.typing.DTypeLike,
) -> Outputs:  # fmt: skip
    """Applies the layers in sequence: the output of each is the input of the next.

    Args:
      layers: see `Layers`; what their attention computes has the same shapes in all.
      x_BTD: input of the first layer, sharded like tokens.
      params: parameters of all layers, each [L, ...]: those that get gradients, and frozen ones.
      shared: arrays that every layer reads; they get no gradients.
      specs: PartitionSpecs of the parameters that get gradients.
      attended_specs: PartitionSpecs of what attention has computed, as the layer returns it.
      placement: layout and mesh.
      policy: what forward keeps.
      grad_dtype: dtype of the layers' gradients until backward is done.

    Returns:
      ([B, T, D] in x's dtype, the small arrays that layers return, each [L, ...]); both are differentiable.

    Keeps: what the policy says. In buffers, a layer's gradients take the place of what was kept of it; otherwise all
      gradients are kept too.
    """
    grad_dtype = jnp.dtype(grad_dtype)
    x_BTD, trained = _differentiable_once((x_BTD, params[0]))
    params = trained, lax.stop_gradient(params[1])
    if policy == "none":
        return _run_with_proxies(layers, grad_dtype, x_BTD, params, shared)
    keep_attention, host = _KEPT[policy]
    if host:
        return run_with_host(layers, keep_attention, grad_dtype, x_BTD, params, shared)
    one = jax.tree.map(lambda param: jax.ShapeDtypeStruct(param.shape[1:], param.dtype), params)
    _, saved, _ = jax.eval_shape(partial(run_one, layers[0], keep_attention), one, x_BTD, shared)
    saved_specs = placement.layout.spec("batch", "sequence", None), attended_specs if keep_attention else None
    buffers = BufferFormat.of(placement, saved, saved_specs, trained, specs, grad_dtype)
    return run_in_buffers(layers, keep_attention, buffers, x_BTD, params, shared)


def add_attention(
    attend: Callable[[jax.Array], tuple[jax.Array, Any]], x_BTD: jax.Array, policy: Remat,
    recall: Callable[[], Saved] | None = None, added: Callable[[jax.Array], jax.Array] = lambda y_BTD: y_BTD,
) -> tuple[jax.Array, Any]:  # fmt: skip
    """Adds an attention branch to the residual stream: (x + added(y), extra) where (y, extra) = attend(x).

    Unless the policy is `none`, the backward pass of a layer has attention's outputs and their log-sum-exps before the
    MLP's backward: it runs the branch again, or has kept them. It projects queries, keys and values after the MLP's
    backward (once more, if it runs the branch again), so that they take no memory while the MLP's backward runs. Nor
    does x: if there is `recall`, x is read again.
    """
    if policy == "none":
        y_BTD, extra = attend(x_BTD)
        return x_BTD + added(y_BTD), extra

    def branch(x_BTD):
        return attend(_with_value(x_BTD, recall()[0]) if recall else x_BTD)

    y_BTD, extra = jax.checkpoint(branch, policy=_SAVE_ATTENTION)(x_BTD)
    return lax.optimization_barrier(x_BTD + added(y_BTD)), extra


@jax.custom_vjp
def _with_value(array: jax.Array, value: jax.Array) -> jax.Array:
    """Returns `value`, which equals `array`, in such a way that gradients go to `array` and only `value` is read."""
    return value


_with_value.defvjp(lambda array, value: (value, None), lambda _, grad: (grad, None))


@jax.custom_vjp
def finish_gradients(x_BTD: jax.Array, params: Any) -> tuple[jax.Array, Any]:
    """Returns its arguments. Backward has all gradients of `params` before it uses the gradient of x.

    Between attention and the MLP this stops the compiler from sending the last gradients of the MLP's weights to their
    owners as late as the end of the layer, and keeping them all through attention's backward.
    """
    return x_BTD, params


finish_gradients.defvjp(lambda x, params: ((x, params), None), lambda _, grads: lax.optimization_barrier(grads))


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
def _use_proxies(grad_dtype: Any, params: Any, proxies: Any) -> Any:
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


def _run_with_proxies(layers: Layers, grad_dtype: Any, x_BTD: jax.Array, params: Params, shared: Any) -> Outputs:
    """Applies the layers in sequence and keeps everything that backward reads."""

    def step(place, x_BTD, params, proxies):
        trained, frozen = params
        trained = _use_proxies(grad_dtype, trained, proxies)
        y_BTD, _, small = layers[place.number]((trained, frozen), x_BTD, shared, None)
        return y_BTD, small

    proxies = jax.tree.map(lambda param: param.astype(grad_dtype), params[0])
    y_BTD, small = scan_layers(step, x_BTD, lax.stop_gradient(params), period=len(layers), xs=proxies)
    return y_BTD, small.joined()
