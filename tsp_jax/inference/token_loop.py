"""Continues prompts: chunks of prefill, then a token a step.

Dims: B batch, T tokens of a chunk, V vocabulary.
"""

import dataclasses
import itertools
import time
from collections.abc import Callable, Collection, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tsp_jax.errors import ConfigError
from tsp_jax.inference.cache import Cache, deal
from tsp_jax.inference.program import InferenceProgram
from tsp_jax.inference.sampling import Sampling, row_keys, sample
from tsp_jax.ops.attention.kv_cache import NO_TOKEN

STOPPED = -1
"""instead of a token: the sequence has ended"""

OnToken = Callable[[int, int], None]


@dataclasses.dataclass
class Stats:
    """What generation took. Compilation is in none of it where programs are compiled beforehand."""

    prompt_tokens: int = 0
    prefill_s: float = 0.0
    new_tokens: int = 0
    """all of them"""
    decoded_tokens: int = 0
    """those after the first of each sequence, which prefill gives"""
    decode_s: float = 0.0


def generate_tokens(
    program: InferenceProgram,
    params: dict,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    stop_tokens: Collection[int] = (),
    on_token: OnToken | None = None,
    stats: Stats | None = None,
) -> list[list[int]]:
    """Continues each prompt until it has `max_new_tokens` more or a stop token.

    Args:
      program: what runs; more prompts than its batch take turns.
      params: in stored form, as `program.abstract_params`.
      prompts: token ids, at least one each; any lengths together.
      max_new_tokens: for each prompt.
      sampling: how tokens are drawn.
      stop_tokens: ends a sequence, and stands at its end.
      on_token: called with the number of a prompt and each of its new tokens, as they come.
      stats: gets counts and times.

    Returns:
      The new tokens of each prompt.

    Raises:
      ConfigError: a prompt is empty, holds what is no token, or the cache has no room for it and what is to come.
    """
    check_prompts(prompts, max_new_tokens, program.capacity, program.vocab_size)
    stats = stats or Stats()
    results: list[list[int]] = [[] for _ in prompts]
    for first in range(0, len(prompts), program.batch):
        group = prompts[first : first + program.batch]
        for row, token in _generate_group(program, params, group, first, max_new_tokens, sampling, stop_tokens, stats):
            results[row].append(token)
            if on_token:
                on_token(row, token)
    return results


def prefill_prompts(
    program: InferenceProgram, params: dict, cache: Cache, prompts: Sequence[Sequence[int]]
) -> tuple[jax.Array, Cache]:
    """Puts prompts into the cache, a chunk at a time, after what their sequences have there.

    Args:
      program: what runs.
      params: in stored form.
      cache: donated.
      prompts: token ids of each of the B sequences; none where a sequence gets nothing.

    Returns:
      (logits [B, V] float32 after the last token of each prompt, the cache). Zeros for empty prompts.
    """
    starts = np.asarray(jax.device_get(cache.lengths_B))
    ends = starts + [len(prompt) for prompt in prompts]
    tokens_sharding = program.abstract_chunk[0].sharding
    last_BV = None
    for turn in range(max(1, -(-int((ends - starts).max()) // program.chunk))):
        begins = np.minimum(starts + turn * program.chunk, ends)
        counts = np.minimum(ends - begins, program.chunk)
        positions = deal(begins.tolist(), counts.tolist(), program.chunk, program.placement.size("sequence"))
        tokens = np.zeros_like(positions)
        for row, (prompt, start) in enumerate(zip(prompts, starts, strict=True)):
            real = positions[row] != NO_TOKEN
            tokens[row, real] = np.asarray(prompt, np.int32)[positions[row, real] - start]
        logits_BV, cache = program.prefill(params, cache, *jax.device_put((tokens, positions), tokens_sharding))
        last_BV = logits_BV if last_BV is None else _where_rows(counts > 0, logits_BV, last_BV)
    assert last_BV is not None
    return last_BV, cache


def check_prompts(prompts: Sequence[Sequence[int]], max_new_tokens: int, capacity: int, vocab_size: int) -> None:
    """Raises ConfigError where prompts, or what is to come after them, cannot be."""
    if not prompts:
        raise ConfigError("prompts=[] holds no prompt; use at least one")
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens={max_new_tokens} must be positive; use 1")
    for row, prompt in enumerate(prompts):
        if not len(prompt):
            raise ConfigError(f"prompts[{row}] is empty; use at least one token, such as the tokenizer's first")
        wrong = [token for token in prompt if not 0 <= token < vocab_size]
        if wrong:
            raise ConfigError(f"prompts[{row}] holds {wrong[0]}, which is no token; use ids from 0 to {vocab_size - 1}")
        needed = len(prompt) + max_new_tokens
        if needed > capacity:
            raise ConfigError(
                f"capacity={capacity} is too small for the {len(prompt)} tokens of prompts[{row}] and "
                f"max_new_tokens={max_new_tokens}; use capacity={needed}"
            )


@jax.jit
def _where_rows(rows_B: jax.Array, new_BV: jax.Array, old_BV: jax.Array) -> jax.Array:
    return jnp.where(rows_B[:, None], new_BV, old_BV)


def _generate_group(program: InferenceProgram, params, prompts, first, max_new_tokens, sampling, stop_tokens, stats):
    """Yields (number of the prompt, token) of one batch of prompts, the first of which has number `first`."""
    sharding = program.abstract_tokens.sharding
    draw = partial(_draw, sampling=sampling, stops=tuple(stop_tokens), sharding=sharding)
    rows_B = np.arange(program.batch, dtype=np.int32)
    idle = [[]] * (program.batch - len(prompts))
    began = time.perf_counter()
    logits_BV, cache = prefill_prompts(program, params, program.init_cache(), [*prompts, *idle])
    jax.block_until_ready(logits_BV)
    stats.prefill_s += time.perf_counter() - began
    stats.prompt_tokens += sum(map(len, prompts))
    going_B = rows_B < len(prompts)
    for step in itertools.count(1):
        tokens_B, going_B = draw(logits_BV, cache.lengths_B, going_B, first + rows_B)
        if step < max_new_tokens:  # the devices go on while this host looks at what they have drawn
            logits_BV, cache = program.decode(params, cache, tokens_B)
        drawn, going = np.asarray(tokens_B), np.asarray(going_B)
        now, count = time.perf_counter(), int((drawn != STOPPED).sum())
        stats.new_tokens += count
        if step > 1:
            stats.decoded_tokens += count
            stats.decode_s += now - began
        began = now
        yield from ((first + row, int(drawn[row])) for row in range(len(prompts)) if drawn[row] != STOPPED)
        if step == max_new_tokens or not going.any():
            return


@partial(jax.jit, static_argnames=("sampling", "stops", "sharding"))
def _draw(logits_BV, lengths_B, going_B, rows_B, *, sampling: Sampling, stops: tuple[int, ...], sharding):
    """(tokens [B], `STOPPED` where a sequence has ended; whether each goes on after its token)."""
    drawn_B = sample(logits_BV, row_keys(sampling.seed, rows_B, lengths_B), sampling)
    tokens_B = jnp.where(going_B, drawn_B, STOPPED)
    stop_B = (drawn_B[:, None] == jnp.asarray(stops, jnp.int32)[None]).any(axis=1)
    return tuple(lax.with_sharding_constraint(array, sharding) for array in (tokens_B, going_B & ~stop_B))
