"""The loop over the layers of a decoder, whose kinds repeat after a period of layers.

A period of layers is unrolled in the body of one loop, so that what depends on a layer's kind is static. Layers after
the last whole period follow the loop, or come before it if it runs in reverse.

Dims: L layers, P layers of a period, G periods.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Place(NamedTuple):
    """Where a layer is."""

    number: int
    """number of the layer in its period; static"""
    layer: jax.Array
    """number of the layer in the decoder, [] int32"""
    looped: bool
    """whether the layer is in the loop; static"""
    period: int
    """P"""

    @property
    def before(self) -> "Place":
        """The place of the layer before this one; of any layer if this is the first."""
        looped, number = self.looped or self.number == 0, (self.number - 1) % self.period
        return self._replace(number=number, layer=jnp.maximum(self.layer - 1, 0), looped=looped)


class Stacks(NamedTuple):
    """An output of every layer."""

    looped: tuple[Any, ...]
    """for each layer of a period, the outputs of all periods, [G, ...]"""
    after: tuple[Any, ...]
    """for each layer after the last whole period, its output"""

    def map(self, part: Callable[[Any], Any]) -> "Stacks":
        """The stacks of a part of each output."""
        return Stacks(tuple(map(part, self.looped)), tuple(map(part, self.after)))

    def read(self, place: Place) -> Any:
        """The output of one layer."""
        if not place.looped:
            return self.after[place.number]
        index = place.layer if place.period == 1 else place.layer // place.period
        return jax.tree.map(
            lambda stack: lax.dynamic_index_in_dim(stack, index, keepdims=False), self.looped[place.number]
        )

    def joined(self) -> Any:
        """The outputs of all layers, [L, ...]; a copy, unless P is 1."""
        if len(self.looped) == 1:
            return self.looped[0]

        def join(*arrays: jax.Array) -> jax.Array:
            looped = jnp.stack(arrays[: len(self.looped)], axis=1)
            after = [array[None] for array in arrays[len(self.looped) :]]
            return jnp.concatenate([looped.reshape(-1, *looped.shape[2:]), *after])

        return jax.tree.map(join, *self.looped, *self.after)


Step = Callable[[Place, Any, Any, Any], tuple[Any, Any]]
"""(place, carry, arrays of one layer, xs of one layer) -> (carry, output)"""


def last_place(num_layers: int, period: int) -> Place:
    """The place of the last layer."""
    rest = num_layers % period
    return Place((rest or period) - 1, jnp.int32(num_layers - 1), looped=rest == 0, period=period)


def scan_layers(
    step: Step, carry: Any, arrays: Any, *, period: int = 1, xs: Any = None, reverse: bool = False
) -> tuple[Any, Stacks]:  # fmt: skip
    """Runs `step` on every layer in sequence, as `lax.scan` does.

    Args:
      step: see `Step`.
      carry: its first value.
      arrays: arrays [L, ...] that get no gradients. They are read where they are, so that the layers after the last
        whole period cost no copy.
      period: P, at most L.
      xs: arrays [L, ...] that may get gradients.
      reverse: from the last layer to the first.

    Returns:
      (the last carry, the outputs).
    """
    num_layers = jax.tree.leaves(arrays)[0].shape[0]
    periods, rest = divmod(num_layers, period)

    def run(carry: Any, number: int, index: jax.Array, looped: bool, x: Any) -> tuple[Any, Any]:
        layer = jax.tree.map(lambda array: lax.dynamic_index_in_dim(array, index, keepdims=False), arrays)
        return step(Place(number, index, looped, period), carry, layer, x)

    def run_some(carry: Any, size: int, first: jax.Array, looped: bool, xs: Any) -> tuple[Any, tuple]:
        """Layers `first` to `first + size`, unrolled; `xs` [size, ...]."""
        outputs = [None] * size
        for number in reversed(range(size)) if reverse else range(size):
            x = jax.tree.map(lambda array, number=number: array[number], xs)
            carry, outputs[number] = run(carry, number, first + number, looped, x)
        return carry, tuple(outputs)

    def run_loop(carry: Any) -> tuple[Any, tuple]:
        if period == 1:
            scanned = jnp.arange(num_layers, dtype=jnp.int32), arrays, xs
            carry, outputs = lax.scan(
                lambda carry, each: step(Place(0, each[0], True, 1), carry, *each[1:]), carry, scanned, reverse=reverse
            )
            return carry, (outputs,)
        by_period = jax.tree.map(lambda x: x[: num_layers - rest].reshape(periods, period, *x.shape[1:]), xs)
        scanned = period * jnp.arange(periods, dtype=jnp.int32), by_period
        return lax.scan(
            lambda carry, each: run_some(carry, period, each[0], True, each[1]), carry, scanned, reverse=reverse
        )

    def run_rest(carry: Any) -> tuple[Any, tuple]:
        first = num_layers - rest
        return run_some(carry, rest, jnp.int32(first), False, jax.tree.map(lambda x: x[first:], xs))

    if reverse:
        carry, after = run_rest(carry)
        carry, looped = run_loop(carry)
    else:
        carry, looped = run_loop(carry)
        carry, after = run_rest(carry)
    return carry, Stacks(looped, after)
