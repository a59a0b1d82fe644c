"""What a run reads: the share and the epochs of each source, and the balance of attention work."""

import msgspec
import numpy as np

from tsp_jax.config import Config, Order
from tsp_jax.files import Count, Finite
from tsp_jax.layout import Placement
from tsp_jax.training.balance import LEAST_GAIN, imbalance
from tsp_jax.training.data import Batches
from tsp_jax.training.splits import Scheduled


class SourceReport(msgspec.Struct):
    """One source, in some steps of a run."""

    name: str
    tokens: Count
    """without padding"""
    share: Finite
    """of the tokens of all sources"""
    epochs: Finite
    """tokens over those of a whole epoch of the source, summed over the phases of a schedule"""
    dropped: Count
    """documents that are in no sequence, because they are longer than one (in the last phase)"""


class DataReport(msgspec.Struct):
    """The data of a run in ``summary.json``."""

    sources: list[SourceReport]
    padding: Finite
    """share of the places in all batches that have no token"""
    attention_max_over_mean: Finite
    """attention work of the slowest device over the mean, in the first steps of the last phase"""


def report_data(config: Config, placement: Placement, train: Scheduled, steps: int) -> DataReport:
    """Reports on the first `steps` steps, 1 or more. Nothing is read but the index of documents."""
    parts = train.parts(0, steps)
    tokens = np.sum([batches.source_tokens(len(part)) for batches, part in parts], axis=0)
    epochs = np.sum([batches.source_tokens(len(part)) / _epoch_tokens(batches) for batches, part in parts], axis=0)
    places = sum(batches.batch * batches.seq_len * len(part) for batches, part in parts)
    last, last_steps = parts[-1]
    shares = tokens / tokens.sum()
    sources = [
        SourceReport(source.name, int(tokens[k]), float(shares[k]), float(epochs[k]), row.packing.num_dropped)
        for k, (source, row) in enumerate(zip(last.sources, last.rows, strict=True))
    ]
    balance = _imbalance(config, placement, last, last_steps, config.data.order)
    return DataReport(sources, 1 - int(tokens.sum()) / places, balance)


def describe_data(config: Config, placement: Placement, train: Scheduled) -> list[str]:
    """Lines about the data of all steps of a run, and about the order of tokens if another one would be better."""
    report = report_data(config, placement, train, config.steps)
    texts = [
        f"{source.name} {source.share:.1%} of tokens, " * bool(source.name)
        + f"{source.epochs:.3g} epochs"
        + f", {source.dropped:,} documents longer than a sequence dropped" * (source.dropped > 0)
        for source in report.sources
    ]
    padding = f"; {report.padding:.1%} padding" * (report.padding > 0)
    lines = [f"data of {config.steps} steps: {'; '.join(texts)}{padding}"]
    if placement.size("batch") * placement.size("sequence") > 1:
        lines.append(f"attention work, slowest device over the mean: {report.attention_max_over_mean:.3f}")
        lines[-1] += _advise(config, placement, *train.parts(0, config.steps)[-1], report.attention_max_over_mean)
    return lines


def _advise(config: Config, placement: Placement, batches: Batches, steps: range, here: float) -> str:
    """The other order of tokens and its balance, if it is better; else nothing."""
    ranks = placement.size("sequence")
    other: Order = "contiguous" if config.data.order == "zigzag" else "zigzag"
    if ranks == 1 or batches.seq_len % (2 * ranks):
        return ""
    there = _imbalance(config, placement, batches, steps, other)
    return f"; --data.order {other} would have {there:.3f}" if there < here * (1 - LEAST_GAIN) else ""


def _imbalance(config: Config, placement: Placement, batches: Batches, steps: range, order: Order) -> float:
    return imbalance(
        batches, steps, order=order, ranks=placement.size("sequence"), groups=placement.size("batch"),
        accumulate=config.accumulate, model=config.model,
    )  # fmt: skip


def _epoch_tokens(batches: Batches) -> np.ndarray:
    """Tokens of a whole epoch of each source, [sources]."""
    packings = [row.packing for row in batches.rows]
    return np.array([packing.num_tokens(np.arange(packing.num_sequences)) for packing in packings])
