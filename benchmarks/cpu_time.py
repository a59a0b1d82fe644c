"""CPU time of a training step under several layouts, as ratios to the first one (`single`).

Steps of the layouts alternate, so that other load on the machine affects all of them alike; the median of the ratios is
printed.
"""

import dataclasses
import json
import statistics
import time
from collections.abc import Callable

import jax
import tyro

from tsp_jax import use_cpu_devices
from tsp_jax.config import Config, ModelConfig, OptimizerConfig, StreamConfig
from tsp_jax.layout import place
from tsp_jax.training.data import Batch, sequence_order
from tsp_jax.training.step import make_program

CONFIG = Config(
    model=ModelConfig(vocab_size=4096, d_model=512, num_layers=4, num_heads=8, num_kv_heads=8, head_dim=64, d_ff=2048),
    stream=StreamConfig(),
    optimizer=OptimizerConfig(warmup_steps=1),
    steps=1000,
    batch=1,
    seq_len=4096,
    compute_dtype="float32",
    remat="save_attention",
)


@dataclasses.dataclass(frozen=True)
class Args:
    """Options of the command."""

    layouts: tuple[str, ...] = ("single", "tsp")
    """layouts to time; CPU times of all are divided by that of the first"""
    ranks: int = 8
    """virtual CPU devices of every layout but single"""
    pairs: int = 10
    """timed steps of each layout"""
    config: Config = CONFIG
    """model, sizes and settings of the step"""


def random_batch(program, config: Config, sequence_shards: int) -> Batch:
    """A batch of random tokens, one document per sequence, in zigzag order, sharded like the program's batches."""
    shape = (1, config.batch, config.seq_len)
    tokens = jax.random.randint(jax.random.key(0), shape, 0, config.model.vocab_size, dtype="int32")
    positions = jax.numpy.broadcast_to(jax.numpy.arange(config.seq_len, dtype="int32"), shape)
    order = sequence_order(config.seq_len, sequence_shards, "zigzag")
    fields = (tokens, tokens, positions, positions * 0)
    return Batch(*(jax.device_put(field[..., order], program.batch_sharding) for field in fields))


def make_step(layout: str, args: Args) -> Callable[[], None]:
    """A function that runs one training step and waits for its result; compiled and warmed up."""
    axes = {"single": {}, "tp": {"model": args.ranks}, "sp": {"seq": args.ranks}}.get(layout, {"tsp": args.ranks})
    placement = place(layout, **axes)
    program = make_program(args.config, placement)
    state, batch = program.init(), random_batch(program, args.config, placement.size("sequence"))
    compiled = program.step.lower(state, batch).compile()

    def step():
        nonlocal state
        state, metrics = compiled(state, batch)
        jax.block_until_ready((state, metrics))

    step()
    return step


def main(args: Args) -> None:
    """Prints a JSON line: for each layout, the median CPU time in seconds and the median ratio to the first layout."""
    use_cpu_devices(args.ranks)
    steps = {layout: make_step(layout, args) for layout in args.layouts}
    cpu_s = {layout: [] for layout in steps}
    for _ in range(args.pairs):
        for layout, step in steps.items():
            began = time.process_time()
            step()
            cpu_s[layout].append(time.process_time() - began)
    base = cpu_s[args.layouts[0]]
    result = {
        "versions": {"jax": jax.__version__},
        "cpu_s": {layout: statistics.median(times) for layout, times in cpu_s.items()},
        "ratio": {
            layout: statistics.median(t / b for t, b in zip(times, base, strict=True))
            for layout, times in cpu_s.items()
        },
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(tyro.cli(Args))
