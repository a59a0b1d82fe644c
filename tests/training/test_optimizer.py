"""Moments that wait in bfloat16, and the warm-up of short runs: what they become, and what is refused."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.builders.arrays import normal, relative_error
from tsp_jax.config import OptimizerConfig
from tsp_jax.errors import ConfigError
from tsp_jax.training.optimizer import describe_shorter_warmup, make_optimizer, make_schedule

pytestmark = pytest.mark.usefixtures("optax_promotes")

STEPS, TOLERANCE = 6, 1e-5
"""relative; the formula below is computed in float64"""


def rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    return np.asarray(jnp.asarray(x, jnp.float32).astype(dtype), np.float64)


def by_hand(config: OptimizerConfig, params: np.ndarray, grads: list[np.ndarray]) -> np.ndarray:
    """AdamW of one matrix, moments rounded after each step."""
    mu, nu, params = np.zeros_like(params), np.zeros_like(params), params.astype(np.float64)
    schedule = make_schedule(config, 100)
    b1, b2, eps, decay = (config.settings[name] for name in ("b1", "b2", "eps", "weight_decay"))
    for step, grad in enumerate(grads):
        mu = b1 * mu + (1 - b1) * grad
        nu = b2 * nu + (1 - b2) * grad.astype(np.float64) ** 2
        direction = mu / (1 - b1 ** (step + 1)) / (np.sqrt(nu / (1 - b2 ** (step + 1))) + eps)
        params = params - float(schedule(step)) * (direction + decay * params)
        mu, nu = rounded(mu, config.moments_dtype), rounded(nu, config.moments_dtype)
    return params


def test_weights_decay_but_norms_biases_and_sinks_do_not():
    optimizer = make_optimizer(OptimizerConfig(warmup_steps=1, learning_rate=0.1, weight_decay=0.5), 100)
    names = "w_q", "w_up", "table", "scale", "q_norm", "k_norm", "q_bias", "k_bias", "v_bias", "sinks"
    params = {"attention": {name: jnp.ones(3) for name in names}}
    grads, state = jax.tree.map(jnp.zeros_like, params), optimizer.init(params)
    for _ in range(2):  # the first step has a learning rate of 0
        updates, state = optimizer.update(grads, state, params)
    decayed = {name for name, update in updates["attention"].items() if update.any()}
    assert decayed == {"w_q", "w_up", "table"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_moments_are_updated_in_float32_and_rounded_once_a_step(dtype):
    config = OptimizerConfig(warmup_steps=1, learning_rate=0.1, clip_norm=1e9, moments_dtype=dtype)
    optimizer = make_optimizer(config, 100)
    start = normal(0, 7, 5)
    params = {"w": jnp.asarray(start)}
    grads = [normal(1 + step, 7, 5) for step in range(STEPS)]
    state = optimizer.init(params)
    for grad in grads:
        updates, state = jax.jit(optimizer.update)({"w": jnp.asarray(grad)}, state, params)
        params = optax.apply_updates(params, updates)
    moved = np.asarray(params["w"], np.float64) - start
    assert relative_error(moved, by_hand(config, start, grads) - start) <= TOLERANCE
    other = OptimizerConfig(**{**vars(config), "moments_dtype": "float32" if dtype == "bfloat16" else "bfloat16"})
    assert relative_error(moved, by_hand(other, start, grads) - start) > 10 * TOLERANCE
    kept = [leaf.dtype for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert kept == [jnp.dtype(dtype)] * 2


@pytest.mark.parametrize(("warmup", "steps"), [(20, 50), (3, 4), (1, 2), (0, 2), (0, 1)])
def test_the_schedule_warms_up_from_the_first_step_and_then_decays_by_a_cosine(warmup, steps):
    config = OptimizerConfig(warmup_steps=warmup, learning_rate=0.5, final_fraction=0.1)
    rates = [float(make_schedule(config, steps)(done)) for done in range(steps)]
    whole = max(1, warmup)
    desired = [
        0.5 * step / whole if step <= whole
        else 0.05 + 0.45 * (1 + math.cos(math.pi * (step - whole) / (steps + 1 - whole))) / 2
        for step in range(1, steps + 1)
    ]  # fmt: skip
    assert rates == pytest.approx(desired, rel=1e-5)
    assert rates[0] == pytest.approx(0.5 / whole), "the first step moves the weights"
    assert min(rates[whole - 1 :]) > 0.05, "so does the last one, whatever the final fraction"


@pytest.mark.parametrize(("warmup", "steps", "used"), [(20, 21, 20), (20, 20, 2), (20, 10, 1), (100, 9, 1), (1, 1, 1)])
def test_a_warm_up_as_long_as_the_run_is_shortened_and_said(warmup, steps, used):
    config = OptimizerConfig(warmup_steps=warmup, learning_rate=0.5)
    rates = [float(make_schedule(config, steps)(done)) for done in range(steps)]
    assert rates.index(max(rates)) == used - 1
    assert max(rates) == pytest.approx(0.5)
    line = describe_shorter_warmup(config, steps, None)
    if used == warmup:
        assert line is None
    else:
        assert line == f"optimizer.warmup_steps={warmup} is not less than steps={steps}; the warm-up has {used}"
    assert describe_shorter_warmup(config, steps, optax.sgd(0.1)) is None


@pytest.mark.parametrize("name", ["b1", "b2"])
def test_moments_too_slow_for_bfloat16_are_refused(name):
    OptimizerConfig(**{name: 0.996}, moments_dtype="bfloat16")
    OptimizerConfig(**{name: 0.999})
    with pytest.raises(ConfigError, match=re.escape(f"optimizer.{name}=0.999 is too slow")) as error:
        OptimizerConfig(**{name: 0.999}, moments_dtype="bfloat16")
    assert f"use optimizer.{name}=0.99" in str(error.value)


@pytest.mark.parametrize(("decay", "shrinks"), [(0.996, True), (0.9981, False)])
def test_refused_moments_would_never_shrink(decay, shrinks):
    """Without gradients; from numbers all over a binade."""
    moments = jnp.linspace(1.0, 2.0, 200, endpoint=False, dtype=jnp.float32).astype(jnp.bfloat16)
    after = (np.float32(decay) * moments.astype(jnp.float32)).astype(jnp.bfloat16)
    assert bool((after < moments).all()) == shrinks


def test_an_unknown_dtype_is_refused():
    with pytest.raises(ConfigError, match=r"optimizer.moments_dtype=float16 is unknown; use one of float32, bfloat16"):
        OptimizerConfig(moments_dtype="float16")  # pyright: ignore[reportArgumentType]
