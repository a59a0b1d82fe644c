"""Scaled rotary frequencies, by the formulas of the models that introduced them."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from tests.builders.arrays import F32_TOLERANCE, assert_trees_near, normal
from tsp_jax.config import RopeScaling
from tsp_jax.errors import ConfigError
from tsp_jax.ops.rope import attention_factor, frequencies, rope

H, THETA = 24, 1e4
YARN = RopeScaling(kind="yarn", factor=4.0, original_context=64, beta_fast=8.0)
LONG = RopeScaling(
    kind="longrope", factor=8.0, original_context=64, short_factors=tuple(1.0 + i for i in range(H // 2)),
    long_factors=tuple(2.0 + 3 * i for i in range(H // 2)),
)  # fmt: skip


def test_llama3_frequencies_follow_the_formula():
    """As Llama's own code writes it, a branch at a time."""
    scaling = RopeScaling(kind="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192)
    scaled, seen = [], set()
    for frequency in 500_000.0 ** -(np.arange(64) / 64):
        wavelength = 2 * np.pi / frequency
        if wavelength < 8192 / 4.0:
            scaled.append(frequency)
            seen.add("kept")
        elif wavelength > 8192 / 1.0:
            scaled.append(frequency / 32.0)
            seen.add("divided")
        else:
            smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
            scaled.append((1 - smooth) * frequency / 32.0 + smooth * frequency)
            seen.add("between")
    assert seen == {"kept", "divided", "between"}
    np.testing.assert_allclose(frequencies(128, 500_000.0, scaling), scaled, rtol=F32_TOLERANCE)


def test_linear_frequencies_are_divided():
    scaled = frequencies(H, THETA, RopeScaling(kind="linear", factor=4.0))
    np.testing.assert_array_equal(scaled, frequencies(H, THETA) / 4)


@pytest.mark.parametrize("truncate", [True, False])
def test_yarn_interpolates_between_two_numbers_of_rotations(truncate):
    """As the paper writes it: gamma is 1 above beta_fast rotations in the original context and 0 below beta_slow."""

    def number(rotations: float) -> float:  # i, where THETA^(-2i/H) makes this many rotations in 64 tokens
        return H / 2 * math.log(64 / (2 * math.pi * rotations), THETA)

    first, last = number(8.0), number(1.0)
    if truncate:
        first, last = math.floor(first), math.ceil(last)
    scaled, seen = [], set()
    for i, frequency in enumerate(THETA ** -(np.arange(H // 2) / (H // 2))):
        gamma = 1 - min(max((i - first) / (last - first), 0.0), 1.0)
        scaled.append(gamma * frequency + (1 - gamma) * frequency / 4.0)
        seen.add(gamma if gamma in (0.0, 1.0) else "between")
    assert seen == {1.0, "between", 0.0}
    scaling = dataclasses.replace(YARN, truncate=truncate)
    np.testing.assert_allclose(frequencies(H, THETA, scaling), scaled, rtol=F32_TOLERANCE)


@pytest.mark.parametrize(("length", "factors"), [(64, LONG.short_factors), (65, LONG.long_factors)])
def test_longrope_divides_by_the_factors_of_the_length(length, factors):
    plain = THETA ** -(np.arange(H // 2) / (H // 2))
    np.testing.assert_allclose(frequencies(H, THETA, LONG.at(length)), plain / factors, rtol=F32_TOLERANCE)
    assert LONG.at(length).at(1) == LONG.at(length).at(10**6) == LONG.at(length)


@pytest.mark.parametrize(
    ("scaling", "desired"),
    [
        (RopeScaling(), 1.0),
        (RopeScaling(kind="linear", factor=4.0, attention_factor=3.0), 1.0),
        (YARN, 0.1 * math.log(4.0) + 1.0),
        (dataclasses.replace(YARN, factor=0.5), 1.0),
        (dataclasses.replace(YARN, attention_factor=0.75), 0.75),
        (LONG, math.sqrt(1 + math.log(8.0) / math.log(64))),
        (dataclasses.replace(LONG, attention_factor=1.25), 1.25),
    ],
)
def test_rotated_heads_have_the_length_of_the_attention_factor(scaling, desired):
    assert attention_factor(scaling) == pytest.approx(desired, rel=1e-12)
    x_BTNH, positions = normal(0, 1, 5, 2, H), jnp.arange(5, dtype=jnp.int32)[None]
    y_BTNH = rope(jnp.asarray(x_BTNH), positions, THETA, scaling.at(5))
    norms = np.linalg.norm(y_BTNH, axis=-1) / np.linalg.norm(x_BTNH, axis=-1)
    np.testing.assert_allclose(norms, desired, rtol=F32_TOLERANCE)


def test_the_rest_of_a_head_is_not_rotated():
    x_BTNH, positions = jnp.asarray(normal(0, 2, 5, 3, 32)), jnp.arange(5, dtype=jnp.int32)[None]
    y_BTNH = rope(x_BTNH, positions, THETA, RopeScaling(fraction=0.75))
    assert_trees_near(y_BTNH[..., :24], rope(x_BTNH[..., :24], positions, THETA), F32_TOLERANCE)
    np.testing.assert_array_equal(y_BTNH[..., 24:], x_BTNH[..., 24:])


REFUSED = {
    "nothing": (RopeScaling(fraction=0.01), "rope_scaling.fraction=0.01 rotates 0 of the 24 .* use 0.083"),
    "factors": (dataclasses.replace(LONG, long_factors=(1.0,)), "long_factors has 1 values, heads of 24 have 12 freq"),
    "no factors": (dataclasses.replace(LONG, short_factors=()), "short_factors has 0 values"),
    "negative": (dataclasses.replace(LONG, long_factors=(-1.0,) * 12), "long_factors has -1.0; use positive numbers"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_scaling_that_does_not_fit_the_heads_is_refused(case):
    scaling, words = REFUSED[case]
    with pytest.raises(ConfigError, match=words):
        scaling.check_fits("model.", H, THETA)


def test_yarn_needs_a_base_above_1():
    with pytest.raises(ConfigError, match=r"model.rope_theta=1.0 must exceed 1 for yarn"):
        YARN.check_fits("model.", H, 1.0)
