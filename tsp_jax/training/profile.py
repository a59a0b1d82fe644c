"""A trace of some steps by JAX's profiler, for TensorBoard's profile plugin, XProf or Perfetto."""

from collections.abc import Callable
from pathlib import Path

import jax

from tsp_jax.training.distributed import is_writer


class Profile:
    """Traces steps `first` to `last` of a run into a folder; a context manager, which ends a trace that still runs.

    Process 0 writes the trace, which shows its own devices. A trace begins and ends between two steps; the caller waits
    until the device has done the steps before.

    Args:
      steps: (first, last); None: nothing is traced.
      folder: where the profiler writes ``plugins/profile/DATE/HOST.xplane.pb``.
      say: called with one line.
    """

    def __init__(self, steps: tuple[int, int] | None, folder: Path, say: Callable[[str], object]):
        self.first, self.last = steps or (0, 0)
        self.folder, self._say, self._runs = folder, say, False

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_) -> None:
        if self._runs:
            self._stop("the steps before the run ended")

    def is_due(self, done: int) -> bool:
        """Whether the trace begins or ends after `done` steps."""
        return bool(self.last) and done in (self.first - 1, self.last)

    def resume(self, start: int) -> None:
        """Begins with a run that has `start` steps already; a part of the steps may be among them."""
        if self.first <= start < self.last:
            self._say(f"profile: steps up to {start} are done already; steps {start + 1} to {self.last} are traced")
            self._begin()
        elif self.last and start >= self.last:
            self._say(f"profile: steps {self.first} to {self.last} are done already; nothing is traced")
        self.begin(start)

    def begin(self, done: int) -> None:
        """Begins the trace if the next step is the first one."""
        if self.first and done == self.first - 1:
            self._begin()

    def end(self, done: int) -> None:
        """Ends the trace if this was the last step."""
        if self._runs and done == self.last:
            self._stop(f"steps {self.first} to {self.last}")

    def _begin(self) -> None:
        if is_writer():
            jax.profiler.start_trace(self.folder)
            self._runs = True

    def _stop(self, what: str) -> None:
        self._runs = False
        try:
            jax.profiler.stop_trace()
        except Exception as error:  # a full disk; a trace never fails a run
            self._say(f"profile: no trace in {self.folder} ({' '.join(str(error).split()):.200})")
            return
        self._say(f"profile: a trace of {what} is in {self.folder}")
