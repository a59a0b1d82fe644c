"""The loop that continues prompts: prefill in chunks, then one token of each sequence per step.

Dims: B batch, V vocabulary.
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
from tsp_jax.inference.cache import Cache, assign_tokens
from tsp_jax.inference.program import InferenceProgram
from tsp_jax.inference.sampling import Sampling, row_keys, sample
from tsp_jax.ops.attention.kv_cache import NO_TOKEN
from tsp_jax.training.clock import when_done

STOPPED = -1
"""in place of a token, where the sequence has ended"""
NOT_FINITE = -2
"""returned in place of a token whose logits contain infinity or NaN"""

OnToken = Callable[[int, int], None]
"""(index of the prompt, token)"""


@dataclasses.dataclass
class Stats:
    """Token counts and times of generation. Times include compilation unless programs were compiled before."""

    prompt_tokens: int = 0
    prefill_s: float = 0.0
    new_tokens: int = 0
    """all generated tokens"""
    decoded_tokens: int = 0
    """generated tokens except the first of each sequence, which comes from prefill"""
    decode_s: float = 0.0


def generate_tokens(
    program: InferenceProgram, params: dict, prompts: Sequence[Sequence[int]], *, max_new_tokens: int,
    sampling: Sampling = Sampling(), stop_tokens: Collection[int] = (), on_token: OnToken | None = None,
    stats: Stats | None = None,
) -> list[list[int]]:  # fmt: skip
    """Continues each prompt until it has `max_new_tokens` new tokens or a stop token is drawn.

    Args:
      program: prefill and decode; prompts are continued in groups of its batch size.
      params: in stored form, like `program.abstract_params`.
      prompts: token ids, at least one per prompt; lengths may differ.
      max_new_tokens: per prompt.
      sampling: how tokens are drawn.
      stop_tokens: tokens that end a sequence; the stop token is kept as its last token.
      on_token: called with the index of a prompt and its next token, as soon as the token is drawn.
      stats: counts and times are added to it.

    Returns:
      The new tokens of each prompt.

    Raises:
      ConfigError: a prompt is empty, has an id outside the vocabulary, exceeds the capacity with its new tokens, or is
        shorter than the program's RoPE allows.
    """
    check_prompts(prompts, max_new_tokens, program.capacity, program.vocab_size, program.shortest)
    check_stop_tokens(stop_tokens, program.vocab_size)
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
    """Appends prompts to the sequences in the cache (donated), one chunk at a time.

    There is one prompt for each of the B sequences; it may be empty.

    Returns:
      (logits [B, V] float32 after the last token of each prompt, the cache). Logits of empty prompts are zeros.
    """
    starts = np.asarray(jax.device_get(cache.lengths_B))
    ends = starts + [len(prompt) for prompt in prompts]
    tokens_sharding = program.abstract_chunk[0].sharding
    last_BV = None
    for step in range(max(1, -(-int((ends - starts).max()) // program.chunk))):
        begins = np.minimum(starts + step * program.chunk, ends)
        counts = np.minimum(ends - begins, program.chunk)
        ranks = program.placement.size("sequence")
        positions = assign_tokens(begins.tolist(), counts.tolist(), program.chunk, ranks)
        tokens = np.zeros_like(positions)
        for row, (prompt, start) in enumerate(zip(prompts, starts, strict=True)):
            is_token = positions[row] != NO_TOKEN
            tokens[row, is_token] = np.asarray(prompt, np.int32)[positions[row, is_token] - start]
        logits_BV, cache = program.prefill(params, cache, *jax.device_put((tokens, positions), tokens_sharding))
        last_BV = logits_BV if last_BV is None else _where_rows(counts > 0, logits_BV, last_BV)
    assert last_BV is not None
    return last_BV, cache


def check_prompts(
    prompts: Sequence[Sequence[int]], max_new_tokens: int, capacity: int, vocab_size: int, shortest: int = 1
) -> None:
    """Raises ConfigError where prompts are invalid, or do not fit the capacity together with their new tokens.

    `shortest`: fewest tokens that a prompt must have.
    """
    if not prompts:
        raise ConfigError("prompts=[] is empty; use at least one prompt")
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens={max_new_tokens} must be positive; use 1")
    for row, prompt in enumerate(prompts):
        if not len(prompt):
            raise ConfigError(f"prompts[{row}] is empty; use at least one token")
        wrong = [token for token in prompt if not 0 <= token < vocab_size]
        if wrong:
            raise ConfigError(f"prompts[{row}] has token id {wrong[0]}, which is unknown; use 0 to {vocab_size - 1}")
        needed = len(prompt) + max_new_tokens
        if needed > capacity:
            raise ConfigError(
                f"capacity={capacity} is too small for the {len(prompt)} tokens of prompts[{row}] and "
                f"max_new_tokens={max_new_tokens}; use capacity={needed}"
            )
        if len(prompt) < shortest:
            # transformers computes all keys again once a continuation is longer than the original context
            raise ConfigError(
                f"prompts[{row}] has {len(prompt)} tokens, with capacity={capacity} RoPE is that of prompts of at "
                f"least {shortest} (longrope); use prompts and max_new_tokens of at most {shortest - 1} tokens together"
            )


def check_stop_tokens(stop_tokens: Collection[int], vocab_size: int, name: str = "stop_tokens") -> None:
    """Raises ConfigError if a stop id is outside the vocabulary, so would never match; the error calls it `name`."""
    for token in stop_tokens:
        if not 0 <= token < vocab_size:
            raise ConfigError(f"{name}={token} is no token; use 0 to {vocab_size - 1}")


@jax.jit
def _where_rows(rows_B: jax.Array, new_BV: jax.Array, old_BV: jax.Array) -> jax.Array:
    return jnp.where(rows_B[:, None], new_BV, old_BV)


def _generate_group(program: InferenceProgram, params, prompts, first, max_new_tokens, sampling, stop_tokens, stats):
    """Yields (index of the prompt, token) for one batch of prompts, the first of which has index `first`."""
    sharding = program.abstract_tokens.sharding
    draw = partial(_draw, sampling=sampling, stops=tuple(stop_tokens), sharding=sharding)
    rows_B = np.arange(program.batch, dtype=np.int32)
    empty = [[]] * (program.batch - len(prompts))
    started = time.perf_counter()
    logits_BV, cache = prefill_prompts(program, params, program.init_cache(), [*prompts, *empty])
    jax.block_until_ready(logits_BV)
    stats.prefill_s += time.perf_counter() - started
    stats.prompt_tokens += sum(map(len, prompts))
    active_B = rows_B < len(prompts)
    for step in itertools.count(1):
        tokens_B, active_B = draw(logits_BV, cache.lengths_B, active_B, first + rows_B)
        ended = when_done(tokens_B)
        if step < max_new_tokens:  # devices run the next step while the host reads these tokens
            logits_BV, cache = program.decode(params, cache, tokens_B)
        drawn, active = np.asarray(tokens_B), np.asarray(active_B)
        if (bad := drawn == NOT_FINITE).any():
            row = first + int(bad.argmax())
            raise ConfigError(f"logits of prompts[{row}] are not finite; use intact weights, or dtype=float32")
        now, count = ended(), int((drawn != STOPPED).sum())
        stats.new_tokens += count
        if step > 1:
            stats.decoded_tokens += count
            stats.decode_s += now - started
        started = now
        yield from ((first + row, int(drawn[row])) for row in range(len(prompts)) if drawn[row] != STOPPED)
        if step == max_new_tokens or not active.any():
            return


@partial(jax.jit, static_argnames=("sampling", "stops", "sharding"))
def _draw(logits_BV, lengths_B, active_B, rows_B, *, sampling: Sampling, stops: tuple[int, ...], sharding):
    """(tokens [B], some replaced by `STOPPED` or `NOT_FINITE`; [B] bool: whether each sequence continues)."""
    drawn_B = sample(logits_BV, row_keys(sampling.seed, rows_B, lengths_B), sampling)
    finite_B = jnp.isfinite(logits_BV.max(axis=-1))  # NaN if any of them is
    tokens_B = jnp.where(active_B, jnp.where(finite_B, drawn_B, NOT_FINITE), STOPPED)
    stop_B = (drawn_B[:, None] == jnp.asarray(stops, jnp.int32)[None]).any(axis=1)
    return tuple(lax.with_sharding_constraint(array, sharding) for array in (tokens_B, active_B & ~stop_B))
