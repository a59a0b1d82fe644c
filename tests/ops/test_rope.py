"""Scaled rotary frequencies, by the formulas of the models that introduced them."""

import numpy as np

from tests.builders.arrays import F32_TOLERANCE
from tsp_jax.config import RopeScaling
from tsp_jax.ops.rope import frequencies


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
    plain, scaled = (frequencies(24, 1e4, scaling) for scaling in (RopeScaling(), RopeScaling(kind="linear", factor=4)))
    np.testing.assert_array_equal(scaled, plain / 4)
