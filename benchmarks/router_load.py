"""CPU time of a layer of experts with the worst router, as a ratio to a balanced one, in the same compiled program.

Experts stream past the tokens of 8 virtual devices. `balanced`: each token chooses k experts at random. `worst`: all
tokens choose the same k experts. Runs with either router alternate; the median of the ratios is printed, with the
tiles that a device multiplies in all buckets together.

Command:  python benchmarks/router_load.py
"""

import dataclasses
import statistics
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import PartitionSpec as P

from tsp_jax import use_cpu_devices
from tsp_jax.config.experts import SLABS
from tsp_jax.layout import place
from tsp_jax.ops.experts import experts
from tsp_jax.ops.router import Choices
from tsp_jax.ops.stream import Stream


@dataclasses.dataclass(frozen=True)
class Args:
    """Options of the command."""

    pairs: int = 7
    """timed runs with each router"""
    tokens: int = 2048
    """of a device"""
    d_model: int = 256
    d_ff: int = 256
    number: int = 32
    """experts"""
    per_token: int = 4
    buckets: int = 2


def main(args: Args) -> None:
    """Times both routers."""
    use_cpu_devices(8)
    placement, total = place("tsp", tsp=8), 8 * args.tokens
    rng = np.random.default_rng(0)
    scores = rng.random((1, total, args.number))
    balanced = np.argsort(scores, axis=-1)[..., : args.per_token].astype(np.int32)
    worst = np.broadcast_to(np.arange(args.per_token, dtype=np.int32), balanced.shape)
    mix = np.full(balanced.shape, 1 / args.per_token, np.float32)
    op = partial(
        experts, num_experts=args.number, axes=placement.layout.axes("mlp"), stream=Stream(buckets=args.buckets)
    )  # fmt: skip

    def local(x, chosen, mix, *weights):
        return op(x, Choices(chosen, mix), *weights)

    split, rows = P(None, "tsp", None), P("tsp", None)
    run = placement.shard_map(local, (split, split, split, rows, rows, rows), split)
    shape = args.number * args.d_ff, args.d_model
    weights = [jax.random.normal(jax.random.key(i), shape) * args.d_model**-0.5 for i in range(3)]
    x = jax.random.normal(jax.random.key(3), (1, total, args.d_model))
    loss = jax.jit(
        jax.grad(lambda x, chosen, *weights: (run(x, chosen, mix, *weights) ** 2).sum(), argnums=(0, 2, 3, 4))
    )
    compiled = loss.lower(x, jnp.asarray(balanced), *weights).compile()

    def seconds(chosen: jax.Array) -> float:
        began = time.process_time()
        jax.block_until_ready(compiled(x, chosen, *weights))
        return time.process_time() - began

    arrays = {"balanced": jnp.asarray(balanced), "worst": jnp.asarray(worst)}
    for chosen in arrays.values():
        seconds(chosen)
    found = [{name: seconds(chosen) for name, chosen in arrays.items()} for _ in range(args.pairs)]
    ratios = [each["worst"] / each["balanced"] for each in found]
    size = SLABS["xla"].tile(args.tokens * args.per_token, args.number)
    for name, chosen in {"balanced": balanced, "worst": worst}.items():
        counts = [np.bincount(part.ravel(), minlength=args.number) for part in np.split(chosen[0], 8)]
        tiles = [int(sum(-(-each // size))) for each in counts]
        print(f"{name}: {min(tiles)} to {max(tiles)} tiles of {size} choices a device")
    print(f"worst / balanced, CPU time: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
