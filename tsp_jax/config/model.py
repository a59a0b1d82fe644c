"""The sizes and the mathematics of a model."""

import dataclasses
from typing import Literal

from tsp_jax.config.checks import check, check_bytes
from tsp_jax.errors import ConfigError

Activation = Literal["silu", "gelu"]
DType = Literal["float32", "bfloat16"]
RopeKind = Literal["none", "linear", "llama3"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are scaled for contexts longer than those a model was first trained on."""

    kind: RopeKind = "none"
    """linear: divide all frequencies by factor; llama3: divide low ones by factor, keep high ones,
    interpolate between"""
    factor: float = 1.0
    """divisor of the scaled frequencies"""
    low_freq_factor: float = 1.0
    """llama3: a frequency with fewer periods than this in the original context is low"""
    high_freq_factor: float = 4.0
    """llama3: a frequency with more periods than this in the original context is high"""
    original_context: int = 8192
    """llama3: context length of pretraining, in tokens (original_max_position_embeddings)"""

    def __post_init__(self):
        owner = "model.rope_scaling."
        check(owner, self, positive="factor low_freq_factor high_freq_factor original_context")
        if self.high_freq_factor <= self.low_freq_factor:
            raise ConfigError(
                f"{owner}high_freq_factor={self.high_freq_factor} must exceed low_freq_factor={self.low_freq_factor}; "
                f"use {4 * self.low_freq_factor}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer: Llama-like by default, Qwen3-like with ``qk_norm=True``."""

    vocab_size: int
    """V, vocabulary size"""
    d_model: int
    """D, width of the residual stream"""
    num_layers: int
    """L, decoder layers"""
    num_heads: int
    """N, query heads"""
    num_kv_heads: int
    """K, key/value heads; divides num_heads"""
    head_dim: int
    """H, width of one head; need not be D / N"""
    d_ff: int
    """F, hidden width of the gated MLP"""
    activation: Activation = "silu"
    """activation of the gate: silu makes SwiGLU, gelu makes GeGLU"""
    qk_norm: bool = False
    """RMSNorm over each query and key head before RoPE (Qwen3)"""
    tie_embeddings: bool = False
    """the output head is the embedding table"""
    rope_theta: float = 10_000.0
    """base of the rotary frequencies"""
    rope_scaling: RopeScaling = RopeScaling()
    """scaling of the rotary frequencies for long contexts"""
    window: int | None = None
    """sliding window: a token attends to this many tokens, itself and those just before it; None: to all before it"""
    attention_scale: float | None = None
    """factor of the products of queries and keys; None: 1 / sqrt(head_dim)"""
    attention_softcap: float | None = None
    """bound c of the absolute scores s, which become c tanh(s / c) (Gemma 2); None: no bound"""
    attention_sinks: bool = False
    """a learned score without a value for each query head (gpt-oss)"""
    norm_eps: float = 1e-5
    """added to the mean square in every RMSNorm"""
    init_std: float = 0.02
    """standard deviation of initial weights; divided by sqrt(2 L) for projections into the residual stream"""

    def __post_init__(self):
        sizes = "vocab_size d_model num_layers num_heads num_kv_heads head_dim d_ff"
        scores = "window attention_scale attention_softcap"
        check("model.", self, positive=f"{sizes} rope_theta norm_eps init_std {scores}")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"model.num_heads={self.num_heads} is not a multiple of model.num_kv_heads={self.num_kv_heads}; "
                f"use model.num_heads={-(-self.num_heads // self.num_kv_heads) * self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ConfigError(
                f"model.head_dim={self.head_dim} is odd, RoPE rotates pairs; use model.head_dim={self.head_dim + 1}"
            )
        check_bytes("weights in bfloat16", 2 * self.num_params, "model.", self, sizes)

    @property
    def num_params(self) -> int:
        """Number of parameters, without padding."""
        heads = (2 * self.num_heads + 2 * self.num_kv_heads) * self.head_dim * self.d_model
        small = 2 * self.d_model + 2 * self.head_dim * self.qk_norm + self.num_heads * self.attention_sinks
        layer = heads + 3 * self.d_ff * self.d_model + small
        tables = self.vocab_size * self.d_model * (1 if self.tie_embeddings else 2)
        return self.num_layers * layer + tables + self.d_model
