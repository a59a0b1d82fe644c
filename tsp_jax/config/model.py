"""The sizes and the mathematics of a model."""

import dataclasses
from typing import Literal, get_args

from tsp_jax.config.checks import check, check_bytes
from tsp_jax.config.experts import ExpertsConfig
from tsp_jax.config.rope import RopeScaling
from tsp_jax.errors import ConfigError

Activation = Literal["silu", "gelu", "clamped_swiglu"]
DType = Literal["float32", "bfloat16"]
NormWidth = Literal["head", "all"]
Norms = Literal["pre", "post", "both"]
LayerKind = Literal["full", "sliding", "full_nope"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer: Llama-like by default; the fields name how a layer differs from Llama's."""

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
    """F, hidden width of the gated MLP; of each expert, if there are experts"""
    experts: ExpertsConfig = ExpertsConfig()
    """mixture of experts in place of the MLP"""
    activation: Activation = "silu"
    """activation of gated MLPs: silu makes SwiGLU, gelu makes GeGLU; clamped_swiglu (gpt-oss) bounds the gate g and the
    up u by 7 and makes (u + 1) g sigmoid(1.702 g)"""
    qk_norm: bool = False
    """RMSNorm of queries and keys before RoPE (Qwen3)"""
    qk_norm_width: NormWidth = "head"
    """what that norm takes the mean over: head: each head on its own; all: all heads together (OLMo 2)"""
    qkv_bias: bool = False
    """biases of the projections to queries, keys and values (Qwen2)"""
    out_bias: bool = False
    """bias of the projection of heads' outputs (gpt-oss)"""
    norms: Norms = "pre"
    """where RMSNorms stand in a layer: pre: before attention and before the MLP; post: after each, before its output is
    added to the residual stream (OLMo 2); both (Gemma 2)"""
    norm_unit_offset: bool = False
    """RMSNorms multiply by 1 + their scale (Gemma)"""
    embedding_scale: float = 1.0
    """factor of embeddings, rounded to the compute dtype (Gemma: the square root of d_model)"""
    residual_scale: float = 1.0
    """factor of what attention, and the MLP, add to the residual stream (Granite)"""
    logits_scale: float = 1.0
    """factor of logits (Granite)"""
    logits_softcap: float | None = None
    """bound c of the absolute logits z, which become c tanh(z / c) (Gemma 2); None: no bound"""
    tie_embeddings: bool = False
    """the output head is the embedding table"""
    rope_theta: float = 10_000.0
    """base of the rotary frequencies"""
    rope_scaling: RopeScaling = RopeScaling()
    """scaling of the rotary frequencies for long contexts"""
    window: int | None = None
    """sliding window: a token attends to this many tokens, itself and those just before it; None: to all before it"""
    layer_kinds: tuple[LayerKind, ...] = ()
    """kinds of layers, repeated over the layers: full: attention without a window; sliding: with `window`; full_nope:
    full, without RoPE (SmolLM3). Empty: all layers are alike, with `window` if there is one"""
    local_rope_theta: float | None = None
    """base of the rotary frequencies of sliding layers, which are then not scaled (Gemma 3); None: those of the rest"""
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
        scores = "window attention_scale attention_softcap logits_softcap"
        factors = "rope_theta local_rope_theta norm_eps init_std embedding_scale residual_scale logits_scale"
        check("model.", self, positive=f"{sizes} {factors} {scores}")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"model.num_heads={self.num_heads} is not a multiple of model.num_kv_heads={self.num_kv_heads}; "
                f"use model.num_heads={-(-self.num_heads // self.num_kv_heads) * self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ConfigError(
                f"model.head_dim={self.head_dim} is odd, RoPE rotates pairs; use model.head_dim={self.head_dim + 1}"
            )
        if self.qk_norm_width == "all" and not self.qk_norm:
            raise ConfigError("model.qk_norm_width=all has no effect without model.qk_norm; use model.qk_norm=True")
        self.rope_scaling.check_fits("model.", self.head_dim, self.rope_theta)
        self._check_kinds()
        check_bytes("weights in bfloat16", 2 * self.num_params, "model.", self, sizes)

    def _check_kinds(self) -> None:
        known = get_args(LayerKind)
        if not isinstance(self.layer_kinds, tuple) or not all(kind in known for kind in self.layer_kinds):
            raise ConfigError(
                f"model.layer_kinds={self.layer_kinds!r:.80} is unknown; use a tuple of {', '.join(known)}"
            )
        sliding = "sliding" in self.period
        if sliding and self.window is None:
            raise ConfigError("model.layer_kinds=sliding needs a window; use model.window=4096")
        for name, use in {"window": "sliding among model.layer_kinds", "local_rope_theta": "model.window=4096"}.items():
            if getattr(self, name) is not None and not sliding:
                value = f"model.{name}={getattr(self, name)}"
                raise ConfigError(f"{value} has no effect, for no layer is sliding; use {use}, or leave it out")

    @property
    def period(self) -> tuple[LayerKind, ...]:
        """The kinds of the first layers, after which they repeat: the shortest such tuple."""
        kinds = self.layer_kinds[: self.num_layers] or (("full",) if self.window is None else ("sliding",))
        lengths = (n for n in range(1, len(kinds)) if len(kinds) % n == 0 and kinds == kinds[:n] * (len(kinds) // n))
        return kinds[: next(lengths, len(kinds))]

    @property
    def windows(self) -> tuple[tuple[int | None, int], ...]:
        """(window, number of layers that have it), where None is no window. Its size does not depend on L."""
        periods, rest = divmod(self.num_layers, len(self.period))
        sliding = periods * self.period.count("sliding") + self.period[:rest].count("sliding")
        found = ((self.window, sliding), (None, self.num_layers - sliding))
        return tuple((window, layers) for window, layers in found if layers)

    @property
    def num_params(self) -> int:
        """Number of parameters, without padding."""
        heads = (2 * self.num_heads + 2 * self.num_kv_heads) * self.head_dim * self.d_model
        normed = self.num_heads + self.num_kv_heads if self.qk_norm_width == "all" else 2
        biased = self.num_heads + 2 * self.num_kv_heads
        small = (normed * self.qk_norm + biased * self.qkv_bias) * self.head_dim + self.num_heads * self.attention_sinks
        vectors = (4 if self.norms == "both" else 2) + self.out_bias
        mlps = self.experts.number + self.experts.shared or 1
        small += self.experts.number * (self.experts.router_bias + self._expert_biases)
        layer = heads + (3 * self.d_ff * mlps + self.experts.number + vectors) * self.d_model + small
        tables = self.vocab_size * self.d_model * (1 if self.tie_embeddings else 2)
        return self.num_layers * layer + tables + self.d_model

    @property
    def active_params(self) -> int:
        """Number of parameters without the experts that a token is not the input of."""
        unused = self.experts.number - self.experts.per_token if self.experts.number else 0
        return self.num_params - self.num_layers * unused * (3 * self.d_ff * self.d_model + self._expert_biases)

    @property
    def _expert_biases(self) -> int:
        """Number of biases of an expert."""
        return (2 * self.d_ff + self.d_model) * self.experts.biases

    def refuse_experts(self, what: str) -> None:
        """Raises ConfigError if there are experts; `what` does not support them."""
        if number := self.experts.number:
            raise ConfigError(f"model.experts.number={number} is not supported by {what}; use model.experts.number=0")
