"""Held-out losses of several runs, as a table and as a chart.

python benchmarks/compare_runs.py runs/mixture runs/dense --png runs.png
"""

import argparse
import json
from pathlib import Path


def held_out(run: Path) -> dict[int, float]:
    """step -> held-out loss of a run's metrics."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["eval_loss"] for line in lines if line.get("eval_loss") is not None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--png", type=Path)
    arguments = parser.parse_args()
    found = {run.name: held_out(run) for run in arguments.runs}
    steps = sorted(set.intersection(*(set(losses) for losses in found.values())))
    print(f"| step | {' | '.join(found)} |\n|{'---|' * (1 + len(found))}")
    for step in steps:
        print(f"| {step} | {' | '.join(f'{losses[step]:.4f}' for losses in found.values())} |")
    if arguments.png:
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
        for name, losses in found.items():
            axes.plot(list(losses), list(losses.values()), marker="o", markersize=3, label=name)
        axes.set(xlabel="step", ylabel="held-out loss, nats per byte")
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(arguments.png, dpi=130)


if __name__ == "__main__":
    main()
