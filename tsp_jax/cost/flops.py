"""Operations of a model's matrix products in a step, from its sizes alone: no layout, no padding.

Dims: T all tokens of the step, S sequence, D model, F ffn, V vocabulary, N query heads, K KV heads, H head.
"""

from tsp_jax.config import Config


def step_flops(config: Config, *, forward: bool = False) -> dict[str, float]:
    """Operations on all devices in a training step, or in its forward pass and loss, by op.

    A multiply-add counts as two. One product of T tokens with a weight of n elements takes 2 T n. Attention counts the
    causal pairs of tokens, 2 T (S + 1) / 2 N H for each of its products, as if each sequence was one document. What
    backward repeats of forward is included: `config.remat` says what, and some ops repeat products of their own.
    """
    model, tokens = config.model, config.batch * config.seq_len
    again = 0 if config.remat == "none" else 1
    twice = 1 if config.remat in ("full", "offload") else 0  # see cost.traffic.attention_traffic

    def count(elements: float, forward_passes: int, backward_products: float) -> float:
        """Operations of all products with weights of so many elements, or with so many elements of keys per token."""
        return 2 * tokens * elements * (1 if forward else forward_passes + backward_products)

    query, kv = (heads * model.head_dim * model.d_model for heads in (model.num_heads, model.num_kv_heads))
    repeated = (query + kv) / (query + 2 * kv) if model.qk_norm else 0  # the norm's backward needs its input
    pairs = model.num_heads * model.head_dim * (config.seq_len + 1) / 2
    layers = {
        # Backward: dx and dW of every weight.
        "projections": count(query + 2 * kv, 1 + again + twice, 2 + repeated) + count(query, 1 + again, 2),
        # Forward: q k and p v. Backward: three products for dq and four for dk and dv, which repeat the scores.
        "attention": count(2 * pairs, 1 + twice, 7 / 2),
        # Backward: gate and up again, then dx and dW of three weights.
        "mlp": count(3 * model.d_ff * model.d_model, 1, 8 / 3),
    }
    flops = {op: model.num_layers * total for op, total in layers.items()}
    return flops | {"loss": count(model.vocab_size * model.d_model, 1, 3)}  # backward: logits again, dx and dW
