"""CPU time of SmolLM2-135M on 8 devices with its 9 query heads, as a ratio to the 16 that it was padded to.

Runs with either number of heads alternate, so that other load on the machine affects both alike; the median of the
ratios is printed.
"""

import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from tsp_jax import use_cpu_devices
from tsp_jax.config import Config, ModelConfig, OptimizerConfig
from tsp_jax.inference.cache import assign_tokens
from tsp_jax.inference.program import make_inference_program
from tsp_jax.layout import place
from tsp_jax.nn import Attention
from tsp_jax.training.data import Batch
from tsp_jax.training.step import make_program

HEADS = {"9 of 3": (9, 3), "16 of 4": (16, 4)}
"""those of the model, and those that 8 ranks can share evenly"""


@dataclasses.dataclass(frozen=True)
class Args:
    """Options of the command."""

    pairs: int = 5
    """timed runs with each number of heads"""
    seq_len: int = 4096
    """tokens"""
    layers: int = 2
    """layers of the model that trains and generates"""


def make_model(heads: tuple[int, int], args: Args) -> ModelConfig:
    """SmolLM2-135M with another number of heads and of layers."""
    return ModelConfig(
        vocab_size=49152, d_model=576, num_layers=args.layers, num_heads=heads[0], num_kv_heads=heads[1], head_dim=64,
        d_ff=1536, tie_embeddings=True,
    )  # fmt: skip


def attention(heads: tuple[int, int], args: Args) -> Callable[[], object]:
    """One layer's attention, forward and backward."""
    layer = Attention(576, *heads, 64, placement=place("tsp", tsp=8), dtype=jnp.float32, remat="full", rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(layer)
    x = jax.random.normal(jax.random.key(0), (1, args.seq_len, 576))
    grad = jax.jit(jax.grad(lambda state, x: (nnx.merge(graphdef, state)(x) ** 2).sum(), argnums=(0, 1)))
    return partial(grad, state, x)


def train(heads: tuple[int, int], args: Args) -> Callable[[], object]:
    """One training step."""
    config = Config(
        model=make_model(heads, args), optimizer=OptimizerConfig(warmup_steps=1), steps=1000, batch=1,
        seq_len=args.seq_len, compute_dtype="float32", remat="full",
    )  # fmt: skip
    program = make_program(config, place("tsp", tsp=8))
    shape = 1, 1, args.seq_len
    tokens = jax.random.randint(jax.random.key(0), shape, 0, config.model.vocab_size, dtype="int32")
    positions = jnp.broadcast_to(jnp.arange(args.seq_len, dtype="int32"), shape)
    fields = tokens, tokens, positions, positions * 0
    batch = Batch(*(jax.device_put(field, program.batch_sharding) for field in fields))
    states = [program.init()]

    def step() -> object:
        state, metrics = program.step(states.pop(), batch)
        states.append(state)
        return metrics

    return step


def prefill(heads: tuple[int, int], args: Args) -> Callable[[], object]:
    """Prefill of one prompt."""
    program = make_inference_program(
        make_model(heads, args), place("tsp", tsp=8), dtype="float32", batch=1, capacity=args.seq_len,
        chunk=args.seq_len,
    )  # fmt: skip
    shardings = jax.tree.map(lambda array: array.sharding, program.abstract_params)
    zeros = partial(jax.tree.map, lambda array: jnp.full(array.shape, 0.01, array.dtype), program.abstract_params)
    params = jax.jit(zeros, out_shardings=shardings)()
    positions = assign_tokens([0], [args.seq_len], args.seq_len, 8)
    tokens, positions = (
        jax.device_put(array, abstract.sharding)
        for array, abstract in zip((np.ones_like(positions), positions), program.abstract_chunk, strict=True)
    )
    return lambda: program.prefill(params, program.init_cache(), tokens, positions)[0]


WORK = {"attention": attention, "training step": train, "prefill": prefill}


def main(args: Args) -> None:
    """Prints a JSON line: for each kind of work the median CPU times in seconds, and the median of their ratios."""
    use_cpu_devices(8)
    result = {}
    for name, make in WORK.items():
        runs = {heads: make(numbers, args) for heads, numbers in HEADS.items()}
        cpu_s = {heads: [] for heads in runs}
        for pair in range(args.pairs + 1):
            for heads, run in runs.items():
                began = time.process_time()
                jax.block_until_ready(run())
                if pair:  # the first pair compiles
                    cpu_s[heads].append(time.process_time() - began)
        medians = {heads: round(statistics.median(times), 2) for heads, times in cpu_s.items()}
        ratio = statistics.median(a / b for a, b in zip(*cpu_s.values(), strict=True))
        result[name] = {"cpu_s": medians, "ratio": round(ratio, 3)}
        print(name, result[name], flush=True)
    print(json.dumps({"jax": jax.__version__, **result}))


if __name__ == "__main__":
    main(tyro.cli(Args))
