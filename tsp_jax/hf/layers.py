"""Which layers of a config.json have a window, and which have no RoPE: read as a period of kinds, written as a list.

Source: models/{qwen3,gemma2,gemma3,smollm3}/configuration_*.py of transformers 5.24.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tsp_jax.config import LayerKind, ModelConfig
from tsp_jax.errors import ConfigError
from tsp_jax.hf.families import Family

TYPES: dict[str, LayerKind] = {"full_attention": "full", "attention": "full", "sliding_attention": "sliding"}
"""name in `layer_types` -> kind; "attention" means "full_attention" to transformers"""
MOST_LAYERS = 2**16
"""most layers of several kinds that are read"""


def read_layers(path: Path, family: Family, keys: Any) -> dict[str, Any]:
    """The fields `layer_kinds` and `window` of a model.

    Args:
      path: config.json, for errors.
      family: the family of the model.
      keys: its content, as `tsp_jax.hf.config.Keys`.

    Raises:
      ConfigError: layers have kinds that the family does not have, or a window has no size.
    """
    kinds = _mixed_kinds(path, family, keys) if family.mixed else _one_kind(path, family, keys)
    if "sliding" not in kinds:
        return {"layer_kinds": () if set(kinds) == {"full"} else period(kinds), "window": None}
    if not keys.sliding_window:
        value = f"sliding_window={json.dumps(keys.sliding_window)}"
        raise ConfigError(f"{path}: {value} is no window; use 4096, or full attention")
    if family.mixed == "max_window_layers" and not keys.use_sliding_window:
        raise ConfigError(
            f"{path}: use_sliding_window={json.dumps(keys.use_sliding_window)} contradicts layer_types; use true, or "
            "full_attention"
        )
    return {"layer_kinds": () if set(kinds) == {"sliding"} else period(kinds), "window": keys.sliding_window}


def period(kinds: Sequence[LayerKind]) -> tuple[LayerKind, ...]:
    """The shortest tuple of kinds that repeats over the layers; the last repetition may be incomplete."""
    lengths = range(1, len(kinds))
    return tuple(kinds[: next((n for n in lengths if kinds[n:] == kinds[: len(kinds) - n]), len(kinds))])


def _one_kind(path: Path, family: Family, keys: Any) -> Sequence[LayerKind]:
    """The kind of all layers, of a family whose layers are all alike."""
    _check_types(path, family, keys)
    has_window = "sliding" in family.kinds
    given = set(keys.layer_types or ()) - {"full_attention", "attention"}
    if not has_window and keys.use_sliding_window is not False and keys.sliding_window is not None:
        raise ConfigError(
            f"{path}: sliding_window={keys.sliding_window} is not supported in {family.architecture}; "
            "use model_type mistral, or sliding_window null"
        )
    return ("sliding",) if given or (has_window and keys.sliding_window is not None) else ("full",)


def _mixed_kinds(path: Path, family: Family, keys: Any) -> list[LayerKind]:
    """The kinds of all layers."""
    layers = keys.num_hidden_layers
    if layers > MOST_LAYERS:
        raise ConfigError(f"{path}: num_hidden_layers={layers} is too large; use at most {MOST_LAYERS}")
    numbers = range(layers)
    kinds: list[LayerKind]
    if keys.layer_types is not None:
        _check_types(path, family, keys)
        kinds = [TYPES[name] for name in keys.layer_types]
    elif family.mixed == "max_window_layers":
        first = keys.max_window_layers if keys.use_sliding_window else layers
        kinds = ["sliding" if number >= first else "full" for number in numbers]
    elif family.mixed == "no_rope_layers":
        kinds = ["full"] * layers
        if keys.use_sliding_window and keys.sliding_window is not None:
            raise ConfigError(
                f"{path}: use_sliding_window=true is not supported, for its layers have no RoPE; use a model without"
            )
    else:
        every = keys.sliding_window_pattern if family.mixed == "sliding_window_pattern" else 2
        kinds = ["sliding" if (number + 1) % every else "full" for number in numbers]
    return _without_rope(path, keys, kinds) if family.mixed == "no_rope_layers" else kinds


def _check_types(path: Path, family: Family, keys: Any) -> None:
    """Raises ConfigError unless `layer_types` is absent, or names kinds that the layers of the family may have."""
    types, layers = keys.layer_types, keys.num_hidden_layers
    if types is None:
        return
    kinds = {TYPES.get(name) for name in types}
    if len(types) != layers or not kinds <= set(family.kinds) or (len(kinds) > 1 and not family.mixed):
        names = [name for name in ("full_attention", "sliding_attention") if TYPES[name] in family.kinds]
        use = f"each {' or '.join(names)}" if family.mixed else f"all {', or all '.join(names)}"
        raise ConfigError(
            f"{path}: layer_types={json.dumps(types):.80} is not supported; use a model of {layers} layers "
            f"(num_hidden_layers) that are {use}"
        )


def _without_rope(path: Path, keys: Any, kinds: list[LayerKind]) -> list[LayerKind]:
    """The kinds, where layers without RoPE (SmolLM3) are `full_nope`."""
    layers, ropes = len(kinds), keys.no_rope_layers
    if ropes is None:
        ropes = [int((number + 1) % keys.no_rope_layer_interval != 0) for number in range(layers)]
    if len(ropes) < layers:
        raise ConfigError(
            f"{path}: no_rope_layers={json.dumps(ropes):.80} says nothing about some layers; use {layers} values "
            "(num_hidden_layers)"
        )
    for number, (kind, rope) in enumerate(zip(kinds, ropes, strict=False)):
        if kind == "sliding" and not rope:
            raise ConfigError(
                f"{path}: layer_types[{number}]=sliding_attention of a layer without RoPE (no_rope_layers) is not "
                "supported; use full_attention"
            )
    return ["full_nope" if not rope else kind for kind, rope in zip(kinds, ropes, strict=False)]


# ------------------------------------------------------------------------------------------------ writing


def layers_json(config: ModelConfig, family: Family) -> dict[str, Any]:
    """Returns the keys of config.json that say which layers have a window, and which have no RoPE."""
    if not family.mixed:
        return {"sliding_window": config.window}
    kinds = [config.period[number % len(config.period)] for number in range(config.num_layers)]
    keys: dict[str, Any] = {
        "layer_types": ["sliding_attention" if kind == "sliding" else "full_attention" for kind in kinds]
    }
    if config.window is not None:
        keys["sliding_window"] = config.window
    if family.mixed in ("max_window_layers", "no_rope_layers"):
        keys["use_sliding_window"] = config.window is not None
    if family.mixed == "max_window_layers":  # for releases that know no layer_types
        keys["max_window_layers"] = kinds.index("sliding") if "sliding" in kinds else config.num_layers
    if family.mixed == "no_rope_layers":
        keys["no_rope_layers"] = [int(kind != "full_nope") for kind in kinds]
    return keys
