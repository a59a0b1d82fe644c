"""Read `config.json` of a Hugging Face folder as a ModelConfig, and write it from one.

A folder is read as transformers reads it. `model_type` names a class of transformers, a row of `FAMILIES`, whose
defaults replace absent keys. Every key of these classes is handled: keys in `Keys` are read, keys in `REFUSED` may only
have the value given there (a family may ask for another one), and keys in `IGNORED` do not change what the model
computes. Keys unknown to the class are ignored, as in transformers.
Source: configuration_utils.py of transformers 5.24.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec

from tsp_jax.config import Activation, DType, ExpertsConfig, ModelConfig
from tsp_jax.errors import ConfigError
from tsp_jax.files import Count, Finite, Size, check_json, read_json
from tsp_jax.hf.families import FAMILIES, Family, choose_family
from tsp_jax.hf.layers import layers_json, read_layers
from tsp_jax.hf.rope import CONTEXT, read_rope, read_two_ropes, rope_json

MAX_BYTES = 2**24
"""largest config.json, in bytes, that is read"""
REFUSED = {
    "attention_bias": (False, "without biases"),
    "mlp_bias": (False, "without biases"),
    "is_causal": (True, "with causal attention"),
    "attention_chunk_size": (None, "without chunks of attention"),
    "per_layer_config": (None, "whose layers are all alike"),
    "compression_config": (None, "that is not quantized"),
}
"""key that changes the mathematics -> (the only supported value, kind of model to use instead)"""
IGNORED = {
    **dict.fromkeys(("attention_dropout", "resid_pdrop", "embd_pdrop"), "of training alone"),
    "pad_token_id": "its row of the table takes no gradient: of training alone",
    "pretraining_tp": "splits sums, which are the same up to rounding",
    "chunk_size_feed_forward": "splits work, not sums",
    **dict.fromkeys(("output_router_logits", "router_aux_loss_coef"), "of training: model.experts.balance_loss"),
    "router_jitter_noise": "of training alone",
    "bos_token_id": "of tokenizers",
    "eos_token_id": "ends a text: tokenizer.read_stop_tokens",
    **dict.fromkeys(("use_cache", "output_hidden_states", "return_dict"), "of what calls return"),
    **dict.fromkeys(("is_encoder_decoder", "id2label", "label2id", "problem_type"), "of other heads"),
    "transformers_version": "of the file",
}
"""key of transformers' classes that does not change what the model computes -> why not"""
ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu", "swish": "silu",
    "gelu_pytorch_tanh": "gelu", "gelu_new": "gelu", "gelu_fast": "gelu", "gelu_python_tanh": "gelu",
}  # fmt: skip
"""activation in config.json -> ModelConfig.activation, whose gelu is the tanh approximation"""
WRITTEN: dict[Activation, str] = {"silu": "silu", "gelu": "gelu_pytorch_tanh", "clamped_swiglu": "silu"}
"""ModelConfig.activation -> activation in config.json"""
DTYPES: dict[str | None, DType] = {
    "float32": "float32", "bfloat16": "bfloat16", "float16": "bfloat16", None: "bfloat16",
}  # fmt: skip
"""dtype in config.json -> dtype that is used here if the caller does not choose one"""
SIZES = {
    "vocab_size": "vocab_size", "d_model": "hidden_size", "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads", "d_ff": "intermediate_size", "tie_embeddings": "tie_word_embeddings",
    "norm_eps": "rms_norm_eps", "init_std": "initializer_range",
}  # fmt: skip
"""field of ModelConfig -> key of config.json, for those that correspond one to one in every family"""
CARRIED = ("bos_token_id", "eos_token_id", "pad_token_id")
"""keys of config.json without a field in ModelConfig, which an export copies from the source folder"""
_Positive = Annotated[float, msgspec.Meta(gt=0, le=1.7976931348623157e308)]


class Keys(msgspec.Struct):
    """The keys of config.json that are read, and their types; a family may have other defaults."""

    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Size
    num_attention_heads: Size
    max_position_embeddings: Size
    num_key_value_heads: Size | None = None
    """null: as many as num_attention_heads"""
    head_dim: Size | None = None
    """null: hidden_size // num_attention_heads"""
    original_max_position_embeddings: Size | None = None
    """read with RoPE"""
    sliding_window: Count | None = None
    use_sliding_window: bool | None = None
    max_window_layers: Count = 28
    sliding_window_pattern: Size = 6
    layer_types: list[str] | None = None
    no_rope_layers: list[int] | None = None
    no_rope_layer_interval: Size = 4
    hidden_act: str = "silu"
    hidden_activation: str = "gelu_pytorch_tanh"
    rms_norm_eps: Finite = 1e-6
    initializer_range: Finite = 0.02
    tie_word_embeddings: bool = False
    query_pre_attn_scalar: Size = 256
    attn_logit_softcapping: Finite | None = None
    final_logit_softcapping: Finite | None = None
    embedding_multiplier: Finite = 1.0
    residual_multiplier: Finite = 1.0
    attention_multiplier: Finite = 1.0
    logits_scaling: _Positive = 1.0
    num_experts: Size | None = None
    num_local_experts: Size | None = None
    num_experts_per_tok: Size = 2
    moe_intermediate_size: Size = 768
    norm_topk_prob: bool = False
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    quantization_config: dict[str, Any] | None = None
    dtype: str | None = None
    torch_dtype: str | None = None
    """the older name of `dtype`; if both are present, `dtype` is used"""


def read_config(folder: str | Path) -> ModelConfig:
    """Reads `config.json`; raises ConfigError if it is missing or broken, or the model is not supported."""
    path, raw, model_type = _read(folder)
    family = FAMILIES[model_type]
    keys = check_json({**family.defaults, **raw}, str(path), Keys)
    _refuse(path, raw, family)
    layers = read_layers(path, family, keys)
    _read_dtype(path, keys)
    _read_quantization(path, family, keys)
    try:
        return ModelConfig(
            **{field: getattr(keys, key) for field, key in _sizes(family).items()},
            experts=_read_experts(path, raw, family, keys),
            num_kv_heads=keys.num_key_value_heads or keys.num_attention_heads,
            head_dim=_head_dim(keys),
            **layers,
            **_read_variants(path, family, keys),
            **_read_rope(path, raw, model_type, layers["window"]),
        )
    except ConfigError as error:
        raise error if str(path) in str(error) else ConfigError(f"{path}: {error}") from None


def read_dtype(folder: str | Path) -> DType:
    """Returns float32 if `config.json` gives it as the dtype of the weights, else bfloat16."""
    path, raw, model_type = _read(folder)
    return _read_dtype(path, check_json({**FAMILIES[model_type].defaults, **raw}, str(path), Keys))


def read_quantization(folder: str | Path) -> str:
    """Returns how the weights of a folder's experts are quantized, such as mxfp4; empty if they are not."""
    path, raw, model_type = _read(folder)
    family = FAMILIES[model_type]
    return _read_quantization(path, family, check_json({**family.defaults, **raw}, str(path), Keys))


def read_model_type(folder: str | Path) -> str:
    """Returns the family of a folder's model, a key of `FAMILIES`."""
    return _read(folder)[2]


def _read(folder: str | Path) -> tuple[Path, dict[str, Any], str]:
    """Returns (path of config.json, its content, its model_type)."""
    path = Path(folder) / "config.json"
    raw = read_json(path, max_bytes=MAX_BYTES, advice="use a Hugging Face folder with an intact one")
    known = {family.architecture: model_type for model_type, family in FAMILIES.items()}
    names, model_type = raw.get("architectures"), raw.get("model_type")
    if names is not None and not (isinstance(names, list) and len(names) == 1 and names[0] in list(known)):
        value = f"architectures={json.dumps(names):.80}"
        raise ConfigError(f"{path}: {value} is not supported; use {', '.join(known)}")
    model_type = known[names[0]] if model_type is None and names else model_type
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        value = f"model_type={json.dumps(model_type):.80}"
        raise ConfigError(f"{path}: {value} is not supported; use {', '.join(FAMILIES)}")
    return path, raw, model_type


def _refuse(path: Path, raw: Mapping[str, Any], family: Family) -> None:
    for key, (plain, use) in {**REFUSED, **family.refused}.items():
        same = raw.get(key) == plain and isinstance(raw.get(key), bool) == isinstance(plain, bool)
        if key in raw and not same and raw[key] not in (None, {}):
            raise ConfigError(f"{path}: {key}={json.dumps(raw[key]):.80} is not supported; use a model {use}")


def _read_quantization(path: Path, family: Family, keys: Keys) -> str:
    if not keys.quantization_config:
        return ""
    method = keys.quantization_config.get("quant_method")
    if method in list(family.quantizations):
        return method
    value, known = f"quantization_config.quant_method={json.dumps(method):.80}", ("", *family.quantizations)
    raise ConfigError(
        f"{path}: {value} is not supported; use a model that is not quantized{', or one in '.join(known)}"
    )


def _head_dim(keys: Keys) -> int:
    return keys.head_dim or keys.hidden_size // keys.num_attention_heads


def _sizes(family: Family) -> dict[str, str]:
    """`SIZES` of a family."""
    return SIZES | ({"d_ff": family.experts.d_ff} if family.experts else {})


def _read_experts(path: Path, raw: Mapping[str, Any], family: Family, keys: Keys) -> ExpertsConfig:
    if family.experts is None:
        return ExpertsConfig()
    names = family.experts.number
    given = [name for name in names if name in raw] or [names[0]]
    number = getattr(keys, given[0])
    for name in given:
        if (value := getattr(keys, name)) is None or value != number:
            use = f"{names[0]}={number or 8}"
            raise ConfigError(f"{path}: {name}={json.dumps(value)} is not the number of experts; use {use} alone")
    normalize, biases = family.experts.normalize, family.experts.biases
    return ExpertsConfig(
        number=number, per_token=keys.num_experts_per_tok, router_bias=biases, biases=biases,
        normalize=keys.norm_topk_prob if normalize is None else normalize,
    )  # fmt: skip


def _experts_json(config: ModelConfig, family: Family) -> dict[str, Any]:
    """The keys of config.json about experts, apart from their width."""
    if family.experts is None:
        return {}
    rule = config.experts
    normalize = {"norm_topk_prob": rule.normalize} if family.experts.normalize is None else {}
    return {family.experts.number[0]: rule.number, "num_experts_per_tok": rule.per_token, **normalize}


def _read_variants(path: Path, family: Family, keys: Keys) -> dict[str, Any]:
    """The activation and the other fields in which families differ, except for layers and RoPE."""
    activation = getattr(keys, family.activation)
    if activation not in ACTIVATIONS and "activation" not in family.fields:
        value = f"{family.activation}={activation[:80]}"
        raise ConfigError(f"{path}: {value} is not supported; use {', '.join(ACTIVATIONS)}")
    given = {field: getattr(keys, key.key) for field, key in family.keys.items()}
    fields = {field: None if value is None else family.keys[field].read(value) for field, value in given.items()}
    if _head_dim(keys) and fields.get("attention_scale") == _head_dim(keys) ** -0.5:
        fields["attention_scale"] = None
    if family.scaled_embedding:
        fields["embedding_scale"] = math.sqrt(keys.hidden_size)
    return {"activation": ACTIVATIONS.get(activation), **family.fields, **fields}


def _read_rope(path: Path, raw: Mapping[str, Any], model_type: str, window: int | None) -> dict[str, Any]:
    family, local = FAMILIES[model_type], None
    raw = {**family.defaults, **raw}
    if not raw.get("rope_scaling") and raw.get("rope_parameters") is None:
        raw["rope_parameters"] = family.rope_parameters
    if family.two_ropes:
        theta, scaling, local = read_two_ropes(str(path), raw)
    else:
        theta, scaling = read_rope(str(path), raw, aliases=family.rope_aliases, partial=family.partial_rope)
    if scaling.kind not in family.rope_kinds:
        known = ", ".join("default" if kind == "none" else kind for kind in family.rope_kinds)
        raise ConfigError(f"{path}: rope_type={scaling.kind} is not supported in a {model_type} model; use {known}")
    return {"rope_theta": theta, "rope_scaling": scaling, "local_rope_theta": None if window is None else local}


def _read_dtype(path: Path, keys: Keys) -> DType:
    key = "torch_dtype" if keys.dtype is None else "dtype"
    name = getattr(keys, key)
    if name not in DTYPES:
        known = ", ".join(filter(None, DTYPES))
        raise ConfigError(f"{path}: {key}={json.dumps(name):.80} is not supported; use {known}")
    return DTYPES[name]


# ------------------------------------------------------------------------------------------------ writing


def config_json(config: ModelConfig, dtype: str, carried: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Returns the content of `config.json` for a model.

    Args:
      config: the model.
      dtype: of the weights.
      carried: the content of the source folder's config.json. The keys in `CARRIED` are copied from it, its family is
        kept if it describes the model, and its longest context if RoPE does not lengthen it.

    Raises:
      ConfigError: no family describes the model.
    """
    carried = carried or {}
    model_type = choose_family(config, carried.get("model_type"))
    family, context = FAMILIES[model_type], carried.get("max_position_embeddings")
    scale = config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
    fields = {field: getattr(config, field) for field in family.keys} | {"attention_scale": scale}
    fields = {
        key.key: None if fields[field] is None else key.write(fields[field]) for field, key in family.keys.items()
    }
    return {
        "architectures": [family.architecture],
        "model_type": model_type,
        **{key: getattr(config, field) for field, key in _sizes(family).items()},
        **_experts_json(config, family),
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        family.activation: WRITTEN[config.activation],
        **({"attention_bias": config.out_bias} if config.out_bias or not config.qkv_bias else {}),
        **layers_json(config, family),
        **fields,
        **rope_json(
            config,
            context if isinstance(context, int) else None,
            context_beside=CONTEXT in family.defaults,
            plain=None if family.rope_parameters is None else {"rope_type": "default"},
        ),
        "torch_dtype": dtype,
        "pad_token_id": None,  # the default of some classes lies outside a smaller vocabulary
        **{key: carried[key] for key in CARRIED if key in carried},
    }
