"""Packing: every document once an epoch, in order inside, and not cut if it fits; padding; labels that count."""

from collections import Counter

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.builders.batches import DOCUMENT_LENGTHS, assert_same, counting_corpus, make_batches
from tsp_jax.errors import ConfigError
from tsp_jax.ops.kernels.mask import PADDING
from tsp_jax.training import packing
from tsp_jax.training.data import IGNORE, Batch, sequence_order
from tsp_jax.training.packing import best_fit_decreasing

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=40).filter(lambda lengths: max(lengths) > 1)
LONG = st.sampled_from(["split", "drop"])
SEQ_LEN = 16


def epoch_of(batches, epoch: int = 0) -> list[Batch]:
    """The sequences of one epoch, each a batch of one row; for batches of one sequence."""
    size = batches.num_windows
    return [Batch(*(array[0] for array in batches.at(epoch * size + place))) for place in range(size)]


# --- best-fit decreasing


def simple_best_fit(lengths: list[int], capacity: int) -> list[int]:
    """The definition, one item at a time: (room left in each bin), sorted."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        rooms.append(capacity - length)
        if fitting:
            rooms[-1] = min(fitting) - length
            rooms.remove(min(fitting))
    return sorted(rooms)


@given(st.lists(st.integers(1, 30), max_size=60), st.integers(30, 50))
def test_best_fit_decreasing_fills_bins_as_one_item_at_a_time_would(lengths, capacity):
    bins, count = best_fit_decreasing(np.array(lengths, np.int64), capacity)
    rooms = capacity - np.bincount(bins, lengths, minlength=count).astype(int)
    assert sorted(rooms) == simple_best_fit(lengths, capacity)


# --- sequences


@given(LENGTHS, LONG, st.integers(1, 8))
@settings(deadline=None)
def test_an_epoch_has_every_token_once_and_drops_only_long_documents(lengths, long, look_ahead):
    corpus = counting_corpus(lengths, first=1)
    kept = [long == "split" or length <= SEQ_LEN for length in lengths]
    if sum(k and n > 1 for k, n in zip(kept, lengths, strict=True)) == 0:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "LOOK_AHEAD", look_ahead)
        batches = make_batches(corpus, batch=1, packing="best-fit", long_documents=long)
    want = np.concatenate([corpus.tokens[s : s + n] for s, n, k in zip(corpus.starts, lengths, kept, strict=True) if k])
    for epoch in range(2):
        tokens = np.concatenate([row.tokens for row in epoch_of(batches, epoch)])
        np.testing.assert_array_equal(np.sort(tokens[tokens > 0]), want)
    assert batches.rows[0].packing.num_dropped == len(lengths) - sum(kept)


@given(LENGTHS)
@settings(deadline=None)
def test_a_document_that_fits_is_one_segment_and_segments_are_in_order(lengths):
    corpus = counting_corpus(lengths, first=1)
    document = np.repeat(np.arange(len(lengths)), lengths)
    for row in epoch_of(make_batches(corpus, batch=1, packing="best-fit")):
        segments = np.unique(row.segment_ids).tolist()
        documents = [segment for segment in segments if segment != PADDING]
        assert documents == list(range(1, len(documents) + 1))
        for segment in segments:
            here = row.segment_ids == segment
            tokens = row.tokens[here]
            np.testing.assert_array_equal(row.positions[here], np.arange(len(tokens)))
            if segment == PADDING:
                assert not tokens.any()
                continue
            (number,) = set(document[tokens - 1])
            np.testing.assert_array_equal(np.diff(tokens), 1)
            assert len(tokens) == lengths[number] or lengths[number] > SEQ_LEN


@given(LENGTHS, st.sampled_from(["windows", "best-fit"]))
@settings(deadline=None)
def test_labels_are_the_next_token_of_the_same_document(lengths, name):
    corpus = counting_corpus(lengths, first=1)
    if name == "windows" and not (sum(lengths) >= SEQ_LEN and max(lengths[:1]) > 1):
        return
    lasts = np.cumsum(lengths)  # ids are 1, 2, 3, ...
    for row in epoch_of(make_batches(corpus, batch=1, packing=name)):
        want = np.where(np.isin(row.tokens, [0, *lasts]), IGNORE, row.tokens + 1)
        np.testing.assert_array_equal(row.labels, want)


@pytest.mark.parametrize("name", ["windows", "best-fit"])
def test_tokens_that_do_not_count_are_no_labels(name):
    loss = (np.arange(sum(DOCUMENT_LENGTHS)) % 3 > 0).astype(np.uint8)
    everything = make_batches(counting_corpus(), packing=name)
    batches = make_batches(counting_corpus(loss=loss), packing=name)
    labels = everything.at(2).labels
    assert (labels % 3 == 0).any()
    counted = np.where((labels != IGNORE) & (labels % 3 > 0), labels, IGNORE)
    assert_same(batches.at(2), everything.at(2)._replace(labels=counted))


def test_padding_is_a_segment_of_its_own_without_labels():
    batch = make_batches(counting_corpus((5, 4), first=1), batch=1, packing="best-fit").at(0)
    expected = Batch(
        tokens=np.array([[1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 0, 0, 0, 0, 0, 0]]),
        labels=np.array([[2, 3, 4, 5, -1, 7, 8, 9, -1, -1, -1, -1, -1, -1, -1, -1]]),
        positions=np.array([[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6]]),
        segment_ids=np.array([[1, 1, 1, 1, 1, 2, 2, 2, 2, *[PADDING] * 7]]),
    )
    assert_same(batch, expected)
    assert {array.dtype for array in batch} == {np.dtype(np.int32)}


@given(LENGTHS)
@settings(deadline=None)
def test_tokens_and_segments_of_a_batch_are_counted_without_reading_it(lengths):
    batches = make_batches(counting_corpus(lengths, first=1), packing="best-fit")
    for step in range(3):
        batch = batches.at(step)
        assert batches.num_tokens(step) == (batch.tokens > 0).sum()
        for sequence, segments in zip(batches.sequences(step), batch.segment_ids, strict=True):
            counts = np.unique(segments, return_counts=True)[1]
            np.testing.assert_array_equal(batches.lengths(int(sequence)), counts)


def test_tokens_of_windows_are_all_real():
    batches = make_batches()
    assert batches.num_tokens(1) == 4 * 16
    assert batches.lengths(0).tolist() == [5, 1, 10]


# --- resuming and placement


def test_a_resumed_run_packs_the_same_batches():
    straight = make_batches(packing="best-fit")
    history = [straight.at(step) for step in range(25)]
    resumed = make_batches(packing="best-fit")
    for step in (24, 1, 3, 5, 8, 11, 13, 17, 20, 23):
        assert_same(resumed.at(step), history[step])


@pytest.mark.parametrize("order", ["zigzag", "contiguous"])
def test_placed_batches_are_the_batches_in_order(order):
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("data", "tsp"))
    batches = make_batches(packing="best-fit", sequence_shards=4, order=order)
    placed = batches.place(1, NamedSharding(mesh, P("data", "tsp")))
    assert_same(placed, Batch(*(array[:, sequence_order(16, 4, order)] for array in batches.at(1))))


def test_each_document_is_read_by_itself():
    """Documents of one sequence may lie far apart in the corpus; what lies between them is not read."""
    read = Counter()

    class Recorder(np.ndarray):
        def __getitem__(self, index):
            read["tokens"] += int(np.max(index) - np.min(index)) + 1
            return np.asarray(self)[index]

    lengths = (9, *[16] * 1000, 7)
    corpus = counting_corpus(lengths)
    recorded = counting_corpus(lengths)
    object.__setattr__(recorded, "tokens", corpus.tokens.view(Recorder))
    batches = make_batches(recorded, packing="best-fit", batch=1001)
    batches.at(0)
    assert read["tokens"] <= 2 * 1001 * 16


# --- refusals


def test_refuses_a_corpus_whose_documents_are_all_dropped():
    with pytest.raises(ConfigError, match=r"drop leaves nothing of the test corpus: each of its 2 documents is longer"):
        make_batches(counting_corpus((17, 30)), packing="best-fit", long_documents="drop")


@pytest.mark.parametrize("name", ["windows", "best-fit"])
def test_refuses_a_corpus_without_a_token_that_counts(name):
    none = np.zeros(sum(DOCUMENT_LENGTHS), np.uint8)
    none[0] = 1  # the first token of a document is nobody's label
    with pytest.raises(ConfigError, match="test corpus has no label: none of its tokens counts"):
        make_batches(counting_corpus(loss=none), packing=name)
    none[-1] = 1
    if name == "best-fit":
        make_batches(counting_corpus(loss=none), packing=name)


def test_refuses_labels_that_are_in_dropped_documents_only():
    with pytest.raises(ConfigError, match="test corpus has no label"):
        make_batches(counting_corpus((1, 17, 1)), packing="best-fit", long_documents="drop")
