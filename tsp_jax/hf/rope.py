"""Read RoPE's parameters from `config.json`, with the precedence of transformers, and write them.

Source: `RotaryEmbeddingConfigMixin` of transformers 5.24, modeling_rope_utils.py.
"""

import json
from collections.abc import Mapping
from typing import Any, get_args

import msgspec

from tsp_jax.config import ModelConfig, RopeKind, RopeScaling
from tsp_jax.errors import ConfigError
from tsp_jax.files import Finite, Size, check_json

FACTORS = ("factor", "low_freq_factor", "high_freq_factor")
"""fields of RopeScaling that llama3 needs, which have the same names in config.json"""
CONTEXT = "original_max_position_embeddings"


class _Rope(msgspec.Struct):
    """RoPE's parameters, merged from all sources.

    Parameters with a default may be absent here. `need` raises ConfigError if one that `rope_type` needs is absent.
    """

    rope_type: str
    rope_theta: Finite = 10_000.0
    partial_rotary_factor: Finite = 1.0
    factor: Finite | None = None
    low_freq_factor: Finite | None = None
    high_freq_factor: Finite | None = None
    original_max_position_embeddings: Size | None = None

    def need(self, source: str, key: str) -> Any:
        value = getattr(self, key)
        if value is None:
            raise ConfigError(f"{source}: {key} is missing for rope_type={self.rope_type}; use a complete config.json")
        return value


def read_rope(source: str, raw: Mapping[str, Any], context: int) -> tuple[float, RopeScaling]:
    """Returns rope_theta and the scaling of a config.json.

    If several keys give the same parameter, the precedence is that of transformers. `rope_scaling` replaces
    `rope_parameters` as a whole. The nested `rope_theta` precedes the top-level one, and `rope_type` precedes `type`.
    For `CONTEXT` the top-level key precedes the nested one, and that precedes the argument `context`.

    Args:
      source: names the file in errors.
      raw: the content of config.json, whose `rope_scaling` and `rope_parameters` are objects or null.
      context: max_position_embeddings.

    Raises:
      ConfigError: a parameter is missing or not a number, or a kind of scaling is not supported.
    """
    given = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if any(isinstance(value, dict) for value in given.values()):
        raise ConfigError(f"{source}: rope={json.dumps(given):.80} is not supported; use a model with one RoPE")
    beside = {key: raw[key] for key in ("rope_theta", "partial_rotary_factor") if key in raw}
    merged = {"rope_type": given.get("type", "default"), CONTEXT: context, **beside, **given}
    if CONTEXT in raw:
        merged[CONTEXT] = raw[CONTEXT]
    rope = check_json(merged, source, _Rope)
    if rope.partial_rotary_factor != 1.0:
        value = f"partial_rotary_factor={rope.partial_rotary_factor}"
        raise ConfigError(f"{source}: {value} is not supported; use a model that rotates whole heads")
    return rope.rope_theta, _scaling(source, rope)


def _scaling(source: str, rope: _Rope) -> RopeScaling:
    if rope.rope_type == "default":
        return RopeScaling()
    if rope.rope_type == "linear":
        return RopeScaling(kind="linear", factor=rope.need(source, "factor"))
    if rope.rope_type == "llama3":
        factors = {key: rope.need(source, key) for key in FACTORS}
        return RopeScaling(kind="llama3", original_context=rope.need(source, CONTEXT), **factors)
    known = ", ".join(("default", *get_args(RopeKind)[1:]))
    raise ConfigError(f"{source}: rope_type={json.dumps(rope.rope_type):.80} is not supported; use {known}")


def rope_json(config: ModelConfig) -> dict[str, Any]:
    """Returns the keys of config.json for a model's RoPE, in a form that every version of transformers reads."""
    scaling = config.rope_scaling
    rope = {
        "none": None,
        "linear": {"rope_type": "linear", "factor": scaling.factor},
        "llama3": {
            "rope_type": "llama3",
            **{key: getattr(scaling, key) for key in FACTORS},
            CONTEXT: scaling.original_context,
        },
    }
    return {"rope_theta": config.rope_theta, "rope_scaling": rope[scaling.kind]}
