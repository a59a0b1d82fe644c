"""Checkpoints survive what happens to disks: damage is found and named, a failed save harms nothing."""

import dataclasses
import gc
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.builders.damage import DAMAGES, truncate
from tests.builders.fuzz import check_door
from tests.builders.runs import small_config
from tsp_jax.config import FaultsConfig
from tsp_jax.errors import NOT_SAVED, ConfigError, RunStopped
from tsp_jax.layout import place
from tsp_jax.training.checkpoint import Checkpoints, saved_steps, steps_to_drop
from tsp_jax.training.step import make_program


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return make_program(small_config(tmp_path_factory.mktemp("program")), place("single", data=1))


@pytest.fixture(scope="module")
def states(program):
    """step -> a state of its own."""
    first = program.init()
    return lambda step: jax.tree.map(lambda x: x + jnp.asarray(step, x.dtype), first)


@pytest.fixture
def said():
    return []


@pytest.fixture
def open_folder(program, tmp_path, said):
    def open_folder(**changes):
        config = small_config(tmp_path, **changes)
        return Checkpoints(tmp_path / "checkpoints", program, config, "digest", said.append)

    return open_folder


def same(a, b) -> bool:
    pairs = zip(jax.tree.leaves(jax.device_get(a)), jax.tree.leaves(jax.device_get(b)), strict=True)
    return all(np.array_equal(x, y) and x.dtype == y.dtype for x, y in pairs)


# ------------------------------------------------------------------------------------------------ falling back


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_falls_back_to_the_newest_whole_one_and_names_the_file(damage, open_folder, states, said):
    checkpoints = open_folder()
    for step in (1, 2, 3):
        checkpoints.save(states(step), step)
    checkpoints.close(3)
    victim = max((checkpoints.folder / "3").rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)
    DAMAGES[damage](victim)
    again = open_folder()
    assert again.newest_undamaged() == 2
    assert same(again.restore(2), states(2))
    assert victim.relative_to(checkpoints.folder / "3").as_posix() in said[0]
    assert "checkpoint 3 is damaged" in said[0]
    assert saved_steps(checkpoints.folder) == [1, 2]
    again.save(states(3), 3)
    again.close(3)
    assert open_folder().newest_undamaged() == 3


def test_where_all_are_damaged_nothing_starts_afresh(open_folder, states):
    checkpoints = open_folder()
    checkpoints.save(states(1), 1)
    checkpoints.close(1)
    truncate(checkpoints.folder / "1" / "meta.json")
    with pytest.raises(ConfigError, match="no checkpoint that is not damaged"):
        open_folder().newest_undamaged()


def test_nothing_saved_is_nothing_damaged(open_folder, said):
    assert open_folder().newest_undamaged() is None
    assert said == []


def test_only_a_folder_named_as_a_step_is_written_is_a_checkpoint(open_folder, states):
    checkpoints = open_folder()
    checkpoints.save(states(20), 20)
    checkpoints.close(20)
    for name in ("5000000000", "99999999999999999999", "030", "0", "3\u0663", "30.damaged", "30-copy"):
        (checkpoints.folder / name).mkdir()
    (checkpoints.folder / "40").write_text("a file")
    assert saved_steps(checkpoints.folder) == [20]
    assert open_folder().newest_undamaged() == 20


@pytest.mark.parametrize("make", [lambda path: path.write_text(""), lambda path: path.symlink_to("nowhere")])
def test_what_is_no_folder_in_the_place_of_the_checkpoints_is_refused(make, open_folder, tmp_path):
    make(tmp_path / "checkpoints")
    with pytest.raises(ConfigError, match=r"checkpoints is not a folder; move it away, or use another --workdir"):
        open_folder()


@pytest.mark.parametrize("make", [lambda path: path.write_text(""), lambda path: path.symlink_to("/"), os.mkfifo])
def test_what_stands_where_a_damaged_checkpoint_goes_is_replaced(make, open_folder, states):
    checkpoints = open_folder()
    for step in (1, 2):
        checkpoints.save(states(step), step)
    checkpoints.close(2)
    truncate(checkpoints.folder / "2" / "meta.json")
    make(checkpoints.folder / "2.damaged")
    assert open_folder().newest_undamaged() == 1
    assert (checkpoints.folder / "2.damaged" / "meta.json").is_file()


# ------------------------------------------------------------------------------------------------ saving


def test_a_save_holds_the_state_of_its_moment(open_folder, states):
    """The step that follows overwrites the donated state while it is being written."""
    step = jax.jit(lambda state: jax.tree.map(lambda x: x * 0, state), donate_argnums=0)
    checkpoints = open_folder()
    state = states(1)
    checkpoints.save(state, 1)
    jax.block_until_ready(step(state))
    checkpoints.close(1)
    assert same(checkpoints.restore(1), states(1))


def fail_to_save(checkpoints, states, step):
    """A file is in the way of the folder."""
    blocked = checkpoints.folder / f"{step}.partial"
    blocked.write_text("")
    checkpoints.save(states(step), step)
    return blocked


def test_a_failed_save_is_reported_never_latest_and_later_ones_work(open_folder, states, said):
    checkpoints = open_folder()
    checkpoints.save(states(1), 1)
    checkpoints.wait()
    fail_to_save(checkpoints, states, 2)
    checkpoints.wait()
    assert len(said) == 1
    assert said[0].startswith("checkpoint 2 could not be saved")
    assert open_folder().newest_undamaged() == 1
    checkpoints.save(states(3), 3)
    checkpoints.close(3)
    assert open_folder().newest_undamaged() == 3
    assert same(open_folder().restore(3), states(3))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of Orbax's event loop, as it fails
def test_a_folder_that_vanishes_during_a_save_costs_that_save_only(open_folder, states, said):
    checkpoints = open_folder()
    checkpoints.save(states(1), 1)
    shutil.rmtree(checkpoints.folder, ignore_errors=True)
    checkpoints.wait()
    checkpoints.save(states(2), 2)
    checkpoints.close(2)
    assert open_folder().newest_undamaged() == 2
    gc.collect()


def test_a_failed_save_stops_a_run_that_wants_it(open_folder, states):
    checkpoints = open_folder(faults=FaultsConfig(failed_save="stop"))
    checkpoints.save(states(1), 1)
    checkpoints.wait()
    fail_to_save(checkpoints, states, 2)
    with pytest.raises(RunStopped, match="checkpoint 2 could not be saved; the newest is 1") as stopped:
        checkpoints.wait()
    assert stopped.value.code == NOT_SAVED


def test_a_run_that_ends_without_its_last_checkpoint_says_so(open_folder, states):
    checkpoints = open_folder()
    checkpoints.folder.mkdir()
    fail_to_save(checkpoints, states, 2)
    with pytest.raises(RunStopped, match="step 2, the last one, has no checkpoint; the newest is none"):
        checkpoints.close(2)


def test_half_written_folders_are_gone_after_the_next_start(open_folder, states):
    checkpoints = open_folder()
    checkpoints.save(states(1), 1)
    checkpoints.close(1)
    left = checkpoints.folder / "2.partial"
    shutil.copytree(checkpoints.folder / "1", left)
    assert open_folder().newest_undamaged() == 1
    assert not left.exists()


# ------------------------------------------------------------------------------------------------ keeping


@pytest.mark.parametrize(
    ("newest", "every", "kept"),
    [(1, 0, [10]), (3, 0, [8, 9, 10]), (99, 0, list(range(1, 11))), (1, 4, [4, 8, 10]), (2, 3, [3, 6, 9, 10])],
)
def test_the_newest_and_every_nth_are_kept(newest, every, kept):
    steps = range(1, 11)
    assert sorted(set(steps) - set(steps_to_drop(steps, newest, every))) == kept


def test_old_checkpoints_are_deleted_as_configured(open_folder, states):
    checkpoints = open_folder(keep_checkpoints=2, keep_every=3)
    for step in range(1, 8):
        checkpoints.save(states(step), step)
    checkpoints.close(7)
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["3", "6", "7"]
    assert open_folder().newest_undamaged() == 7


def test_another_models_checkpoint_is_refused(open_folder, states, program, tmp_path):
    checkpoints = open_folder()
    checkpoints.save(states(1), 1)
    checkpoints.close(1)
    other = small_config(tmp_path)
    other = dataclasses.replace(other, model=dataclasses.replace(other.model, rope_theta=5.0))
    with pytest.raises(ConfigError, match=r"model.rope_theta=5.0.*10000.0"):
        Checkpoints(checkpoints.folder, program, other, "digest").check(1)


def test_a_checkpoint_without_newer_fields_of_the_scaling_is_of_the_same_model(open_folder, states):
    checkpoints = open_folder()
    checkpoints.save(states(1), 1)
    checkpoints.close(1)
    path = checkpoints.folder / "1" / "meta.json"
    meta = json.loads(path.read_text())
    meta["config"]["model"]["rope_scaling"] = {"kind": "none", "factor": 1.0}
    path.write_text(json.dumps(meta))
    checkpoints.check(1)
    meta["config"]["model"]["rope_scaling"] = {"kind": "linear", "factor": 2.0}
    path.write_text(json.dumps(meta))
    with pytest.raises(ConfigError, match=r"model.rope_scaling=.*linear"):
        checkpoints.check(1)


def test_a_field_that_an_older_release_has_not_saved_had_its_default(open_folder, states, program, tmp_path):
    checkpoints = open_folder()
    checkpoints.save(states(1), 1)
    checkpoints.close(1)
    path = checkpoints.folder / "1" / "meta.json"
    meta = json.loads(path.read_text())
    del meta["config"]["model"]["embedding_scale"]
    path.write_text(json.dumps(meta))
    checkpoints.check(1)
    other = small_config(tmp_path)
    other = dataclasses.replace(other, model=dataclasses.replace(other.model, embedding_scale=5.0))
    with pytest.raises(ConfigError, match=r"model.embedding_scale=5.0.*1.0"):
        Checkpoints(checkpoints.folder, program, other, "digest").check(1)


# ------------------------------------------------------------------------------------------------ meta.json


@pytest.fixture
def saved(open_folder, states):
    """Checkpoints with step 1, and its meta.json."""
    checkpoints = open_folder()
    checkpoints.save(states(1), 1)
    checkpoints.close(1)
    return checkpoints, checkpoints.folder / "1" / "meta.json"


METAS = {
    "": "cannot be read as JSON",
    "[]": "Expected `object`, got `array`",
    "[" * 100_000: "nested too deeply",
    '{"data": {"digest": ""}}': "missing required field `config`",
    '{"config": {}, "data": {"digest": ""}}': "config.model: Expected `object`, got `null`",
    '{"config": {"model": 5}, "data": {"digest": ""}}': "config.model: Expected `object`, got `int`",
    '{"config": {"model": {}}}': "missing required field `data`",
    '{"config": {"model": {}}, "data": {"digest": 5}}': "data.digest=5",
    '{"config": {"model": {}}, "data": {"digest": ""}, "opt_state": {"a": [1.5]}}': "Expected `int`, got `float`",
    '{"config": {"model": {"d_ff": "[/]"}}, "data": {"digest": ""}}': "has model.d_ff=[/]",
}


@pytest.mark.parametrize(("content", "reason"), METAS.items(), ids=[reason[:30] for reason in METAS.values()])
def test_a_meta_of_the_wrong_shape_is_refused_in_a_line(content, reason, saved):
    checkpoints, path = saved
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"^[^\n]*another --workdir$") as error:
        checkpoints.check(1)
    assert reason in str(error.value)


@pytest.mark.soak
def test_fuzz_of_meta(saved):
    checkpoints, path = saved
    check_door(lambda content: (path.write_bytes(content), checkpoints.check(1)), [path.read_bytes()], (ConfigError,))
