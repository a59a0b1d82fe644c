"""The pictures of a run: its losses by step, and its held-out perplexity by position in the context."""

import io
import math
from pathlib import Path
from typing import Any

import numpy as np

from tsp_jax.training.distributed import write_atomically
from tsp_jax.training.evaluation import BY_POSITION


def plot_losses(metrics: list[dict], path: Path) -> bool:
    """Plots training loss, its running mean and held-out loss by step; returns False if matplotlib is missing."""
    pyplot = _pyplot()
    if pyplot is None:
        return False
    train, held_out = (
        np.array([(line["step"], line[name]) for line in metrics if line.get(name) is not None], np.float64)
        for name in ("loss", "eval_loss")
    )
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    if len(train):
        axes.plot(*train.T, color="tab:blue", alpha=0.35, linewidth=1, label="training")
        window = max(1, len(train) // 30)
        smooth = np.convolve(train[:, 1], np.ones(window) / window, mode="valid")
        axes.plot(train[window - 1 :, 0], smooth, color="tab:blue", label=f"mean of {window} steps")
    if len(held_out):
        axes.plot(*held_out.T, "o-", color="tab:orange", markersize=4, label="held out")
    axes.set(xlabel="step", ylabel="loss (nats/token)")
    axes.grid(alpha=0.3)
    if len(train) or len(held_out):
        axes.legend()
    _save(pyplot, figure, path)
    return True


def plot_positions(metrics: list[dict], path: Path) -> bool:
    """Plots the perplexity of each held-out set by the number of tokens in the context, of the last evaluation.

    The first evaluation is drawn faintly. Draws nothing if there is none; returns False if matplotlib is missing.
    """
    evaluations = [line for line in metrics if _curves(line)]
    if not evaluations:
        return True
    pyplot = _pyplot()
    if pyplot is None:
        return False
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for number, (name, curve) in enumerate(_curves(evaluations[-1]).items()):
        color = f"C{number}"
        axes.plot(
            *zip(*curve, strict=True), "o-", color=color, markersize=3, label=f"{name}, step {evaluations[-1]['step']}"
        )
        if (before := _curves(evaluations[0]).get(name)) and len(evaluations) > 1:
            label = f"{name}, step {evaluations[0]['step']}"
            axes.plot(*zip(*before, strict=True), "-", color=color, alpha=0.35, linewidth=1, label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set(xlabel="tokens in the context", ylabel="perplexity of the next token")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    _save(pyplot, figure, path)
    return True


def _curves(line: dict) -> dict[str, list[tuple[int, float]]]:
    """Set -> (tokens in the context, perplexity) of an evaluation's line; a line that a person has changed has none."""
    sets = line.get(BY_POSITION)
    if not isinstance(sets, dict):
        return {}
    curves = {
        str(name): [
            (int(first), math.exp(min(nll, 700.0)))
            for first, nll in by_position.items()
            if isinstance(nll, float) and first.isdecimal()
        ]
        for name, by_position in sets.items()
        if isinstance(by_position, dict)
    }
    return {name: curve for name, curve in curves.items() if curve}


def _pyplot() -> Any:
    """matplotlib's pyplot without a display; None if it is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(pyplot: Any, figure: Any, path: Path) -> None:
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120)
    pyplot.close(figure)
    write_atomically(path, picture.getvalue())
