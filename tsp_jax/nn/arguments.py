"""Checks of a layer's arguments. An error is one line: the layer, the argument, its value, and what to use."""

import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from tsp_jax.config import LARGEST, Activation, ExpertsConfig, NormWidth, Remat, RopeScaling, StreamConfig, TokenOrder
from tsp_jax.errors import ConfigError
from tsp_jax.layout import Placement

FLOATS, INTEGERS = "floats", "integers"
_DTYPES = {FLOATS: jnp.floating, INTEGERS: jnp.integer}


def check_array(layer: str, name: str, array: Any, kind: str, *shape: Any) -> None:
    """Raises ConfigError unless an array is of this kind (`FLOATS` or `INTEGERS`) and has this shape.

    A letter in `shape` stands for any size but 0.
    """
    found, dims = getattr(array, "shape", None), f"[{', '.join(map(str, shape))}]"
    if found is None:
        raise ConfigError(f"{layer}: {name} is no array but {type(array).__name__}; use {kind} {dims}")
    fits = len(found) == len(shape) and jnp.issubdtype(array.dtype, _DTYPES[kind])
    if not fits or any(
        size == 0 if isinstance(want, str) else size != want for size, want in zip(found, shape, strict=True)
    ):
        least = "".join(f", {want} at least 1" for want in shape if isinstance(want, str)) if 0 in found else ""
        raise ConfigError(f"{layer}: {name} is {array.dtype}{list(found)}; use {kind} {dims}{least}")


class _Rule(NamedTuple):
    fits: Callable[[Any], bool]
    use: str


def _is_number(value: Any, kind: type = Real) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value)


def _is_float_dtype(value: Any) -> bool:
    """Whether a value is a floating-point dtype that arrays can have (float64 needs `jax_enable_x64`)."""
    try:
        dtype = None if value is None else jnp.dtype(value)
    except TypeError:
        return False
    return dtype is not None and jnp.issubdtype(dtype, jnp.floating) and jax.dtypes.canonicalize_dtype(dtype) == dtype


def _one_of(literal: Any) -> _Rule:
    values = get_args(literal)
    return _Rule(lambda value: isinstance(value, str) and value in values, f"one of {', '.join(values)}")


def _instance(kind: type, use: str) -> _Rule:
    return _Rule(lambda value: isinstance(value, kind), use)


def _or_none(rule: _Rule) -> _Rule:
    return _Rule(lambda value: value is None or rule.fits(value), f"{rule.use}, or None")


_SIZE = _Rule(lambda value: _is_number(value, Integral) and 0 < value <= LARGEST, "a positive integer")
_POSITIVE = _Rule(lambda value: _is_number(value) and value > 0, "a positive number")
_NOT_NEGATIVE = _Rule(lambda value: _is_number(value) and value >= 0, "a number that is not negative")
_BOOL = _instance(bool, "True or False")
_RULES = {
    **dict.fromkeys(["d_model", "d_ff", "vocab_size", "num_heads", "num_kv_heads", "head_dim", "num_layers"], _SIZE),
    "logits_scale": _POSITIVE,
    **dict.fromkeys(["norm_eps", "init_std", "out_std"], _NOT_NEGATIVE),
    "window": _or_none(_SIZE),
    **dict.fromkeys(["rope_theta", "scale", "softcap", "logits_softcap"], _or_none(_POSITIVE)),
    **dict.fromkeys(["qkv_bias", "out_bias", "qk_norm", "norm_unit_offset", "causal", "sinks", "norm_follows"], _BOOL),
    "qk_norm_width": _one_of(NormWidth),
    "activation": _one_of(Activation),
    "remat": _one_of(Remat),
    "token_order": _one_of(TokenOrder),
    "dtype": _Rule(_is_float_dtype, "jnp.float32 or jnp.bfloat16"),
    "placement": _instance(Placement, 'a tsp_jax.Placement, such as tsp_jax.place("tsp", tsp=8)'),
    "stream": _instance(StreamConfig, "a tsp_jax.StreamConfig"),
    "config": _instance(ExpertsConfig, "a tsp_jax.config.ExpertsConfig"),
    "rope_scaling": _instance(RopeScaling, "a tsp_jax.config.RopeScaling"),
    "rngs": _instance(nnx.Rngs, "flax.nnx.Rngs"),
}


def check_settings(layer: str, **settings: Any) -> None:
    """Raises ConfigError unless each setting of a layer has the right type and is within its bounds."""
    for name, value in settings.items():
        if not _RULES[name].fits(value):
            raise ConfigError(f"{layer}: {name}={value!r} does not fit; use {_RULES[name].use}")
