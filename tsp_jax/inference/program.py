"""Prefill and decode as jitted functions over global arrays, and the shapes and shardings of all that they touch."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from tsp_jax.config import Config, StreamConfig
from tsp_jax.errors import ConfigError
from tsp_jax.hardware.compiler_options import compiler_options
from tsp_jax.heads import paddings
from tsp_jax.inference.cache import Cache, abstract_cache, empty_cache
from tsp_jax.inference.forward import decode, decode_placement, prefill
from tsp_jax.inspect.memory import compiled_memory
from tsp_jax.layout import Placement, check_divides
from tsp_jax.models.transformer import Transformer, make_merge

ONE_BUCKET = StreamConfig(bucket_mib=1e9)
"""for decoding, where no weights move: one bucket per op"""


@dataclasses.dataclass(frozen=True)
class InferenceProgram:
    """The functions that serve a model, not yet compiled, and the trees that describe what they take."""

    placement: Placement
    batch: int
    """B, sequences of the cache"""
    capacity: int
    """tokens of a sequence that the cache has room for: what was asked for, in whole pages"""
    chunk: int
    """T, tokens of a sequence that one prefill takes"""
    prefill: Any
    """jitted (params, cache, tokens [B, T], positions [B, T]) -> (logits [B, V] float32, cache); donates the cache"""
    decode: Any
    """jitted (params, cache, tokens [B]) -> (logits [B, V] float32, cache); donates the cache"""
    init_cache: Callable[[], Cache]
    """a cache without tokens, made where it belongs"""
    cast_params: Callable[[dict], dict]
    """parameters of training, in stored form, in the dtype of serving"""
    abstract_params: dict
    """shapes, dtypes and shardings, in stored form: those of training, but for the dtype"""
    paddings: dict
    """for each parameter, the object that pads its layout-independent array to the stored shape and back"""
    abstract_cache: Cache
    abstract_chunk: tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]
    """tokens and positions that prefill takes"""
    abstract_tokens: jax.ShapeDtypeStruct
    """that decode takes"""
    vocab_size: int
    peak_bytes: int = 0
    """on one device, of the larger of prefill and decode, by the compiler; 0: not compiled yet"""

    def compile(self) -> "InferenceProgram":
        """The same with prefill and decode compiled, so that no later call compiles anything."""
        given = self.abstract_params, self.abstract_cache
        options = compiler_options(jax.devices()[0])
        prefill = self.prefill.lower(*given, *self.abstract_chunk).compile(options)
        decode = self.decode.lower(*given, self.abstract_tokens).compile(options)
        peak = max(compiled_memory(compiled).peak_bytes for compiled in (prefill, decode))
        return dataclasses.replace(self, prefill=prefill, decode=decode, peak_bytes=peak)


def make_inference_program(
    config: Config,
    placement: Placement,
    *,
    batch: int,
    capacity: int,
    chunk: int,
    params_dtype: jax.typing.DTypeLike | None = None,
) -> InferenceProgram:
    """Builds the functions that serve a model on a placement; compiles nothing.

    Args:
      config: of the model, its streams and the compute dtype, which is also the cache's.
      placement: layout and mesh, those of training or any others.
      batch: B, sequences at a time.
      capacity: tokens of a sequence, prompt and continuation.
      chunk: tokens of a prompt that are prefilled at once; longer prompts take several turns.
      params_dtype: of the parameters; the compute dtype if None.

    Raises:
      ConfigError: the placement cannot cut the batch or the chunk.
    """
    _check(placement, batch, capacity, chunk)
    dtype = jnp.dtype(config.compute_dtype)
    model_of, abstract_params, pads = _model(config, placement, config.stream, params_dtype or dtype)
    whole_model_of, _, _ = _model(config, decode_placement(placement), ONE_BUCKET, params_dtype or dtype)
    cache = abstract_cache(config.model, placement, batch=batch, capacity=max(capacity, chunk), dtype=dtype)
    replicated = NamedSharding(placement.mesh, PartitionSpec())
    tokens = jax.ShapeDtypeStruct((batch, chunk), jnp.int32, sharding=placement.sharding("batch", "sequence"))
    token = jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=replicated)

    def prefill_step(params: dict, cache: Cache, tokens_BT: jax.Array, positions_BT: jax.Array):
        whole = whole_model_of(params)
        return prefill(model_of(params), whole, placement, cache, tokens_BT, positions_BT)

    def decode_step(params: dict, cache: Cache, tokens_B: jax.Array):
        return decode(whole_model_of(params), placement, cache, tokens_B)

    def jit(step: Callable, *inputs: jax.ShapeDtypeStruct):
        args = _shardings((abstract_params, cache, *inputs))
        outs = placement.sharding("batch", None), args[1]
        return jax.jit(step, donate_argnums=1, in_shardings=args, out_shardings=outs)

    return InferenceProgram(
        placement=placement,
        batch=batch,
        capacity=cache.positions_BS.shape[1],
        chunk=chunk,
        prefill=jit(prefill_step, tokens, tokens),
        decode=jit(decode_step, token),
        init_cache=jax.jit(lambda: empty_cache(cache), out_shardings=_shardings(cache)),
        cast_params=_cast_like(abstract_params),
        abstract_params=abstract_params,
        paddings=pads,
        abstract_cache=cache,
        abstract_chunk=(tokens, tokens),
        abstract_tokens=token,
        vocab_size=config.model.vocab_size,
    )


def _shardings(abstract: Any) -> Any:
    return jax.tree.map(lambda array: array.sharding, abstract)


def _cast_like(abstract_params: dict) -> Callable[[dict], dict]:
    """Parameters -> the same in these dtypes and shardings."""

    def cast(params: dict) -> dict:
        return jax.tree.map(lambda p, like: p.astype(like.dtype), params, abstract_params)

    return jax.jit(cast, out_shardings=_shardings(abstract_params))


def _check(placement: Placement, batch: int, capacity: int, chunk: int) -> None:
    for name, value in (("batch", batch), ("capacity", capacity), ("chunk", chunk)):
        if value < 1:
            raise ConfigError(f"{name}={value} must be positive; use 1")
    layout = placement.layout
    check_divides("batch", batch, placement.size("batch"), layout.batch)
    check_divides("chunk", chunk, placement.size("sequence"), layout.sequence)


def _model(config: Config, placement: Placement, stream: StreamConfig, params_dtype: jax.typing.DTypeLike):
    """(params -> the model on a placement, abstract params, their paddings)."""

    def make() -> Transformer:
        return Transformer(
            config.model, placement=placement, stream=stream, dtype=jnp.dtype(config.compute_dtype), remat="none",
            rngs=nnx.Rngs(0),
        )  # fmt: skip

    graphdef, abstract = nnx.split(nnx.eval_shape(make))
    params = jax.tree.map(
        lambda array: jax.ShapeDtypeStruct(array.shape, params_dtype, sharding=array.sharding),
        nnx.to_pure_dict(abstract),
    )
    return make_merge(graphdef, abstract), params, paddings(abstract)
