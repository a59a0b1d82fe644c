"""Every bucket is visited once by every rank, and its gradient is reduced to its owner."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax
from jax.sharding import PartitionSpec as P

from tsp_jax.layout import largest_divisor
from tsp_jax.mesh import make_mesh
from tsp_jax.ops.stream import Stream, over_buckets, over_buckets_with_grads, vary_alike, zeros

ROWS, BUCKETS, D = (6, 12), 3, 2
"""rows of each weight per rank: different, so that wrong packing shows"""
MESHES = {"no_axes": {}, "1": {"a": 1}, "2": {"a": 2}, "3": {"a": 3}, "8": {"a": 8}, "2x4": {"a": 2, "b": 4}}
MESHES["2 in 4"] = {"b": 4, "a": 2}  # weights and mesh name the axes in another order
MOVEMENTS = ("gather", "ring")
BF16_TOLERANCE = 2**-6
"""relative; a sum over 8 ranks of bfloat16s, each rounded to 8 bits, up to three times"""

over_meshes = pytest.mark.parametrize("mesh", MESHES)
over_streams = pytest.mark.parametrize(
    "stream", [Stream(movement, BUCKETS) for movement in MOVEMENTS], ids=lambda stream: stream.movement
)  # fmt: skip


def num_ranks(mesh: str) -> int:
    return int(np.prod(list(MESHES[mesh].values())))


def num_buckets(stream: Stream, mesh: str) -> int:
    if stream.movement == "gather" or not MESHES[mesh]:
        return stream.buckets
    return num_ranks(mesh)


def weights(mesh: str) -> tuple[np.ndarray, ...]:
    """Gathered weights whose every entry tells which array, row and column it is; small integers, so sums are exact."""
    return tuple(
        (1000 * number + 2 * np.arange(num_ranks(mesh) * rows)[:, None] + np.arange(D)).astype(np.float32)
        for number, rows in enumerate(ROWS)
    )


def on_mesh(mesh: str, local, *arrays, out_specs):
    """`local(shard, axes)` on every device; with `no_axes`, on one device and without collectives."""
    axes = tuple(sorted(MESHES[mesh]))
    run = jax.shard_map(
        lambda *shard: local(shard, axes),
        mesh=make_mesh(MESHES[mesh] or {"a": 1}),
        in_specs=P(axes or None),
        out_specs=jax.tree.map(lambda stacked: P(axes or None), out_specs),
    )
    return jax.jit(run)(*arrays)


def weigh(axes, arrays):
    """Each times 1 + this device's rank, so that no two devices have the same."""
    weight = 1.0 + jax.lax.axis_index(axes).astype(jnp.float32) if axes else jnp.float32(1)
    return tuple(weight * array for array in arrays)


def zeros_on_every_rank(shard, shape):
    return vary_alike(shard[0], jnp.zeros(shape, jnp.float32))[1]


def places(bucket, number: int) -> jax.Array:
    """Rows of the gathered weight that a bucket's rows are, as `Bucket` documents."""
    rows = bucket.arrays[number].shape[0] // bucket.num_ranks
    i = jnp.arange(bucket.num_ranks * rows)
    return (bucket.first_rank + i // rows) * ROWS[number] + bucket.index_in_shard * rows + i % rows


@over_meshes
@over_streams
def test_every_row_is_visited_once_in_its_place(stream, mesh):
    ranks = num_ranks(mesh)

    def body(carry, bucket):
        totals = tuple(
            total.at[places(bucket, number)].add(bucket.arrays[number]) for number, total in enumerate(carry[0])
        )
        counts = tuple(count.at[places(bucket, number)].add(1.0) for number, count in enumerate(carry[1]))
        return (totals, counts), None

    def local(shard, axes):
        totals = tuple(zeros_on_every_rank(shard, (ranks * rows, D)) for rows in ROWS)
        counts = tuple(zeros_on_every_rank(shard, (ranks * rows,)) for rows in ROWS)
        carry, _ = over_buckets(body, (totals, counts), shard, axes=axes, stream=stream, dtype=jnp.float32)
        return jax.tree.map(lambda array: array[None], carry)

    totals, counts = on_mesh(mesh, local, *weights(mesh), out_specs=((0, 0), (0, 0)))
    for total, count, full in zip(totals, counts, weights(mesh), strict=True):
        np.testing.assert_array_equal(count, np.ones((ranks, len(full))))
        np.testing.assert_array_equal(total, np.broadcast_to(full, (ranks, *full.shape)))


@over_meshes
@over_streams
def test_find_finds_every_row_in_one_bucket(stream, mesh):
    ranks = num_ranks(mesh)
    wanted = jnp.arange(-ROWS[0], (ranks + 1) * ROWS[0])  # those outside of the weight are in no bucket

    def body(carry, bucket):
        index, inside = bucket.find(wanted)
        found = jnp.where(inside[:, None], bucket.arrays[0][index], 0.0)
        return (carry[0] + found, carry[1] + inside.astype(jnp.float32)), None

    def local(shard, axes):
        carry = zeros_on_every_rank(shard, (len(wanted), D)), zeros_on_every_rank(shard, (len(wanted),))
        found, times = over_buckets(body, carry, shard, axes=axes, stream=stream, dtype=jnp.float32)[0]
        return found[None], times[None]

    found, times = on_mesh(mesh, local, *weights(mesh), out_specs=(0, 0))
    full = weights(mesh)[0]
    outside = np.zeros((ROWS[0], D), np.float32)
    np.testing.assert_array_equal(found, np.broadcast_to(np.concatenate([outside, full, outside]), found.shape))
    exists = (wanted >= 0) & (wanted < len(full))
    np.testing.assert_array_equal(times, np.broadcast_to(exists, times.shape))


@over_meshes
@over_streams
def test_rows_is_the_inverse_of_find(stream, mesh):
    def body(carry, bucket):
        rows = bucket.rows()
        index, inside = bucket.find(rows)
        right = (rows == places(bucket, 0)) & (index == jnp.arange(len(rows))) & inside
        return carry, vary_alike(bucket.arrays[0], right)[1]

    def local(shard, axes):
        return over_buckets(body, (), shard, axes=axes, stream=stream, dtype=jnp.float32)[1]

    right = on_mesh(mesh, local, *weights(mesh), out_specs=0)
    assert right.size == num_ranks(mesh) ** 2 * ROWS[0]
    assert right.all()


@over_meshes
@over_streams
def test_gradients_are_summed_over_ranks_in_their_owner(stream, mesh):
    ranks = num_ranks(mesh)

    def local(shard, axes):
        def body(carry, bucket):
            return carry, weigh(axes, bucket.arrays), None

        return over_buckets_with_grads(body, (), shard, axes=axes, stream=stream, dtype=jnp.float32)[1]

    grads = on_mesh(mesh, local, *weights(mesh), out_specs=(0, 0))
    for grad, full in zip(grads, weights(mesh), strict=True):
        np.testing.assert_array_equal(grad, full * (ranks * (ranks + 1) / 2))


@over_meshes
@over_streams
def test_outputs_are_stacked_in_the_order_of_buckets(stream, mesh):
    def body(carry, bucket):
        return carry + 1, (bucket.index * jnp.int32(1), carry)

    def local(shard, axes):
        carry = vary_alike(shard[0], jnp.int32(0))[1]
        _, ys = over_buckets(body, carry, shard, axes=axes, stream=stream, dtype=jnp.float32)
        return tuple(vary_alike(shard[0], y)[1][None] for y in ys)

    indices, steps = on_mesh(mesh, local, *weights(mesh), out_specs=(0, 0))
    buckets = np.broadcast_to(np.arange(num_buckets(stream, mesh)), indices.shape)
    np.testing.assert_array_equal(indices, buckets)
    np.testing.assert_array_equal(steps, buckets)


@over_streams
def test_the_carry_and_outputs_of_backward_are_those_of_forward(stream):
    def local(shard, axes):
        def body(carry, bucket):
            return carry + bucket.arrays[0].sum(), bucket.arrays[0].sum()

        def body_with_grads(carry, bucket):
            carry, y = body(carry, bucket)
            return carry, bucket.arrays, y

        carry = zeros_on_every_rank(shard, ())
        total, ys = over_buckets(body, carry, shard, axes=axes, stream=stream, dtype=jnp.float32)
        again, _, ys_again = over_buckets_with_grads(
            body_with_grads, carry, shard, axes=axes, stream=stream, dtype=jnp.float32
        )
        return total[None], ys[None], again[None], ys_again[None]

    total, ys, again, ys_again = on_mesh("3", local, *weights("3"), out_specs=(0, 0, 0, 0))
    np.testing.assert_array_equal(total, again)
    np.testing.assert_array_equal(ys, ys_again)


@pytest.mark.parametrize("grad_dtype", ["float32", "bfloat16"])
@over_streams
def test_gradients_have_the_dtype_of_the_shard_and_are_sent_in_grad_dtype(stream, grad_dtype):
    stream = stream._replace(grad_dtype=grad_dtype)
    full = tuple(1 + np.random.default_rng(0).random(array.shape, np.float32) for array in weights("8"))

    def local(shard, axes):
        def body(carry, bucket):
            return carry, weigh(axes, bucket.arrays), None

        return over_buckets_with_grads(body, (), shard, axes=axes, stream=stream, dtype=jnp.float32)[1]

    grads = on_mesh("8", local, *full, out_specs=(0, 0))
    errors = [np.abs(np.asarray(grad) / (36 * array) - 1).max() for grad, array in zip(grads, full, strict=True)]
    assert [grad.dtype for grad in grads] == [jnp.float32] * 2
    if grad_dtype == "bfloat16":
        assert 1e-6 < max(errors) <= BF16_TOLERANCE
    else:
        assert max(errors) <= 1e-6


@over_streams
def test_buckets_are_in_the_compute_dtype(stream):
    seen = []

    def body(carry, bucket):
        seen.extend(array.dtype for array in bucket.arrays)
        return carry, bucket.arrays[0].astype(jnp.float32)

    def local(shard, axes):
        return over_buckets(body, (), shard, axes=axes, stream=stream, dtype=jnp.bfloat16)[1][None]

    on_mesh("2", local, *weights("2"), out_specs=0)
    assert set(seen) == {jnp.dtype(jnp.bfloat16)}


@functools.cache
def divisors(value: int) -> list[int]:
    return [d for d in range(1, value + 1) if value % d == 0]


@given(st.integers(1, 500), st.integers(1, 1000))
def test_largest_divisor(value, at_most):
    assert largest_divisor(value, at_most) == max(d for d in divisors(value) if d <= at_most)


def test_vary_alike_sums_the_gradients_of_replicated_arrays():
    def local(x, w):
        x, w = vary_alike(x, w)
        return x * w

    f = jax.shard_map(local, mesh=make_mesh({"a": 8}), in_specs=(P("a"), P()), out_specs=P("a"))
    x = np.arange(8, dtype=np.float32)
    assert jax.jit(jax.grad(lambda w: f(x, w).sum()))(jnp.ones(1)).tolist() == [28.0]


# ------------------------------------------------------------------------------------------------ zeros

FIRSTS = {
    "float32": [1.5, -1.5, -0.0, np.nan, -np.nan, np.inf, -np.inf, np.finfo(np.float32).tiny],
    "bfloat16": [-1.5, -np.nan, -np.inf],
    "int32": [0, 7, -1, -(2**31), 2**31 - 1],
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32"])
@pytest.mark.parametrize(("like", "first"), [(like, first) for like, firsts in FIRSTS.items() for first in firsts])
def test_zeros_are_zero_for_every_value_of_like(like, first, dtype):
    out = zeros((2, 3), dtype, like=jnp.full((2, 2), first, like))
    assert (out.shape, out.dtype) == ((2, 3), jnp.dtype(dtype))
    assert not np.asarray(out).view(f"uint{8 * out.dtype.itemsize}").any()  # nor is there a -0.0


def test_zeros_depend_on_like():
    """Else a compiler makes them once and keeps them; and they vary as a loop's carry must."""

    def local(x):
        carry, _ = lax.scan(lambda carry, _: (carry + x, None), zeros((2,), jnp.float32, like=x), None, length=3)
        return carry

    f = jax.jit(jax.shard_map(local, mesh=make_mesh({"a": 8}), in_specs=P("a"), out_specs=P("a")))
    assert f(jnp.ones(16)).tolist() == [3.0] * 16
    made = jax.make_jaxpr(lambda x: zeros((2,), jnp.float32, like=x))(jnp.ones(2))
    assert not isinstance(made.jaxpr.outvars[0], jax.extend.core.Literal)
    text = jax.jit(lambda x: zeros((2,), jnp.float32, like=x)).lower(jnp.ones(2)).compile().as_text()
    assert "shift-right-logical" in text, "the compiler has found out that they are constant"
