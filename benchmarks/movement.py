"""Bytes that each device receives in a compiled training step, by movement, batch size and sequence length.

For each point three programs are compiled: with `auto`, with `gather` in every op, and with `activations` in every op.
`auto` should receive no more than the better of the other two.
"""

import csv
import dataclasses
import itertools
from pathlib import Path

import tyro

from tsp_jax.config import Config
from tsp_jax.cost.training import movements
from tsp_jax.errors import ConfigError
from tsp_jax.hardware.targets import parse_target, use_target
from tsp_jax.inspect import list_collectives, parse
from tsp_jax.layout import get_layout, parse_mesh
from tsp_jax.plan.compile import compile_step
from tsp_jax.tools.cli import load_config

OPS = ("attention", "mlp", "embed", "loss")
PINNED = ("gather", "activations")


@dataclasses.dataclass(frozen=True)
class Args:
    """Options of the command."""

    target: str = "mi300x:8"
    """kind and number of devices to compile for; they need not be present"""
    tokens: tuple[int, ...] = tuple(1 << n for n in range(10, 21))
    """tokens per step: batch size x sequence length"""
    batches: tuple[int, ...] = (1, 4)
    """batch sizes"""
    csv: str = ""
    """file to write the table to; empty: none"""
    config: Config = dataclasses.field(default_factory=lambda: load_config("llama_7b"))
    """model and settings; batch size, sequence length and movements are replaced"""


def received(config: Config, target) -> dict[str, float]:
    """Bytes received per device in a compiled step: by op, and in `total`, which includes gradient all-reduces and
    messages that the compiler merged across ops. Also the `peak` bytes."""
    step = compile_step(config, target)
    found = list_collectives(parse(step.compiled.as_text()), dict(step.placement.mesh.shape))
    totals = {op: sum(c.total_bytes for c in found if f"tsp/{op}" in c.scope) for op in OPS}
    totals["total"] = sum(c.total_bytes for c in found)
    memory = step.compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
    return totals | {"peak": held - memory.alias_size_in_bytes}


def with_movement(config: Config, movement: str) -> Config:
    """`config` with the given movement in every op."""
    fields = dict.fromkeys(("attention_movement", "mlp_movement", "vocab_movement"), movement)
    return dataclasses.replace(config, stream=dataclasses.replace(config.stream, **fields))


def compare(config: Config, target) -> list[dict]:
    """Compiles the step with each movement; returns one row of the table per movement."""
    layout = get_layout(config.layout)
    sizes = parse_mesh(config.mesh, layout, target.num_devices)
    rows, compiled = [], {}
    for movement in ("auto", *PINNED):
        changed = with_movement(config, movement)
        chosen = movements(changed, layout, sizes)
        key = tuple(chosen.values())
        if key not in compiled:  # auto may choose the same movement for every op: the same program
            compiled[key] = received(changed, target)
        found = compiled[key]
        row = {"batch": config.batch, "seq_len": config.seq_len, "movement": movement, "peak_gb": found["peak"] / 1e9}
        row |= {f"{op}_gb": found[op] / 1e9 for op in OPS}
        row["total_gb"] = found["total"] / 1e9
        rows.append(row | {"moves_activations": " ".join(op for op in OPS if chosen[op] == "activations")})
    return rows


def worse(rows: list[dict]) -> bool:
    """Whether auto receives more bytes than the better of gather and activations."""
    auto, *pinned = (row["total_gb"] for row in rows)
    return auto > min(pinned)


def main(args: Args) -> int:
    """Prints the table; returns exit code 1 if auto receives more at any point."""
    target = parse_target(args.target)
    use_target(target)
    bad, table = 0, []
    for batch, tokens in itertools.product(args.batches, args.tokens):
        rows = compare(dataclasses.replace(args.config, batch=batch, seq_len=tokens // batch), target)
        bad += worse(rows)
        table += [{k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()} for row in rows]
        for row in table[-len(rows) :]:
            print(*row.values(), flush=True)
        print("  auto receives more" if worse(rows) else "  auto receives no more", flush=True)
        if args.csv:
            with Path(args.csv).open("w", newline="") as file:
                writer = csv.DictWriter(file, table[0].keys())
                writer.writeheader()
                writer.writerows(table)
    print(f"{len(table) // 3} points, auto receives more at {bad}")
    return 1 if bad else 0


if __name__ == "__main__":
    try:
        raise SystemExit(main(tyro.cli(Args)))
    except ConfigError as error:
        raise SystemExit(f"error: {error}") from None
