"""The pipelined loop runs its events in the documented order."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import io_callback

from tsp_jax.ops.pipeline import pipelined

NUM_STEPS = (1, 2, 3, 5)


def traced(num_steps: int, *, sends: bool, remote: bool):
    """(events of a pipeline in the order in which they run, carry, received, ys).

    A message holds the index of its step and the carry when it was fetched; a result holds the index of its step.
    """
    log = []

    def note(event: str, *numbers) -> None:
        io_callback(lambda *numbers: log.append((event, *map(int, numbers))), None, *numbers, ordered=True)

    def fetch(carry, index):
        note("fetch", index)
        return jnp.int32(index), carry

    def step(carry, message, index):
        note("step", index)
        return carry + 1, jnp.int32(index) if sends else (), (*message, carry)

    def send(result, index):
        note("send", index)
        return result, jnp.int32(index)

    run = jax.jit(lambda: pipelined(step, fetch, send if sends else None, jnp.int32(0), num_steps, remote=remote))
    carry, received, ys = jax.device_get(run())
    jax.effects_barrier()
    return log, carry, received, ys


def desired_log(num_steps: int, *, sends: bool, overlaps: bool) -> list[tuple[str, int]]:
    """If it overlaps: before step i runs, fetching the message of i + 1 and sending the result of i - 1 have begun."""
    log = [("fetch", 0)] if overlaps else []
    for i in range(num_steps):
        before = [("fetch", i + 1)] * (i + 1 < num_steps) + [("send", i - 1)] * (sends and i > 0)
        after = [("send", i)] * sends
        log += [*before, ("step", i)] if overlaps else [("fetch", i), ("step", i), *after]
    return log + [("send", num_steps - 1)] * (sends and overlaps)


@pytest.mark.parametrize("sends", [False, True], ids=["keeps", "sends"])
@pytest.mark.parametrize("remote", [True, False], ids=["remote", "local"])
@pytest.mark.parametrize("num_steps", NUM_STEPS)
def test_a_step_overlaps_with_the_next_fetch_and_the_previous_send(num_steps, remote, sends):
    overlaps = remote and num_steps > 1
    log, carry, received, (messages, carry_when_fetched, carries) = traced(num_steps, sends=sends, remote=remote)
    assert log == desired_log(num_steps, sends=sends, overlaps=overlaps)
    steps = list(range(num_steps))
    assert carry == num_steps
    assert messages.tolist() == carries.tolist() == steps
    assert carry_when_fetched.tolist() == ([max(0, i - 1) for i in steps] if overlaps else steps)
    assert [array.tolist() for array in received] == ([steps, steps] if sends else [])
