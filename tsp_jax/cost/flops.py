"""Floating-point operations of the matrix products in a training step, from the model's sizes alone.

Layout and padding do not count. Dims: T all tokens of the step, S tokens per sequence, N query heads, H head.
"""

from collections import Counter

from tsp_jax.config import Config, ModelConfig
from tsp_jax.cost.traffic import repeats_attention, repeats_mlp


def step_flops(config: Config, *, forward: bool = False, backward_products: int = 5) -> dict[str, float]:
    """Floating-point operations of a training step, or of its `forward` pass and loss, on all devices together, by op.

    A multiply-add counts as two operations. One product of T tokens with a weight of n elements takes 2 T n. In
    attention only causal pairs of tokens within the window W count, as if each sequence were one document:
    T (W - W (W - 1) / 2 S) pairs, T (S + 1) / 2 without a window, each of which takes 2 N H operations per product.
    Recomputed products are included: those that backward recomputes under `config.remat`, and those that some ops
    always recompute in backward. `backward_products` is the number of products that attention's backward takes for each
    pair of tokens: 5 in one kernel, 7 in two kernels, each of which computes the scores.
    """
    model, tokens = config.model, config.batch * config.seq_len
    again = 0 if config.remat == "none" else 1
    twice = int(repeats_attention(config.remat))

    def count(elements: float, forward_passes: int, backward_products: float) -> float:
        """Operations of matrix products in which each token is multiplied with `elements` elements."""
        return 2 * tokens * elements * (1 if forward else forward_passes + backward_products)

    query, kv = (heads * model.head_dim * model.d_model for heads in (model.num_heads, model.num_kv_heads))
    repeated = (query + kv) / (query + 2 * kv) if model.qk_norm else 0  # the norm's backward needs its input
    pairs = model.num_heads * model.head_dim * _attended(model, config.seq_len)
    layers = {
        # Backward: dx and dW of every weight.
        "projections": count(query + 2 * kv, 1 + again + twice, 2 + repeated) + count(query, 1 + again, 2),
        "attention": count(2 * pairs, 1 + twice, backward_products / 2),  # forward: q k and p v
        # Backward: gate and up again, then dx and dW of three weights.
        "mlp": count(3 * model.d_ff * model.d_model, 1 + int(repeats_mlp(model.norms, config.remat)), 8 / 3),
    }
    flops = {op: model.num_layers * total for op, total in layers.items()}
    return flops | {"loss": count(model.vocab_size * model.d_model, 1, 3)}  # backward: logits again, dx and dW


def _attended(model: ModelConfig, seq_len: int) -> float:
    """Mean number of tokens that a token attends to, over tokens and layers: token i attends to min(i + 1, window)."""
    total = 0.0
    for window, layers in Counter(model.windows).items():
        window = min(window or seq_len, seq_len)
        total += layers * (window - window * (window - 1) / (2 * seq_len))
    return total / model.num_layers
