"""Read RoPE's parameters from `config.json`, with the precedence of transformers, and write them.

Source: `RotaryEmbeddingConfigMixin` of transformers 5.24, modeling_rope_utils.py, and configuration_*.py of Phi-3 and
Gemma 3.
"""

import json
import math
from collections.abc import Mapping
from typing import Any, cast, get_args

import msgspec

from tsp_jax.config import ModelConfig, RopeKind, RopeScaling
from tsp_jax.config.rope import USED
from tsp_jax.errors import ConfigError
from tsp_jax.files import Finite, Size, check_json

CONTEXT = "original_max_position_embeddings"
FULL, SLIDING = "full_attention", "sliding_attention"
"""types of layers, for each of which `rope_parameters` of Gemma 3 has a RoPE of its own"""
KEYS = {"original_context": CONTEXT, "short_factors": "short_factor", "long_factors": "long_factor"}
"""field of RopeScaling -> its key, where the two differ"""
_KINDS = get_args(RopeKind)[1:]


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
    attention_factor: Finite | None = None
    beta_fast: Finite | None = None
    beta_slow: Finite | None = None
    truncate: bool = True
    mscale: Finite | None = None
    mscale_all_dim: Finite | None = None
    short_factor: list[Finite] | None = None
    long_factor: list[Finite] | None = None

    def need(self, source: str, field: str) -> Any:
        """The value of a field of RopeScaling."""
        key = KEYS.get(field, field)
        value = getattr(self, key)
        if value is None:
            raise ConfigError(f"{source}: {key} is missing for rope_type={self.rope_type}; use a complete config.json")
        return tuple(value) if isinstance(value, list) else value


def read_rope(
    source: str, raw: Mapping[str, Any], *, aliases: Mapping[str, RopeKind] = {}, partial: bool = False
) -> tuple[float, RopeScaling]:
    """Returns rope_theta and the scaling of a config.json.

    If several keys give the same parameter, the precedence is that of transformers. `rope_scaling` replaces
    `rope_parameters` as a whole. The nested `rope_theta` precedes the top-level one, and `rope_type` precedes `type`.
    For `CONTEXT` the top-level key precedes the nested one, and that precedes `max_position_embeddings`.

    Args:
      source: names the file in errors.
      raw: the content of config.json and the defaults of its family; `rope_scaling` and `rope_parameters` are objects
        or null.
      aliases: other names of kinds of scaling.
      partial: whether the family can rotate a part of each head.

    Raises:
      ConfigError: a parameter is missing or not a number, or a kind of scaling is not supported.
    """
    given = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if any(isinstance(value, dict) for value in given.values()):
        raise ConfigError(f"{source}: rope={json.dumps(given):.80} is not supported; use a model with one RoPE")
    beside = {key: raw[key] for key in ("rope_theta", "partial_rotary_factor") if key in raw}
    above = {CONTEXT: raw[CONTEXT]} if CONTEXT in raw else {}
    return _read(source, beside | dict(given) | above, raw["max_position_embeddings"], aliases, partial)


def read_two_ropes(source: str, raw: Mapping[str, Any]) -> tuple[float, RopeScaling, float]:
    """Returns rope_theta, its scaling, and rope_theta of sliding layers of a config.json of Gemma 3.

    `rope_scaling` adds to the parameters of layers without a window. Arguments and errors are those of `read_rope`.
    """
    given = raw.get("rope_parameters") or {FULL: {"rope_type": "default"}}
    if set(given) - {FULL, SLIDING} or not all(isinstance(value, dict | None) for value in given.values()):
        raise ConfigError(
            f"{source}: rope_parameters={json.dumps(given):.80} is not supported; use objects {FULL} and {SLIDING}"
        )
    whole = {key: raw[key] for key in ("partial_rotary_factor",) if key in raw}
    full = {"rope_theta": raw["rope_theta"], **whole, **(given.get(FULL) or {}), **(raw.get("rope_scaling") or {})}
    local = {"rope_theta": raw["rope_local_base_freq"], **whole, **(given.get(SLIDING) or {})}
    theta, scaling = _read(source, full, raw["max_position_embeddings"])
    local_theta, local_scaling = _read(source, local, raw["max_position_embeddings"])
    if local_scaling.kind != "none":
        value = f"rope_type={local_scaling.kind} of {SLIDING}"
        raise ConfigError(f"{source}: {value} is not supported; use default there")
    return theta, scaling, local_theta


def _read(
    source: str, given: Mapping[str, Any], context: Any, aliases: Mapping[str, RopeKind] = {}, partial: bool = False
) -> tuple[float, RopeScaling]:
    """rope_theta and the scaling of these parameters; `context`: max_position_embeddings."""
    merged = {"rope_type": given.get("type", "default"), CONTEXT: context, **given}
    rope = check_json(merged, source, _Rope)
    if rope.partial_rotary_factor != 1.0 and not partial:
        value = f"partial_rotary_factor={rope.partial_rotary_factor}"
        raise ConfigError(f"{source}: {value} is not supported; use a model that rotates whole heads")
    return rope.rope_theta, _scaling(source, rope, aliases.get(rope.rope_type, rope.rope_type), context)


def _scaling(source: str, rope: _Rope, kind: str, context: int) -> RopeScaling:
    fraction = rope.partial_rotary_factor
    if kind == "default":
        return RopeScaling(original_context=context, fraction=fraction)
    if kind not in _KINDS:
        known = ", ".join(("default", *_KINDS))
        raise ConfigError(f"{source}: rope_type={json.dumps(rope.rope_type):.80} is not supported; use {known}")
    fields: dict[str, Any] = {"original_context": context}
    if kind == "longrope" and rope.factor is None:
        fields["factor"] = context / rope.need(source, "original_context")
    if kind == "yarn":
        fields |= {"beta_fast": rope.beta_fast or 32.0, "beta_slow": rope.beta_slow or 1.0, "truncate": rope.truncate}
    if kind in ("yarn", "longrope"):
        fields["attention_factor"] = _attention_factor(rope)
    needed = {field: rope.need(source, field) for field in USED[kind] if field not in fields or field in KEYS}
    return RopeScaling(kind=cast(RopeKind, kind), **fields | needed, fraction=fraction)


def _attention_factor(rope: _Rope) -> float | None:
    if rope.attention_factor is not None or not (rope.mscale and rope.mscale_all_dim):
        return rope.attention_factor
    longer = 0.1 * math.log(max(rope.factor or 1.0, 1.0))
    return (1.0 + longer * rope.mscale) / (1.0 + longer * rope.mscale_all_dim)


# ------------------------------------------------------------------------------------------------ writing


def rope_json(
    config: ModelConfig, context: int | None = None, *, context_beside: bool = False, plain: Any = None
) -> dict[str, Any]:
    """Returns the keys of config.json for a model's RoPE, in a form that every version of transformers reads.

    Args:
      config: the model.
      context: max_position_embeddings of the folder that the model is from; a scaling may lengthen it.
      context_beside: whether `CONTEXT` stands beside `rope_scaling` and not in it (Phi-3).
      plain: `rope_scaling` of a model without a scaling.
    """
    scaling = config.rope_scaling
    longest = scaling.original_context if context is None else context
    if "original_context" in USED[scaling.kind]:
        lengthened = round(scaling.factor * scaling.original_context)
        longest = lengthened if context is None else max(context, lengthened)
    used = {KEYS.get(field, field): getattr(scaling, field) for field in USED[scaling.kind]}
    used = {key: list(value) if isinstance(value, tuple) else value for key, value in used.items() if value is not None}
    keys = {"rope_theta": config.rope_theta, "rope_scaling": plain, "max_position_embeddings": longest}
    if context_beside:
        keys[CONTEXT] = used.pop(CONTEXT, longest)
        if scaling.kind == "longrope" and scaling.factor * keys[CONTEXT] == longest:
            used.pop("factor", None)  # it follows; some releases refuse it
    if scaling.kind != "none":
        keys["rope_scaling"] = {"type" if context_beside else "rope_type": scaling.kind, **used}
    if scaling.fraction != 1.0:
        keys["partial_rotary_factor"] = scaling.fraction
    if config.local_rope_theta is not None:
        keys["rope_local_base_freq"] = config.local_rope_theta
    return keys
