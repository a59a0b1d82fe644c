"""Numbers that are not finite, or not plausible: a step that has them changes nothing, many of them stop the run."""

import math
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from tsp_jax.config import FaultsConfig
from tsp_jax.errors import BAD_NUMBERS, RunStopped

T = TypeVar("T")


def update_if_finite(loss: jax.Array, grad_norm: jax.Array, new: T, old: T) -> T:
    """`new` where loss and gradient are finite, else `old`; integers (counts of steps) are always those of `new`.

    The norm is finite only if every gradient is. A choice between old and new of one array costs no second copy: the
    result takes the place of the old one, which the step donates.
    """
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)

    def choose(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(finite, new, old) if jnp.issubdtype(new.dtype, jnp.floating) else new

    return jax.tree.map(choose, new, old)


def is_skipped(line: dict[str, Any]) -> bool:
    """Whether `update_if_finite` kept the old state in a step, from its line of metrics (null is not finite)."""
    return not all(line[name] is not None and math.isfinite(line[name]) for name in ("loss", "grad_norm"))


@jax.jit
def all_finite(state: Any) -> jax.Array:
    """[] bool: whether every floating-point number of a state is finite."""
    floats = [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in floats]))


class NumbersWatch:
    """Looks at every step's numbers, on the host.

    Args:
      faults: what is too much.
      earlier: lines of metrics before the first step that it will see, so that a resumed run goes on counting.
      report: told, in a line, of each skipped step and each spike.
    """

    def __init__(self, faults: FaultsConfig, earlier: Iterable[dict], report: Callable[[str], Any]):
        self.faults = faults
        self.in_a_row = 0
        self.losses: deque[float] = deque(maxlen=faults.spike_window)
        self.report = lambda text: None
        for line in earlier:
            self._count(line)
        self.report = report

    def see(self, line: dict) -> None:
        """The numbers of a step.

        Raises:
          RunStopped: too many steps in a row were skipped; or a spike, if `faults.spike` is "stop".
        """
        spike = self._count(line)
        if self.in_a_row >= self.faults.skip_limit:
            raise RunStopped(
                f"{self.in_a_row} steps in a row without finite loss and gradient, the last is step {line['step']}; "
                "their updates were skipped and no checkpoint has them",
                BAD_NUMBERS,
            )
        if spike and self.faults.spike == "stop":
            raise RunStopped(f"{spike}; the newest checkpoint is from before it", BAD_NUMBERS)

    def _count(self, line: dict) -> str:
        """Takes a line in; returns what to say of a spike, else ""."""
        if is_skipped(line):
            self.in_a_row += 1
            self.report(
                f"step {line['step']} is skipped: loss {line['loss']}, gradient norm {line['grad_norm']} "
                f"({self.in_a_row} in a row)"
            )
            return ""
        self.in_a_row = 0
        spike = self._spike(line) if self.faults.spike != "ignore" else ""
        self.losses.append(line["loss"])
        if spike:
            self.report(spike)
        return spike

    def _spike(self, line: dict) -> str:
        if len(self.losses) < self.faults.spike_window:
            return ""
        mean, deviation = np.mean(self.losses), np.std(self.losses)
        if not line["loss"] > mean + self.faults.spike_sigmas * deviation:
            return ""
        return (
            f"step {line['step']} has a spike: loss {line['loss']:.4f}, where the {len(self.losses)} before have "
            f"{mean:.4f} +- {deviation:.4f}"
        )
