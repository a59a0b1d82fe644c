"""Runs that train adapters: what is trained, what a checkpoint holds, and what is refused when a run is resumed."""

import dataclasses
import json
import shutil
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.builders.arrays import place_case
from tests.builders.folders import save_folder
from tests.builders.runs import compile_once, numbers, small_config
from tsp_jax.config import Config, LoraConfig
from tsp_jax.errors import ConfigError
from tsp_jax.layout import place
from tsp_jax.stored import to_logical
from tsp_jax.training import trainer
from tsp_jax.training.checkpoint import Checkpoints
from tsp_jax.training.frozen import digest_weights, load_frozen
from tsp_jax.training.saved_run import load_run_params
from tsp_jax.training.splits import load_splits
from tsp_jax.training.step import make_program

pytestmark = pytest.mark.usefixtures("optax_promotes")

LORA = LoraConfig(rank=4, base_dtype="bfloat16")
make_once = compile_once(trainer.make_program)


@pytest.fixture(autouse=True)
def programs(monkeypatch):
    monkeypatch.setattr(trainer, "make_program", make_once)
    monkeypatch.setattr(trainer, "plot_losses", lambda lines, path: True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Config:
    """A run of eight steps from given weights, with checkpoints after four and eight."""
    folder = tmp_path_factory.mktemp("whole")
    config = small_config(folder, lora=LORA, layout="tsp", mesh="data=1,tsp=2", steps=8, checkpoint_every=4)
    model = dataclasses.replace(config.model, init_std=0.1)
    config = dataclasses.replace(config, model=model, init_from=str(save_folder(folder / "model", config.model)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "make_program", make_once)
        patch.setattr(trainer, "plot_losses", lambda lines, path: True)
        trainer.train(config, "whole")
    return config


def state_of(config: Config, case: str, step: int):
    """The logical arrays of a checkpoint, restored under another layout."""
    program = make_program(config, place_case(case))
    state = Checkpoints(Path(config.workdir) / "checkpoints", program, config, "").restore(step)
    return jax.device_get(to_logical(program.paddings._replace(frozen={}), state))


def same(a, b) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


def test_the_loss_falls(whole):
    losses = [line["loss"] for line in numbers(Path(whole.workdir)) if "loss" in line]
    assert np.mean(losses[-2:]) < losses[0] - 0.1


def test_a_checkpoint_is_the_same_under_every_layout_and_has_no_frozen_weights(whole):
    states = [state_of(whole, case, 8) for case in ("tsp2", "single", "tp2_sp4")]
    assert same(states[0], states[1])
    assert same(states[0], states[2])
    assert set(states[0].params) == {"adapters"}
    assert states[0].frozen == {}
    written = sum(file.stat().st_size for file in (Path(whole.workdir) / "checkpoints/8/state").rglob("*"))
    assert written < 2 * (Path(whole.init_from) / "model.safetensors").stat().st_size


@pytest.mark.parametrize("mesh", ["data=1,tsp=2", "data=2,tsp=1"])
def test_a_run_is_resumed_from_its_workdir_and_the_folder(mesh, whole, tmp_path):
    """Bitwise on the same mesh; within rounding on another one."""
    workdir = tmp_path / "run"
    shutil.copytree(Path(whole.workdir) / "checkpoints/4", workdir / "checkpoints/4")
    shutil.copy(Path(whole.workdir) / "metrics.jsonl", workdir)
    moved = shutil.copytree(whole.init_from, tmp_path / "elsewhere")
    again = dataclasses.replace(whole, workdir=str(workdir), init_from=str(moved), mesh=mesh)
    trainer.train(again, "again")
    if mesh == whole.mesh:
        assert numbers(workdir) == numbers(Path(whole.workdir))
        assert same(state_of(again, "single", 8), state_of(whole, "single", 8))
    else:
        chex.assert_trees_all_close(numbers(workdir), numbers(Path(whole.workdir)), rtol=1e-4)


def test_a_checkpoint_is_restored_with_its_adapters_merged(whole):
    placement = place_case("single")
    program = make_program(whole, placement)
    checkpoints = Checkpoints(Path(whole.workdir) / "checkpoints", program, whole, "")
    merged = load_run_params(whole.workdir, whole, placement, 8)
    state, frozen = checkpoints.restore(8), load_frozen(whole, program, placement)
    assert jax.tree.structure(merged) == jax.tree.structure(frozen)
    adapter, weight = state.params["adapters"]["o"], frozen["layers"]["attention"]["w_o"]
    wanted = weight.astype(jnp.float32) + LORA.scale * jnp.einsum("lor,lrd->lod", adapter["left"], adapter["right"])
    np.testing.assert_allclose(merged["layers"]["attention"]["w_o"], wanted, rtol=1e-5, atol=1e-6)
    assert float(abs(wanted - weight.astype(jnp.float32)).max()) > 1e-3


def flip(folder: Path) -> None:
    """Changes one weight, by the lowest bit that a bfloat16 has."""
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


REFUSED = {
    "rank": ({"lora": LoraConfig(rank=2)}, "lora.rank=2: the checkpoint in workdir=.* has lora.rank=4; use that"),
    "alpha": ({"lora": dataclasses.replace(LORA, alpha=1.0)}, "lora.alpha=1.0: .* has lora.alpha=16.0"),
    "targets": ({"lora": dataclasses.replace(LORA, targets=("v", "q"))}, r"lora.targets=\['q', 'v'\]: .* 'gate'"),
    "dtype": ({"lora": dataclasses.replace(LORA, base_dtype="float32")}, "lora.base_dtype=float32: .*=bfloat16"),
    "off": ({"lora": LoraConfig()}, "lora.rank=0: .* has lora.rank=4"),
    "random weights": (
        {"init_from": ""},
        "init_from='' and seed=0 give other frozen weights than .*/model' and seed=0",
    ),
    "no folder": ({"init_from": "gone"}, "gone"),
    "another model": ({}, "give other frozen weights than those under the adapters in workdir="),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_adapters_and_other_weights_are_refused_before_anything_is_written(case, whole, tmp_path):
    changes, words = REFUSED[case]
    workdir = tmp_path / "run"
    shutil.copytree(Path(whole.workdir) / "checkpoints/4", workdir / "checkpoints/4")
    config = dataclasses.replace(whole, workdir=str(workdir))
    if case == "another model":
        folder = shutil.copytree(whole.init_from, tmp_path / "model")
        flip(folder)
        config = dataclasses.replace(config, init_from=str(folder))
    with pytest.raises(ConfigError, match=words) as refused:
        trainer.train(dataclasses.replace(config, **changes), "refused")
    assert "\n" not in str(refused.value)
    assert not (workdir / "config.json").exists()


def test_a_checkpoint_of_all_weights_is_no_checkpoint_of_adapters(whole, tmp_path):
    """Also one of an earlier version, whose configuration had no `lora`."""
    workdir = tmp_path / "run"
    shutil.copytree(Path(whole.workdir) / "checkpoints/4", workdir / "checkpoints/4")
    path = workdir / "checkpoints/4/meta.json"
    meta = json.loads(path.read_text())
    del meta["config"]["lora"]
    path.write_text(json.dumps(meta))
    checkpoints = Checkpoints(workdir / "checkpoints", make_once(whole, place("tsp", tsp=2)), whole, "")
    with pytest.raises(ConfigError, match=r"lora.rank=4: .* has lora.rank=0"):
        checkpoints.check(4)


# ------------------------------------------------------------------------------------------------ one step


@pytest.fixture(scope="module")
def program(whole):
    return make_once(whole, place("tsp", data=1, tsp=2))


def step_with(program, config: Config, frozen=None):
    """(state before, state after, metrics) of the first step."""
    state = program.init()
    if frozen is not None:
        state = state._replace(frozen=frozen(state.frozen))
    before = jax.device_get(state)
    batch = load_splits(config, 2).train.place(0, program.batch_sharding, accumulate=1)
    after, metrics = program.step.lower(program.abstract_state, batch).compile()(state, batch)
    return before, jax.device_get(after), metrics


def test_a_step_changes_adapters_alone_and_has_moments_of_them_alone(program, whole):
    before, after, metrics = step_with(program, whole)
    assert same(before.frozen, after.frozen)
    assert {leaf.dtype for leaf in jax.tree.leaves(after.frozen)} == {jnp.dtype("bfloat16")}
    shapes = sorted(leaf.shape for leaf in jax.tree.leaves(after.params))
    assert sorted(leaf.shape for leaf in jax.tree.leaves(after.opt_state) if leaf.ndim) == sorted(2 * shapes)
    moments = [leaf for leaf in jax.tree.leaves(after.opt_state) if leaf.ndim][: len(shapes)]
    clipped = np.sqrt(sum(np.sum(np.square(mu / (1 - whole.optimizer.settings["b1"]))) for mu in moments))
    assert clipped == pytest.approx(min(float(metrics.grad_norm), whole.optimizer.clip_norm), rel=1e-4)


def test_a_step_is_skipped_if_a_frozen_weight_is_not_a_number(program, whole):
    def spoil(frozen):
        return frozen | {"embed": {"table": frozen["embed"]["table"] * jnp.asarray(jnp.nan, jnp.bfloat16)}}

    before, after, metrics = step_with(program, whole, spoil)
    assert not np.isfinite(metrics.grad_norm)
    assert same(before.params, after.params)


# ------------------------------------------------------------------------------------------------ digests


def test_a_digest_depends_on_values_and_not_on_the_layout(whole):
    """Heads are padded, or stored in another order, under some of these layouts."""
    digests = set()
    for case in ("single", "tsp8", "tp8", "mix2_4"):
        placement = place_case(case)
        program = make_program(whole, placement)
        frozen = load_frozen(whole, program, placement)
        digests.add(digest_weights(program.paddings.frozen, frozen))
    assert len(digests) == 1
    pads, table = program.paddings.frozen, frozen["embed"]["table"]
    swapped = table.at[:2].set(table[1::-1])
    for other in (swapped, table.at[3, 4].set(1.0), table.at[3, 4].multiply(-1.0)):
        assert digest_weights(pads, frozen | {"embed": {"table": other}}) not in digests
    assert digest_weights({}, {}) == ""
