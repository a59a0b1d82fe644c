"""Evaluation: losses by position equal a sum over tokens, in every order of tokens, and several sets are told apart."""

import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.builders.runs import small_config, write_text
from tsp_jax.errors import ConfigError
from tsp_jax.layout import place
from tsp_jax.training import evaluation, trainer
from tsp_jax.training.data import Batches, load_splits
from tsp_jax.training.evaluation import BY_POSITION, FIRST_SET, evaluate, load_held_out
from tsp_jax.training.metrics import read_metrics
from tsp_jax.training.pictures import plot_positions
from tsp_jax.training.positions import position_buckets, sum_by_position
from tsp_jax.training.step import make_program

pytestmark = pytest.mark.usefixtures("optax_promotes")


# ------------------------------------------------------------------------------------------------ positions


def test_buckets_are_four_an_octave():
    assert position_buckets(20).tolist() == [1, 2, 3, 4, 5, 6, 8, 9, 11, 13, 16, 19]
    assert position_buckets(1).tolist() == [1]
    assert position_buckets(2**20)[-1] == 2**20
    assert len(position_buckets(2**20)) < 90


def test_sums_by_position_are_those_of_a_loop_over_tokens():
    rng = np.random.default_rng(0)
    nll = rng.random((3, 40)).astype(np.float32)
    labels = np.where(rng.random((3, 40)) < 0.2, -1, 5).astype(np.int32)
    nll[labels < 0] = 0
    positions = np.tile(np.arange(40, dtype=np.int32), (3, 1))
    positions[1, 17:] -= 17  # a second document
    order = rng.permutation(40)
    sums, counts = sum_by_position(*(jnp.asarray(x[:, order]) for x in (nll, labels, positions)))
    buckets = position_buckets(40)
    want_sums, want_counts = np.zeros(len(buckets)), np.zeros(len(buckets), int)
    for row, column in np.ndindex(3, 40):
        bucket = max(p for p in range(len(buckets)) if buckets[p] <= positions[row, column] + 1)
        want_sums[bucket] += nll[row, column]
        want_counts[bucket] += labels[row, column] >= 0
    np.testing.assert_allclose(sums, want_sums, rtol=1e-6)
    assert counts.tolist() == want_counts.tolist()


def test_no_array_of_tokens_times_buckets_is_stored():
    length = 1 << 18
    arrays = [jax.ShapeDtypeStruct((1, length), dtype) for dtype in (jnp.float32, jnp.int32, jnp.int32)]
    memory = jax.jit(sum_by_position).lower(*arrays).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 32 * length < len(position_buckets(length)) * length // 2


# ------------------------------------------------------------------------------------------------ sets


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Two further sets: 60 documents like those of training, and one document of other text."""
    folder = tmp_path_factory.mktemp("run")
    config = small_config(folder, steps=4, eval_every=2, eval_batches=2)
    like = write_text(folder / "like")
    (folder / "book.txt").write_text("".join(chr(33 + i * i % 90) for i in range(1500)))
    data = dataclasses.replace(config.data, eval=f"like={like}, book={folder / 'book.txt'}")
    return dataclasses.replace(config, data=data)


def evaluated(config, layout: str, **mesh) -> dict:
    placement = place(layout, **mesh)
    program = make_program(config, placement)
    shards = placement.size("sequence")
    sets = load_held_out(config, shards, load_splits(config, shards).held_out)
    found = evaluate(program, program.init().params, sets, config, lambda what: True)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def single(config):
    return evaluated(config, "single", data=1)


def test_each_set_has_its_loss_and_its_curve(single):
    assert {"eval_loss", "eval_loss/like", "eval_loss/book", BY_POSITION} == single.keys()
    assert set(single[BY_POSITION]) == {FIRST_SET, "like", "book"}
    assert single["eval_loss/like"] != single["eval_loss/book"]
    book = single[BY_POSITION]["book"]
    assert [int(first) for first in book] == position_buckets(96).tolist()


@pytest.mark.parametrize(("layout", "mesh"), [("tsp", {"data": 1, "tsp": 8}), ("sp", {"data": 2, "seq": 4})])
def test_losses_by_position_are_those_of_single_in_zigzag_order(layout, mesh, config, single):
    found = evaluated(config, layout, **mesh)
    assert config.data.order == "zigzag"
    leaves = zip(jax.tree.leaves_with_path(found), jax.tree.leaves(single), strict=True)
    for (path, value), want in leaves:
        assert value == pytest.approx(want, rel=1e-5), path


def test_the_mean_over_positions_is_the_loss(config, single):
    """The book fills its 15 windows, each of which has as many tokens at each position."""
    sizes = np.diff([*position_buckets(96), 97])
    means = np.array(list(single[BY_POSITION]["book"].values()))
    assert np.average(means, weights=sizes) == pytest.approx(single["eval_loss/book"], rel=1e-5)


def test_all_documents_of_a_set_are_evaluated_and_one_document_is_not_cut(config):
    """The splits of a corpus would leave out 49 of 50, and cut the book in two."""
    sets = load_held_out(config, 1, load_splits(config, 1).held_out)
    text = sum(len(path.read_bytes()) for path in Path(config.data.files).parent.parent.glob("like/*.txt"))
    assert sets["like"].num_windows == text // 96
    book = sets["book"]
    assert isinstance(book, Batches) and book.num_windows == 1500 // 96
    last = evaluation._whole_corpus(dict(config.data.held_out_sets())["book"], 264, "book")
    assert last.starts.tolist() == [0] and len(last.tokens) == 1500


def test_files_that_are_trained_on_are_refused(config):
    data = dataclasses.replace(config.data, eval=f"same={Path(config.data.files).parent}/0*.txt")
    with pytest.raises(ConfigError, match=r"^data.eval, set same: .*00.txt is trained on too; use files that data"):
        load_held_out(dataclasses.replace(config, data=data), 1, load_splits(config, 1).held_out)


def test_errors_of_a_set_name_it(config):
    data = dataclasses.replace(config.data, eval="gone=/nowhere/*.txt")
    with pytest.raises(ConfigError, match=r"^data.eval, set gone: data.files='/nowhere/\*.txt' matches no file"):
        load_held_out(dataclasses.replace(config, data=data), 1, load_splits(config, 1).held_out)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("books/*.txt", r"data.eval='books/\*.txt' is no NAME=FILES; use data.eval=books=books/\*.txt"),
        ("a=x,a=y", "data.eval names two sets a; use a name for each"),
        ("a=x,", "data.eval='' is no NAME=FILES"),
        ("held out=x", "data.eval='held out=x' is no NAME=FILES"),
        ("a=gs://bucket/x", "data.eval: a=gs://bucket/x is not on a file system"),
    ],
)
def test_sets_that_cannot_be_read_are_refused(value, message, config):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(config.data, eval=value)


# ------------------------------------------------------------------------------------------------ whole runs


def test_a_run_writes_losses_curves_and_the_picture(config, capsys):
    summary = trainer.train(config, "sets")
    folder = Path(config.workdir)
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if "eval_loss" in line]
    assert [line["step"] for line in lines] == [2, 4]
    for name in ("like", "book"):
        assert summary["eval_losses"][name] == lines[-1][f"eval_loss/{name}"]
        assert lines[-1][f"eval_loss/{name}"] < lines[0][f"eval_loss/{name}"] or name == "book"
    assert (folder / "eval_positions.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert f"held-out loss {lines[0]['eval_loss']:.4f} nats/token; like {lines[0]['eval_loss/like']:.4f}; book" in out
    assert "loss, held-out set book" in out


def test_a_curve_that_is_not_finite_is_null(tmp_path):
    line = {"step": 1, "eval_loss": math.nan, BY_POSITION: {"held out": {"1": math.nan, "2": 2.0}}}
    metrics = trainer.MetricsFile(tmp_path / "metrics.jsonl", 1)
    metrics.write(line)
    metrics.close()
    (read,) = read_metrics(tmp_path / "metrics.jsonl")
    assert read[BY_POSITION] == {"held out": {"1": None, "2": 2.0}}
    assert plot_positions([read, json.loads('{"eval_nll_by_position": 7}')], tmp_path / "a.png")
    assert (tmp_path / "a.png").exists()
    assert plot_positions([], tmp_path / "b.png") and not (tmp_path / "b.png").exists()
