"""Mixtures: shares by weight, epochs of each source, and the same batches whenever a run is resumed."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.builders.batches import assert_same, counting_corpus, make_batches
from tsp_jax.config import Config, DataConfig, ModelConfig
from tsp_jax.config.mixture import Part, parse_mixture
from tsp_jax.errors import ConfigError
from tsp_jax.training.data import Weighted
from tsp_jax.training.mixture import Interleaving
from tsp_jax.training.splits import load_splits

WEIGHTS = st.lists(st.integers(1, 20), min_size=1, max_size=5)
FAR = 10_000
"""ids of source k start at k FAR"""


def mixed(*weights: int, lengths=((200,), (5, 1, 30, 12), (40, 33, 20)), **changes):
    sources = [
        Weighted(f"source{k}", counting_corpus(lengths[k], first=k * FAR + 1), weight)
        for k, weight in enumerate(weights)
    ]
    return make_batches(sources, **changes)


# --- the text of a mixture


def test_weights_become_the_smallest_integers():
    text = "wiki=corpus/wiki/*.jsonl:1.5, code=corpus/**/*.py:0.75,rest=a=b:6"
    want = (Part("wiki", "corpus/wiki/*.jsonl", 2), Part("code", "corpus/**/*.py", 1), Part("rest", "a=b", 8))
    assert parse_mixture(text) == want
    assert [part.weight for part in parse_mixture("a=x,b=y")] == [1, 1]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("wiki", "data.mixture has 'wiki', which does not start with a name"),
        ("a=x:1,", "data.mixture has '', which"),
        ("=x:1", "data.mixture has '=x:1', which"),
        ("a b=x:1", "data.mixture has 'a b=x:1', which"),
        ("a=:1", "source a has no files"),
        ("a=x:0", "weight '0' of source a is not a positive number; use a=x:1"),
        ("a=x:0.0", "weight '0.0' of source a"),
        ("a=x:-1", "weight '-1' of source a"),
        ("a=x:nan", "weight 'nan' of source a"),
        ("a=x:1e9", "weight '1e9' of source a"),
        ("a=x:", "weight '' of source a"),
        ("a=x,b=y,a=z", "data.mixture names 2 sources a"),
        ("a=x:1,b=y:0.000003", "weights 1:0.000003 are too fine"),
        ("a=gs://b/c:1", "source a=gs://b/c:1 is not on a file system"),
    ],
)
def test_wrong_mixtures_are_refused(text, says):
    with pytest.raises(ConfigError) as refused:
        DataConfig(mixture=text)
    assert says in str(refused.value) and "\n" not in str(refused.value)


def test_a_mixture_beside_files_is_refused():
    with pytest.raises(ConfigError, match=r"data.files='b' stands beside data.mixture; use one of them"):
        DataConfig(mixture="a=x:1", files="b")


def test_dropping_without_whole_documents_is_refused():
    with pytest.raises(ConfigError, match=r"data.long_documents=drop .*; use data.packing=best-fit"):
        DataConfig(long_documents="drop")


# --- places


@given(WEIGHTS, st.integers(0, 200))
def test_counts_are_those_of_the_places(weights, places):
    interleaving = Interleaving(weights)
    sources, numbers = interleaving.at(np.arange(places))
    np.testing.assert_array_equal(interleaving.counts(places), np.bincount(sources, minlength=len(weights)))
    for k in range(len(weights)):
        np.testing.assert_array_equal(numbers[sources == k], np.arange((sources == k).sum()))


@given(WEIGHTS)
def test_shares_follow_the_weights_at_every_place(weights):
    interleaving, share = Interleaving(weights), np.array(weights) / sum(weights)
    for places in range(2 * sum(weights) + 1):
        assert (np.abs(interleaving.counts(places) - places * share) <= len(weights)).all()
    np.testing.assert_array_equal(interleaving.counts(sum(weights)), weights)


# --- batches


def test_each_source_has_its_share_and_its_own_epochs():
    batches = mixed(2, 1, 1, batch=8)
    sizes = [row.packing.num_sequences for row in batches.rows]
    assert sizes == [12, 3, 5]
    rows = np.concatenate([batches.at(step).tokens[:, 0] for step in range(30)])
    for k, size in enumerate(sizes):
        windows = (rows[rows // FAR == k] - k * FAR - 1) // 16
        assert len(windows) == len(rows) * (2, 1, 1)[k] // 4
        for epoch in range(len(windows) // size):
            np.testing.assert_array_equal(np.sort(windows[epoch * size : (epoch + 1) * size]), np.arange(size))


@given(st.lists(st.integers(1, 40), min_size=3, max_size=20), st.lists(st.integers(1, 40), min_size=3, max_size=20))
@settings(deadline=None, max_examples=50)
def test_an_epoch_of_each_packed_source_has_every_token_once(first, second):
    batches = mixed(3, 2, lengths=((2, *first), (2, *second)), packing="best-fit", batch=5)
    for k, row in enumerate(batches.rows):
        sequences = np.concatenate([batches.sequences(step) for step in range(row.packing.num_sequences)])
        sequences = sequences[batches._source_of(sequences) == k][: row.packing.num_sequences]
        tokens = batches._read(sequences, np.arange(16)).tokens
        np.testing.assert_array_equal(np.sort(tokens[tokens > 0]), batches.sources[k].corpus.tokens)


@pytest.mark.parametrize("packing", ["windows", "best-fit"])
def test_a_resumed_run_mixes_the_same_batches(packing):
    straight = mixed(3, 1, 2, packing=packing, batch=5)
    history = [straight.at(step) for step in range(40)]
    resumed = mixed(3, 1, 2, packing=packing, batch=5)
    for step in (39, 2, 3, 7, 11, 13, 19, 23, 29, 31):
        assert_same(resumed.at(step), history[step])


def test_a_source_alone_has_the_batches_of_its_corpus():
    alone, named = make_batches(), make_batches([Weighted("only", counting_corpus(), 7)])
    for step in (0, 5):
        assert_same(named.at(step), alone.at(step))


def test_two_sources_of_one_size_have_orders_of_their_own():
    batches = mixed(1, 1, lengths=((800,), (800,)), batch=100)
    rows = batches.at(0).tokens[:, 0]
    first, second = rows[rows < FAR], rows[rows >= FAR] - FAR
    assert sorted(first) == sorted(second)
    assert first.tolist() != second.tolist()


def test_the_digest_depends_on_texts_and_weights():
    digests = {mixed(3, 1).digest, mixed(1, 3).digest, mixed(3, 1, 1).digest, make_batches().digest}
    assert len(digests) == 4
    assert mixed(3, 1).digest == mixed(3, 1).digest


# --- files


@pytest.fixture
def config(tmp_path):
    for name, text in (("prose", "one sentence after another. "), ("code", "def f(): return 1\n")):
        (tmp_path / name).mkdir()
        for number in range(3):
            (tmp_path / name / f"{number}.txt").write_text(text * (5 + number))
    data = DataConfig(cache_dir=str(tmp_path / "cache"), mixture=f"prose={tmp_path}/prose/*:3,code={tmp_path}/code/*:1")
    sizes = {"d_model": 8, "num_layers": 1, "num_heads": 1, "num_kv_heads": 1, "head_dim": 8, "d_ff": 8}
    return Config(model=ModelConfig(vocab_size=256, **sizes), data=data, steps=2, batch=4, seq_len=32)


def test_sources_are_read_from_their_own_files(config):
    for split in load_splits(config, 1):
        rows = [bytes(row.astype(np.uint8)) for row in split.at(1).tokens]
        assert [b"return" in row for row in rows].count(True) == 1


def test_a_source_without_files_is_named(config, tmp_path):
    data = dataclasses.replace(config.data, mixture=f"{config.data.mixture},none={tmp_path}/none/*:1")
    with pytest.raises(ConfigError, match=r"^data.mixture, source none: data.files='.*none/\*' matches no file"):
        load_splits(dataclasses.replace(config, data=data), 1)
