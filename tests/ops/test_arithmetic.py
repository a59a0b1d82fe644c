"""Norm, rotary embedding and products: the arithmetic of one device."""

import jax.numpy as jnp
import numpy as np

from tests.builders.arrays import F32_TOLERANCE, assert_trees_near, normal
from tsp_jax.ops.linear import matmul, matmul_t, outer
from tsp_jax.ops.norm import rms_norm
from tsp_jax.ops.rope import rope


def test_rms_norm_has_unit_mean_square_times_scale():
    x, scale = normal(0, 3, 5, 7, std=4.0), normal(1, 7)
    desired = x / np.sqrt(np.mean(x.astype(np.float64) ** 2, axis=-1, keepdims=True) + 0.5) * scale
    assert_trees_near(rms_norm(jnp.asarray(x), jnp.asarray(scale), 0.5), desired, F32_TOLERANCE)


def test_rms_norm_of_bfloat16_is_computed_in_float32():
    x = jnp.asarray(normal(0, 3, 512), jnp.bfloat16)
    out = rms_norm(x, jnp.ones(512), 1e-6)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out, rms_norm(x.astype(jnp.float32), jnp.ones(512), 1e-6).astype(jnp.bfloat16))


def test_rope_rotates_pairs_of_the_two_halves():
    x, positions = normal(0, 1, 3, 2, 6), np.array([[4, 0, 7]], np.int32)
    pairs = x[..., :3] + 1j * x[..., 3:]
    angles = positions[..., None, None] * 50.0 ** (-np.arange(3) / 3)
    rotated_pairs = pairs * np.exp(1j * angles)
    desired = np.concatenate([rotated_pairs.real, rotated_pairs.imag], axis=-1)
    assert_trees_near(rope(jnp.asarray(x), jnp.asarray(positions), 50.0), desired, F32_TOLERANCE)


def test_rope_scores_depend_on_distance_alone():
    q, k = normal(0, 1, 1, 1, 16), normal(1, 1, 1, 1, 16)

    def dot(q_position, k_position):
        rotated = (
            rope(jnp.asarray(x), jnp.full((1, 1), position, jnp.int32), 100.0)
            for x, position in ((q, q_position), (k, k_position))
        )
        return float(jnp.vdot(*rotated))

    np.testing.assert_allclose(dot(9, 4), dot(105, 100), rtol=F32_TOLERANCE * 10)
    assert abs(dot(9, 4) - dot(9, 5)) > 0.01


def test_products_accumulate_in_float32():
    ones = jnp.ones((1, 600, 1), jnp.bfloat16)
    assert outer(ones, ones)[0, 0] == 600  # not representable in bfloat16's 8 bits after 256 + 1
    wide = jnp.ones((1, 1, 601), jnp.bfloat16)
    assert matmul_t(wide, jnp.ones((2, 601), jnp.bfloat16)).tolist() == [[[601.0, 601.0]]]
    assert matmul(wide, jnp.ones((601, 2), jnp.bfloat16)).tolist() == [[[601.0, 601.0]]]
