# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
# ---

# %% [markdown]
# # A Flax model of your own on eight devices
#
# The layers of `tsp_jax.nn` are ordinary Flax modules. This notebook puts a small model on eight virtual CPU devices,
# changes its layout without changing the model, shows that every layout computes the same numbers, and reports what
# a device holds and receives.

# %%
import jax
import jax.numpy as jnp
import optax
from flax import nnx

import tsp_jax

tsp_jax.use_cpu_devices(8)


# %%
class MyModel(nnx.Module):
    """One layer of attention and an MLP; `place` says on which mesh axes everything lies."""

    def __init__(self, place, rngs):
        shared = {"placement": place, "rngs": rngs, "dtype": jnp.float32}
        self.embed = tsp_jax.nn.Embed(256, 64, **shared)
        self.norms = nnx.List([nnx.RMSNorm(64, rngs=rngs) for _ in range(2)])  # Flax's own: it is replicated
        self.attention = tsp_jax.nn.Attention(64, num_heads=9, num_kv_heads=3, head_dim=8, **shared)
        self.mlp = tsp_jax.nn.MLP(64, d_ff=250, **shared)

    def __call__(self, tokens):
        x = self.embed(tokens)
        x += self.attention(self.norms[0](x))
        x += self.mlp(self.norms[1](x))
        return self.embed.cross_entropy(x, jnp.roll(tokens, -1, axis=1)).nll_Bt.mean()


# %% [markdown]
# Nine heads and an FFN of 250 columns do not divide over eight devices. Nothing has to be changed for that.
#
# ## Train it

# %%
tokens = jnp.asarray(jax.random.randint(jax.random.key(0), (2, 128), 0, 256))


@nnx.jit
def step(model, optimizer, tokens):
    loss, grads = nnx.value_and_grad(MyModel.__call__)(model, tokens)
    optimizer.update(model, grads)
    return loss


def losses(place, steps=5):
    model = MyModel(place, nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adamw(1e-2), wrt=nnx.Param)
    return [float(step(model, optimizer, tokens)) for _ in range(steps)]


tsp = losses(tsp_jax.place("tsp", data=1, tsp=8))
print("tsp:", [round(loss, 4) for loss in tsp])

# %% [markdown]
# ## Another layout
#
# A layout is a row of a table: which mesh axes shard which dimension. The model stays as it is.

# %%
LAYOUTS = {
    "single": {"data": 1},
    "tp": {"data": 1, "model": 8},
    "tp_sp": {"data": 1, "model": 2, "seq": 4},
    "fsdp": {"data": 2},
    "tsp(weights=data+tsp)": {"data": 2, "tsp": 4},  # a row of our own: weights over all devices
}
for name, sizes in LAYOUTS.items():
    found = losses(tsp_jax.place(name, **sizes))
    print(f"{name}:", [round(loss, 4) for loss in found])
    assert max(abs(ours - theirs) for ours, theirs in zip(found, tsp, strict=True)) < 1e-4

# %% [markdown]
# ## What a device holds
#
# Parameters are global arrays with sharding metadata. Each device has an eighth of every weight. Rows that do not
# divide are padded: the MLP's 250 rows are stored as 256. Flax's own norms are small; `jit` copies them to all
# devices.

# %%
model = MyModel(tsp_jax.place("tsp", data=1, tsp=8), nnx.Rngs(0))
for path, parameter in nnx.to_flat_state(nnx.state(model, nnx.Param)):
    array, name = parameter[...], ".".join(map(str, path))
    mine = array.sharding.shard_shape(array.shape)
    print(f"{name:18s} {array.shape!s:10s} a device: {mine!s:9s} {getattr(array.sharding, 'spec', 'on one device')}")

# %% [markdown]
# ## What a step moves
#
# `compile_for` compiles a function for a target, here these CPU devices, and reads the program. With a compiler of
# another platform installed (`pip install ".[aot-rocm]"`), `target="mi300x:8"` works on the same laptop.

# %%
graphdef, state = nnx.split(model)


def loss_of(state, tokens):
    return nnx.merge(graphdef, state)(tokens)


found = tsp_jax.inspect.compile_for(jax.grad(loss_of), state, tokens, target="cpu:8", mesh="data=1,tsp=8").report()
for op, total in sorted({c.op: 0 for c in found.collectives}.items()):
    total = sum(c.total_bytes for c in found.collectives if c.op == op)
    print(f"{op}: {total / 1e6:.3f} MB received by a device")

# %% [markdown]
# ## Exercises
#
# 1. Which layouts of `LAYOUTS` sum activations over devices in forward? Look for all-reduces in a report.
# 2. Nine heads of eight rows are 72 rows. How many does a device hold, and of how many heads?
#
# `docs/own_model.md` saves such a model and restores it on another mesh.
