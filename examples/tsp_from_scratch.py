# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
# ---

# %% [markdown]
# # Tensor and sequence parallelism from scratch
#
# A transformer that reads long texts runs out of memory twice: on weights and on activations. This notebook builds
# the remedy, tensor and sequence parallelism on one mesh axis (TSP, [arXiv
# 2604.26294](https://arxiv.org/abs/2604.26294)), with JAX alone. It begins with the naive program and mends one fault
# at a time. It runs on 8 virtual CPU devices; what it shows of memory and traffic is read from the compiled programs,
# not measured on hardware.

# %%
import re

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

R = 8  # devices
T, D, F = 1024, 64, 512  # tokens, width of the model, hidden width
mesh = jax.make_mesh((R,), ("tsp",), axis_types=(jax.sharding.AxisType.Auto,))

# %% [markdown]
# ## The layer, on one device
#
# An MLP without a gate: `y = relu(x up^T) down`. Both weights are stored `[F, D]`: row f of `up` makes hidden column
# f, and row f of `down` says what that column adds to the output. So the output is a *sum over rows*, and rows may
# come in any order, a few at a time. Everything below rests on that.


# %%
def partial_output(x_tD, up_fD, down_fD):
    """What some rows of the weights add to the output."""
    return jax.nn.relu(x_tD @ up_fD.T) @ down_fD


keys = jax.random.split(jax.random.key(0), 4)
x_TD, dy_TD = (jax.random.normal(key, (T, D)) for key in keys[:2])
up_FD, down_FD = (jax.random.normal(key, (F, D)) / 8 for key in keys[2:])


def loss(layer):
    """A scalar whose gradient for the output is dy, and its gradients for the tokens and the weights."""
    return jax.value_and_grad(lambda x, up, down, dy: (layer(x, up, down) * dy).sum(), argnums=(0, 1, 2))


reference = jax.jit(loss(partial_output))(x_TD, up_FD, down_FD, dy_TD)

# %% [markdown]
# ## One axis, two shardings
#
# Tensor parallelism shards the rows of the weights over devices, sequence parallelism shards the tokens. Usually each
# has a mesh axis of its own. Here both use the *same* axis: each of R devices holds 1/R of every weight and 1/R of
# the tokens. In JAX that is one PartitionSpec for all arrays.

# %%
sharding = NamedSharding(mesh, P("tsp"))
arrays = jax.device_put((x_TD, up_FD, down_FD, dy_TD), sharding)


def on_devices(layer):
    """Runs `layer` once per device, on that device's rows."""
    return jax.shard_map(layer, mesh=mesh, in_specs=P("tsp"), out_specs=P("tsp"))


def compiled(layer):
    """The compiled program of the loss and its gradients."""
    return jax.jit(loss(on_devices(layer))).lower(*arrays).compile()


def check(layer):
    """The layer has the loss and the gradients of the reference."""
    for ours, theirs in zip(jax.tree.leaves(compiled(layer)(*arrays)), jax.tree.leaves(reference), strict=True):
        error = jnp.abs(ours - theirs).max() / jnp.abs(theirs).max()
        assert error < 1e-5, error


# %% [markdown]
# ## First try: fetch all weights
#
# A device has its tokens and a part of the weights. It needs all the weights. The obvious program asks for them.


# %%
def naive(x_tD, up_fD, down_fD):
    up_FD, down_FD = (lax.all_gather(w, "tsp", tiled=True) for w in (up_fD, down_fD))
    return partial_output(x_tD, up_FD, down_FD)


check(naive)

# %% [markdown]
# The numbers are right, and autodiff has found that the gradient of an all-gather is a reduce-scatter. But how much
# does it hold? We read the shapes of all arrays in the compiled program. **What is wrong:** each device holds every
# weight whole, for as long as the layer runs, and its hidden columns are `[T/R, F]`, all of them at once.


# %%
def largest_buffers(layer, number=3):
    """(shape, kibibytes) of the largest float32 arrays that one device makes."""
    text = compiled(layer).as_text()
    shapes = {tuple(map(int, dims.split(","))) for dims in re.findall(r"f32\[([\d,]+)\]", text)}
    return [(shape, 4 * jnp.prod(jnp.array(shape)).item() // 1024) for shape in sorted(shapes, key=size)[-number:]]


def size(shape):
    return jnp.prod(jnp.array(shape)).item()


print("naive:", largest_buffers(naive))

# %% [markdown]
# ## Second try: a few rows at a time
#
# The output is a sum over rows, so a device can fetch a few rows of every shard (a *bucket*), add what they
# contribute, and forget them.

# %%
BUCKETS = 4  # parts of a device's shard; each bucket holds F / BUCKETS rows, from all devices


def gather_bucket(shards, index):
    """Bucket `index`: that part of every device's shard."""
    mine = [shard.reshape(BUCKETS, -1, D)[index] for shard in shards]
    return [lax.all_gather(rows, "tsp", tiled=True) for rows in mine]


def bucketed(x_tD, *shards):
    def step(y_tD, index):
        return y_tD + partial_output(x_tD, *gather_bucket(shards, index)), None

    return lax.scan(step, jnp.zeros_like(x_tD), jnp.arange(BUCKETS))[0]


check(bucketed)
print("bucketed:", largest_buffers(bucketed))

# %% [markdown]
# **What is wrong:** in each step of the loop the product needs the gather of the same step. Communication and
# matrix products cannot overlap: each waits for the other.
#
# ## Third try: fetch the next bucket meanwhile
#
# The loop carries the bucket that it is about to use. A step first asks for the next one, then multiplies the one it
# has. Nothing in a step depends on that step's gather, so a compiler that has asynchronous collectives runs both at
# once.


# %%
def prefetched(x_tD, *shards):
    def step(carry, index):
        y_tD, bucket = carry
        following = gather_bucket(shards, index)
        return (y_tD + partial_output(x_tD, *bucket), following), None

    first = gather_bucket(shards, 0)
    (y_tD, last), _ = lax.scan(step, (jnp.zeros_like(x_tD), first), jnp.arange(1, BUCKETS))
    return y_tD + partial_output(x_tD, *last)


check(prefetched)
print("prefetched:", largest_buffers(prefetched))

# %% [markdown]
# **What is wrong** shows only in backward. Autodiff keeps what each step used: the buckets of all steps, stacked
# (`[BUCKETS - 1, F / BUCKETS, D]` above), which together are the whole weights, and their hidden columns. So
# backward again holds all the memory that the loop saved in forward.
#
# ## Fourth try: a gradient of our own
#
# Backward may fetch the buckets a second time instead. It needs only its inputs: x, the shards and dy. With `h =
# relu(x up^T)`, for the rows of a bucket:
#
#     ddown = h^T dy        dh = dy down^T        dup = (dh * [h > 0])^T x        dx += (dh * [h > 0]) up
#
# `dx` is a sum over rows, like y. `dup` and `ddown` are sums over tokens, whose parts lie on all devices: a
# reduce-scatter adds them up and returns to each device those of its own rows. It is sent while the next bucket is
# multiplied.


# %%
@jax.custom_vjp
def tsp(x_tD, up_fD, down_fD):
    return prefetched(x_tD, up_fD, down_fD)


def forward(x_tD, *shards):
    return prefetched(x_tD, *shards), (x_tD, shards)  # what is kept: the inputs alone


def backward(kept, dy_tD):
    x_tD, shards = kept

    def products(bucket):
        return jax.vjp(partial_output, x_tD, *bucket)[1](dy_tD)

    def scatter(grads):
        return [lax.psum_scatter(grad, "tsp", tiled=True) for grad in grads]

    def step(carry, index):
        dx_tD, bucket, previous = carry
        following = gather_bucket(shards, index)
        reduced = scatter(previous)
        more, *grads = products(bucket)
        return (dx_tD + more, following, grads), reduced

    # From the last bucket to the first: the last is used, the one before it fetched, when the loop begins.
    dx_tD, *grads = products(gather_bucket(shards, BUCKETS - 1))
    carry = dx_tD, gather_bucket(shards, BUCKETS - 2), grads
    (dx_tD, bucket, grads), reduced = lax.scan(step, carry, jnp.arange(BUCKETS - 2), reverse=True)
    more, *first = products(bucket)
    parts = zip(scatter(first), scatter(grads), reduced, strict=True)
    return dx_tD + more, *(jnp.concatenate([one, two, rest.reshape(-1, D)]) for one, two, rest in parts)


tsp.defvjp(forward, backward)
check(tsp)
print("tsp:", largest_buffers(tsp))

# %% [markdown]
# No array is as large as a weight any more. That is TSP: one PartitionSpec for weights and tokens, weights that
# stream past resident tokens, fetched ahead, and their gradients sent home.
#
# ## What it moves
#
# The traffic can be written down. Forward fetches (R-1)/R of both weights; backward fetches them again and sends as
# many gradients. And it can be read from the compiled program: every collective has its shape, and those in a loop
# run as often as the loop does.


# %%
def received(program):
    """(messages, bytes) that one device receives, by kind of collective."""
    totals = {}
    trips = {name: int(count) for name, count in re.findall(r"body=%?([\w.-]+).*?known_trip_count\D+(\d+)", program)}
    for name, body in re.findall(r"^(?:ENTRY )?%?([\w.-]+) .*?\{\n(.*?)^\}", program, re.MULTILINE | re.DOTALL):
        for dims, kind in re.findall(r"= f32\[([\d,]+)\]\S* (all-gather|reduce-scatter)\(", body):
            elements = size(tuple(map(int, dims.split(","))))
            others = elements * (R - 1) // R if kind == "all-gather" else elements * (R - 1)
            messages, total = totals.get(kind, (0, 0))
            times = trips.get(name, 1)
            totals[kind] = messages + times, total + 4 * others * times
    return totals


WEIGHTS = 4 * 2 * F * D * (R - 1) // R  # bytes of both weights that the other devices hold
moved = received(compiled(tsp).as_text())
print("tsp receives (messages, bytes):", moved)
assert moved["all-gather"][1] == 2 * WEIGHTS
assert moved["reduce-scatter"][1] == WEIGHTS

# %% [markdown]
# ## When it pays
#
# That traffic does not depend on the number of tokens, while the products grow with it. With few tokens a device
# waits for weights; with many the weights arrive unnoticed. Tensor parallelism moves tokens
# instead: two all-reduces of `[T, D]` a layer, whose bytes grow with T.
#
# ## Exercises
#
# 1. From how many tokens on does TSP move fewer bytes than tensor parallelism, for this layer? (An all-reduce of n
#    bytes over R devices receives 2 n (R-1)/R; tensor parallelism needs one in forward and one in backward.)
# 2. How many messages does `tsp` receive, forward and backward? How many if BUCKETS is 8? How many bytes then?
# 3. With BUCKETS = 8, is the largest array of `tsp` still its hidden columns?
#
# `tests/test_examples.py` computes the answers. The library does the same for every op of a transformer:
# `tsp_jax/ops/stream.py` has this notebook's loop, `tsp_jax/ops/rowwise.py` its sum over rows.
