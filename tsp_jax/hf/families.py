"""The families of models that Hugging Face folders hold: a row each, for config.json and the weights beside it.

A row says what a class of transformers computes that not every decoder does, and by which keys its config.json says so.
Source: models/*/configuration_*.py and modeling_*.py of transformers 5.24.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, get_args

from tsp_jax.config import LayerKind, ModelConfig, RopeKind
from tsp_jax.errors import ConfigError

Mixed = Literal["", "max_window_layers", "alternating", "sliding_window_pattern", "no_rope_layers"]
"""what says of which kinds layers are if `layer_types` is absent, mostly a key; empty: all layers are alike"""


class Key(NamedTuple):
    """A key of config.json that gives a field of ModelConfig."""

    key: str
    read: Callable[[Any], Any] = lambda value: value
    """value of the key -> value of the field"""
    write: Callable[[Any], Any] = lambda value: value
    """value of the field -> value of the key"""


class ExpertsFormat(NamedTuple):
    """How the folders of a family hold a mixture of experts in every layer, whose scores are softmax."""

    number: tuple[str, ...]
    """keys of the number of experts; the first is written"""
    tensors: Literal["mlp", "block_sparse_moe", "input_linear", "gate_up_proj"]
    """which tensors hold the router and the experts: a key of `tsp_jax.hf.names.EXPERTS`"""
    d_ff: str = "intermediate_size"
    """key of the width of an expert"""
    normalize: bool | None = None
    """whether the weights of a token sum to 1, in all models; None: the key norm_topk_prob says so"""
    biases: bool = False
    """the router and the experts have biases"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """What the models of a family have in common, and how they may differ."""

    architecture: str
    """class of transformers, as `architectures` in config.json names it"""
    defaults: Mapping[str, Any]
    """key -> default of the class, where it is not that of `tsp_jax.hf.config.Keys`"""
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """field of ModelConfig -> its value in all models of the family, where it is not the field's default"""
    keys: Mapping[str, Key] = dataclasses.field(default_factory=dict)
    """field of ModelConfig -> the key that gives it, for fields that not every family has"""
    activation: str = "hidden_act"
    """key of the activation, which `fields` precedes"""
    scaled_embedding: bool = False
    """embeddings are multiplied by the square root of d_model"""
    kinds: tuple[LayerKind, ...] = ("full",)
    """kinds of layers that a model may have"""
    mixed: Mixed = ""
    rope_kinds: tuple[RopeKind, ...] = get_args(RopeKind)
    rope_aliases: Mapping[str, RopeKind] = dataclasses.field(default_factory=dict)
    """other names of kinds of RoPE"""
    partial_rope: bool = False
    """a part of each head may be rotated"""
    rope_parameters: Mapping[str, Any] | None = None
    """those of a model whose config.json gives neither them nor rope_scaling; None: rope_type default"""
    two_ropes: bool = False
    """layers with a window have a RoPE of their own"""
    whole_heads: bool = False
    """transformers demands that the number of heads divides d_model"""
    experts: ExpertsFormat | None = None
    """None: each layer has one MLP"""
    shared_width: bool = False
    """heads share d_model: head_dim is d_model / num_heads"""
    fused: bool = False
    """one tensor holds the projections to queries, keys and values, another gate and up of the MLP"""
    quantizations: tuple[str, ...] = ()
    """values of quantization_config.quant_method whose weights are read; they are never written"""
    refused: Mapping[str, tuple[Any, str]] = dataclasses.field(default_factory=dict)
    """key that changes the mathematics -> (the only supported value, kind of model to use instead)"""


_SIZES = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": None}
_LLAMA = {**_SIZES, "vocab_size": 32_000, "intermediate_size": 11_008, "max_position_embeddings": 2048}
_QWEN = {
    **_SIZES, "vocab_size": 151_936, "intermediate_size": 22_016, "num_key_value_heads": 32, "sliding_window": 4096,
    "max_position_embeddings": 32_768,
}  # fmt: skip
_GEMMA = {
    "hidden_size": 2304, "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
    "intermediate_size": 9216, "sliding_window": 4096, "tie_word_embeddings": True,
}  # fmt: skip
_GEMMA_KEYS = {
    # transformers takes the square root of the key, a whole number
    "attention_scale": Key("query_pre_attn_scalar", lambda size: size**-0.5, lambda scale: round(scale**-2)),
    "logits_softcap": Key("final_logit_softcapping"),
}
_GRANITE_KEYS = {
    "embedding_scale": Key("embedding_multiplier"), "residual_scale": Key("residual_multiplier"),
    "attention_scale": Key("attention_multiplier"),
    "logits_scale": Key("logits_scaling", lambda divisor: 1.0 / divisor, lambda scale: 1.0 / scale),
}  # fmt: skip
_CAUSAL = {"use_bidirectional_attention": (False, "with causal attention")}

FAMILIES: dict[str, Family] = {
    "llama": Family(architecture="LlamaForCausalLM", defaults=_LLAMA, whole_heads=True),
    "mistral": Family(
        architecture="MistralForCausalLM", kinds=("full", "sliding"),
        defaults={
            **_SIZES, "vocab_size": 32_000, "intermediate_size": 14_336, "num_key_value_heads": 8,
            "sliding_window": 4096, "max_position_embeddings": 131_072,
        },
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM", defaults=_QWEN, fields={"qkv_bias": True}, kinds=("full", "sliding"),
        mixed="max_window_layers",
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM", defaults={**_QWEN, "head_dim": 128}, fields={"qk_norm": True},
        kinds=("full", "sliding"), mixed="max_window_layers",
    ),
    "gemma2": Family(
        architecture="Gemma2ForCausalLM", activation="hidden_activation", scaled_embedding=True, whole_heads=True,
        defaults={
            **_GEMMA, "vocab_size": 256_000, "max_position_embeddings": 8192,
            "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0,
        },
        fields={"norms": "both", "norm_unit_offset": True},
        keys={**_GEMMA_KEYS, "attention_softcap": Key("attn_logit_softcapping")},
        kinds=("full", "sliding"), mixed="alternating", refused=_CAUSAL,
    ),
    "gemma3_text": Family(
        architecture="Gemma3ForCausalLM", activation="hidden_activation", scaled_embedding=True, whole_heads=True,
        defaults={
            **_GEMMA, "vocab_size": 262_208, "max_position_embeddings": 131_072,
            "rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0,
        },
        fields={"norms": "both", "norm_unit_offset": True, "qk_norm": True},
        keys=_GEMMA_KEYS, kinds=("full", "sliding"), mixed="sliding_window_pattern", two_ropes=True,
        refused={**_CAUSAL, "attn_logit_softcapping": (None, "without it: transformers does not apply it")},
    ),
    "phi3": Family(
        architecture="Phi3ForCausalLM", kinds=("full", "sliding"), fused=True, partial_rope=True,
        defaults={
            **_SIZES, "vocab_size": 32_064, "hidden_size": 3072, "intermediate_size": 8192, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096, "original_max_position_embeddings": 4096,
        },
        rope_kinds=("none", "longrope"), rope_aliases={"su": "longrope", "yarn": "longrope"},
    ),
    "mixtral": Family(
        architecture="MixtralForCausalLM", kinds=("full", "sliding"),
        experts=ExpertsFormat(("num_local_experts", "num_experts"), "block_sparse_moe", normalize=True),
        defaults={
            **_SIZES, "vocab_size": 32_000, "intermediate_size": 14_336, "num_key_value_heads": 8,
            "max_position_embeddings": 131_072, "rms_norm_eps": 1e-5, "rope_theta": 1_000_000.0,
            "num_local_experts": 8,
        },
    ),
    "qwen3_moe": Family(
        architecture="Qwen3MoeForCausalLM", fields={"qk_norm": True},
        experts=ExpertsFormat(("num_experts", "num_local_experts"), "mlp", d_ff="moe_intermediate_size"),
        defaults={
            "vocab_size": 151_936, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 24,
            "num_attention_heads": 32, "num_key_value_heads": 4, "max_position_embeddings": 32_768,
            "sliding_window": 4096, "use_sliding_window": False, "num_experts": 128, "num_experts_per_tok": 8,
        },
        refused={
            "decoder_sparse_step": (1, "whose layers all have experts"),
            "mlp_only_layers": ([], "whose layers all have experts"),
        },
    ),
    "olmoe": Family(
        architecture="OlmoeForCausalLM", fields={"qk_norm": True, "qk_norm_width": "all"}, shared_width=True,
        experts=ExpertsFormat(("num_experts", "num_local_experts"), "mlp"),
        defaults={
            "vocab_size": 50_304, "hidden_size": 2048, "intermediate_size": 2048, "num_hidden_layers": 16,
            "num_attention_heads": 16, "num_key_value_heads": None, "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5, "num_experts": 64, "num_experts_per_tok": 8,
        },
        refused={"clip_qkv": (None, "whose queries, keys and values are not clipped")},
    ),
    "granitemoe": Family(
        architecture="GraniteMoeForCausalLM", defaults={**_LLAMA, "num_local_experts": 8}, keys=_GRANITE_KEYS,
        experts=ExpertsFormat(("num_local_experts",), "input_linear", normalize=True),
    ),
    "gpt_oss": Family(
        architecture="GptOssForCausalLM", kinds=("full", "sliding"), mixed="alternating", quantizations=("mxfp4",),
        experts=ExpertsFormat(("num_local_experts", "num_experts"), "gate_up_proj", normalize=True, biases=True),
        defaults={
            "vocab_size": 201_088, "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 36,
            "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "sliding_window": 128,
            "max_position_embeddings": 131_072, "rms_norm_eps": 1e-5, "rope_theta": 150_000.0,
            "num_local_experts": 128, "num_experts_per_tok": 4,
        },
        rope_parameters={
            "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        fields={"qkv_bias": True, "out_bias": True, "attention_sinks": True, "activation": "clamped_swiglu"},
        refused={
            "attention_bias": (True, "with biases"), "swiglu_alpha": (1.702, "with 1.702"),
            "swiglu_limit": (7.0, "with 7.0"),
        },
    ),
    "smollm3": Family(
        architecture="SmolLM3ForCausalLM", kinds=("full", "sliding", "full_nope"), mixed="no_rope_layers",
        defaults={
            "vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 11_008, "num_hidden_layers": 36,
            "num_attention_heads": 16, "num_key_value_heads": 4, "max_position_embeddings": 32_768,
            "tie_word_embeddings": True, "rope_theta": 2_000_000.0,
        },
    ),
    "granite": Family(
        architecture="GraniteForCausalLM", defaults=_LLAMA, keys=_GRANITE_KEYS,
    ),
    "olmo2": Family(
        architecture="Olmo2ForCausalLM", defaults={**_LLAMA, "vocab_size": 50_304, "rms_norm_eps": 1e-5},
        fields={"norms": "post", "qk_norm": True, "qk_norm_width": "all"},
    ),
}  # fmt: skip
"""model_type -> the family. A model that several could describe is written as the first of them"""


# ------------------------------------------------------------------------------------------------ the family of a model

VARIANTS = (
    "qkv_bias", "out_bias", "qk_norm", "qk_norm_width", "norms", "norm_unit_offset", "embedding_scale",
    "residual_scale", "logits_scale", "logits_softcap", "attention_scale", "attention_softcap", "attention_sinks",
)  # fmt: skip
"""fields of ModelConfig in which families differ, beside layers and RoPE"""
_PLAIN = {field.name: field.default for field in dataclasses.fields(ModelConfig)}


def choose_family(config: ModelConfig, preferred: Any = None) -> str:
    """Returns the model_type of the first family that describes a model, `preferred` first.

    Raises:
      ConfigError: no family does; the error names a field in which the model differs from the nearest family.
    """
    of_kind = [name for name, family in FAMILIES.items() if bool(family.experts) == bool(config.experts.number)]
    order = [preferred] if isinstance(preferred, str) and preferred in FAMILIES else []
    if config.rope_scaling.kind == "longrope":
        order.append("phi3")  # other classes of transformers compute it too, but no model of theirs has it
    wrong = {name: misfits(FAMILIES[name], config) for name in (*order, *of_kind) if name in of_kind}
    nearest = min(wrong, key=lambda name: len(wrong[name]))
    if not wrong[nearest]:
        return nearest
    field, fits = next(iter(wrong[nearest].items()))
    value = functools.reduce(getattr, field.split("."), config)
    raise ConfigError(
        f"model.{field}={value} has no place in config.json of {nearest}, the nearest of {', '.join(of_kind)}; "
        f"use model.{field}={fits}"
    )


def misfits(family: Family, config: ModelConfig) -> dict[str, Any]:
    """The fields by which a model is not of this family, and for each a value that fits."""
    fixed = {field: family.fields.get(field, _PLAIN[field]) for field in VARIANTS if field not in family.keys}
    if family.scaled_embedding:
        fixed["embedding_scale"] = math.sqrt(config.d_model)
    if "activation" in family.fields or config.activation not in ("silu", "gelu"):
        fixed["activation"] = family.fields.get("activation", "silu")
    wrong = {field: value for field, value in fixed.items() if not _equal(getattr(config, field), value)}
    for field, key in family.keys.items():
        value = getattr(config, field)
        if value is not None and not _equal(again := key.read(key.write(value)), value):
            wrong[field] = again
    sliding = "sliding" in config.period
    if not set(config.period) <= set(family.kinds) or (len(config.period) > 1 and not family.mixed):
        wrong["layer_kinds" if config.layer_kinds else "window"] = () if config.layer_kinds else None
    if (config.local_rope_theta is not None) != (family.two_ropes and sliding):
        wrong["local_rope_theta"] = 10_000.0 if family.two_ropes and sliding else None
    if config.rope_scaling.kind not in family.rope_kinds:
        wrong["rope_scaling.kind"] = " or ".join(family.rope_kinds)
    if config.rope_scaling.fraction != 1.0 and not family.partial_rope:
        wrong["rope_scaling.fraction"] = 1.0
    if (
        family.partial_rope
        and config.rope_scaling.kind == "longrope"
        and config.head_dim * config.num_heads != config.d_model
    ):
        # transformers counts the factors of heads that share d_model
        wrong["head_dim"] = max(2, config.d_model // config.num_heads)
    if family.experts:
        biases = family.experts.biases
        rule = {"scores": "softmax", "scale": 1.0, "shared": 0, "bias_rate": 0.0}
        rule |= {"router_bias": biases, "biases": biases}
        rule |= {} if family.experts.normalize is None else {"normalize": family.experts.normalize}
        wrong |= {f"experts.{name}": fits for name, fits in rule.items() if getattr(config.experts, name) != fits}
    if family.shared_width and config.head_dim * config.num_heads != config.d_model:
        wrong["head_dim"] = max(2, config.d_model // config.num_heads)
    if family.whole_heads and config.d_model % config.num_heads:
        wrong["d_model"] = -(-config.d_model // config.num_heads) * config.num_heads
    return wrong


def _equal(a: Any, b: Any) -> bool:
    return math.isclose(a, b, rel_tol=1e-12) if isinstance(a, float) and isinstance(b, float) else a == b
