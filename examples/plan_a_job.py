# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
# ---

# %% [markdown]
# # Plan a job for a thousand GPUs, from a laptop
#
# Llama-3-70B, 1,024 x MI300X, sequences of 128 K tokens: which layout fits, which is fastest, and when is TSP the
# wrong choice? Closed forms answer in milliseconds without a compiler. They are estimates; the last section says how
# far off they are, and how the target's own compiler decides.

# %%
import dataclasses

from tsp_jax import ConfigError
from tsp_jax.hardware.targets import parse_target
from tsp_jax.plan.estimate import estimate
from tsp_jax.tools.cli import load_config

base = load_config("llama3_70b")
target = parse_target("mi300x:1024")
usable = 0.9 * target.hardware.memory_bytes

# %% [markdown]
# A candidate is a layout with the sizes of its mesh axes. `data` is outside: replicas, or, in `weights=data+tsp`,
# more ranks that share the weights.

# %%
CANDIDATES = {
    "tsp, replicas outside": ("tsp", "data=128,tsp=8"),
    "tsp, weights over all": ("tsp(weights=data+tsp)", "data=128,tsp=8"),
    "fsdp_cp": ("fsdp_cp(weights=data+tsp)", "data=128,tsp=8"),
    "fsdp": ("fsdp", "data=1024"),
    "tp": ("tp", "data=128,model=8"),
    "tp_sp 8 x 8": ("tp_sp", "data=16,model=8,seq=8"),
}


def candidates(seq_len, tokens_per_step, **changes):
    """Prints peak memory and step of each candidate, and returns the steps of those that fit."""
    steps = {}
    print(f"{seq_len:,} tokens a sequence, {tokens_per_step // seq_len} sequences a step")
    for name, (layout, mesh) in CANDIDATES.items():
        config = dataclasses.replace(
            base, layout=layout, mesh=mesh, seq_len=seq_len, batch=tokens_per_step // seq_len, **changes
        )
        try:
            found = estimate(config, target)
        except ConfigError as error:
            print(f"  {name:24s} {error!s:.90s}")
            continue
        fits = found.peak_bytes <= usable
        note = "" if fits else "does not fit"
        exposed = sum(seconds for term, seconds in found.seconds.items() if term.startswith("exposed"))
        print(f"  {name:24s} {found.peak_bytes / 1e9:6.1f} GB {found.step_s:7.2f} s, exposed {exposed:6.2f} s  {note}")
        if fits:
            steps[name] = found.step_s
    return steps


long = candidates(131072, 128 * 131072)

# %% [markdown]
# Replicas outside each hold a copy of the weights, and sum their gradients after every step. `weights=data+tsp`
# shares the weights over all 1,024 devices: buckets then come from other nodes too, but arrive while attention
# computes. `fsdp` shards tokens by whole sequences, and there are only 128 sequences for
# 1,024 devices. Tensor parallelism keeps all
# tokens of a sequence on every device of its group, and does not fit.
#
# ## When not to use TSP
#
# The same tokens a step, cut into short sequences: each device can hold whole sequences now, so that no keys and
# values are exchanged. Plain FSDP is as lean, and not slower.

# %%
short = candidates(4096, 128 * 131072)
print("fastest at 128 K:", min(long, key=long.get), "| fastest at 4 K:", min(short, key=short.get))

# %% [markdown]
# ## Which term wins
#
# The time of a step is the sum of matrix products, attention, memory traffic, and communication that nothing hides.

# %%
for name in (min(long, key=long.get), "tp_sp 8 x 8"):
    layout, mesh = CANDIDATES[name]
    found = estimate(dataclasses.replace(base, layout=layout, mesh=mesh, batch=128), target)
    print(name, {term: round(seconds, 2) for term, seconds in found.seconds.items() if seconds > 0.005})

# %% [markdown]
# ## How sure is that?
#
# Rates are bands. A ranking that turns within them is a tie, whatever the typical figures say.

# %%
for name in list(long)[:2]:
    layout, mesh = CANDIDATES[name]
    found = estimate(dataclasses.replace(base, layout=layout, mesh=mesh, batch=128), target)
    steps = [sum(terms.values()) for terms in found.scenarios.values()]
    print(f"{name}: {min(steps):.1f} to {max(steps):.1f} s")

# %% [markdown]
# On MI300X the closed forms of memory are within 5 % of most compiled programs; on TPUs they can be much too low
# (`benchmarks/closed_forms.md`, `docs/planning.md`). The planner uses them to discard what cannot win,
# compiles the rest with the target's compiler, and writes a configuration file:
#
# ```sh
# pip install ".[aot-rocm]"
# python scripts/plan.py llama3_70b --target mi300x:1024 --seq-len 131072 --batch 128 --out plan.py
# ```
#
# ## Exercises
#
# 1. At which sequence length does a TSP layout become the fastest, if a step always has 16 M tokens?
# 2. How many MI300X does the model need at least, with one sequence of 128 K tokens a step?
#
# `tests/test_examples.py` computes the answers.
