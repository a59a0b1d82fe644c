"""What a whole run comes to."""

import math
from typing import Any

import numpy as np

from tsp_jax.config import Config
from tsp_jax.inspect import compiled_memory, list_collectives, parse
from tsp_jax.layout import Placement
from tsp_jax.training.safety.finite import is_skipped


def summarise(config: Config, name: str, placement: Placement, compiled: Any, lines: list[dict]) -> dict:
    """Last losses, median speed, and what the compiled step holds and moves per device."""
    steps = [line for line in lines if "loss" in line]
    moved = list_collectives(parse(compiled.as_text()), dict(placement.mesh.shape))
    return {
        "config": name,
        "layout": placement.layout.name,
        "mesh": ",".join(f"{axis}={size}" for axis, size in placement.mesh.shape.items()),
        "step": steps[-1]["step"],
        "loss": next((line["loss"] for line in reversed(steps) if not is_skipped(line)), math.nan),
        "eval_loss": next(line["eval_loss"] for line in reversed(lines) if "eval_loss" in line),
        "skipped_steps": sum(map(is_skipped, steps)),
        "tokens_per_s": float(np.median([line["tokens_per_s"] for line in steps])),
        "peak_bytes": compiled_memory(compiled).peak_bytes,
        "bytes_per_step": int(sum(c.total_bytes for c in moved)),
        "num_params": config.model.num_params,
    }
