"""Text to text: a model with its weights on devices, its tokenizer and compiled programs."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from tsp_jax.config import DType, ModelConfig, StreamConfig
from tsp_jax.errors import ConfigError
from tsp_jax.hardware.memory import check_room, memory_bytes, shard_bytes
from tsp_jax.hf.byte_tokenizer import ByteTokenizer
from tsp_jax.hf.config import read_dtype
from tsp_jax.hf.tokenizer import Tokenizer, read_stop_tokens
from tsp_jax.hf.weights import abstract_params, check_folder, load_params, read_config
from tsp_jax.inference.cache import check_capacity
from tsp_jax.inference.forward import decode_placement
from tsp_jax.inference.program import InferenceProgram, make_inference_program
from tsp_jax.inference.sampling import Sampling
from tsp_jax.inference.token_loop import OnToken, Stats, check_prompts, check_stop_tokens, generate_tokens
from tsp_jax.layout import Placement, check_divides
from tsp_jax.training.saved_run import find_step, is_run, load_run_params, read_run, run_tokenizer

Prompt = str | Sequence[int]
CHUNK = 2048
"""default for the most tokens of a prompt that one prefill takes"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """Weights on a placement, and a tokenizer. `load` makes one from a Hugging Face folder or a training run."""

    config: ModelConfig
    placement: Placement
    params: dict
    """in stored form, as in `load_params` and in a training state"""
    dtype: DType = "bfloat16"
    """of parameters, activations and cache"""
    stream: StreamConfig = dataclasses.field(default_factory=StreamConfig)
    tokenizer: Tokenizer | ByteTokenizer | None = None
    """None: prompts are token ids"""
    stop_tokens: tuple[int, ...] = ()
    """tokens that end a continuation, unless `generate` is given others"""
    programs: dict[tuple[int, int, int], InferenceProgram] = dataclasses.field(default_factory=dict, repr=False)
    """compiled so far, by (batch, capacity, chunk)"""

    def program(self, batch: int, capacity: int, chunk: int) -> InferenceProgram:
        """The compiled program for these sizes; see `make_inference_program`."""
        sizes = batch, capacity, chunk
        if sizes not in self.programs:
            weight_bytes = sum(array.addressable_shards[0].data.nbytes for array in jax.tree.leaves(self.params))
            check_capacity(
                self.config, self.placement,
                batch=batch, capacity=capacity, dtype=self.dtype, weight_bytes=weight_bytes,
            )  # fmt: skip
            program = make_inference_program(
                self.config, self.placement,
                stream=self.stream, dtype=self.dtype, batch=batch, capacity=capacity, chunk=chunk,
            )  # fmt: skip
            self.programs[sizes] = program.compile()
        return self.programs[sizes]

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt."""
        if not isinstance(prompt, str):
            return list(prompt)
        if self.tokenizer is None:
            raise ConfigError("this model has no tokenizer; use token ids for prompts")
        return self.tokenizer.encode(prompt)


class ModelFacts(NamedTuple):
    """A model without its weights; fields as in `Model`."""

    config: ModelConfig
    dtype: DType
    tokenizer: Tokenizer | ByteTokenizer | None
    stop_tokens: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Continuation:
    """New tokens after a prompt."""

    tokens: list[int]
    """ends with a stop token if there was one"""
    text: str
    """empty where the model has no tokenizer"""


def load(
    folder: str | Path, placement: Placement, *, dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    stream: StreamConfig = StreamConfig(), step: int = 0,
) -> Model:  # fmt: skip
    """Loads a Hugging Face folder, or a training run, onto a placement; each device reads its own shards.

    Args:
      folder: with config.json, safetensors and tokenizer.json; or the working directory of a run.
      placement: layout and mesh.
      dtype: of weights, activations and cache; auto: the compute dtype of a run, float32 if a folder is float32, else
        bfloat16.
      stream: how weights are streamed in prefill.
      step: step of a run's checkpoint; 0: the newest.

    Raises:
      ConfigError: a file is missing, broken or not supported, or the model does not fit the mesh.
    """
    decode_placement(placement)  # refuses a layout that cannot serve before weights are read
    facts = read_facts(folder, dtype=dtype, step=step)
    if is_run(folder):
        params = load_run_params(folder, read_run(folder), placement, find_step(folder, step), facts.dtype)
    else:
        params = _load_folder(folder, facts, placement)
    return Model(**facts._asdict(), placement=placement, params=params, stream=stream)


def read_facts(
    folder: str | Path, *, dtype: Literal["auto", "float32", "bfloat16"] = "auto", step: int = 0
) -> ModelFacts:
    """Reads everything but the weights; arguments and errors as those of `load`."""
    if dtype not in ("auto", *get_args(DType)):
        raise ConfigError(f"dtype={dtype} is unknown; use one of auto, {', '.join(get_args(DType))}")
    if is_run(folder):
        run = read_run(folder)
        return ModelFacts(run.model, run.compute_dtype if dtype == "auto" else dtype, *run_tokenizer(run))
    if step:
        raise ConfigError(f"step={step}: {folder} is no working directory of a run, which has steps; use step=0")
    config, tokenizer, stop_tokens = read_config(folder), Tokenizer(folder), read_stop_tokens(folder)
    check_stop_tokens(stop_tokens, config.vocab_size, f"{folder}: eos_token_id")
    return ModelFacts(config, read_dtype(folder) if dtype == "auto" else dtype, tokenizer, stop_tokens)


def _load_folder(folder: str | Path, facts: ModelFacts, placement: Placement) -> dict:
    check_folder(folder, facts.config, placement)
    nbytes = shard_bytes(abstract_params(facts.config, placement, jnp.dtype(facts.dtype)))
    memory = memory_bytes(jax.local_devices())
    check_room(f"on each device {folder} in {facts.dtype}", nbytes, memory, "use more devices that shard weights")
    return load_params(folder, facts.config, placement, jnp.dtype(facts.dtype))


def generate(
    model: Model, prompts: Sequence[Prompt], *, max_new_tokens: int, sampling: Sampling = Sampling(),
    stop_tokens: Sequence[int] | None = None, capacity: int = 0, chunk: int = 0, on_token: OnToken | None = None,
    stats: Stats | None = None,
) -> list[Continuation]:  # fmt: skip
    """Continues prompts, all in one batch.

    Args:
      model: see `load`.
      prompts: texts or token ids; lengths may differ.
      max_new_tokens: per prompt.
      sampling: greedy, or temperature, top-k, top-p and a seed.
      stop_tokens: ids that end a sequence; the model's if None.
      capacity: tokens of a sequence that the cache has room for; 0: enough for the longest prompt and its new tokens.
        Calls with the same batch, capacity and chunk reuse one compiled program.
      chunk: most tokens of a prompt that one prefill takes; 0: `CHUNK`. Smaller chunks need less memory; larger chunks
        stream the weights fewer times.
      on_token: called with the index of a prompt and its next token, as soon as the token is drawn.
      stats: counts and times are added to it.

    Returns:
      A continuation for each prompt.

    Raises:
      ConfigError: a prompt is empty, is too long for the capacity, or has an id outside the model's vocabulary.
    """
    for name, value in (("capacity", capacity), ("chunk", chunk)):
        if value < 0:
            raise ConfigError(f"{name}={value} must not be negative; use 0")
    ranks, shards = model.placement.size("sequence"), model.placement.size("batch")
    check_divides("chunk", chunk, ranks, model.placement.layout.sequence)
    encoded = [model.encode(prompt) for prompt in prompts]
    longest = max((len(tokens) for tokens in encoded), default=1)
    needed, scaling = longest + max_new_tokens, model.config.rope_scaling
    if not capacity:
        capacity = _round_up(needed, 1)
        if scaling.depends_on_length and needed <= scaling.original_context:  # a larger capacity is for longer prompts
            capacity = min(capacity, scaling.original_context)
    check_prompts(
        encoded, max_new_tokens, capacity, model.config.vocab_size, scaling.shortest_prompt(capacity)
    )  # before anything is compiled
    stops = model.stop_tokens if stop_tokens is None else stop_tokens
    check_stop_tokens(stops, model.config.vocab_size)
    batch = -(-len(prompts) // shards) * shards
    chunk = min(chunk or _round_up(CHUNK, ranks), _round_up(longest, ranks))
    program = model.program(batch, capacity, chunk)
    tokens = generate_tokens(
        program, model.params, encoded,
        max_new_tokens=max_new_tokens, sampling=sampling,
        stop_tokens=stops, on_token=on_token, stats=stats,
    )  # fmt: skip
    return [Continuation(new, _text(model, new, set(model.stop_tokens))) for new in tokens]


def _text(model: Model, tokens: list[int], stops: set[int]) -> str:
    if model.tokenizer is None:
        return ""
    return model.tokenizer.decode(tokens[:-1] if tokens and tokens[-1] in stops else tokens)


def _round_up(count: int, ranks: int) -> int:
    """Rounds `count` up to a multiple of about `count` / 8, then to one of `ranks`. So only few sizes are compiled."""
    step = max(1, 1 << count.bit_length() >> 4)
    count = -(-count // step) * step
    return -(-count // ranks) * ranks
