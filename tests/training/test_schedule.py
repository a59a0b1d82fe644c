"""A schedule of sequence lengths: its text, its batches by step, and runs in the middle of it that are resumed."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.builders.batches import assert_same, counting_corpus, make_batches
from tests.builders.runs import compile_once, numbers, small_config, write_text
from tsp_jax.config import DataConfig, Phase
from tsp_jax.config.phases import parse_phases
from tsp_jax.errors import ConfigError
from tsp_jax.layout import place
from tsp_jax.training import trainer
from tsp_jax.training.checkpoint import Checkpoints
from tsp_jax.training.data import IGNORE, Batch
from tsp_jax.training.schedule import describe_schedule, lengths_from
from tsp_jax.training.splits import Scheduled

pytestmark = pytest.mark.usefixtures("optax_promotes")

# --- its text


@pytest.mark.parametrize(
    ("schedule", "want"),
    [
        ("", [Phase(0, 96)]),
        ("16x200", [Phase(0, 16), Phase(200, 96)]),
        ("16x200,96", [Phase(0, 16), Phase(200, 96)]),
        ("32x5, 16x7,96", [Phase(0, 32), Phase(5, 16), Phase(12, 96)]),
    ],
)
def test_phases_follow_each_other_and_end_with_seq_len(schedule, want):
    assert list(parse_phases(schedule, 96)) == want


@pytest.mark.parametrize(
    ("schedule", "says"),
    [
        ("16", "seq_len_schedule=16 ends with 16, seq_len=96; use seq_len=16"),
        ("16x2,48", "seq_len_schedule=16x2,48 ends with 48, seq_len=96; use seq_len=48"),
        ("128x2", "seq_len_schedule=128x2 has length 128, above seq_len=96; use seq_len=128"),
        ("16x0", "seq_len_schedule='16x0': '16x0' is not LENGTHxSTEPS; use 48x200"),
        ("96,16x2", "'96' is not LENGTHxSTEPS"),
        (",", "'' is not LENGTHxSTEPS"),
    ],
)
def test_wrong_schedules_are_refused(schedule, says, tmp_path):
    with pytest.raises(ConfigError) as refused:
        small_config(tmp_path, seq_len_schedule=schedule)
    assert says in str(refused.value) and "\n" not in str(refused.value)


def test_a_length_that_the_ranks_do_not_divide_is_refused_before_anything_compiles(tmp_path):
    config = small_config(tmp_path, layout="tsp", mesh="tsp=4", seq_len_schedule="36x2")
    with pytest.raises(ConfigError, match=r"seq_len_schedule: seq_len=36 is not divisible by 8 .*; use 40"):
        trainer.train(config)
    assert not Path(config.workdir).exists()


def test_lengths_are_those_of_the_steps_that_are_left(tmp_path):
    config = small_config(tmp_path, seq_len_schedule="32x5,16x5,32x5")
    assert [lengths_from(config, start) for start in (0, 5, 14, 15, 20)] == [
        [32, 16, 96],
        [16, 32, 96],
        [32, 96],
        [96],
        [96],
    ]
    assert lengths_from(dataclasses.replace(config, steps=7), 0) == [32, 16]


def test_tokens_of_a_step_are_said(tmp_path):
    config = small_config(tmp_path, seq_len_schedule="48x5")
    want = "sequence length 48 from step 1 (192 tokens a step), 96 from step 6 (384 tokens a step)"
    assert describe_schedule(config) == want
    shorter = describe_schedule(dataclasses.replace(config, steps=5))
    assert shorter == "sequence length 48 from step 1 (192 tokens a step); seq_len=96 comes after the last step"
    assert describe_schedule(dataclasses.replace(config, seq_len_schedule="")) is None


# --- its batches


def test_each_phase_has_the_batches_of_its_own_steps():
    short, long = (make_batches(counting_corpus((500,)), seq_len=length, phase=n) for n, length in enumerate((8, 32)))
    scheduled = Scheduled((Phase(0, 8), Phase(3, 32)), [short, long])
    for step, (batches, own) in {0: (short, 0), 2: (short, 2), 3: (long, 0), 9: (long, 6)}.items():
        assert_same(scheduled.at(step), batches.at(own))
        assert scheduled.num_tokens(step) == 4 * batches.seq_len
    assert [(part.seq_len, steps) for part, steps in scheduled.parts(1, 5)] == [(8, range(1, 3)), (32, range(0, 2))]
    assert [(part.seq_len, steps) for part, steps in scheduled.parts(0, 3)] == [(8, range(0, 3))]


def test_phases_of_one_length_have_orders_of_their_own():
    first, second = (make_batches(counting_corpus((500,)), batch=30, phase=phase) for phase in range(2))
    assert first.at(0).tokens.tolist() != second.at(0).tokens.tolist()


LENGTHS = st.lists(st.integers(1, 40), min_size=4, max_size=30)
SHORT = st.lists(st.tuples(st.sampled_from([4, 8, 12]), st.integers(1, 12)), min_size=1, max_size=3)


@pytest.mark.parametrize("packing", ["windows", "best-fit"])
@given(LENGTHS, SHORT)
@settings(deadline=None)
def test_an_epoch_that_goes_through_phases_has_every_token_once(packing, lengths, phases):
    corpus = counting_corpus([40, *lengths], first=1)
    if packing == "windows":  # whose epochs leave out a remainder: one epoch only
        assume(sum(seq_len * steps for seq_len, steps in phases) <= len(corpus.tokens))
    tokens, used, pack = [], None, functools.partial(make_batches, corpus, packing=packing, batch=1)
    for number, (seq_len, steps) in enumerate(phases):
        batches = pack(seq_len=seq_len, phase=number, used=used)
        tokens += [batches.at(step).tokens for step in range(steps)]
        used = batches.used(steps)
    last = pack(seq_len=16, phase=len(phases), used=used)
    tokens += [last.at(step).tokens for step in range(last.rows[0].size - last.rows[0].packing.num_sequences)]
    counts = np.bincount(np.concatenate([array.ravel() for array in tokens]), minlength=len(corpus.tokens) + 1)[1:]
    if packing == "windows":
        assert counts.max() == 1 and (counts == 0).sum() < 16
    else:
        assert counts.max() == counts.min()


@pytest.mark.parametrize("packing", ["windows", "best-fit"])
def test_labels_and_positions_of_the_rest_of_an_epoch(packing):
    """A document that an earlier phase has used in part goes on where that part ended."""
    corpus = counting_corpus((64, 7), first=1)
    short = make_batches(corpus, packing=packing, seq_len=8, batch=3)
    rest = make_batches(corpus, packing=packing, seq_len=16, batch=1, phase=1, used=short.used(1))
    used = set(short.at(0).tokens.ravel().tolist())
    rows = [Batch(*(array[0] for array in rest.at(step))) for step in range(rest.rows[0].size - rest.num_windows)]
    for row in rows:
        assert used.isdisjoint(row.tokens[row.tokens > 0].tolist())
        np.testing.assert_array_equal(row.labels, np.where(np.isin(row.tokens, [0, 64, 71]), IGNORE, row.tokens + 1))
        for segment in np.unique(row.segment_ids):
            here = row.segment_ids == segment
            np.testing.assert_array_equal(row.positions[here], np.arange(here.sum()))
            assert (np.diff(row.tokens[here]) == 1).all() or not row.tokens[here].any()
    assert rest.source_tokens(len(rows)) == sum((row.tokens > 0).sum() for row in rows)


# --- runs


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run on two by two devices of a mixture of packed documents, in two phases, with a checkpoint of every step."""
    folder = tmp_path_factory.mktemp("whole")
    small = write_text(folder / "small")
    (folder / "code").mkdir()
    for number in range(8):
        (folder / "code" / f"{number}.py").write_text(f"def f{number}(x): return x\n" * (1 + number % 4))
    mixture = f"small={small}:3,code={folder}/code/*:1"
    data = DataConfig(cache_dir=str(folder / "cache"), tokenizer="bytes", mixture=mixture, packing="best-fit")
    config = small_config(
        folder, data=data, layout="tsp", mesh="data=2,tsp=2", steps=12, accumulate=2, seq_len_schedule="48x6",
        checkpoint_every=1, keep_checkpoints=20, eval_every=4,
    )  # fmt: skip
    make_program = compile_once(trainer.make_program)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "make_program", make_program)
        trainer.train(config, "whole")
    return config, make_program


def everything(config, make_program) -> tuple:
    """Metrics and the final state of a run."""
    program = make_program(config, place("tsp", data=2, tsp=2))
    state = Checkpoints(Path(config.workdir) / "checkpoints", program, config, "").restore(config.steps)
    return numbers(Path(config.workdir)), [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


QUICK = (2, 6, 9)
STEPS = [
    pytest.param(step, marks=() if step in QUICK else pytest.mark.soak) for step in (1, 2, 3, 4, 5, 6, 7, 8, 9, 11)
]


@pytest.mark.parametrize("step", STEPS)
def test_resuming_in_a_mixture_a_packing_and_a_schedule_is_bitwise(step, whole, tmp_path, monkeypatch):
    config, make_program = whole
    monkeypatch.setattr(trainer, "make_program", make_program)
    monkeypatch.setattr(trainer, "plot_losses", lambda lines, path: True)
    original, resumed = Path(config.workdir), dataclasses.replace(config, workdir=str(tmp_path / "run"))
    shutil.copytree(original / "checkpoints" / str(step), tmp_path / "run" / "checkpoints" / str(step))
    shutil.copy(original / "metrics.jsonl", tmp_path / "run")
    trainer.train(resumed, "resumed")
    assert everything(resumed, make_program) == everything(config, make_program)


def test_the_summary_says_what_was_read(whole):
    config, _ = whole
    lines = [line for line in numbers(Path(config.workdir)) if "loss" in line]
    data = json.loads((Path(config.workdir) / "summary.json").read_text())["data"]
    small, code = data["sources"]
    assert (small["name"], code["name"]) == ("small", "code")
    assert small["share"] + code["share"] == pytest.approx(1)
    assert small["tokens"] + code["tokens"] > sum(
        line["tokens"] for line in lines
    )  # a token of a document has no label
    assert small["tokens"] + code["tokens"] == pytest.approx((1 - data["padding"]) * 4 * 6 * (48 + 96))
    assert code["epochs"] > 0 and data["padding"] > 0 and data["attention_max_over_mean"] >= 1


def test_a_changed_packing_or_schedule_is_said_when_a_run_is_resumed(whole):
    config, make_program = whole
    program = make_program(config, place("tsp", data=2, tsp=2))
    data = dataclasses.replace(config.data, packing="windows")
    changed = dataclasses.replace(config, data=data, seq_len_schedule="")
    checkpoints = Checkpoints(Path(config.workdir) / "checkpoints", program, changed, "other")
    assert checkpoints.check(3) == [
        "seq_len_schedule=, was 48x6",
        "data.packing=windows, was best-fit",
        "the training text, or its mixture, is not the one that the checkpoint was trained on",
    ]
