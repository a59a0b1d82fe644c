"""The frozen weights of a run with adapters. Checkpoints do not hold them, only a digest of their values."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from tsp_jax.config import Config, LoraConfig
from tsp_jax.errors import ConfigError
from tsp_jax.hf.weights import load_params
from tsp_jax.layout import Placement
from tsp_jax.stored import Padding
from tsp_jax.training.step import TrainProgram, TrainState

DETERMINE = ("rank", "alpha", "targets", "base_dtype")
"""fields of LoraConfig that must be those of a checkpoint"""


def load_frozen(config: Config, program: TrainProgram, placement: Placement) -> dict:
    """The frozen weights in `lora.base_dtype`: those of the folder `init_from`, or random ones; {} without LoRA."""
    if not config.lora.rank:
        return {}
    if config.weights_from:
        return load_params(config.weights_from, config.model, placement, config.lora.base_dtype)
    return _part(program, lambda state: state.frozen)


def init_adapters(program: TrainProgram, frozen: dict) -> TrainState:
    """The state of step 0 on given frozen weights."""
    return _part(program, lambda state: state._replace(frozen={}))._replace(frozen=frozen)


def _part(program: TrainProgram, take: Any) -> Any:
    """A part of the initial state; nothing else is computed."""
    shardings = jax.tree.map(lambda array: array.sharding, take(program.abstract_state))
    return jax.jit(lambda: take(program.init()), out_shardings=shardings)()


def check_adapters(config: Config, saved: Mapping[str, Any]) -> None:
    """Raises ConfigError if a checkpoint has other adapters; `saved` is its `lora`, {} in earlier versions."""
    here, there = (json.loads(json.dumps(dataclasses.asdict(lora))) for lora in (config.lora, LoraConfig()))
    there |= saved
    for field in DETERMINE:
        if here[field] != there[field]:
            raise ConfigError(
                f"lora.{field}={here[field]}: the checkpoint in workdir={config.workdir} has "
                f"lora.{field}={there[field]!s:.80}; use that, or another --workdir"
            )


def check_digest(config: Config, digest: str, saved: str, saved_config: Mapping[str, Any]) -> None:
    """Raises ConfigError if a checkpoint's adapters were trained on other weights than those with `digest`."""
    if digest != saved:
        init_from, seed = (saved_config.get(field) for field in ("init_from", "seed"))
        raise ConfigError(
            f"init_from={config.init_from!r} and seed={config.seed} give other frozen weights than those under the "
            f"adapters in workdir={config.workdir}, of init_from={init_from!r:.200} and seed={seed!r:.20}; use those, "
            "unchanged, or another --workdir"
        )


def digest_weights(paddings: dict, weights: dict) -> str:
    """A digest of weights' names, dtypes, shapes and bits. It is the same under every layout; "" if there are none.

    Each array gives the sum, modulo 2^32, of a hash of each element's bits and place. Devices read their own shards, so
    no array is gathered. It finds weights of another model; it is no protection from people who want to deceive it.
    """
    if not weights:
        return ""
    pads = jax.tree.leaves(paddings)
    leaves = jax.tree_util.tree_leaves_with_path(weights)
    sums = jax.device_get(_sums(tuple(pads), [array for _, array in leaves]))
    digest = hashlib.sha256()
    for (path, array), pad, value in zip(leaves, pads, sums, strict=True):
        shape = jax.eval_shape(pad.unpad, array).shape
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {shape} {value}\n".encode())
    return digest.hexdigest()


@functools.partial(jax.jit, static_argnums=0)
def _sums(paddings: tuple[Padding, ...], arrays: list[jax.Array]) -> list[jax.Array]:
    return [_sum(padding, array) for padding, array in zip(paddings, arrays, strict=True)]


def _sum(padding: Padding, array: jax.Array) -> jax.Array:
    """The sum over the elements of an array in stored form, [] uint32; padding adds 0."""
    logical = jax.eval_shape(padding.unpad, array).shape
    numbers = [jnp.arange(1, size + 1, dtype=jnp.uint32) for size in logical]
    if padding.padded:
        numbers[-2] = padding.pad(numbers[-2][:, None])[:, 0]  # 0 where a row is padding
    place, real = jnp.zeros(array.shape, jnp.uint32), True
    for dim, number in enumerate(numbers):
        along = lax.broadcast_in_dim(number, array.shape, (dim,))
        place, real = _mix(place ^ along), real & (along > 0)
    bits = lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * array.dtype.itemsize}")).astype(jnp.uint32)
    return jnp.where(real, _mix(place ^ bits), jnp.uint32(0)).sum(dtype=jnp.uint32)


def _mix(x: jax.Array) -> jax.Array:
    """A bijection of 32 bits in which each input bit changes half of the output bits (end of MurmurHash3)."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        x = (x ^ (x >> jnp.uint32(shift))) * jnp.uint32(factor)
    return x
