"""A software-pipelined loop that overlaps communication with computation. Every streamed op runs on it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Carry = Any


def pipelined(
    step: Callable[[Carry, Any, Any], tuple[Carry, Any, Any]], fetch: Callable[[Carry, Any], Any],
    send: Callable[[Any, Any], Any] | None, carry: Carry, num_steps: int, *, remote: bool,
) -> tuple[Carry, Any, Any]:  # fmt: skip
    """A loop in which step i overlaps with fetching the message of step i + 1 and sending the result of step i - 1.

    Args:
      step: (carry, message, index) -> (carry, result to send, y).
      fetch: (carry, index) -> message of step `index`. It is called before step `index` - 1 changes the carry.
      send: (result, index of its step) -> what this device receives for it; None: nothing is sent, and steps return ()
        as the result.
      carry: initial value.
      num_steps: number of steps.
      remote: `fetch` and `send` communicate. If False, each step fetches its own message just before it runs, and no
        message is buffered.

    Returns:
      (carry, received, ys): what `send` returned and the ys, each stacked over steps.

    Keeps: two messages and two results at a time.
    """
    last = num_steps - 1
    receive = send or (lambda result, index: ())

    def local_step(carry, index):
        carry, result, y = step(carry, fetch(carry, index), index)
        return carry, (receive(result, index), y)

    def overlapped_step(state, index):
        carry, message, previous = state
        following = fetch(carry, index + 1)
        received = receive(previous, index - 1)
        carry, result, y = step(carry, message, index)
        return (carry, following, result), (received, y)

    if last == 0:
        carry, (received, y) = local_step(carry, 0)
        return carry, stack_of_one(received), stack_of_one(y)
    if not remote:
        carry, (received, ys) = lax.scan(local_step, carry, jnp.arange(num_steps))
        return carry, received, ys
    message, result, ys = fetch(carry, 0), (), []
    if send:  # step 0 has no previous result to send
        following = fetch(carry, 1)
        carry, result, y = step(carry, message, 0)
        message, ys = following, [stack_of_one(y)]
    received = []
    if (first := len(ys)) < last:
        state = carry, message, result
        (carry, message, result), (received_in_loop, more) = lax.scan(overlapped_step, state, jnp.arange(first, last))
        received, ys = [received_in_loop], [*ys, more]
    next_to_last = receive(result, last - 1)
    carry, result, y = step(carry, message, last)
    if send:
        received = [*received, stack_of_one(next_to_last), stack_of_one(receive(result, last))]
    return carry, concatenated(received) if send else (), concatenated([*ys, stack_of_one(y)])


def stack_of_one(tree: Any) -> Any:
    """Each array [...] -> [1, ...]."""
    return jax.tree.map(lambda array: array[None], tree)


def concatenated(stacks: list[Any]) -> Any:
    """Trees of stacks [n, ...], concatenated along n."""
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *stacks)
