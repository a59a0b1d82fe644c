"""The router of a mixture of experts: which experts each token goes to, with which weights.

Dims: B batch, t this device's tokens, D model, E experts, k experts of a token.
"""

from typing import NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import lax

from tsp_jax.config import RouterScores
from tsp_jax.errors import ConfigError
from tsp_jax.layout import AxisNames
from tsp_jax.ops.stream import vary_alike

TINY = 1e-20
"""added to sums of sigmoid scores, which may all be 0 in float32"""


class Choices(NamedTuple):
    """The experts of each token."""

    experts_Btk: jax.Array
    """int32, those of a token differ"""
    weights_Btk: jax.Array
    """float32"""


class RouterSums(NamedTuple):
    """What a router says about the real tokens of all devices, float32."""

    balance: jax.Array
    """[] balance loss ``E sum_e f_e p_e``, of the shares f of choices and the mean probabilities p; 1 in balance"""
    z: jax.Array
    """[] mean of the squared log-sum-exps of logits"""
    shares_E: jax.Array
    """share of choices that went to each expert; sums to 1, without a gradient"""


def route(
    x_BtD: jax.Array, w_ED: jax.Array, *, per_token: int, token_axes: AxisNames = (), scores: RouterScores = "softmax",
    normalize: bool = True, scale: float = 1.0, bias_E: jax.Array | None = None,
    selection_bias_E: jax.Array | None = None, real_Bt: jax.Array | None = None,
) -> tuple[Choices, RouterSums]:  # fmt: skip
    """Chooses the experts of each token, in float32.

        logits = x w^T + bias    s = softmax(logits) or sigmoid(logits)
        chosen = top_k(s + selection_bias)    weights = scale s[chosen], divided by their sum first if normalized

    Args:
      x_BtD: this device's tokens, any float dtype.
      w_ED: the router's weights, the same on every device.
      per_token: k.
      token_axes: mesh axes that shard tokens: sums are over all of them.
      scores: softmax, or sigmoid (DeepSeek-V3).
      normalize: divide the weights of a token by their sum.
      scale: factor of the weights.
      bias_E: added to logits (gpt-oss).
      selection_bias_E: changes which experts are chosen, not their weights; it gets no gradient.
      real_Bt: bool: tokens that count in the sums; others, such as padding, only choose. None: all.

    Returns:
      (choices of this device's tokens, sums over all real tokens). The balance loss is Switch Transformer's over all
      tokens of a batch, divided by k. That of transformers is one of all layers together, not divided by k: for the
      same effect its coefficient is L / k times as large as that of a sum over L layers of this one.

    Moves: forward an all-reduce of 2 E + 2 float32 over the token axes; backward one of [E, D] and of the biases.
    Keeps: [B, t, E] float32, a few times.
    Raises:
      ConfigError: k exceeds E, a bias has not E elements, or `scores` is unknown.
    Source: Shazeer et al., arXiv 1701.06538; balance loss: Fedus et al., arXiv 2101.03961; z-loss: Zoph et al., arXiv
      2202.08906; selection bias: Wang et al., arXiv 2408.15664.
    """
    num_experts = len(w_ED)
    if not 0 < per_token <= num_experts:
        raise ConfigError(f"per_token={per_token} does not fit {num_experts} experts; use 1 to {num_experts}")
    if scores not in get_args(RouterScores):
        raise ConfigError(f"scores={scores} is unknown; use one of {', '.join(get_args(RouterScores))}")
    for name, array in {"bias_E": bias_E, "selection_bias_E": selection_bias_E}.items():
        if array is not None and array.shape != (num_experts,):
            raise ConfigError(f"{name} has shape {array.shape}, the router {num_experts} experts; use ({num_experts},)")
    with jax.named_scope("tsp/router"):
        x_BtD, w_ED = vary_alike(x_BtD, w_ED)
        # Default precision is bfloat16 on TPUs, TF32 on GPUs: scores that are nearly equal would change places.
        exact = lax.Precision.HIGHEST
        logits_BtE = jnp.einsum("btd,ed->bte", x_BtD.astype(jnp.float32), w_ED.astype(jnp.float32), precision=exact)
        if bias_E is not None:
            logits_BtE += bias_E.astype(jnp.float32)[None, None]
        lse_Bt1 = jax.nn.logsumexp(logits_BtE, axis=-1, keepdims=True)
        if scores == "softmax":
            scores_BtE = probabilities_BtE = jnp.exp(logits_BtE - lse_Bt1)
        else:
            scores_BtE = jax.nn.sigmoid(logits_BtE)
            probabilities_BtE = scores_BtE / (scores_BtE.sum(axis=-1, keepdims=True) + TINY)
        preferred_BtE = lax.stop_gradient(scores_BtE)
        if selection_bias_E is not None:
            preferred_BtE += lax.stop_gradient(selection_bias_E.astype(jnp.float32))[None, None]
        chosen_Btk = lax.top_k(preferred_BtE, per_token)[1]
        weights_Btk = jnp.take_along_axis(scores_BtE, chosen_Btk, axis=-1)
        if normalize:
            weights_Btk /= weights_Btk.sum(axis=-1, keepdims=True) + TINY
        sums = _sums(chosen_Btk, probabilities_BtE, lse_Bt1, real_Bt, token_axes)
        return Choices(chosen_Btk, weights_Btk * scale), sums


def _sums(chosen_Btk, probabilities_BtE, lse_Bt1, real_Bt, token_axes: AxisNames) -> RouterSums:
    num_experts, per_token = probabilities_BtE.shape[-1], chosen_Btk.shape[-1]
    chosen_BtE = jax.nn.one_hot(chosen_Btk, num_experts, dtype=jnp.float32).sum(axis=2)
    real_Bt1 = jnp.ones_like(lse_Bt1) if real_Bt is None else real_Bt[..., None].astype(jnp.float32)
    each = chosen_BtE, probabilities_BtE, jnp.square(lse_Bt1), jnp.ones_like(lse_Bt1)
    local = [(real_Bt1 * array).sum(axis=(0, 1)) for array in each]
    counts_E, probabilities_E, squares, tokens = lax.psum(local, token_axes) if token_axes else local
    squares, tokens = squares[0], jnp.maximum(tokens[0], 1.0)
    shares_E = counts_E / (tokens * per_token)
    return RouterSums(num_experts / tokens * (shares_E * probabilities_E).sum(), squares / tokens, shares_E)
