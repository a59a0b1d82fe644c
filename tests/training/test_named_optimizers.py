"""Optimizers by name: the updates of optax, the same under every layout, and refused where a setting is not theirs."""

import dataclasses
import functools
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers, muon

from tests.builders.arrays import normal, relative_error
from tests.builders.runs import compile_once, numbers, small_config
from tsp_jax.config import ModelConfig, OptimizerConfig
from tsp_jax.config.optimizer import SETTINGS
from tsp_jax.errors import ConfigError
from tsp_jax.layout import place
from tsp_jax.stored import to_logical
from tsp_jax.training import trainer
from tsp_jax.training.checkpoint import Checkpoints
from tsp_jax.training.optimizer import make_optimizer
from tsp_jax.training.step import make_program

pytestmark = pytest.mark.usefixtures("optax_promotes")

PADDED = ModelConfig(vocab_size=259, d_model=128, num_layers=2, num_heads=9, num_kv_heads=3, head_dim=16, d_ff=130)
"""144 query rows, 259 tokens and 130 ffn columns, which most layouts pad, and Adafactor factors"""
LAYOUTS = {
    "tsp 8": ("tsp", {"data": 1, "tsp": 8}),
    "data 2 x tsp 4": ("tsp", {"data": 2, "tsp": 4}),
    "tp 4": ("tp", {"data": 1, "model": 4}),
}
RATES = {"lion": 1e-3, "sgd": 0.3}


def optimizer_config(name: str, **changes) -> OptimizerConfig:
    return OptimizerConfig(name=name, learning_rate=RATES.get(name, 1e-2), warmup_steps=1, weight_decay=0.1, **changes)  # pyright: ignore


# ------------------------------------------------------------------------------------------------ updates


def tree() -> dict:
    """Two stacked matrices, a table, and the norm of two layers."""
    shapes = {"layers": {"up": (2, 5, 7), "scale": (2, 7)}, "embed": (11, 7)}
    return jax.tree.map(lambda shape: jnp.asarray(normal(7, *shape)), shapes, is_leaf=lambda x: isinstance(x, tuple))


def updates_of(optimizer: optax.GradientTransformation, steps: int = 3) -> list[dict]:
    params, found = tree(), []
    state = optimizer.init(params)
    for step in range(steps):
        grads = jax.tree.map(lambda x, step=step: jnp.sin(x * (3 + step)), params)
        updates, state = optimizer.update(grads, state, params)
        found.append(updates)
        params = optax.apply_updates(params, updates)
    return found


def decays(params):
    return {"layers": {"up": True, "scale": False}, "embed": True}


def by_optax(name: str) -> optax.GradientTransformation:
    """What optax has under the name; its own Adafactor and SGD have no decay that the learning rate scales."""
    schedule = {"learning_rate": 1e-2, "weight_decay": 0.1}
    mask = {"mask": decays}
    if name == "muon":
        return muon(
            1e-2, beta=0.95, eps=1e-8, adam_b1=0.9, adam_b2=0.95, consistent_rms=0.2,
            muon_weight_dimension_numbers={"layers": {"up": MuonDimensionNumbers(1, 2), "scale": None}, "embed": None},
        )  # fmt: skip
    return {
        "adamw": lambda: optax.adamw(**schedule, **mask, b1=0.9, b2=0.95),
        "lion": lambda: optax.lion(**schedule, **mask, b1=0.9, b2=0.99),
        "adafactor": lambda: optax.adafactor(1e-2, multiply_by_parameter_scale=False),
        "sgd": lambda: optax.sgd(1e-2, momentum=0.9),
    }[name]()


@pytest.mark.parametrize("name", SETTINGS)
def test_updates_are_those_of_optax(name):
    decay = None if name in ("adamw", "lion") else 0.0
    config = OptimizerConfig(
        name=name, learning_rate=1e-2, warmup_steps=0, clip_norm=1e9, weight_decay=decay, final_fraction=1.0
    )
    actual, desired = updates_of(make_optimizer(config, 10)), updates_of(by_optax(name))
    for got, want in zip(jax.tree.leaves(actual), jax.tree.leaves(desired), strict=True):
        if name == "muon" and want.ndim < 3:
            continue  # optax gives Nesterov's Adam to what is no matrix
        assert relative_error(np.asarray(got), np.asarray(want)) <= 1e-6


def test_muon_orthogonalizes_each_layers_matrix_alone():
    """Each layer's update has singular values about equal, and does not change with another layer's gradient."""
    config = OptimizerConfig(
        name="muon", learning_rate=1.0, warmup_steps=0, final_fraction=1.0, weight_decay=0.0, clip_norm=1e9
    )
    (update,) = updates_of(make_optimizer(config, 10), steps=1)
    for layer in np.asarray(update["layers"]["up"]):
        values = np.linalg.svd(layer, compute_uv=False) / (0.2 * np.sqrt(7))
        assert (values > 0.6).all() and (values < 1.3).all()
        assert np.sqrt((layer**2).mean()) == pytest.approx(0.2, rel=0.25)
    table = np.linalg.svd(np.asarray(update["embed"]), compute_uv=False)
    assert table.max() > 2 * table.min(), "a table is no matrix of a layer"


@pytest.mark.parametrize("name", ["lion", "sgd", "adafactor"])
def test_weight_decay_is_scaled_by_the_learning_rate_and_leaves_norms(name):
    config = OptimizerConfig(name=name, learning_rate=1e-2, warmup_steps=0, final_fraction=1.0, weight_decay=0.5)
    without = dataclasses.replace(config, weight_decay=0.0)
    (decayed,), (plain,) = (updates_of(make_optimizer(c, 10), steps=1) for c in (config, without))
    params = tree()
    difference = jax.tree.map(jnp.subtract, decayed, plain)
    np.testing.assert_allclose(difference["embed"], -1e-2 * 0.5 * params["embed"], atol=1e-7)
    assert not difference["layers"]["scale"].any()


@pytest.mark.parametrize("name", ["adamw", "lion", "muon", "sgd"])
def test_moments_wait_in_bfloat16_and_nothing_else_does(name):
    """Muon's state also has the coefficients of its iteration."""
    config = optimizer_config(name, moments_dtype="bfloat16", **({"b2": 0.95} if name == "lion" else {}))
    state = make_optimizer(config, 10).init(tree())
    for array in jax.tree.leaves(state):
        shapes = {param.shape for param in jax.tree.leaves(tree())}
        if array.shape in shapes:
            assert array.dtype == jnp.bfloat16
        else:
            assert array.dtype in (jnp.int32, jnp.float32)


# ------------------------------------------------------------------------------------------------ layouts


def losses_of(config, placement, steps: int) -> tuple[np.ndarray, object]:
    """(losses, logical parameters) after some steps on one batch of tokens."""
    program = make_program(config, placement)
    state, losses = program.init(), []
    for step in range(steps):
        tokens = np.random.default_rng(step).integers(0, 259, (1, config.batch, config.seq_len), np.int32)
        ones = np.ones_like(tokens)
        batch = (tokens, np.roll(tokens, -1, -1), np.cumsum(ones, -1, dtype=np.int32) - 1, ones)
        batch = type(program.abstract_batch((1, 1, 1)))(*(jax.device_put(x, program.batch_sharding) for x in batch))
        state, metrics = program.step(state, batch)
        losses.append(float(metrics.loss))
    return np.array(losses), logical_of(program.paddings.params, state.params)


def logical_of(paddings, stored):
    """On one device: the order in which eight would do it eagerly may deadlock on a busy machine."""
    return jax.device_get(to_logical(paddings, jax.tree.map(jnp.asarray, jax.device_get(stored))))


def run_config(folder, name: str, layout: str = "single", mesh: str = "", **changes):
    optimizer = optimizer_config(name, **changes)
    data = dataclasses.replace(small_config(folder).data, order="contiguous")
    return small_config(
        folder, model=PADDED, layout=layout, mesh=mesh, steps=6, batch=2, seq_len=48, optimizer=optimizer, data=data
    )


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """Losses and parameters of `single`, which every layout is compared with."""
    folder = tmp_path_factory.mktemp("single")
    return functools.cache(lambda name: losses_of(run_config(folder, name), place("single", data=1), 4))


@pytest.mark.parametrize(
    ("name", "layout"),
    [("adafactor", "tsp 8"), ("adafactor", "tp 4"), ("muon", "data 2 x tsp 4"), ("muon", "tp 4"), ("lion", "tsp 8"),
     ("sgd", "tsp 8")],
)  # fmt: skip
def test_updates_are_the_same_under_every_layout(name, layout, single, tmp_path):
    """Also of weights with padding, whose shapes and means differ from the logical weights'."""
    layout, mesh = LAYOUTS[layout]
    losses, params = losses_of(run_config(tmp_path, name, layout), place(layout, **mesh), 4)
    want_losses, want_params = single(name)
    # Lion takes signs, and rounding decides the sign of what should be 0: 1.4e-5 and 3.3e-3 were seen.
    np.testing.assert_allclose(losses, want_losses, rtol=1e-4 if name == "lion" else 1e-5)
    assert want_losses[0] != want_losses[-1]
    for got, want in zip(jax.tree.leaves(params), jax.tree.leaves(want_params), strict=True):
        assert relative_error(got, want) <= (1e-2 if name == "lion" else 1e-4)


def test_zero1_shards_muons_momentum_over_data(tmp_path):
    config = run_config(tmp_path, "muon", "tsp", zero1=True)
    program = make_program(config, place("tsp", data=2, tsp=4))
    large = [array for array in jax.tree.leaves(program.abstract_state.opt_state) if array.size > 10_000]
    assert large
    for array in large:
        assert np.prod(array.sharding.shard_shape(array.shape)) * 8 == array.size


# ------------------------------------------------------------------------------------------------ whole runs


@pytest.mark.parametrize("name", ["adafactor", "muon"])
def test_a_run_resumes_bitwise_and_restores_under_another_layout(name, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "make_program", compile_once(trainer.make_program))
    monkeypatch.setattr(trainer, "plot_losses", lambda lines, path: True)
    config = dataclasses.replace(run_config(tmp_path, name, "tsp", "data=1,tsp=8"), steps=4, checkpoint_every=2)
    trainer.train(config, "whole")
    again = dataclasses.replace(config, workdir=str(tmp_path / "again"))
    shutil.copytree(Path(config.workdir) / "checkpoints" / "2", tmp_path / "again" / "checkpoints" / "2")
    shutil.copy(Path(config.workdir) / "metrics.jsonl", tmp_path / "again")
    trainer.train(again, "again")
    assert numbers(Path(again.workdir)) == numbers(Path(config.workdir))

    def logical(layout: str, workdir: str, **mesh):
        program = make_program(config, place(layout, **mesh))
        checkpoints = Checkpoints(Path(workdir) / "checkpoints", program, config, "")
        checkpoints.check(4)
        return logical_of(program.paddings, checkpoints.restore(4))

    trees = [
        logical("tsp", config.workdir, data=1, tsp=8),
        logical("tsp", again.workdir, data=1, tsp=8),
        logical("single", config.workdir, data=1),
        logical("tp", config.workdir, data=1, model=4),
    ]
    for tree in trees[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(trees[0]), jax.tree.leaves(tree), strict=True))


def test_resuming_with_another_name_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "make_program", compile_once(trainer.make_program))
    monkeypatch.setattr(trainer, "plot_losses", lambda lines, path: True)
    config = small_config(tmp_path, steps=2, optimizer=OptimizerConfig(name="lion"))
    trainer.train(config, "lion")
    other = dataclasses.replace(config, steps=4, optimizer=OptimizerConfig(name="muon"))
    with pytest.raises(ConfigError, match=r"^optimizer.*use the optimizer that it was trained with"):
        trainer.train(other, "muon")


# ------------------------------------------------------------------------------------------------ settings

REFUSED = {
    "lion": {"eps": 1e-6, "momentum": 0.9},
    "adafactor": {"b1": 0.9, "b2": 0.9, "eps": 1e-6, "momentum": 0.9, "zero1": True, "moments_dtype": "bfloat16"},
    "sgd": {"b1": 0.9, "b2": 0.9, "eps": 1e-6},
    "adamw": {"momentum": 0.9},
}


@pytest.mark.parametrize(("name", "field"), [(name, field) for name, fields in REFUSED.items() for field in fields])
def test_settings_that_an_optimizer_does_not_have_are_refused(name, field):
    value = REFUSED[name][field]
    message = (
        f"optimizer.{field}={value} has no effect with optimizer.name={name}; leave it out, or use optimizer.name="
    )
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        OptimizerConfig(name=name, **{field: value})
    OptimizerConfig(name=str(error.value).rpartition("=")[2], **{field: value})  # pyright: ignore


def test_an_unknown_name_is_refused():
    with pytest.raises(ConfigError, match=r"optimizer.name=adam is unknown; use one of adamw, lion, adafactor, muon"):
        OptimizerConfig(name="adam")  # pyright: ignore


def test_given_settings_replace_the_defaults():
    assert OptimizerConfig(name="lion", b2=0.98).settings == {"b1": 0.9, "b2": 0.98, "weight_decay": 0.1}
    with pytest.raises(ConfigError, match=r"optimizer.momentum=1.0 must lie in \[0, 1\)"):
        OptimizerConfig(name="sgd", momentum=1.0)
    with pytest.raises(ConfigError, match=r"optimizer.weight_decay=-0.1 must not be negative"):
        OptimizerConfig(weight_decay=-0.1)
