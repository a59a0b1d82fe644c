"""An optax transformation of the user's own: it trains, resumes bitwise, and restores under another layout."""

import dataclasses
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from tests.builders.runs import compile_once, numbers, small_config
from tsp_jax.config import ModelConfig, OptimizerConfig
from tsp_jax.errors import ConfigError
from tsp_jax.layout import place
from tsp_jax.stored import to_logical
from tsp_jax.training import trainer
from tsp_jax.training.checkpoint import Checkpoints
from tsp_jax.training.metrics import read_metrics
from tsp_jax.training.optimizer import check_unused_flags, choose_optimizer
from tsp_jax.training.step import make_program

pytestmark = pytest.mark.usefixtures("optax_promotes")

LION = optax.chain(optax.clip_by_global_norm(1.0), optax.lion(optax.linear_schedule(1e-3, 1e-4, 6)))
PADDED = ModelConfig(vocab_size=259, d_model=24, num_layers=1, num_heads=9, num_kv_heads=3, head_dim=8, d_ff=50)
"""nine query and three KV heads, 259 tokens and 50 ffn columns, which most layouts pad"""


@pytest.fixture(scope="module", autouse=True)
def programs_compiled_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "make_program", compile_once(trainer.make_program))
        patch.setattr(trainer, "plot_losses", lambda lines, path: True)
        yield


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """Six steps with a checkpoint after every second one, on data=2, tsp=4 with ZeRO-1."""
    config = small_config(
        tmp_path_factory.mktemp("whole"), model=PADDED, layout="tsp", mesh="data=2,tsp=4", steps=6,
        checkpoint_every=2, keep_checkpoints=5, optimizer=OptimizerConfig(zero1=True),
    )  # fmt: skip
    summary = trainer.train(config, "lion", LION)
    return config, summary


def restored(config, layout: str, optimizer=LION, workdir: str = "", **mesh):
    """(program, state) of the last step under a layout."""
    program = make_program(config, place(layout, **mesh), optimizer)
    checkpoints = Checkpoints(Path(workdir or config.workdir) / "checkpoints", program, config, "")
    checkpoints.check(config.steps)
    return program, checkpoints.restore(config.steps)


def assert_same(actual, desired) -> None:
    pairs = zip(jax.tree.leaves(jax.device_get(actual)), jax.tree.leaves(jax.device_get(desired)), strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs)


def test_it_trains(whole_run):
    config, summary = whole_run
    lines = [line for line in read_metrics(Path(config.workdir) / "metrics.jsonl") if "loss" in line]
    assert summary["step"] == 6
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert {line["learning_rate"] for line in lines} == {None}, "it does not tell its learning rate"


def test_it_resumes_bitwise(whole_run, tmp_path):
    config, _ = whole_run
    shutil.copytree(Path(config.workdir) / "checkpoints" / "4", tmp_path / "checkpoints" / "4")
    shutil.copy(Path(config.workdir) / "metrics.jsonl", tmp_path)
    trainer.train(dataclasses.replace(config, workdir=str(tmp_path)), "lion", LION)
    assert numbers(tmp_path) == numbers(Path(config.workdir))
    mesh = {"data": 2, "tsp": 4}
    assert_same(restored(config, "tsp", workdir=str(tmp_path), **mesh)[1], restored(config, "tsp", **mesh)[1])


@pytest.mark.parametrize(("layout", "mesh"), [("tp", {"data": 1, "model": 8}), ("single", {"data": 1})])
def test_its_state_restores_under_another_layout(layout, mesh, whole_run):
    config, _ = whole_run
    logical = [to_logical(program.paddings, state) for program, state in (
        restored(config, "tsp", data=2, tsp=4), restored(config, layout, **mesh)
    )]  # fmt: skip
    assert any(padding.padded for padding in jax.tree.leaves(restored(config, "tsp", data=2, tsp=4)[0].paddings))
    assert_same(*logical)


def test_resuming_with_another_optimizer_is_refused_by_name(whole_run):
    config, _ = whole_run
    with pytest.raises(
        ConfigError, match=r"^optimizer: its state has .*None.*use the optimizer that it was trained with"
    ):
        trainer.train(config, "sgd", optax.sgd(1e-2))


def test_zero1_shards_its_state_over_data(whole_run):
    program = make_program(whole_run[0], place("tsp", data=2, tsp=4), LION)
    large = [array for array in jax.tree.leaves(program.abstract_state.opt_state) if array.size > 1000]
    assert large
    for array in large:
        assert np.prod(array.sharding.shard_shape(array.shape)) * 8 == array.size


def only_matrices(params):
    return jax.tree.map(lambda param: param.ndim > 1, params)


TRANSFORMATIONS = {
    "chain": LION,
    "masked": optax.masked(optax.adam(1e-3), only_matrices),
    "partition": optax.partition(
        {True: optax.sgd(1e-2, momentum=0.9), False: optax.adam(1e-3)}, param_labels=only_matrices
    ),
    "accumulated": optax.MultiSteps(optax.adam(1e-3), every_k_schedule=2).gradient_transformation(),
    "factored": optax.adafactor(1e-3, min_dim_size_to_factor=8),
    "injected": optax.inject_hyperparams(optax.adamw)(learning_rate=optax.linear_schedule(1.0, 0.0, 10)),
}


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_every_kind_of_state_is_sharded_like_the_parameters_or_replicated(name, tmp_path):
    config = small_config(tmp_path, layout="tsp", mesh="data=1,tsp=8", model=PADDED)
    program = make_program(config, place("tsp", data=1, tsp=8), TRANSFORMATIONS[name])
    sharded = {array.shape for array in jax.tree.leaves(program.abstract_state.params) if array.size > 100}
    state = jax.tree.leaves(program.abstract_state.opt_state)
    assert any(array.shape in sharded for array in state) == (name != "factored")
    for array in state:
        assert array.sharding.is_fully_replicated != (array.shape in sharded)
    jax.eval_shape(program.step, program.abstract_state, program.abstract_batch((1, config.batch, config.seq_len)))


def test_an_injected_learning_rate_is_read():
    optimizer = TRANSFORMATIONS["injected"]
    params = {"w": np.ones(3, np.float32)}
    state = optimizer.init(params)
    learning_rate = choose_optimizer(OptimizerConfig(), 20, optimizer).learning_rate
    for step in range(3):
        _, state = optimizer.update(params, state, params)
        np.testing.assert_allclose(learning_rate(step, state), 1.0 - step / 10)


@pytest.mark.parametrize("wrong", [optax.adamw, OptimizerConfig(), (lambda params: params, None)])
def test_a_wrong_type_is_refused_before_anything_is_written(wrong, tmp_path):
    config = small_config(tmp_path)
    with pytest.raises(ConfigError, match=rf"^optimizer is of type {type(wrong).__name__}, not an optax"):
        trainer.train(config, "wrong", wrong)
    with pytest.raises(ConfigError, match=r"^optimizer is of type"):
        make_program(config, place("single", data=1), wrong)
    assert not Path(config.workdir).exists()


def test_flags_that_it_would_ignore_are_refused_by_name():
    in_file = OptimizerConfig(b1=0.8)
    changed = dataclasses.replace(in_file, learning_rate=0.5)
    check_unused_flags(None, in_file, changed)
    check_unused_flags(LION, in_file, dataclasses.replace(in_file, zero1=True))
    message = "optimizer.learning_rate=0.5 has no effect: the configuration file defines its own optimizer"
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_unused_flags(LION, in_file, changed)
