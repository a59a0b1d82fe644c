"""Numbers that are not finite: a step with such a loss or gradient is skipped, and many in a row stop the run."""

import math
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from tsp_jax.errors import BAD_NUMBERS, RunStopped

T = TypeVar("T")

SPIKE_SIGMAS = 6.0
"""a loss this many standard deviations above the mean of earlier losses is reported"""
SPIKE_WINDOW = 100
"""number of earlier losses that a loss is compared with"""


def update_if_finite(loss: jax.Array, grad_norm: jax.Array, new: T, old: T) -> T:
    """Selects the new state if loss and gradient are finite, else the old state.

    Only floating-point arrays are selected; all others (step counts) are always taken from the new state. `grad_norm`
    is finite only if every gradient is. The selection needs no second copy of the state: the result is written into the
    old arrays, which are donated.
    """
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)

    def choose(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(finite, new, old) if jnp.issubdtype(new.dtype, jnp.floating) else new

    return jax.tree.map(choose, new, old)


def is_skipped(line: dict[str, Any]) -> bool:
    """Whether a step, given its line of metrics, was skipped by `update_if_finite`. Null means not finite."""
    return not all(line[name] is not None and math.isfinite(line[name]) for name in ("loss", "grad_norm"))


@jax.jit
def all_finite(state: Any) -> jax.Array:
    """Whether every floating-point number of a state is finite, [] bool."""
    floats = [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in floats]))


class NumbersWatch:
    """Checks the metrics of every step, on the host: reports skipped steps and spikes of the loss, one line each.

    `skip_limit` consecutive skipped steps stop the run. A resumed run continues the counts from `earlier`, its
    metrics lines so far.
    """

    def __init__(self, skip_limit: int, earlier: Iterable[dict], report: Callable[[str], Any]):
        self.skip_limit = skip_limit
        self.consecutive = 0
        self.losses: deque[float] = deque(maxlen=SPIKE_WINDOW)
        self.report = lambda text: None
        for line in earlier:
            self._count(line)
        self.report = report

    def see(self, line: dict) -> None:
        """Checks the metrics of a step; raises RunStopped if too many consecutive steps were skipped."""
        self._count(line)
        if self.consecutive >= self.skip_limit:
            raise RunStopped(
                f"{self.consecutive} steps in a row without finite loss and gradient, the last is step {line['step']}; "
                "their updates were skipped and are in no checkpoint",
                BAD_NUMBERS,
            )

    def _count(self, line: dict) -> None:
        if is_skipped(line):
            self.consecutive += 1
            self.report(
                f"step {line['step']} is skipped: loss {line['loss']}, gradient norm {line['grad_norm']} "
                f"({self.consecutive} in a row)"
            )
            return
        self.consecutive = 0
        losses = self.losses
        if len(losses) == SPIKE_WINDOW and line["loss"] > np.mean(losses) + SPIKE_SIGMAS * np.std(losses):
            self.report(
                f"loss spike at step {line['step']}: {line['loss']:.4f}; the {SPIKE_WINDOW} losses before it are "
                f"{np.mean(losses):.4f} +- {np.std(losses):.4f}"
            )
        losses.append(line["loss"])
