# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
# ---

# %% [markdown]
# # Read a compiled program: find an exposed collective, and fix it
#
# `jax.jit` inserts the communication that shardings imply. It does not say what it inserted, nor what it costs. This
# notebook compiles an ordinary data-parallel step with gradient accumulation, finds out why it waits, and fixes it.
# It compiles for 8 CPU devices, so that it runs anywhere; with `pip install ".[aot-rocm]"` (or `aot-cuda`, `aot-tpu`)
# `TARGET = "mi300x:8"` shows the same for GPUs that are not there.

# %%
import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from tsp_jax import inspect, use_cpu_devices

use_cpu_devices(8)
TARGET = "cpu:8"
MICRO, B, D, F = 8, 64, 128, 512  # micro-batches, tokens of one, widths
mesh = inspect.target_mesh(TARGET, "data=8")

# %% [markdown]
# ## The step
#
# A step sums the gradients of eight micro-batches in a loop. Tokens are sharded over `data`, weights are replicated.
# The whole program is plain JAX.


# %%
def loss(weights, x):
    hidden = jax.nn.gelu(x @ weights["up"])
    return jnp.mean((hidden @ weights["down"]) ** 2)


def accumulated(weights, batches):
    """The gradients of all micro-batches, summed one after another."""

    def add(total, x):
        return jax.tree.map(jnp.add, total, jax.grad(loss)(weights, x)), None

    zeros = jax.tree.map(jnp.zeros_like, weights)
    return jax.lax.scan(add, zeros, batches)[0]


def array(*shape, spec=P()):
    """A shape with a sharding: nothing is allocated."""
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=jax.sharding.NamedSharding(mesh, spec))


weights = {"up": array(D, F), "down": array(F, D)}
batches = array(MICRO, B, D, spec=P(None, "data"))

# %% [markdown]
# ## What was compiled
#
# `compile_for` lowers and compiles the function for the target; `report` reads the result.


# %%
def show(function):
    found = inspect.compile_for(function, weights, batches, target=TARGET).report()
    exposed = f"{found.exposed_fraction:.0%} of communication exposed"
    print(f"{function.__name__}: peak {found.peak_bytes / 1e6:.1f} MB, {exposed}")
    for c in sorted(found.collectives, key=lambda c: -c.total_bytes)[:4]:
        print(f"  {c.op} over {c.axis}: {c.count:g} x {c.bytes / 1e6:.2f} MB  {c.scope}")
    return found


before = show(accumulated)

# %% [markdown]
# There it is: the all-reduce runs **eight times**, once in each turn of the loop. A replicated sum must be equal on
# all devices after every turn, so the compiler sums it over devices every time. The scope names the line: it is the
# transpose of the matrix product, the gradient of a weight. All of it is exposed: devices wait, since the next turn
# needs the sum (on CPUs communication never runs beside computation anyway).
#
# Nothing needs the sum before the loop ends.
#
# ## The fix
#
# Let each device add up the gradients of its own tokens, and sum over devices once. That is what `shard_map` is for:
# in it arrays are a device's own, and nothing is communicated that is not written.


# %%
@functools.partial(jax.shard_map, mesh=mesh, in_specs=(P(), P(None, "data")), out_specs=P())
def reduced_once(weights, batches):
    # As if the weights differed from device to device; else their gradient is a sum over devices.
    weights = jax.lax.pcast(weights, "data", to="varying")
    return jax.lax.pmean(accumulated(weights, batches), "data")


reduced_once.__name__ = "reduced_once"
after = show(reduced_once)

# %% [markdown]
# One all-reduce a weight, an eighth of the bytes. The numbers are the same:


# %%
def received(found):
    """Bytes that a device receives."""
    return sum(c.total_bytes for c in found.collectives)


print(f"received: {received(before) / 1e6:.2f} MB before, {received(after) / 1e6:.2f} MB after")

# %% [markdown]
# ## On other programs
#
# - `python scripts/inspect_hlo.py A B` compares two programs by scope; `--html OUT.html` draws memory and timeline.
# - A report lists the three changes that would shorten a step most. For steps of `tsp_jax`
#   it also names the flag.
# - What a program's text does not tell is *unknown* in a report, never zero.
#
# ## Exercises
#
# 1. How many bytes does a device receive if there are 16 micro-batches, before and after?
# 2. Do both programs compute the same gradients? Run them on random weights and tokens.
