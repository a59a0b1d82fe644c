"""Bytes that a compiled training step receives with each movement, over batch sizes and sequence lengths.

Of every point three programs are compiled: `auto`, and each of the two that it chooses from, pinned in every op. `auto`
should receive no more than the better of the two.
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
from tsp_jax.tools.cli import load_config
from tsp_jax.tools.compile import compile_step

OPS = ("attention", "mlp", "embed", "loss")
PINNED = ("gather", "activations")


@dataclasses.dataclass(frozen=True)
class Args:
    """Which points."""

    target: str = "mi300x:8"
    tokens: tuple[int, ...] = tuple(1 << n for n in range(10, 21))
    """B S"""
    batches: tuple[int, ...] = (1, 4)
    """B"""
    csv: str = ""
    """file for the table"""
    config: Config = dataclasses.field(default_factory=lambda: load_config("llama_7b"))


def received(config: Config, target) -> dict[str, float]:
    """Op -> bytes that one device receives in a compiled step; their `total`, messages that the compiler merged from
    several ops' and sums of gradients among them; and `peak` bytes."""
    step = compile_step(config, target)
    found = list_collectives(parse(step.compiled.as_text()), dict(step.placement.mesh.shape))
    totals = {op: sum(c.total_bytes for c in found if f"tsp/{op}" in c.scope) for op in OPS}
    totals["total"] = sum(c.total_bytes for c in found)
    memory = step.compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
    return totals | {"peak": held - memory.alias_size_in_bytes}


def with_movement(config: Config, movement: str) -> Config:
    """The same, with one movement in every op."""
    fields = dict.fromkeys(("attention_movement", "mlp_movement", "vocab_movement"), movement)
    return dataclasses.replace(config, stream=dataclasses.replace(config.stream, **fields))


def compare(config: Config, target) -> list[dict]:
    """A row for each movement."""
    layout = get_layout(config.layout)
    sizes = parse_mesh(config.mesh, layout, target.num_devices)
    rows, compiled = [], {}
    for movement in ("auto", *PINNED):
        changed = with_movement(config, movement)
        chosen = movements(changed, layout, sizes)
        key = tuple(chosen.values())
        if key not in compiled:  # where auto chooses one for all ops, it is that program
            compiled[key] = received(changed, target)
        found = compiled[key]
        row = {"batch": config.batch, "seq_len": config.seq_len, "movement": movement, "peak_gb": found["peak"] / 1e9}
        row |= {f"{op}_gb": found[op] / 1e9 for op in OPS}
        row["total_gb"] = found["total"] / 1e9
        rows.append(row | {"moves_activations": " ".join(op for op in OPS if chosen[op] == "activations")})
    return rows


def worse(rows: list[dict]) -> bool:
    """Whether auto receives more than the better of the pinned ones."""
    auto, *pinned = (row["total_gb"] for row in rows)
    return auto > min(pinned)


def main(args: Args) -> int:
    """Prints the table; exit code 1 if auto receives more anywhere."""
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
