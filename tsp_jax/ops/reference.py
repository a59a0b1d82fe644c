"""The executable specification: every op without sharding, in plain JAX. Slow, and correct by inspection.

Weights are logical (without padding), and have the shape [rows, D] as everywhere.

Dims: B batch, T tokens (queries), S key tokens, D model, F ffn, E experts, k experts of a token, N query heads,
K KV heads, G = N / K, H head, V vocabulary.
"""

import jax
import jax.numpy as jnp

from tsp_jax.ops.mlp import GATED
from tsp_jax.ops.norm import rms_norm
from tsp_jax.ops.rope import NO_SCALING, rope


def mlp(x_BTD, w_gate_FD, w_up_FD, w_down_FD, activation="silu", biases=None):
    """Gated MLP; `biases`: of gate [F], up [F] and down [D], or None."""
    gate, up = x_BTD @ w_gate_FD.T, x_BTD @ w_up_FD.T
    if biases is None:
        return GATED[activation](gate, up) @ w_down_FD
    b_gate_F, b_up_F, b_down_D = (bias[None, None] for bias in biases)
    return GATED[activation](gate + b_gate_F, up + b_up_F) @ w_down_FD + b_down_D


def route(
    x_BTD, w_ED, *, per_token, scores="softmax", normalize=True, scale=1.0, bias_E=None, selection_bias_E=None
):  # fmt: skip
    """(chosen experts [B, T, k], their weights [B, T, k], balance loss, z-loss) of a router, in float32.

    `bias_E` is added to logits, `selection_bias_E` to the scores by which experts are chosen, not to their weights.
    The balance loss is ``E sum_e f_e p_e`` of the shares f of choices and the mean probabilities p: 1 in balance. The
    z-loss is the mean of squared log-sum-exps of the logits.
    """
    logits_BTE = x_BTD.astype(jnp.float32) @ w_ED.T
    if bias_E is not None:
        logits_BTE = logits_BTE + bias_E[None, None]
    scores_BTE = jax.nn.softmax(logits_BTE, axis=-1) if scores == "softmax" else jax.nn.sigmoid(logits_BTE)
    by_BTE = scores_BTE if selection_bias_E is None else scores_BTE + selection_bias_E[None, None]
    chosen_BTk = jnp.argsort(-by_BTE, axis=-1, stable=True)[..., :per_token].astype(jnp.int32)
    weights_BTk = jnp.take_along_axis(scores_BTE, chosen_BTk, axis=-1)
    if normalize:
        weights_BTk = weights_BTk / weights_BTk.sum(axis=-1, keepdims=True)
    shares_E = jax.nn.one_hot(chosen_BTk, len(w_ED)).mean(axis=(0, 1, 2))
    probabilities_E = (scores_BTE / scores_BTE.sum(axis=-1, keepdims=True)).mean(axis=(0, 1))
    balance = len(w_ED) * (shares_E * probabilities_E).sum()
    z = jnp.square(jax.nn.logsumexp(logits_BTE, axis=-1)).mean()
    return chosen_BTk, weights_BTk * scale, balance, z


def experts(x_BTD, chosen_BTk, weights_BTk, w_gate_EFD, w_up_EFD, w_down_EFD, activation="silu", biases=None):
    """The sum of each token's chosen experts, weighted. Computes every expert on every token.

    `biases`: of gate [E, F], up [E, F] and down [E, D], or None.
    """
    biases_E = zip(*biases, strict=True) if biases else [None] * len(w_up_EFD)
    experts_E = zip(w_gate_EFD, w_up_EFD, w_down_EFD, biases_E, strict=True)
    y_EBTD = jnp.stack([mlp(x_BTD, *weights, activation=activation, biases=own) for *weights, own in experts_E])
    weights_BTE = (jax.nn.one_hot(chosen_BTk, len(w_up_EFD)) * weights_BTk[..., None]).sum(axis=2)
    return jnp.einsum("EBTD,BTE->BTD", y_EBTD, weights_BTE)


def softmax_attention(
    q_BTKGH, k_BSKH, v_BSKH, q_positions, k_positions, q_segments, k_segments,
    *, causal=True, window=None, softcap=None, scale=None, sinks_KG=None,
):  # fmt: skip
    """(out, lse) from the full matrix of scores; a sink is one more score of each head, without a value."""
    scale = 1 / jnp.sqrt(jnp.float32(q_BTKGH.shape[-1])) if scale is None else scale
    s_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH) * scale
    if softcap is not None:
        s_BKGTS = softcap * jnp.tanh(s_BKGTS / softcap)
    before_BTS = q_positions[:, :, None] - k_positions[:, None, :]
    allowed_BTS = k_segments[:, None, :] == q_segments[:, :, None]
    if causal:
        allowed_BTS &= before_BTS >= 0
    if window is not None:
        allowed_BTS &= jnp.abs(before_BTS) < window
    s_BKGTS = jnp.where(allowed_BTS[:, None, None], s_BKGTS, -jnp.inf)
    if sinks_KG is not None:
        sink_BKGT1 = jnp.broadcast_to(sinks_KG[None, :, :, None, None], (*s_BKGTS.shape[:-1], 1))
        s_BKGTS = jnp.concatenate([s_BKGTS, sink_BKGT1], axis=-1)
    weights_BKGTS = jax.nn.softmax(s_BKGTS, axis=-1)[..., : k_BSKH.shape[1]]
    out = jnp.einsum("BKGTS,BSKH->BTKGH", weights_BKGTS, v_BSKH)
    return out, jnp.moveaxis(jax.nn.logsumexp(s_BKGTS, axis=-1), 3, 1)


def attention(
    x_BTD, wq_NHD, wk_KHD, wv_KHD, wo_NHD, positions, segments,
    *, head_dim, theta, scaling=NO_SCALING, biases=None, out_bias=0.0, norms=None, eps=1e-6, sinks_N=None, **scores,
):  # fmt: skip
    """Self-attention within segments.

    `biases`: of queries, keys and values, or None; `out_bias`: of the output, [1, 1, D], or 0; `norms`: scales of q/k
    RMSNorm over each head, [H], or over all heads, [N H] and [K H], or None; `theta`: None for no RoPE; `scaling`: RoPE
    scaling; `scores`: causal, window, softcap and scale, as `softmax_attention` takes them.
    """
    B, T, _ = x_BTD.shape
    q, k, v = (x_BTD @ w.T for w in (wq_NHD, wk_KHD, wv_KHD))
    if biases is not None:
        q, k, v = (x + bias[None, None] for x, bias in zip((q, k, v), biases, strict=True))
    if norms is not None:
        # Over as many elements as there are scales: a head's, or all.
        q, k = (rms_norm(x.reshape(B, T, -1, len(s)), s, eps) for x, s in zip((q, k), norms, strict=True))
    q, k, v = (x.reshape(B, T, -1, head_dim) for x in (q, k, v))
    if theta is not None:
        q, k = rope(q, positions, theta, scaling.at(T)), rope(k, positions, theta, scaling.at(T))
    q_BTKGH = q.reshape(B, T, k.shape[2], -1, head_dim)
    sinks_KG = None if sinks_N is None else sinks_N.reshape(q_BTKGH.shape[2:4])
    tokens = positions, positions, segments, segments
    out, _ = softmax_attention(q_BTKGH, k, v, *tokens, sinks_KG=sinks_KG, **scores)
    return out.reshape(B, T, -1) @ wo_NHD + out_bias


def embed(ids_BT, table_VD):
    """``table[ids]``; an id outside [0, V) gives zeros."""
    inside = (ids_BT >= 0) & (ids_BT < table_VD.shape[0])
    return jnp.where(inside[..., None], table_VD[jnp.where(inside, ids_BT, 0)], 0.0)


def logits(x_BTD, table_VD, *, scale=1.0, softcap=None):
    """``cap(scale x table^T)``, where ``cap(z) = softcap tanh(z / softcap)``."""
    logits_BTV = x_BTD @ table_VD.T * scale
    return logits_BTV if softcap is None else softcap * jnp.tanh(logits_BTV / softcap)


def cross_entropy(x_BTD, table_VD, labels_BT, **options):
    """(nll, lse) per token, 0 where the label is negative, NaN where it is V or more.

    `options`: scale and softcap, as `logits` takes them.
    """
    logits_BTV = logits(x_BTD, table_VD, **options)
    lse_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    label_BT = jnp.take_along_axis(logits_BTV, jnp.maximum(labels_BT, 0)[..., None], axis=-1)[..., 0]
    no_label_BT = jnp.where(labels_BT < 0, 0.0, jnp.nan)
    real_BT = (labels_BT >= 0) & (labels_BT < table_VD.shape[0])
    return jnp.where(real_BT, lse_BT - label_BT, no_label_BT), jnp.where(real_BT, lse_BT, no_label_BT)


def decoder(params, tokens, positions, segments, *, config):
    """(final hidden states [B, T, D], table of the output head [V, D], loss of routers) of a decoder (`ModelConfig`).

    `params` are those of `tsp_jax.stored.logical_params`, layers stacked [L, ...]; the other arrays are [B, T] int32.
    """

    def norm(owner, name, x_BTD):
        """RMSNorm with the parameters of this name; x itself if there are none."""
        if name not in owner:
            return x_BTD
        return rms_norm(x_BTD, owner[name]["scale"] + float(config.norm_unit_offset), config.norm_eps)

    x_BTD, router_loss = embed(tokens, params["embed"]["table"]) * config.embedding_scale, 0.0
    for index in range(config.num_layers):
        layer = jax.tree.map(lambda p, i=index: p[i], params["layers"])
        kind = config.period[index % len(config.period)]
        y_BTD = norm(layer, "attention_norm", x_BTD)
        y_BTD = decoder_attention(layer["attention"], y_BTD, positions, segments, config=config, kind=kind)
        x_BTD += norm(layer, "attention_post_norm", y_BTD) * config.residual_scale
        y_BTD = norm(layer, "mlp_norm", x_BTD)
        y_BTD, balance, z = decoder_mlp(layer["mlp"], y_BTD, config=config)
        router_loss += config.experts.balance_loss * balance + config.experts.z_loss * z
        x_BTD += norm(layer, "mlp_post_norm", y_BTD) * config.residual_scale
    x_BTD = norm(params, "final_norm", x_BTD)
    return x_BTD, params["embed" if config.tie_embeddings else "head"]["table"], router_loss


def decoder_mlp(params, x_BTD, *, config):
    """(output, balance loss, z-loss) of the MLP or the experts of one layer of a decoder."""

    def gated(params, x_BTD):
        return mlp(x_BTD, params["w_gate"], params["w_up"], params["w_down"], config.activation)

    rule = config.experts
    if not rule.number:
        return gated(params, x_BTD), 0.0, 0.0
    options = {name: getattr(rule, name) for name in ("per_token", "scores", "normalize", "scale")}
    chosen_BTk, weights_BTk, balance, z = route(
        x_BTD, params["router"], bias_E=params["router_bias"] if rule.router_bias else None, **options
    )
    weights = (params[name].reshape(rule.number, config.d_ff, -1) for name in ("w_gate", "w_up", "w_down"))
    biases = (params[name].reshape(rule.number, -1) for name in ("gate_bias", "up_bias", "down_bias") if rule.biases)
    options = {"activation": config.activation, "biases": list(biases) or None}
    y_BTD = experts(x_BTD, chosen_BTk, weights_BTk, *weights, **options)
    return y_BTD + gated(params["shared"], x_BTD) if rule.shared else y_BTD, balance, z


def decoder_attention(params, x_BTD, positions, segments, *, config, kind):
    """Attention of one layer of a decoder; `kind` is its kind (`LayerKind`)."""
    theta, scaling = None if kind == "full_nope" else config.rope_theta, config.rope_scaling
    if kind == "sliding" and config.local_rope_theta is not None:
        theta, scaling = config.local_rope_theta, NO_SCALING
    norms = [params[name] + float(config.norm_unit_offset) for name in ("q_norm", "k_norm") if config.qk_norm]
    biases = [params[name] for name in ("q_bias", "k_bias", "v_bias") if config.qkv_bias]
    return attention(
        x_BTD, params["w_q"], params["w_k"], params["w_v"], params["w_o"], positions, segments,
        head_dim=config.head_dim, theta=theta, scaling=scaling, eps=config.norm_eps, norms=norms or None,
        biases=biases or None, out_bias=params["o_bias"][None, None] if config.out_bias else 0.0,
        sinks_N=params["sinks"] if config.attention_sinks else None,
        softcap=config.attention_softcap, scale=config.attention_scale,
        window=config.window if kind == "sliding" else None,
    )  # fmt: skip


def decoder_logits(params, tokens, positions, segments, *, config):
    """[B, T, V] logits of a decoder; arguments as those of `decoder`."""
    x_BTD, table_VD, _ = decoder(params, tokens, positions, segments, config=config)
    return logits(x_BTD, table_VD, scale=config.logits_scale, softcap=config.logits_softcap)


def decoder_loss(params, tokens, labels, positions, segments, *, config, z_loss=0.0):
    """Mean loss of a decoder over tokens whose label is not ignored, and that of its routers; see `decoder`."""
    rule = {"scale": config.logits_scale, "softcap": config.logits_softcap}
    x_BTD, table_VD, router_loss = decoder(params, tokens, positions, segments, config=config)
    nll_BT, lse_BT = cross_entropy(x_BTD, table_VD, labels, **rule)
    return (nll_BT + z_loss * lse_BT**2).sum() / (labels >= 0).sum(dtype=jnp.float32) + router_loss
