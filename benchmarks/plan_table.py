"""What the planner picks: contexts, models, kinds and numbers of devices.

A step has 16 K tokens a device, and at least one sequence. Every cell is what `scripts/plan.py` finds with the command
that the cell holds. Cells are appended to a file as lines of JSON: an interrupted run goes on where it stopped. One run
takes targets of one platform, since compilers of two do not load into one process.

    python benchmarks/plan_table.py CELLS.jsonl --targets mi300x:8 mi300x:64
    python benchmarks/plan_table.py CELLS.jsonl --markdown
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from tsp_jax.errors import ConfigError
from tsp_jax.hardware.targets import Target, parse_target, use_target
from tsp_jax.plan.choose import Plan, choose
from tsp_jax.plan.compiled import Compile, Compilers
from tsp_jax.tools.cli import errors_in_a_line, load_config

MODELS = ("smollm2_135m", "qwen3_8b", "llama3_70b")
LENGTHS = (1024, 16384, 131072, 1048576)
TARGETS = ("mi300x:8", "h100:8", "v5p:8", "mi300x:64", "h100:64", "v5p:64")
TOKENS = 16384
"""of a device in a step"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", type=Path)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=[])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--lengths", nargs="+", type=int, choices=LENGTHS, default=LENGTHS)
    parser.add_argument("--compilations", type=int, default=2, help="most steps of a cell that are compiled")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--markdown", action="store_true", help="print the cells of the file as a table")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.markdown:
        print("\n".join(markdown(read(arguments.cells))))
        return
    for text in arguments.targets:
        target, done = parse_target(text), read(arguments.cells)
        if arguments.compilations:
            use_target(target)
        with Compilers(target, workers=arguments.workers) as compile:
            for model in arguments.models:
                for length in arguments.lengths:
                    known = done.get((model, text, length))
                    if known is None or known["compilations"] < arguments.compilations:
                        cell = plan_cell(model, target, length, arguments.compilations, compile)
                        with arguments.cells.open("a") as file:
                            file.write(json.dumps(cell) + "\n")
                        print(text, model, length, cell.get("error") or cell["choice"], file=sys.stderr, flush=True)


def read(path: Path) -> dict[tuple[str, str, int], dict[str, Any]]:
    """(model, target, length) -> its last cell."""
    lines = path.read_text().splitlines() if path.exists() else []
    cells = [json.loads(line) for line in lines]
    return {(cell["model"], cell["target"], cell["seq_len"]): cell for cell in cells}


def plan_cell(model: str, target: Target, length: int, compilations: int, compile: Compile) -> dict[str, Any]:
    batch = max(1, TOKENS * target.num_devices // length)
    command = f"python scripts/plan.py {model} --target {target} --seq-len {length} --batch {batch}"
    command += f" --compilations {compilations}"
    facts = {
        "model": model, "target": str(target), "seq_len": length, "batch": batch, "compilations": compilations,
        "command": command,
    }  # fmt: skip
    config = dataclasses.replace(load_config(model), seq_len=length, batch=batch)
    try:
        plan = choose(config, target, name=model, compilations=compilations, compile=compile)
    except ConfigError as error:
        return {**facts, "error": str(error)}
    return {**facts, **found(plan)}


def found(plan: Plan) -> dict[str, Any]:
    best = plan.chosen
    finalists = [
        {
            "choice": c.choice.text(), "compiled_bytes": c.compiled.peak_bytes, "compiled_s": c.compiled.step_s,
            "closed_form_bytes": c.estimate.peak_bytes, "closed_form_s": c.estimate.step_s,
            "compile_s": c.compiled.compile_s, "differences": [str(each) for each in plan.differences(c)],
        }
        for c in plan.candidates if c.compiled
    ]  # fmt: skip
    return {
        "choice": best.choice.text(), "step_s": best.step_s, "peak_bytes": best.peak_bytes,
        "compiled": best.compiled is not None, "finalists": finalists, "why": list(plan.why), "ties": list(plan.ties),
        "refused": {c.choice.text(): c.note for c in plan.candidates if c.note},
    }  # fmt: skip


def markdown(cells: dict[tuple[str, str, int], dict[str, Any]]) -> Iterator[str]:
    """A row for each target, model and length."""
    yield "| target | model | batch x tokens | pick | step s | peak GB | by | closed form of the peak |"
    yield "|---|---|---|---|---|---|---|---|"
    for target in TARGETS:
        for model in MODELS:
            for length in LENGTHS:
                if cell := cells.get((model, target, length)):
                    yield f"| {target} | {model} | {cell['batch']} x {length:,} | {' | '.join(columns(cell))} |"


def columns(cell: dict[str, Any]) -> list[str]:
    if error := cell.get("error"):
        return [error.partition(": ")[2] or error, "", "", "", ""]
    own = next((f for f in cell["finalists"] if f["choice"] == cell["choice"]), None)
    share = f"{own['closed_form_bytes'] / own['compiled_bytes'] - 1:+.1%}" if own else ""
    by = "compiled" if cell["compiled"] else "closed form"
    return [f"`{cell['choice']}`", f"{cell['step_s']:.4g}", f"{cell['peak_bytes'] / 1e9:.1f}", by, share]


if __name__ == "__main__":
    with errors_in_a_line():
        main()
