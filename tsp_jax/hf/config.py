"""Read `config.json` of a Hugging Face folder as a ModelConfig, and write it from one.

A folder is read as transformers reads it. `model_type` names a class of transformers, whose defaults replace absent
keys. Every key of these classes is handled: keys in `_Keys` are read, keys in `REFUSED` may only have the value given
there, and keys in `IGNORED` do not change what the model computes. Keys unknown to the class are ignored, as in
transformers.
Source: models/{llama,mistral,qwen3}/configuration_*.py and configuration_utils.py of transformers 5.24.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from tsp_jax.config import Activation, DType, ModelConfig
from tsp_jax.errors import ConfigError
from tsp_jax.files import Count, Finite, Size, check_json, read_json
from tsp_jax.hf.rope import read_rope, rope_json

MAX_BYTES = 2**24
"""largest config.json, in bytes, that is read"""
FAMILIES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen3": "Qwen3ForCausalLM"}
"""model_type -> class of transformers, as `architectures` in config.json names it"""
_SIZES = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {
        **_SIZES, "vocab_size": 32_000, "intermediate_size": 11_008, "num_key_value_heads": None, "head_dim": None,
        "max_position_embeddings": 2048, "sliding_window": None,
    },
    "mistral": {
        **_SIZES, "vocab_size": 32_000, "intermediate_size": 14_336, "num_key_value_heads": 8, "head_dim": None,
        "max_position_embeddings": 131_072, "sliding_window": 4096,
    },
    "qwen3": {
        **_SIZES, "vocab_size": 151_936, "intermediate_size": 22_016, "num_key_value_heads": 32, "head_dim": 128,
        "max_position_embeddings": 32_768, "sliding_window": 4096,
    },
}  # fmt: skip
"""model_type -> key -> default of the family's class; `_Keys` has the defaults that all families share"""
REFUSED = {
    "attention_bias": (False, "without biases"),
    "mlp_bias": (False, "without biases"),
    "is_causal": (True, "with causal attention"),
    "attention_chunk_size": (None, "without chunks of attention"),
    "per_layer_config": (None, "whose layers are all alike"),
    "quantization_config": (None, "that is not quantized"),
    "compression_config": (None, "that is not quantized"),
}
"""key that changes the mathematics -> (the only supported value, kind of model to use instead)"""
IGNORED = {
    "attention_dropout": "of training alone",
    "pad_token_id": "its row of the table takes no gradient: of training alone",
    "pretraining_tp": "splits sums, which are the same up to rounding",
    "chunk_size_feed_forward": "splits work, not sums",
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
DTYPES: dict[str | None, DType] = {
    "float32": "float32", "bfloat16": "bfloat16", "float16": "bfloat16", None: "bfloat16",
}  # fmt: skip
"""dtype in config.json -> dtype that is used here if the caller does not choose one"""
FULL_ATTENTION = {"full_attention", "attention"}
"""names of layer types without a window; "attention" means "full_attention" to transformers"""
SIZES = {
    "vocab_size": "vocab_size", "d_model": "hidden_size", "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads", "d_ff": "intermediate_size",
}  # fmt: skip
"""field of ModelConfig -> key of config.json, for those that correspond one to one"""
CARRIED = ("bos_token_id", "eos_token_id", "pad_token_id")
"""keys of config.json without a field in ModelConfig, which an export copies from the source folder"""


class _Keys(msgspec.Struct):
    """The keys of config.json that are read, and their types."""

    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Size
    num_attention_heads: Size
    num_key_value_heads: Size | None
    """null: as many as num_attention_heads"""
    head_dim: Size | None
    """null: hidden_size // num_attention_heads"""
    max_position_embeddings: Size
    sliding_window: Count | None
    use_sliding_window: bool | None = None
    max_window_layers: Count = 28
    layer_types: list[str] | None = None
    hidden_act: str = "silu"
    rms_norm_eps: Finite = 1e-6
    initializer_range: Finite = 0.02
    tie_word_embeddings: bool = False
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    dtype: str | None = None
    torch_dtype: str | None = None
    """the older name of `dtype`; if both are present, `dtype` is used"""


def read_config(folder: str | Path) -> ModelConfig:
    """Reads `config.json`; raises ConfigError if it is missing or broken, or the model is not supported."""
    path, raw, family = _read(folder)
    keys = check_json(DEFAULTS[family] | raw, str(path), _Keys)
    _refuse(path, raw)
    window = _read_window(path, raw, family, keys)
    _read_dtype(path, keys)
    if keys.hidden_act not in ACTIVATIONS:
        value = f"hidden_act={keys.hidden_act[:80]}"
        raise ConfigError(f"{path}: {value} is not supported; use {', '.join(ACTIVATIONS)}")
    try:
        theta, scaling = read_rope(str(path), DEFAULTS[family] | raw)
        return ModelConfig(
            **{field: getattr(keys, key) for field, key in SIZES.items()},
            num_kv_heads=keys.num_key_value_heads or keys.num_attention_heads,
            head_dim=keys.head_dim or keys.hidden_size // keys.num_attention_heads,
            activation=ACTIVATIONS[keys.hidden_act],
            qk_norm=family == "qwen3",
            window=window,
            tie_embeddings=keys.tie_word_embeddings,
            rope_theta=theta,
            rope_scaling=scaling,
            norm_eps=keys.rms_norm_eps,
            init_std=keys.initializer_range,
        )
    except ConfigError as error:
        raise error if str(path) in str(error) else ConfigError(f"{path}: {error}") from None


def read_dtype(folder: str | Path) -> DType:
    """Returns float32 if `config.json` gives it as the dtype of the weights, else bfloat16."""
    path, raw, family = _read(folder)
    return _read_dtype(path, check_json(DEFAULTS[family] | raw, str(path), _Keys))


def _read(folder: str | Path) -> tuple[Path, dict[str, Any], str]:
    """Returns (path of config.json, its content, its model_type)."""
    path = Path(folder) / "config.json"
    raw = read_json(path, max_bytes=MAX_BYTES, advice="use a Hugging Face folder with an intact one")
    known = {name: family for family, name in FAMILIES.items()}
    names, family = raw.get("architectures"), raw.get("model_type")
    if names is not None and not (isinstance(names, list) and len(names) == 1 and names[0] in FAMILIES.values()):
        value = f"architectures={json.dumps(names):.80}"
        raise ConfigError(f"{path}: {value} is not supported; use {', '.join(known)}")
    family = known[names[0]] if family is None and names else family
    if not isinstance(family, str) or family not in FAMILIES:
        raise ConfigError(f"{path}: model_type={json.dumps(family):.80} is not supported; use {', '.join(FAMILIES)}")
    return path, raw, family


def _refuse(path: Path, raw: Mapping[str, Any]) -> None:
    for key, (plain, use) in REFUSED.items():
        if key in raw and raw[key] is not plain and raw[key] not in (None, {}):
            raise ConfigError(f"{path}: {key}={json.dumps(raw[key]):.80} is not supported; use a model {use}")


def _read_window(path: Path, raw: Mapping[str, Any], family: str, keys: _Keys) -> int | None:
    """The sliding window of all layers; None if no layer has one. Raises ConfigError if only some layers have one."""
    types, layers = keys.layer_types, keys.num_hidden_layers
    if types is None and family == "qwen3" and keys.use_sliding_window:
        full = min(keys.max_window_layers, layers)
        types = ["full_attention"] * full + ["sliding_attention"] * (layers - full)
    kinds = set(types or ()) - FULL_ATTENTION
    if types is not None and (len(types) != layers or (kinds and set(types) != {"sliding_attention"})):
        value = f"layer_types={json.dumps(types):.80}"
        if keys.layer_types is None:
            value = f"sliding_window={keys.sliding_window} from layer max_window_layers={keys.max_window_layers} on"
        raise ConfigError(
            f"{path}: {value} is not supported; use a model of {layers} layers (num_hidden_layers) that are all "
            "full_attention, or all sliding_attention"
        )
    if family == "llama" and keys.use_sliding_window is not False and keys.sliding_window is not None:
        raise ConfigError(
            f"{path}: sliding_window={keys.sliding_window} is not supported in a llama model; "
            "use model_type mistral, or sliding_window null"
        )
    if family != "mistral" and not kinds:
        return None
    if keys.sliding_window == 0 or (kinds and keys.sliding_window is None):
        raise ConfigError(
            f"{path}: sliding_window={json.dumps(keys.sliding_window)} is no window; use 4096, or full attention"
        )
    return keys.sliding_window


def _read_dtype(path: Path, keys: _Keys) -> DType:
    key = "torch_dtype" if keys.dtype is None else "dtype"
    name = getattr(keys, key)
    if name not in DTYPES:
        known = ", ".join(filter(None, DTYPES))
        raise ConfigError(f"{path}: {key}={json.dumps(name):.80} is not supported; use {known}")
    return DTYPES[name]


# ------------------------------------------------------------------------------------------------ writing


def config_json(config: ModelConfig, dtype: str, carried: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Returns the content of `config.json` for a model, plus those keys of `carried` that are in `CARRIED`."""
    for field in ("attention_scale", "attention_softcap", "attention_sinks"):
        if getattr(config, field):
            value = f"model.{field}={getattr(config, field)}"
            raise ConfigError(f"{value} has no place in config.json of {', '.join(FAMILIES)}; use a model without it")
    activation = {name: hf_name for hf_name, name in reversed(ACTIVATIONS.items())}[config.activation]
    family = "qwen3" if config.qk_norm else "llama"
    if family == "llama" and (config.window or config.d_model % config.num_heads):
        family = "mistral"  # with windows, and without transformers' demand that the heads divide the width
    windows = {"use_sliding_window": True, "max_window_layers": 0} if config.window and family == "qwen3" else {}
    return {
        "architectures": [FAMILIES[family]],
        "model_type": family,
        **{key: getattr(config, field) for field, key in SIZES.items()},
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": activation,
        "attention_bias": False,
        "sliding_window": config.window,
        **windows,
        "tie_word_embeddings": config.tie_embeddings,
        **rope_json(config, (carried or {}).get("max_position_embeddings")),
        "rms_norm_eps": config.norm_eps,
        "initializer_range": config.init_std,
        "torch_dtype": dtype,
        **{key: carried[key] for key in CARRIED if carried and key in carried},
    }
