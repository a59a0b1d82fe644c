"""When devices are done, as a host sees it that does not wait for them."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import jax


def when_done(arrays: Any) -> Callable[[], float]:
    """Returns a function that waits until a pytree of arrays is computed, and returns the `time.perf_counter` of then.

    Call it as soon as the arrays' program is dispatched. The time is right also where dispatching the next program
    holds up the host: XLA returns late from dispatching a program whose loops read their condition from a GPU. An error
    of the program is raised.
    """
    done: Future[float] = Future()

    def wait() -> None:
        try:
            jax.block_until_ready(arrays)
            done.set_result(time.perf_counter())
        except BaseException as error:
            done.set_exception(error)

    # A daemon: a device that never answers must not keep a process from ending.
    threading.Thread(target=wait, name="when_done", daemon=True).start()
    return done.result
