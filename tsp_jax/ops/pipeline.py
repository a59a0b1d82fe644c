"""A loop whose messages travel while it works: what every streamed op runs on."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Carry = Any


def pipelined(
    turn: Callable[[Carry, Any, Any], tuple[Carry, Any, Any]],
    fetch: Callable[[Carry, Any], Any],
    send: Callable[[Any, Any], Any] | None,
    carry: Carry,
    steps: int,
    *,
    remote: bool,
) -> tuple[Carry, Any, Any]:
    """A loop in which the next turn's message arrives, and what the last turn made leaves, while a turn runs.

    Args:
      turn: (carry, message, index) -> (carry, what leaves, y).
      fetch: (carry, index) -> message of turn `index`; asked for before turn `index` - 1 has changed the carry.
      send: (what leaves, index of the turn that made it) -> what comes of it; None: nothing leaves, and turns return
        () for it.
      carry: initial value.
      steps: number of turns.
      remote: messages go to and come from other ranks; else each is made when it is used, and none is held.

    Returns:
      (carry, what came of sending, ys), the latter two stacked.

    Keeps: two messages, and two of what leaves.
    """
    last = steps - 1
    done = send or (lambda leaving, index: ())

    def local_turn(carry, index):
        carry, leaving, y = turn(carry, fetch(carry, index), index)
        return carry, (done(leaving, index), y)

    def ahead_turn(state, index):
        carry, message, left = state
        ahead = fetch(carry, index + 1)
        home = done(left, index - 1)
        carry, leaving, y = turn(carry, message, index)
        return (carry, ahead, leaving), (home, y)

    if last == 0:
        carry, (home, y) = local_turn(carry, 0)
        return carry, one(home), one(y)
    if not remote:
        carry, (homes, ys) = lax.scan(local_turn, carry, jnp.arange(steps))
        return carry, homes, ys
    message, left, ys = fetch(carry, 0), (), []
    if send:  # the first turn has nothing to send
        ahead = fetch(carry, 1)
        carry, left, y = turn(carry, message, 0)
        message, ys = ahead, [one(y)]
    homes = []
    if (first := len(ys)) < last:
        (carry, message, left), (homes, more) = lax.scan(ahead_turn, (carry, message, left), jnp.arange(first, last))
        homes, ys = [homes], [*ys, more]
    home = done(left, last - 1)
    carry, left, y = turn(carry, message, last)
    homes = [*homes, one(home), one(done(left, last))] if send else homes
    return carry, joined(homes) if send else (), joined([*ys, one(y)])


def one(tree: Any) -> Any:
    """A stack of one."""
    return jax.tree.map(lambda array: array[None], tree)


def joined(stacks: list[Any]) -> Any:
    """Stacks, one after another."""
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *stacks)
