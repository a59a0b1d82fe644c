"""Rebuilds tables of README, docs/ and benchmarks/ from the commands that give their figures.

A table stands between `<!-- figure: NAME -->` and `<!-- end -->`. Its data lie in a file beside this script; a test
renders them again and compares, so that no figure is copied by hand.

    python benchmarks/figures.py              run all commands, with the compilers of all platforms
    python benchmarks/figures.py layouts      run one
    python benchmarks/figures.py --render     write the tables from the data as they are
"""

import argparse
import dataclasses
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
COMPARE = (
    "python scripts/compare.py llama_7b --remat full --seq-lens 16384,131072 --target mi300x:8"
    " --json benchmarks/layouts_mi300x.json --png benchmarks/layouts_mi300x.png"
)
INSPECT = "python scripts/inspect_hlo.py llama_7b --target mi300x:8"


@dataclasses.dataclass(frozen=True)
class Figure:
    """A table: the commands whose results it shows, the file that keeps them, and how they are shown."""

    commands: tuple[str, ...]
    data: str
    render: Callable[[Path], list[str]]
    documents: tuple[str, ...]

    def run(self) -> None:
        """Runs the commands. Those of `inspect_hlo.py` are kept in one file, by command."""
        kept = {}
        for command in self.commands:
            print(command, file=sys.stderr)
            words = [sys.executable, *shlex.split(command)[1:]]
            if "inspect_hlo" not in command:
                subprocess.run(words, cwd=ROOT, check=True)
                continue
            out = ROOT / "benchmarks" / ".report.json"
            subprocess.run([*words, "--json", str(out)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
            report = json.loads(out.read_text())
            out.unlink()
            steps = {name: found["step_s"] for name, found in report["timeline"]["scenarios"].items()}
            memory = report["memory"]
            kept[command] = {"peak_bytes": memory["peak_bytes"], "host_bytes": memory["host_bytes"], "step_s": steps}
        if kept:
            (ROOT / self.data).write_text(json.dumps(kept, indent=1) + "\n")

    def text(self) -> str:
        """The lines of the table."""
        return "\n".join(self.render(ROOT / self.data))

    def replaced_in(self, document: str) -> str:
        """A document with this table in its place."""
        (name,) = (name for name, figure in FIGURES.items() if figure is self)
        place = re.compile(rf"(<!-- figure: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        replaced, number = place.subn(lambda found: found[1] + "\n" + self.text() + "\n\n" + found[2], document)
        if number != 1:
            raise SystemExit(f"figure {name} has {number} places in a document; it needs one")
        return replaced


def table(header: str, rows: list[list[str]]) -> list[str]:
    """Lines of a table in Markdown; `header` has its columns, separated by bars."""
    columns = [column.strip() for column in header.split("|")]
    return [_line(columns), "|" + "---|" * len(columns), *map(_line, rows)]


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def layouts_table(path: Path) -> list[str]:
    """Memory, traffic and step of each row of `compare.py`."""
    rows = [
        [
            f"`{row['layout']}`", f"{row['seq_len'] // 1024} K", str(row["batch"]), f"{row['peak_bytes'] / 1e9:.1f}",
            f"{row['predicted_bytes'] / 1e9:.1f}", row["paper_peak_gb"] or "", f"{row['received_bytes'] / 1e9:.1f}",
            f"{100 * row['exposed_comm_s'] / row['comm_s']:.0f}%", _band(row["scenario_steps_s"], 2),
            f"{row['step_s'] / row['matmul_s']:.2f}", f"{row['largest_seq_len'] // 1024:,} K",
        ]
        for row in json.loads(path.read_text())["rows"]
    ]  # fmt: skip
    header = "layout | tokens | batch | peak GB | formula | paper | received GB | exposed | step s | / products"
    return table(f"{header} | longest that fits", rows)


def short_table(path: Path) -> list[str]:
    """Layouts of one sequence of 128 K tokens, leanest first."""
    rows = [row for row in json.loads(path.read_text())["rows"] if row["seq_len"] == 131072 and row["batch"] == 1]
    rows = sorted((row for row in rows if "(" not in row["layout"]), key=lambda row: row["peak_bytes"])
    cells = [
        [
            f"`{row['layout']}`", f"{row['peak_bytes'] / 1e9:.1f}", row["paper_peak_gb"] or "",
            _band(row["scenario_steps_s"], 1), f"{row['largest_seq_len'] // 1024:,} K",
        ]
        for row in rows
    ]  # fmt: skip
    return table("layout | peak GB | the paper's | step s | longest that fits", cells)


def scenarios_table(path: Path) -> list[str]:
    """Step of one sequence of 16 K tokens in each scenario of the rates, fastest layout first."""
    rows = [row for row in json.loads(path.read_text())["rows"] if row["seq_len"] == 16384 and row["batch"] == 1]
    names = list(rows[0]["scenario_steps_s"])
    rows.sort(key=lambda row: row["step_s"])
    cells = [[f"`{row['layout']}`", *(f"{row['scenario_steps_s'][name]:.3f}" for name in names)] for row in rows]
    return table(" | ".join(["layout", *names]), cells)


def picks_table(path: Path) -> list[str]:
    """What the planner picks, as `plan_table.py` prints it."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import plan_table

    return list(plan_table.markdown(plan_table.read(path)))


def remat_table(path: Path) -> list[str]:
    """Peak and step of each remat policy."""
    rows = []
    for command, found in json.loads(path.read_text()).items():
        remat = command.rpartition(" ")[2]
        rows.append([f"`{remat}`", f"{found['peak_bytes'] / 1e9:.1f}", _band(found["step_s"], 1)])
    return table("`" + INSPECT + " --remat ...` | peak GB | step s", rows)


SINGLE = {
    "llama_7b --target mi300x:8 --seq-len 1048576 --remat full": "7B, 1 M tokens",
    "llama_7b --target mi300x:8 --seq-len 4194304 --remat offload": "7B, 4 M tokens, layer inputs on the host",
    "llama_7b --target h100:8": "7B, 128 K tokens, cuDNN's attention",
    "llama_7b --target v5p:8": "7B, 128 K tokens",
    "llama_7b --target mi300x:64 --mesh data=1,tsp=64": "7B, 128 K tokens on twice as many ranks as heads",
    "llama_7b --target mi300x:1024 --batch 128 --mesh data=128,tsp=8": "7B, 128 K tokens a replica",
    "qwen3_8b --target h100:8 --mesh data=1,tsp=8": "Qwen3-8B, 1 M tokens",
    "llama3_70b --target mi300x:64 --mesh data=8,tsp=8": "70B, 8 x 128 K tokens, weights over data and tsp",
    "llama3_70b --target mi300x:64 --mesh data=8,tsp=8 --layout tsp": "the same with replicas of the weights",
}
"""flags of `inspect_hlo.py` -> what is trained"""


def single_table(path: Path) -> list[str]:
    """Peak, host memory and step of single configurations."""
    rows = []
    for command, found in json.loads(path.read_text()).items():
        flags = command.removeprefix("python scripts/inspect_hlo.py ")
        host = f"{found['host_bytes'] / 1e9:.1f}" if found["host_bytes"] else ""
        rows.append([SINGLE[flags], f"`{flags}`", f"{found['peak_bytes'] / 1e9:.1f}", host, _band(found["step_s"], 1)])
    return table("a training step of | `python scripts/inspect_hlo.py ...` | peak GB | host GB | step s", rows)


def _band(step_s: dict[str, float], digits: int) -> str:
    low, high, typical = min(step_s.values()), max(step_s.values()), step_s["typical rates"]
    return f"{low:.{digits}f} to {high:.{digits}f} ({typical:.{digits}f})"


LAYOUTS = "benchmarks/layouts_mi300x.json"
FIGURES = {
    "layouts": Figure(
        (COMPARE,), LAYOUTS, layouts_table, ("docs/layouts.md", "benchmarks/layouts.md")
    ),
    "layouts-128k": Figure((), LAYOUTS, short_table, ("README.md",)),
    "layouts-16k": Figure((), LAYOUTS, scenarios_table, ("benchmarks/layouts.md",)),
    "single": Figure(
        tuple(f"python scripts/inspect_hlo.py {flags}" for flags in SINGLE),
        "benchmarks/single.json", single_table, ("docs/benchmarks.md",),
    ),
    "plan": Figure(
        tuple(
            f"python benchmarks/plan_table.py benchmarks/plan_cells.jsonl --targets {name}:8 {name}:64"
            for name in ("mi300x", "h100", "v5p")
        ),
        "benchmarks/plan_cells.jsonl", picks_table, ("docs/planning.md",),
    ),
    "remat": Figure(
        tuple(f"{INSPECT} --remat {name}" for name in ("save_attention", "full", "offload_attention")),
        "benchmarks/remat_mi300x.json", remat_table, ("docs/training.md",),
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"all by default: {', '.join(FIGURES)}")
    parser.add_argument("--render", action="store_true", help="run no command")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.names if name not in FIGURES]:
        parser.error(f"figure {unknown[0]} is unknown; use one of {', '.join(FIGURES)}")
    for name in arguments.names or FIGURES:
        figure = FIGURES[name]
        if not arguments.render:
            figure.run()
        for document in figure.documents:
            path = ROOT / document
            path.write_text(figure.replaced_in(path.read_text()))


if __name__ == "__main__":
    main()
