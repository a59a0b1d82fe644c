"""Does the planner find the best of a grid that is compiled whole?

Compiles every layout and mesh, remat policy and bucket size of a grid, and compares the fastest step that fits with the
one that `scripts/plan.py` would take. Rows are kept on disk, where the planner finds them too: an interrupted run goes
on where it stopped.

    python benchmarks/plan_grid.py llama_7b --target mi300x:8 --seq-len 131072 --json OUT.json
    python benchmarks/plan_grid.py llama_7b --buckets 64 256 --remats none save_attention full offload_attention
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tsp_jax.hardware.targets import parse_target, use_target
from tsp_jax.plan.budget import usable_bytes
from tsp_jax.plan.choose import choose
from tsp_jax.plan.compiled import Compiled, Compilers, Job, Refused
from tsp_jax.plan.space import REMATS, Choice, choices
from tsp_jax.tools.cli import errors_in_a_line, load_config

BUCKETS_MIB = (64.0, 128.0, 256.0)
"""of the grid; the planner searches all of its own"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--target", default="mi300x:8")
    parser.add_argument("--seq-len", type=int, default=131072)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--memory", type=float, default=0.9)
    parser.add_argument("--buckets", type=float, nargs="+", default=BUCKETS_MIB, help="MiB, of the grid")
    parser.add_argument("--remats", nargs="+", choices=REMATS, default=REMATS, help="remat policies of the grid")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--compilations", type=int, default=12, help="of the planner")
    parser.add_argument("--json", default="")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    config = dataclasses.replace(load_config(arguments.config), seq_len=arguments.seq_len, batch=arguments.batch)
    target = parse_target(arguments.target)
    use_target(target)
    limit = usable_bytes(target.hardware, arguments.memory).usable_bytes
    found = choices(config, target.num_devices, frozenset({"accumulate"}))
    grid = [c for c in found if c.bucket_mib in arguments.buckets and c.remat in arguments.remats]
    print(f"{len(grid)} steps", file=sys.stderr)
    done = []

    def say(job: Job, row: Compiled | Refused, kept: bool) -> None:
        done.append(job)
        print(f"{len(done)} of {len(grid)}{' (kept)' * kept}: {Choice.of(job.config).text()}: {row}", file=sys.stderr)

    with Compilers(target, workers=arguments.workers, progress=say) as compile:
        rows = dict(zip(grid, compile([Job(choice.apply(config)) for choice in grid]), strict=True))
    plan = choose(
        config, target, memory=arguments.memory, name=arguments.config, compilations=arguments.compilations,
        workers=arguments.workers,
    )  # fmt: skip
    fitting = {c: row for c, row in rows.items() if isinstance(row, Compiled) and row.peak_bytes <= limit}
    ranked = sorted(fitting, key=lambda choice: fitting[choice].step_s)
    for choice in ranked:
        print(f"{fitting[choice].step_s:8.3f} s {fitting[choice].peak_bytes / 1e9:7.1f} GB  {choice.text()}")
    best, planned = fitting[ranked[0]].step_s, plan.chosen
    print(f"planned: {planned.step_s:.3f} s, {planned.peak_bytes / 1e9:.1f} GB, {planned.choice.text()}")
    print(f"planned / best of {len(grid)} ({len(fitting)} fit): {planned.step_s / best:.4f}")
    if arguments.json:
        content = [
            {"choice": dataclasses.asdict(choice), "row": row._asdict() if isinstance(row, Refused) else vars(row)}
            for choice, row in rows.items()
        ]
        Path(arguments.json).write_text(json.dumps({"grid": content, "plan": plan.to_json()}, indent=1) + "\n")


if __name__ == "__main__":
    with errors_in_a_line():
        main()
