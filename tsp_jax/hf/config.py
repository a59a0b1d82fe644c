"""`config.json` of a Hugging Face folder: read as a ModelConfig, and written from one."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from tsp_jax.config import Activation, ModelConfig, RopeKind, RopeScaling
from tsp_jax.errors import ConfigError

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen3ForCausalLM")
ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu"}
"""activation in config.json -> ModelConfig.activation, whose gelu is the tanh approximation"""
SIZES = {
    "vocab_size": "vocab_size", "d_model": "hidden_size", "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads", "d_ff": "intermediate_size",
}  # fmt: skip
"""field of ModelConfig -> key of config.json that every folder has"""
LLAMA3_FACTORS = ("factor", "low_freq_factor", "high_freq_factor")
LLAMA3_CONTEXT = "original_max_position_embeddings"
CARRIED = ("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings")
"""keys of config.json without a field in ModelConfig, which an export copies from the source folder"""


class _Json:
    """The JSON object of a file; its values are checked when they are read."""

    def __init__(self, path: Path, raw: Mapping[str, Any]):
        self.path, self.raw = path, raw

    def number(self, key: str, kind: type, default: Any = None) -> Any:
        value = self.raw.get(key)
        value = default if value is None else value
        if value is None:
            raise ConfigError(f"{self.path}: {key} is missing; use a complete config.json")
        if type(value) not in (int, float) or not math.isfinite(value) or kind(value) != value:
            raise ConfigError(
                f"{self.path}: {key}={json.dumps(value):.80} is not a valid {kind.__name__}; use {kind(1)}"
            )
        return kind(value)

    def refuse(self, key: str, reason: str) -> None:
        if self.raw.get(key):
            text = json.dumps(self.raw[key])
            raise ConfigError(f"{self.path}: {key}={text:.80} is not supported; use a model {reason}")


def read_json(path: Path) -> dict[str, Any]:
    """Reads a file that holds a JSON object; raises ConfigError if it is missing or broken."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"{path} does not exist; use a Hugging Face folder that holds it") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON ({error}); use an intact copy") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds no JSON object; use an intact copy")
    return raw


def read_config(folder: str | Path) -> ModelConfig:
    """Reads `config.json`; raises ConfigError if it is missing or broken, or the model is not supported."""
    path = Path(folder) / "config.json"
    source = _Json(path, read_json(path))
    architecture = _architecture(source)
    _refuse_options(source, architecture)
    sizes = {field: source.number(key, int) for field, key in SIZES.items()}
    rope = _rope(source)
    qwen, llama = architecture == "Qwen3ForCausalLM", architecture == "LlamaForCausalLM"
    head_dim = None if qwen or sizes["d_model"] % sizes["num_heads"] else sizes["d_model"] // sizes["num_heads"]
    try:
        return ModelConfig(
            **sizes,
            num_kv_heads=source.number("num_key_value_heads", int, sizes["num_heads"] if llama else None),
            head_dim=source.number("head_dim", int, head_dim),
            activation=_activation(source),
            qk_norm=qwen,
            tie_embeddings=bool(source.raw.get("tie_word_embeddings", False)),
            rope_theta=rope.number("rope_theta", float, 10_000.0),
            rope_scaling=_rope_scaling(rope),
            norm_eps=source.number("rms_norm_eps", float),
            init_std=source.number("initializer_range", float, 0.02),
        )
    except ConfigError as error:
        raise error if str(path) in str(error) else ConfigError(f"{path}: {error}") from None


def _architecture(source: _Json) -> str:
    names = source.raw.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or names[0] not in ARCHITECTURES:
        raise ConfigError(
            f"{source.path}: architectures={json.dumps(names):.80} is not supported; use {', '.join(ARCHITECTURES)}"
        )
    return names[0]


def _refuse_options(source: _Json, architecture: str) -> None:
    source.refuse("attention_bias", "without biases")
    source.refuse("mlp_bias", "without biases")
    source.refuse("quantization_config", "that is not quantized")
    mistral = architecture == "MistralForCausalLM"
    if mistral and "sliding_window" not in source.raw:
        raise ConfigError(f"{source.path}: sliding_window is missing, which means 4096; use a model without windows")
    if mistral or source.raw.get("use_sliding_window"):
        source.refuse("sliding_window", "without windows")
    if set(source.raw.get("layer_types") or ()) - {"full_attention"}:
        source.refuse("layer_types", "whose layers are all full_attention")


def _activation(source: _Json) -> Activation:
    name = source.raw.get("hidden_act", "silu")
    if name not in ACTIVATIONS:
        raise ConfigError(f"{source.path}: hidden_act={name} is not supported; use {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _rope(source: _Json) -> _Json:
    """RoPE options: newer folders keep all of them in `rope_parameters`, older ones some in `rope_scaling`."""
    rope = source.raw.get("rope_parameters") or source.raw.get("rope_scaling") or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise ConfigError(f"{source.path}: rope={json.dumps(rope):.80} is not supported; use a model with one RoPE")
    merged = _Json(source.path, {**source.raw, **rope})
    if merged.number("partial_rotary_factor", float, 1.0) != 1.0:
        merged.refuse("partial_rotary_factor", "that rotates whole heads")
    return merged


def _rope_scaling(rope: _Json) -> RopeScaling:
    kind = rope.raw.get("rope_type", rope.raw.get("type", "default"))
    if kind == "default":
        return RopeScaling()
    if kind == "linear":
        return RopeScaling(kind="linear", factor=rope.number("factor", float))
    if kind == "llama3":
        factors = {key: rope.number(key, float) for key in LLAMA3_FACTORS}
        return RopeScaling(kind="llama3", original_context=rope.number(LLAMA3_CONTEXT, int), **factors)
    known = ", ".join(("default", *get_args(RopeKind)[1:]))
    raise ConfigError(f"{rope.path}: rope_type={json.dumps(kind)} is not supported; use {known}")


# ------------------------------------------------------------------------------------------------ writing


def config_json(config: ModelConfig, dtype: str, carried: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Returns the content of `config.json` for a model, plus those keys of `carried` that are in `CARRIED`."""
    activation = {name: hf_name for hf_name, name in reversed(ACTIVATIONS.items())}[config.activation]
    family = "Qwen3" if config.qk_norm else "Llama"
    if family == "Llama" and config.d_model % config.num_heads:
        family = "Mistral"  # the same model, without transformers' demand that the heads divide the width
    return {
        "architectures": [f"{family}ForCausalLM"],
        "model_type": family.lower(),
        **{key: getattr(config, field) for field, key in SIZES.items()},
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": activation,
        "attention_bias": False,
        "sliding_window": None,
        "tie_word_embeddings": config.tie_embeddings,
        "rope_theta": config.rope_theta,
        "rope_scaling": _rope_json(config.rope_scaling),
        "rms_norm_eps": config.norm_eps,
        "initializer_range": config.init_std,
        "torch_dtype": dtype,
        **{key: carried[key] for key in CARRIED if carried and key in carried},
    }


def _rope_json(scaling: RopeScaling) -> dict[str, Any] | None:
    if scaling.kind == "none":
        return None
    if scaling.kind == "linear":
        return {"rope_type": "linear", "factor": scaling.factor}
    factors = {key: getattr(scaling, key) for key in LLAMA3_FACTORS}
    return {"rope_type": "llama3", **factors, LLAMA3_CONTEXT: scaling.original_context}
