"""Checks and times the products of a mixture of experts on one GPU: many tiles at once, and one after another.

Parts: `check` compares value and gradients of `tsp_jax.ops.experts` in bfloat16 with float32; `kernels` times the
kernel's three products with several blocks; `op` times forward and backward of the op with the streaming's buckets;
`train` trains two layers of Qwen3-30B-A3B and a small mixture of text with each kernel, whose first losses must agree.
Every result is one line of grouped.jsonl in the folder of --out, written when it is known.

On a GPU: python benchmarks/grouped.py --out OUT
On a CPU, interpreted and tiny, to see that it runs: python benchmarks/grouped.py --out OUT --interpret

Dims: T tokens, D model, E experts, F ffn, k experts of a token, m experts of a bucket, N rows of a slab, n of a tile.
"""

import argparse
import functools
import gzip
import itertools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from gpu_check import Results, compile_all, load, rate, run_script, say, seconds


class Sizes(NamedTuple):
    """Sizes of a mixture, and of a device's share."""

    name: str
    tokens: int
    d_model: int
    num_experts: int
    per_token: int
    d_ff: int
    buckets: int

    @property
    def flops(self) -> float:
        """Operations of the routed products in forward."""
        return 6.0 * self.tokens * self.per_token * self.d_model * self.d_ff


QWEN = Sizes("Qwen3-30B-A3B", 16384, 2048, 128, 8, 768, 16)
MIXTRAL = Sizes("Mixtral-8x7B", 16384, 4096, 8, 2, 14336, 8)
TINY = Sizes("tiny", 64, 32, 4, 2, 32, 2)


def arrays(sizes: Sizes, skewed: bool = False, biased: bool = False) -> tuple[Any, ...]:
    """(x [1, T, D], chosen [1, T, k], mix [1, T, k], three weights [E F, D]), random; skewed: few experts have most.

    If biased, also three biases [E, D], of gate and up in the first F of D elements.
    """
    import jax
    import jax.numpy as jnp

    keys = jax.random.split(jax.random.key(0), 8)
    scores = jax.random.normal(keys[0], (1, sizes.tokens, sizes.num_experts))
    if skewed:
        scores += 4.0 * jnp.linspace(0, 1, sizes.num_experts) ** 4
    mix, chosen = jax.lax.top_k(scores, sizes.per_token)
    x = jax.random.normal(keys[1], (1, sizes.tokens, sizes.d_model), jnp.bfloat16)
    shape = sizes.num_experts * sizes.d_ff, sizes.d_model
    weights = [jax.random.normal(key, shape, jnp.bfloat16) * sizes.d_model**-0.5 for key in keys[2:5]]
    if biased:
        shape = sizes.num_experts, sizes.d_model
        gate, up, down = (jax.random.normal(key, shape, jnp.bfloat16) for key in keys[5:])
        weights += [*(bias.at[:, sizes.d_ff :].set(0) for bias in (gate, up)), down]
    return x, chosen.astype(jnp.int32), jax.nn.softmax(mix, axis=-1), *weights


def forward(sizes: Sizes, grouped: Any, x, chosen, mix, gate, up, down, *biases):
    """The op, in buckets as it streams them; with biases as in gpt-oss."""
    ops, router, stream = (load(f"tsp_jax.ops.{name}") for name in ("experts", "router", "stream"))
    return ops.experts(
        x, router.Choices(chosen, mix), gate, up, down, num_experts=sizes.num_experts,
        stream=stream.Stream(buckets=sizes.buckets, grad_dtype="bfloat16"), grouped=grouped,
        **({"biases": ops.ExpertBiases(*biases), "activation": "clamped_swiglu"} if biases else {}),
    )  # fmt: skip


def both(sizes: Sizes, grouped: Any, x, chosen, mix, *weights):
    """(y, gradients of x, mix and the weights) for a cotangent of y's own size."""
    import jax

    y, vjp = jax.vjp(lambda x, mix, *weights: forward(sizes, grouped, x, chosen, mix, *weights), x, mix, *weights)
    return y, *vjp(x)


def ragged(sizes: Sizes, x, chosen, mix, *weights):
    """Forward by `jax.lax.ragged_dot`, for comparison."""
    import jax
    import jax.numpy as jnp

    order = jnp.argsort(chosen.reshape(-1))
    counts = jnp.bincount(chosen.reshape(-1), length=sizes.num_experts).astype(jnp.int32)
    rows = x[0][order // sizes.per_token]
    gate, up, down = (w.reshape(sizes.num_experts, sizes.d_ff, sizes.d_model) for w in weights)
    g, u = (jax.lax.ragged_dot(rows, w.swapaxes(1, 2), counts) for w in (gate, up))
    out = jax.lax.ragged_dot(jax.nn.silu(g) * u, down, counts) * mix.reshape(-1)[order][:, None]
    return jnp.zeros_like(x[0]).at[order // sizes.per_token].add(out.astype(x.dtype))[None]


def triton(interpret: bool, blocks: Any = None) -> Any:
    """The kernel for this device; `blocks`: those of both kernels, where they are not the device's own."""
    import jax
    import numpy as np

    kernels, grouped = load("tsp_jax.ops.kernels"), load("tsp_jax.ops.grouped")
    arch = "interpret" if interpret else kernels.arch_of(jax.sharding.Mesh(np.array(jax.devices()[:1]), ("one",)))
    return grouped.TritonGrouped(arch, blocks and grouped.KernelBlocks(*4 * [blocks]))


def check(results: Results, interpret: bool) -> None:
    """Norm of the error over the norm of the value, for the output and each gradient; balanced, skewed and biased."""
    import jax
    import jax.numpy as jnp

    grouped = load("tsp_jax.ops.grouped")
    sizes = TINY if interpret else QWEN._replace(tokens=2048, num_experts=32, buckets=4)
    names = "y", "dx", "dmix", "dgate", "dup", "ddown", "dgate_bias", "dup_bias", "ddown_bias"
    for label in ("balanced", "skewed", "biased"):
        inputs = arrays(sizes, label == "skewed", label == "biased")
        exact = [a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a for a in inputs]
        with jax.default_matmul_precision("highest"):
            desired = jax.jit(functools.partial(both, sizes, grouped.OneByOne()))(*exact)
        for name, kernel in {"triton": triton(interpret), "xla": grouped.OneByOne()}.items():
            program = jax.jit(functools.partial(both, sizes, kernel))
            actual, again = program(*inputs), program(*inputs)
            same = all(bool((a == b).all()) for a, b in zip(actual, again, strict=True))
            errors = {
                part: float(jnp.linalg.norm((a.astype(jnp.float32) - d).ravel()) / jnp.linalg.norm(d.ravel()))
                for part, a, d in zip(names, actual, desired, strict=False)
            }
            text = ", ".join(f"{part} {error:.2e}" for part, error in errors.items())
            results.add(
                f"{name}, {label}: {text}; twice the same: {same}", name=name, label=label, errors=errors, same=same,
                ok=max(errors.values()) < 0.02 and same,
            )  # fmt: skip


def products(kernel: Any, slab: Any) -> dict[str, Callable[..., Any]]:
    """name -> each product of forward and backward, of a slab."""
    import jax

    return {
        "gate and up": lambda x, w: kernel.matmul_t(x, (w, w), slab, combine=lambda g, u: jax.nn.silu(g) * u)[0],
        "one product": lambda x, w: kernel.matmul_t(x, (w,), slab)[0],
        "down": lambda h, w: kernel.matmul((h,), (w,), slab),
        "dx": lambda h, da, w: kernel.matmul((h, da), (w, w), slab),
        "outer": lambda h, x: kernel.outer(None, h, x, slab),
    }


SHAPES = (128, 128), (128, 256), (64, 256), (256, 128), (256, 64)
"""rows and columns of the blocks that `kernels` tries; those of a tile's kernel with more rows than a tile are cut"""


def kernels(results: Results, interpret: bool) -> None:
    """The products of one slab of full tiles, with several blocks; and one plain product of the same size."""
    import jax
    import jax.numpy as jnp

    grouped = load("tsp_jax.ops.grouped")
    for sizes in [TINY] if interpret else [QWEN, MIXTRAL]:
        tile = 16 if interpret else 128
        experts = sizes.num_experts // sizes.buckets
        rows = sizes.tokens * sizes.per_token // sizes.buckets
        keys = jax.random.split(jax.random.key(1), 6)
        x, dy = (jax.random.normal(key, (rows, sizes.d_model), jnp.bfloat16) for key in keys[:2])
        h, da = (jax.random.normal(key, (rows, sizes.d_ff), jnp.bfloat16) for key in keys[2:4])
        w = jax.random.normal(keys[4], (experts, sizes.d_ff, sizes.d_model), jnp.bfloat16)
        options = [None] if interpret else [
            grouped.Blocks(*shape, *each)
            for shape, each in itertools.product(SHAPES, itertools.product((64, 32), (8, 4), (3, 4), (8, 1)))
            if (shape == (128, 128) or each[1] == 8) and (each[2:] == (3, 8) or each[0] == 64)
        ]  # fmt: skip
        number = rows // tile
        places = jnp.arange(number, dtype=jnp.int32) // (number // experts)
        slab = grouped.Slab(places, experts, jnp.int32(number), tile, number, rows / experts)
        inputs = {"gate and up": (x, w), "one product": (x, w), "down": (h, w), "dx": (h, da, w)}
        inputs["outer"] = h, dy
        calls = []
        for option in options:
            label = f"{sizes.name} {'x'.join(map(str, option or ()))}"
            for name, call in products(triton(interpret, option), slab).items():
                if name == "outer" or option is None or option.rows <= tile:
                    calls.append((f"{name}: {label}", call, inputs[name]))
        whole = w.reshape(-1, sizes.d_model)[: sizes.d_ff]
        calls.append((f"plain product: {sizes.name}", lambda x, w: x @ w.T, (x, whole)))
        programs = compile_all(calls, results)
        one = 2.0 * rows * sizes.d_model * sizes.d_ff
        for name, _, arguments in calls:
            if (program := programs.get(name)) is not None:
                kind = name.split(":")[0]
                flops = one * {"gate and up": 2, "dx": 2}.get(kind, 1)
                try:
                    times = seconds(functools.partial(program, *arguments), total=0.02, repeats=3)
                    rate(results, name, flops, times, kind=kind)
                except Exception as error:
                    results.failed(name, error, kind=kind)


def op(results: Results, interpret: bool, folder: Path) -> None:
    """The whole op: routed operations a second, whatever is computed; its programs are kept as text."""
    grouped = load("tsp_jax.ops.grouped")
    for sizes in [TINY] if interpret else [QWEN, QWEN._replace(tokens=4096), MIXTRAL]:
        calls = []
        for skewed in (False, True):
            inputs, label = arrays(sizes, skewed), "skewed" if skewed else "balanced"
            ways = {"triton": triton(interpret), "xla": grouped.OneByOne()}
            for name, kernel in ways.items():
                if skewed and name == "xla":
                    continue
                calls.append((f"forward {name} {label}", functools.partial(forward, sizes, kernel), inputs))
                calls.append((f"both {name} {label}", functools.partial(both, sizes, kernel), inputs))
            if not skewed and sizes is not MIXTRAL:
                calls.append((f"forward ragged_dot {label}", functools.partial(ragged, sizes), inputs))
        programs = compile_all(calls, results)
        for name, _, inputs in calls:
            if (program := programs.get(name)) is not None:
                flops = sizes.flops * (1 if name.startswith("forward") else 11 / 3)
                label = f"{sizes.name} T {sizes.tokens} {name}"
                times = seconds(functools.partial(program, *inputs), total=0.2, repeats=3)
                rate(
                    results, label, flops, times, sizes=sizes.name, tokens=sizes.tokens,
                    temporaries=program.memory_analysis().temp_size_in_bytes,
                )  # fmt: skip
                if "balanced" in name and sizes is QWEN:
                    text = folder / f"{label.replace(' ', '_')}.hlo.gz"
                    text.write_bytes(gzip.compress(program.as_text().encode()))


TRAINED = {
    "Qwen3-30B-A3B, 2 layers": (
        "qwen3_30b_a3b --model.num-layers 2 --model.vocab-size 32768 --seq-len 16384 --steps 12 --eval-every 0 "
        "--data.tokenizer bytes --data.files tsp_jax/**/*.py"
    ),
    "tiny of bytes": (
        "tiny --model.experts.number 8 --model.experts.per-token 2 --model.d-ff 288 --compute-dtype bfloat16 "
        "--eval-every 0 --steps 30"
    ),
}
"""name -> configuration and flags of a run on one GPU"""


def train(results: Results, interpret: bool) -> None:
    """Short training runs with each kernel of experts: the first losses must agree, and steps are timed."""
    for name, flags in TRAINED.items():
        losses = {}
        for kernel in ("triton", "xla")[interpret:]:
            if interpret and not name.startswith("tiny"):
                continue
            with tempfile.TemporaryDirectory() as folder:
                chosen = f"--cpu-devices {int(interpret)} --mesh data=1,tsp=1 --stream.expert-kernel {kernel}"
                say(f"training {name}, {kernel}")
                short = f"--checkpoint-every 0 --workdir {folder}/run" + " --steps 2" * interpret
                done = run_script("train.py", f"{flags} {chosen} {short}")
                files = Path(folder).rglob("*.jsonl")
                lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
            losses[kernel] = [line["loss"] for line in lines if "loss" in line]
            tail = "\n  ".join(done.stdout.strip().splitlines()[-6:] + done.stderr.strip().splitlines()[-6:])
            times = [round(line["tokens"] / line["tokens_per_s"], 4) for line in lines if "tokens_per_s" in line]
            results.add(
                f"{name}, {kernel}: exit code {done.returncode}, losses {losses[kernel][-3:]}, seconds {times[-3:]}\n"
                f"  {tail}",
                ok=done.returncode == 0, name=name, kernel=kernel, metrics=lines, stdout=done.stdout[-4000:],
                stderr=done.stderr[-6000:],
            )  # fmt: skip
        if len(losses) == 2:
            first = list(zip(*losses.values(), strict=False))[:8]  # rounding grows with steps, also from run to run
            apart = max((abs(a - b) / abs(b) for a, b in first), default=float("inf"))
            text = f"{name}: losses of {len(first)} steps differ by {apart:.1e} at most"
            results.add(text, name=name, apart=apart, ok=apart < 0.01)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", default="check,op,train,kernels")
    parser.add_argument("--interpret", action="store_true")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for part in arguments.parts.split(","):
        results = Results(arguments.out, part)
        results.file = arguments.out / "grouped.jsonl"
        say(part)
        extra = (arguments.out,) if part == "op" else ()
        {"check": check, "kernels": kernels, "op": op, "train": train}[part](results, arguments.interpret, *extra)


if __name__ == "__main__":
    main()
