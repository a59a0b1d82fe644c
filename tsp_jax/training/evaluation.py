"""Evaluation on held-out sets: the mean loss of each, and its losses by position in the context."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tsp_jax.config import Config, DataConfig
from tsp_jax.errors import ConfigError
from tsp_jax.text.sources import find_sources
from tsp_jax.training.corpus import HELD_OUT, Corpus, load_corpus
from tsp_jax.training.data import Batches, Weighted
from tsp_jax.training.positions import position_buckets
from tsp_jax.training.step import TrainProgram

FIRST_SET = "held out"
"""the set that is held out from the training files; no set of data.eval can have this name"""
BY_POSITION = "eval_nll_by_position"
"""key in an evaluation's line: set -> first number of tokens of a bucket (`position_buckets`) -> mean loss"""


def load_held_out(config: Config, sequence_shards: int, first: Batches) -> dict[str, Batches]:
    """The held-out sets by name: `first`, and those of data.eval.

    Raises:
      ConfigError: a file of a set is one of the training files; otherwise as `load_corpus` and `Batches`.
    """
    sets = {FIRST_SET: first}
    for name, data in config.data.held_out_sets():
        try:
            _check_apart(config.data, data)
            sets[name] = Batches(
                [Weighted(name, _whole_corpus(data, config.model.vocab_size, name), 1)], batch=config.batch,
                seq_len=config.seq_len, seed=config.seed, order=config.data.order, sequence_shards=sequence_shards,
                shuffle=False, packing=config.data.packing, long_documents=config.data.long_documents,
            )  # fmt: skip
        except ConfigError as error:
            raise ConfigError(f"data.eval, set {name}: {error}") from None
    return sets


def _check_apart(trained: DataConfig, held_out: DataConfig) -> None:
    """Raises ConfigError if a file is both trained on and held out."""
    train = {source.path for _, _, data in trained.sources() for source in find_sources(data)[1]}
    both = train & {source.path for source in find_sources(held_out)[1]}
    if both:
        raise ConfigError(f"{min(both)} is trained on too; use files that data.files does not match")


def _whole_corpus(data: DataConfig, vocab_size: int, name: str) -> Corpus:
    """Both splits of a set's files, in memory."""
    parts = [load_corpus(data, vocab_size, split) for split in ("train", "heldout")]
    tokens = [np.asarray(part.tokens) for part in parts]
    starts = [parts[0].starts, parts[1].starts + len(tokens[0])]
    total, last = sum(map(len, tokens)), len(tokens[1])
    if all(len(part.starts) == 1 for part in parts) and last == max(1, total // HELD_OUT):
        starts.pop()  # one document, which the splits divide
    return dataclasses.replace(
        parts[0],
        tokens=np.concatenate(tokens),
        loss=None if parts[0].loss is None else np.concatenate([np.asarray(part.loss) for part in parts]),
        starts=np.concatenate(starts),
        name=f"held-out set {name}={data.files!r}",
    )


def evaluate(
    program: TrainProgram, params: dict, sets: Mapping[str, Batches], config: Config, go_on: Callable[[str], bool]
) -> dict[str, Any] | None:
    """Evaluates sets on `config.eval_batches` batches each, or as many as a set has.

    `go_on` is called before each batch with a text that names it; if it returns False, the evaluation ends.

    Returns:
      What an evaluation's line of metrics.jsonl holds: eval_loss, which is of `FIRST_SET`, eval_loss/NAME of each other
      set, and `BY_POSITION`, all in nats per token. None: the evaluation ended early.
    """
    line: dict[str, Any] = {}
    by_position = {}
    for name, batches in sets.items():
        nll, labels = 0.0, 0
        for index in range(min(config.eval_batches, max(1, batches.num_windows // config.batch))):
            if not go_on(f"batch {index} of the evaluation of {name}"):
                return None
            found = program.evaluate(params, batches.place(index, program.batch_sharding, accumulate=1))
            nll, labels = nll + np.asarray(found[0], np.float64), labels + np.asarray(found[1], np.int64)
        count = np.sum(labels)
        line["eval_loss" if name == FIRST_SET else f"eval_loss/{name}"] = (
            float(np.sum(nll) / count) if count else math.nan
        )
        buckets = position_buckets(config.seq_len)
        by_position[name] = {
            str(first): float(total / number)
            for first, total, number in zip(buckets, np.atleast_1d(nll), np.atleast_1d(labels), strict=True)
            if number
        }
    return line | {BY_POSITION: by_position}


def describe(line: Mapping[str, Any]) -> str:
    """The losses of an evaluation's line as text."""
    others = [f"{key.partition('/')[2]} {value:.4f}" for key, value in line.items() if key.startswith("eval_loss/")]
    return "; ".join([f"held-out loss {line['eval_loss']:.4f} nats/token", *others])
