"""Floating-point operations of the matrix products in a training step, from the model's sizes alone.

`step_flops` counts what the step executes, `model_flops` what the model needs, which recomputation does not change. A
multiply-add counts as two operations. Layout and padding do not count.

Dims: T all tokens of the step, S tokens per sequence, L layers, N query heads, H head.
"""

from typing import NamedTuple

from tsp_jax.config import Config, ModelConfig
from tsp_jax.cost.traffic import repeats_attention

MUON_STEPS = 5
"""Newton-Schulz iterations of optax's Muon"""


class _Elements(NamedTuple):
    """Elements of one layer's weights that a token is multiplied with, and of the output head."""

    query: int
    """of the projection to queries; as many in the output projection"""
    kv: int
    """of the projection to keys; as many in the projection to values"""
    mlp: int
    """of the MLP, or of the experts that a token is the input of"""
    router: int
    biases: int
    """of the experts' down projections: all of them, of which a token takes a weighted sum"""
    head: int

    @classmethod
    def of(cls, model: ModelConfig) -> "_Elements":
        query, kv = (heads * model.head_dim * model.d_model for heads in (model.num_heads, model.num_kv_heads))
        experts = model.experts
        mlps = experts.per_token + experts.shared if experts.number else 1
        mlp, router = 3 * mlps * model.d_ff * model.d_model, experts.number * model.d_model
        return cls(query, kv, mlp, router, router * experts.biases, model.vocab_size * model.d_model)


def mean_keys(model: ModelConfig, seq_len: int) -> float:
    """Number of keys that a token attends to, in the mean over tokens and layers: W - W (W - 1) / 2 S.

    Token i of S attends to min(i + 1, W) tokens, as if the sequence were one document. W is the window, or S in layers
    without one.
    """
    layers = sum(layers * keys_within(window, seq_len) for window, layers in model.windows)
    return layers / model.num_layers


def keys_within(window: int | None, seq_len: int) -> float:
    """Number of keys that a token attends to in a layer with this window, in the mean over tokens."""
    window = min(window or seq_len, seq_len)
    return window - window * (window - 1) / (2 * seq_len)


def model_flops(
    model: ModelConfig, tokens: int, seq_len: int, *, whole_square: bool = False, frozen: bool = False
) -> float:
    """Operations that the model needs for a training step, on all devices together; the numerator of MFU.

        T (6 P + 12 L N H keys)    P: elements of all weights in a token's matrix products, the output head's once

    Forward takes one product with each weight and two for each pair of query and key, backward twice as many.
    Recomputation does not count, neither that of remat nor an op's own. Embeddings, norms and biases take no products.

    Args:
      model: sizes.
      tokens: T.
      seq_len: S, which `mean_keys` follows from.
      whole_square: count all S keys in attention, as some publications do, not the causal half within windows.
      frozen: the weights are frozen, as under LoRA: 4 P, since their gradients take no products.
    """
    each, keys = _Elements.of(model), seq_len if whole_square else mean_keys(model, seq_len)
    elements = model.num_layers * (2 * each.query + 2 * each.kv + each.mlp + each.router) + each.head
    pairs = model.num_layers * model.num_heads * model.head_dim * keys
    return tokens * ((4 if frozen else 6) * elements + 12 * pairs)


def step_flops(config: Config, *, forward: bool = False, backward_products: int = 5) -> dict[str, float]:
    """Floating-point operations of a training step, or of its `forward` pass and loss, on all devices together, by op.

    One product of T tokens with a weight of n elements takes 2 T n. In attention each of T `mean_keys` pairs takes
    2 N H operations per product. Recomputed products are included: those that backward recomputes under
    `config.remat`, and those that some ops always recompute in backward. `backward_products` is the number of products
    that attention's backward takes for each pair of tokens: 5 in one kernel, 7 in two kernels, each of which computes
    the scores.
    """
    model, tokens = config.model, config.batch * config.seq_len
    again = 0 if config.remat == "none" else 1
    twice = int(repeats_attention(config.remat))

    def count(elements: float, forward_passes: int, backward_products: float) -> float:
        """Operations of matrix products in which each token is multiplied with `elements` elements."""
        return 2 * tokens * elements * (1 if forward else forward_passes + backward_products)

    query, kv, mlp, router, biases, head = _Elements.of(model)
    # Backward of a norm in the buckets of the projections needs its input, which is not kept.
    in_buckets = model.qk_norm and model.qk_norm_width == "head" and not model.qkv_bias
    repeated = (query + kv) / (query + 2 * kv) if in_buckets else 0
    pairs = model.num_heads * model.head_dim * mean_keys(model, config.seq_len)
    layers = {
        # Backward: dx and dW of every weight.
        "projections": count(query + 2 * kv, 1 + again + twice, 2 + repeated) + count(query, 1 + again, 2),
        "attention": count(2 * pairs, 1 + twice, backward_products / 2),  # forward: q k and p v
        # Backward: gate and up again, then dx and dW of three weights.
        "mlp": count(mlp, 1 + again * (model.norms != "pre"), 8 / 3),
    }
    if router:  # backward needs its scores
        layers["router"] = count(router, 1 + again, 2)
    if biases:
        layers["expert_biases"] = count(biases, 1 + again * (model.norms != "pre"), 2)
    flops = {op: model.num_layers * total for op, total in layers.items()}
    return flops | {"loss": count(head, 1, 3)}  # backward: logits again, dx and dW


def muon_products(model: ModelConfig, shards: int) -> list[tuple[float, float, float, float]]:
    """Float32 products [m, k] x [k, n] of Muon's update on one of `shards` devices, as (m, n, k, times).

    Of a matrix W [rows, D], whose smaller dimension is s and whose larger one is l, `MUON_STEPS` times: the square A of
    W, s x l x s; A A, s x s x s; and its product with W. Rows are sharded. If W has more rows than D, every device has
    the sum over rows, and computes all of A A.
    """
    query, kv = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    found = []
    for rows, number in ((query, 2), (kv, 2), (model.d_ff, 3)):
        small, large = sorted((rows, model.d_model))
        times = MUON_STEPS * model.num_layers * number
        found.append((small, small, large / shards, 2 * times))
        found.append((small / (shards if rows <= model.d_model else 1), small, small, times))
    return [(float(m), float(n), float(k), float(times)) for m, n, k, times in found]
