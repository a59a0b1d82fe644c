"""Prefill and decode as jitted functions over global arrays, and the shapes and shardings of their arguments."""

import dataclasses
from collections.abc import Callable
from typing import Any, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from tsp_jax.config import DType, ModelConfig, StreamConfig
from tsp_jax.errors import ConfigError
from tsp_jax.hardware.compiler_options import compiler_options
from tsp_jax.inference.cache import Cache, abstract_cache, empty_cache
from tsp_jax.inference.forward import decode, decode_placement, prefill
from tsp_jax.inspect.memory import compiled_memory
from tsp_jax.layout import Placement, check_divides
from tsp_jax.models.transformer import Transformer, make_merge
from tsp_jax.stored import in_dtype, paddings

ONE_BUCKET = StreamConfig(bucket_mib=1e9)
"""for decode, where weights are stationary: one bucket per op"""


@dataclasses.dataclass(frozen=True)
class InferenceProgram:
    """The functions that serve a model, compiled or not, and abstract versions of their arguments."""

    placement: Placement
    batch: int
    """B, sequences in the cache"""
    capacity: int
    """tokens of a sequence that the cache has room for, at least as many as requested"""
    chunk: int
    """T, tokens of a sequence that one prefill takes"""
    prefill: Any
    """jitted (params, cache, tokens [B, T], positions [B, T]) -> (logits [B, V] float32, cache); donates the cache"""
    decode: Any
    """jitted (params, cache, tokens [B]) -> (logits [B, V] float32, cache); donates the cache"""
    init_cache: Callable[[], Cache]
    """a sharded cache without tokens"""
    cast_params: Callable[[dict], dict]
    """training parameters in stored form -> the same in the dtype and shardings of serving"""
    abstract_params: dict
    """shapes, dtypes and shardings in stored form; as in training except for the dtype"""
    paddings: dict
    """for each parameter, the object that converts it from logical to stored form and back"""
    abstract_cache: Cache
    abstract_chunk: tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]
    """tokens and positions for prefill"""
    abstract_tokens: jax.ShapeDtypeStruct
    """tokens for decode"""
    vocab_size: int
    shortest: int = 1
    """fewest tokens of a prompt; more than 1 if RoPE is that of sequences longer than a model's original context"""
    peak_bytes: int = 0
    """peak memory per device, the larger of prefill and decode, as the compiler reports it; 0: not compiled yet"""

    def compile(self) -> "InferenceProgram":
        """The program with prefill and decode compiled, so that no later call compiles."""
        args = self.abstract_params, self.abstract_cache
        options = dict(compiler_options(jax.devices()[0]))
        prefill = self.prefill.lower(*args, *self.abstract_chunk).compile(options)
        decode = self.decode.lower(*args, self.abstract_tokens).compile(options)
        peak = max(compiled_memory(compiled).peak_bytes for compiled in (prefill, decode))
        return dataclasses.replace(self, prefill=prefill, decode=decode, peak_bytes=peak)


def make_inference_program(
    model: ModelConfig, placement: Placement, *, stream: StreamConfig = StreamConfig(), dtype: DType = "bfloat16",
    batch: int, capacity: int, chunk: int, params_dtype: jax.typing.DTypeLike | None = None,
) -> InferenceProgram:  # fmt: skip
    """Builds the functions that serve a model on a placement; compiles nothing.

    Args:
      model: sizes of the model.
      placement: layout and mesh, those of training or any others.
      stream: how weights are streamed in prefill.
      dtype: of activations and of the cache.
      batch: B, sequences that are served together.
      capacity: tokens of a sequence that the cache has room for, prompt and continuation. If the model's RoPE depends
        on the length of sequences (longrope), the capacity also decides which are served: those of at most
        `original_context` tokens or, if it is larger, those whose prompt is longer already.
      chunk: T, tokens of a prompt that one prefill takes; a longer prompt takes several prefills.
      params_dtype: of the parameters; `dtype` if None.

    Raises:
      ConfigError: a size is not positive, the batch or the chunk does not divide evenly over the placement, or the
        dtype is unknown.
    """
    _check(placement, batch, capacity, chunk, dtype)
    params_dtype = dtype if params_dtype is None else params_dtype
    scaling = model.rope_scaling
    is_short = scaling.depends_on_length and capacity <= scaling.original_context
    model = dataclasses.replace(model, rope_scaling=scaling.at(capacity))
    model_of, abstract_params, pads = _model(model, placement, stream, dtype, params_dtype)
    decode_model_of, _, _ = _model(model, decode_placement(placement), ONE_BUCKET, dtype, params_dtype)
    cache = abstract_cache(model, placement, batch=batch, capacity=max(capacity, chunk), dtype=dtype)
    entries = cache.positions_BS.shape[1]
    replicated = NamedSharding(placement.mesh, PartitionSpec())
    tokens = jax.ShapeDtypeStruct((batch, chunk), jnp.int32, sharding=placement.sharding("batch", "sequence"))
    token = jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=replicated)

    def prefill_step(params: dict, cache: Cache, tokens_BT: jax.Array, positions_BT: jax.Array):
        return prefill(model_of(params), decode_model_of(params), placement, cache, tokens_BT, positions_BT)

    def decode_step(params: dict, cache: Cache, tokens_B: jax.Array):
        configs = model_of(params).layers.variants
        return decode(decode_model_of(params), configs, placement, cache, tokens_B)

    def cast(params: dict) -> dict:
        return jax.tree.map(lambda p, like: p.astype(like.dtype), params, abstract_params)

    return InferenceProgram(
        placement=placement, batch=batch, chunk=chunk,
        capacity=min(entries, scaling.original_context) if is_short else entries,
        vocab_size=model.vocab_size, shortest=scaling.shortest_prompt(capacity),
        prefill=_jit(prefill_step, placement, abstract_params, cache, tokens, tokens),
        decode=_jit(decode_step, placement, abstract_params, cache, token),
        init_cache=jax.jit(lambda: empty_cache(cache), out_shardings=_shardings(cache)),
        cast_params=jax.jit(cast, out_shardings=_shardings(abstract_params)),
        abstract_params=abstract_params, paddings=pads, abstract_cache=cache,
        abstract_chunk=(tokens, tokens), abstract_tokens=token,
    )  # fmt: skip


def _jit(step: Callable, placement: Placement, params: dict, cache: Cache, *inputs: jax.ShapeDtypeStruct):
    """`step` (params, cache, *inputs) -> (logits, cache), jitted for these shardings; donates the cache."""
    args = _shardings((params, cache, *inputs))
    outs = placement.sharding("batch", None), args[1]
    return jax.jit(step, donate_argnums=1, in_shardings=args, out_shardings=outs)


def _shardings(abstract: Any) -> Any:
    return jax.tree.map(lambda array: array.sharding, abstract)


def _check(placement: Placement, batch: int, capacity: int, chunk: int, dtype: str) -> None:
    if dtype not in get_args(DType):
        raise ConfigError(f"dtype={dtype} is unknown; use one of {', '.join(get_args(DType))}")
    for name, value in (("batch", batch), ("capacity", capacity), ("chunk", chunk)):
        if value < 1:
            raise ConfigError(f"{name}={value} must be positive; use 1")
    layout = placement.layout
    check_divides("batch", batch, placement.size("batch"), layout.batch)
    check_divides("chunk", chunk, placement.size("sequence"), layout.sequence)


def _model(
    config: ModelConfig, placement: Placement, stream: StreamConfig, dtype: DType, params_dtype: jax.typing.DTypeLike
):
    """(function from parameters to the model on a placement, abstract parameters, their paddings)."""

    def make() -> Transformer:
        return Transformer(
            config, placement=placement, stream=stream, dtype=jnp.dtype(dtype), remat="none", rngs=nnx.Rngs(0)
        )

    graphdef, abstract = nnx.split(nnx.eval_shape(make))
    params = in_dtype(nnx.to_pure_dict(abstract), params_dtype)
    return make_merge(graphdef, abstract), params, paddings(abstract)
