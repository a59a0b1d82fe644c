"""Batches by step: token order, epochs, placement on devices, prefetch."""

import threading

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.builders.batches import assert_same, counting_corpus, make_batches
from tsp_jax.errors import ConfigError
from tsp_jax.training.corpus import Corpus
from tsp_jax.training.data import IGNORE, Batch, prefetch, sequence_order


def make_mesh() -> Mesh:
    return Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("data", "tsp"))


# --- bad input


def test_refuses_a_corpus_shorter_than_a_sequence():
    with pytest.raises(
        ConfigError, match=r"seq_len=32 is longer than the 21 tokens of the test corpus; use seq_len=16 "
    ):
        make_batches(counting_corpus((21,)), seq_len=32, sequence_shards=4)
    with pytest.raises(ConfigError, match="test corpus; use more text"):
        make_batches(counting_corpus((5,)), seq_len=32, sequence_shards=4)


@pytest.mark.parametrize("lengths", [(1,) * 40, (1,) * 32 + (7,)], ids=["all", "all in whole windows"])
def test_refuses_a_corpus_without_a_label(lengths):
    with pytest.raises(ConfigError, match=r"the test corpus has no label: each .* use files of several tokens"):
        make_batches(counting_corpus(lengths))


def test_one_label_is_enough():
    batches = make_batches(counting_corpus((1,) * 31 + (2,)), batch=2)
    assert (batches.at(0).labels != IGNORE).sum() == 1


def test_refuses_a_batch_that_micro_batches_do_not_divide():
    with pytest.raises(ConfigError, match="batch=4 is not a multiple of accumulate=3; use batch=6"):
        make_batches().place(0, NamedSharding(make_mesh(), P()), accumulate=3)


# --- order


def test_zigzag_gives_each_rank_an_early_and_a_late_chunk():
    expected = [0, 1, 14, 15, 2, 3, 12, 13, 4, 5, 10, 11, 6, 7, 8, 9]
    np.testing.assert_array_equal(sequence_order(16, 4, "zigzag"), expected)


@pytest.mark.parametrize("shards", [1, 2, 3, 8])
def test_zigzag_gives_ranks_equally_many_keys(shards: int):
    order = sequence_order(48, shards, "zigzag")
    np.testing.assert_array_equal(np.sort(order), np.arange(48))
    assert len(set((order + 1).reshape(shards, -1).sum(axis=1))) == 1


def test_contiguous_is_the_natural_order():
    np.testing.assert_array_equal(sequence_order(12, 4, "contiguous"), np.arange(12))


def test_one_rank_takes_any_length():
    np.testing.assert_array_equal(sequence_order(7, 1, "zigzag"), np.arange(7))


@pytest.mark.parametrize(
    ("seq_len", "order", "nearest"),
    [(100, "zigzag", 96), (108, "zigzag", 112), (3, "zigzag", 16), (101, "contiguous", 104), (100, "contiguous", 96)],
)
def test_refuses_lengths_that_ranks_do_not_divide(seq_len: int, order: str, nearest: int):
    with pytest.raises(
        ConfigError, match=rf"seq_len={seq_len} is not a multiple of .*8 ranks.*; use seq_len={nearest}$"
    ):
        sequence_order(seq_len, 8, order)  # pyright: ignore[reportArgumentType]


# --- batches


def test_batch_of_a_small_corpus_is_as_written_by_hand():
    # documents 0..4, 5, 6..15; windows of 8
    batch = make_batches(counting_corpus((5, 1, 10)), batch=2, seq_len=8, shuffle=False).at(0)
    expected = Batch(
        tokens=np.array([[0, 1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15]]),
        labels=np.array([[1, 2, 3, 4, -1, -1, 7, 8], [9, 10, 11, 12, 13, 14, 15, -1]]),
        positions=np.array([[0, 1, 2, 3, 4, 0, 0, 1], [0, 1, 2, 3, 4, 5, 6, 7]]),
        segment_ids=np.array([[1, 1, 1, 1, 1, 2, 3, 3], [1, 1, 1, 1, 1, 1, 1, 1]]),
    )
    assert_same(batch, expected)
    assert {array.dtype for array in batch} == {np.dtype(np.int32)}


def test_labels_never_cross_documents():
    corpus = counting_corpus()
    batches = make_batches(corpus, batch=13)
    batch = batches.at(0)
    assert batches.num_windows == 13
    is_last = np.isin(batch.tokens + 1, [*corpus.starts, len(corpus.tokens)])
    np.testing.assert_array_equal(batch.labels, np.where(is_last, IGNORE, batch.tokens + 1))


def test_a_label_may_lie_in_the_next_window():
    batch = make_batches(counting_corpus((40,)), batch=2, shuffle=False).at(0)
    np.testing.assert_array_equal(batch.labels[:, -1], [16, 32])


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("batch", [1, 4, 13, 20])
def test_epochs_hold_every_window_once(batch: int, shuffle: bool):
    batches = make_batches(batch=batch, shuffle=shuffle)
    steps = -(-3 * batches.num_windows // batch)
    windows = np.concatenate([batches.at(step).tokens[:, 0] // 16 for step in range(steps)])
    for epoch in range(3):
        seen = windows[epoch * batches.num_windows : (epoch + 1) * batches.num_windows]
        np.testing.assert_array_equal(np.sort(seen), np.arange(batches.num_windows))


def test_shuffle_depends_on_seed_and_epoch():
    def orders(seed: int) -> list[list[int]]:
        batches = make_batches(batch=13, seed=seed)
        return [batches.at(epoch).tokens[:, 0].tolist() for epoch in range(2)]

    first, second = orders(3), orders(4)
    assert first == orders(3)
    assert len({str(order) for order in first + second}) == 4


def test_unshuffled_batches_follow_the_corpus():
    np.testing.assert_array_equal(make_batches(shuffle=False).at(1).tokens.ravel(), np.arange(64, 128))


def test_a_resumed_run_sees_the_same_batches():
    straight = make_batches()
    history = [straight.at(step) for step in range(9)]
    resumed = make_batches()
    for step in (8, 3, 5):
        assert_same(resumed.at(step), history[step])


# --- placement


@pytest.mark.parametrize("order", ["zigzag", "contiguous"])
@pytest.mark.parametrize("spec", [P(), P("data", "tsp"), P(None, ("data", "tsp")), P("tsp", "data"), P("tsp")], ids=str)
def test_placed_batch_is_the_batch_in_order(spec: P, order: str):
    batches = make_batches(batch=8, seq_len=32, sequence_shards=8, order=order, seed=5)
    sharding = NamedSharding(make_mesh(), spec)
    placed = batches.place(2, sharding)
    assert {array.sharding for array in placed} == {sharding}
    assert {array.dtype for array in placed} == {np.dtype(np.int32)}
    assert_same(placed, Batch(*(array[:, sequence_order(32, 8, order)] for array in batches.at(2))))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_micro_batches_are_runs_of_rows(accumulate: int):
    batches = make_batches(batch=8, seq_len=32, sequence_shards=4)
    placed = batches.place(1, NamedSharding(make_mesh(), P(None, "data", "tsp")), accumulate=accumulate)
    rows = Batch(*(array[:, batches.order] for array in batches.at(1)))
    assert_same(placed, Batch(*(array.reshape(accumulate, 8 // accumulate, 32) for array in rows)))


@pytest.mark.parametrize("spec", [P(), P("data", "tsp"), P(None, "tsp"), P("data")], ids=str)
def test_devices_with_equal_slices_share_one_reading(spec: P):
    read = []

    class Recorder(np.ndarray):
        def __getitem__(self, index):
            read.append(np.size(index))
            return np.asarray(self)[index]

    counting = counting_corpus()
    recorded = Corpus(tokens=counting.tokens.view(Recorder), starts=counting.starts, name="", digest="")
    make_batches(recorded, sequence_shards=4).place(0, NamedSharding(make_mesh(), spec))
    assert sum(read) == 2 * 4 * 16  # tokens and labels of B = 4 and S = 16


# --- prefetch


@pytest.mark.parametrize("depth", [1, 2, 50])
def test_prefetch_yields_every_step_in_order(depth: int):
    assert list(prefetch(lambda step: step**2, 3, 20, depth)) == [(step, step**2) for step in range(3, 20)]


def test_prefetch_works_ahead_by_depth():
    made = [threading.Event() for _ in range(20)]
    stream = prefetch(lambda step: made[step].set(), 0, 20, depth=3)
    for _ in range(5):
        next(stream)
    assert made[7].wait(timeout=10)  # steps 0 to 4 were taken, 5 to 7 are ahead
    assert not made[8].wait(timeout=0.2)
    stream.close()


def test_prefetch_raises_when_the_step_is_due():
    def make(step: int) -> int:
        if step == 2:
            raise ConfigError("step 2 cannot be made")
        return step

    stream = prefetch(make, 0, 9, depth=4)
    assert [next(stream), next(stream)] == [(0, 0), (1, 1)]
    with pytest.raises(ConfigError, match="step 2 cannot be made"):
        next(stream)
    assert not any(thread.name.startswith("tsp_prefetch") for thread in threading.enumerate())


def test_closing_prefetch_ends_its_thread():
    stream = prefetch(lambda step: step, 0, 10**6, depth=2)
    next(stream)
    assert any(thread.name.startswith("tsp_prefetch") for thread in threading.enumerate())
    stream.close()
    assert not any(thread.name.startswith("tsp_prefetch") for thread in threading.enumerate())
