"""SIGTERM and SIGINT: the run saves and exits, at most one step later; a second signal exits at once."""

import contextlib
import os
import signal
import socket
import sys
import threading
from concurrent.futures import Future

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tsp_jax.errors import PREEMPTED

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """Context manager that catches SIGTERM and SIGINT.

    A thread reads the signals from the pipe that Python's C handler writes to, because a Python handler has to wait for
    the main thread, which may be compiling for minutes. Outside the main thread, this context manager catches nothing.
    """

    def __init__(self):
        self.requested: Future[int] = Future()
        """done after a signal; can be waited for together with other futures"""
        self._noticed = self._protected = False
        self._lock = threading.Lock()
        self._exits = contextlib.ExitStack()

    def __enter__(self):
        if threading.current_thread() is not threading.main_thread():
            return self
        reader, pipe = socket.socketpair()
        pipe.setblocking(False)
        thread = threading.Thread(target=self._read, args=(reader,), name="tsp_signals", daemon=True)
        thread.start()
        # runs last, when nothing writes to the pipe
        self._exits.callback(lambda: (pipe.close(), thread.join(), reader.close()))
        before = signal.set_wakeup_fd(pipe.fileno(), warn_on_full_buffer=False)
        self._exits.callback(signal.set_wakeup_fd, before)
        for number in SIGNALS:
            self._exits.callback(signal.signal, number, signal.signal(number, self._notice))
        return self

    def __exit__(self, *_):
        self._exits.close()

    @property
    def asked(self) -> bool:
        """Whether a signal was received."""
        return self._noticed or self.requested.done()

    def protect(self) -> None:
        """From this call on, a signal is a request to save and exit.

        Before this call, a signal ends the process at once, since there is nothing to save.
        """
        with self._lock:
            self._protected = True

    def _notice(self, *_) -> None:
        self._noticed = True  # the main thread need not wait until the other thread runs

    def _read(self, reader: socket.socket) -> None:
        while received := reader.recv(1):
            number = received[0]
            if number not in SIGNALS:
                continue
            name = signal.Signals(number).name
            with self._lock:
                if not self._protected:
                    _leave(f"{name} before the first step: nothing to save", PREEMPTED)
                if self.requested.done():
                    _leave(f"second signal ({name}): exited at once, without saving", 128 + number)
                print(f"{name}: saving, then exiting; a second signal exits at once", file=sys.stderr, flush=True)
                self.requested.set_result(number)


class Agreement:
    """Tells all processes at the same step whether any of them was asked to stop.

    With several processes, each step starts a reduction: the maximum of one integer per device. The result is read one
    step later, so that no step waits for it.
    """

    def __init__(self, signals: StopSignals):
        self.signals = signals
        self._asked: jax.Array | None = None
        if jax.process_count() > 1:
            mesh = jax.make_mesh((jax.device_count(),), ("all",), axis_types=(AxisType.Auto,), devices=jax.devices())
            self._each = NamedSharding(mesh, PartitionSpec("all"))
            self._any = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def __call__(self) -> bool:
        """Returns whether to stop; call it once after each step."""
        asked = self.signals.asked
        if jax.process_count() == 1:
            return asked
        flags = jax.make_array_from_callback((jax.device_count(),), self._each, lambda _: np.full(1, asked, np.int32))
        before, self._asked = self._asked, self._any(flags)
        return before is not None and bool(before)


def _leave(message: str, code: int) -> None:
    print(f"stopped: {message}", file=sys.stderr, flush=True)
    os._exit(code)
