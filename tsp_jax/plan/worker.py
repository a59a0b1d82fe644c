"""A process that compiles steps for one target: the parent's side, and its own.

The parent writes pickled requests to the process's standard input, and reads a line of JSON for each from its standard
output. Compilers print to both streams as they like; their words go to a file, whose last line says why they died.
"""

import contextlib
import dataclasses
import json
import os
import pickle
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from tsp_jax.errors import ConfigError
from tsp_jax.hardware.targets import Target, use_target
from tsp_jax.plan.compile import CompiledStep, compile_step
from tsp_jax.plan.peak_parts import peak_parts

_ROOT = Path(__file__).resolve().parents[2]
_MODULE = "tsp_jax.plan.worker"
_LONGEST = 300
"""characters of a compiler's message that are kept"""


class Died(Exception):
    """The process ended, or took too long."""


class Worker:
    """The parent's side of a process, which starts with the first request, and again after it died.

    Args:
      target: devices to compile for.
      timeout_s: seconds after which a compilation is given up.
    """

    def __init__(self, target: Target, timeout_s: float):
        self.target, self.timeout_s = target, timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._words: Any = None
        self._closed = False

    def ask(self, job: tuple[Any, ...]) -> dict[str, Any]:
        """Compiles ``(config, step, chunk)``: {"row": ...}, or {"refused": why} if the compiler or a check refuses it.

        Raises:
          Died: the process ended, or took too long.
        """
        if self._process is None:
            self._start()
        process = self._process
        assert process and process.stdin and process.stdout
        late = threading.Timer(self.timeout_s, process.kill)
        late.start()
        try:
            pickle.dump(tuple(job), process.stdin)
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError:  # it died before it had read the request
            line = b""
        finally:
            in_time = late.is_alive()
            late.cancel()
        if line.endswith(b"\n"):
            return json.loads(line)
        why = self._end() if in_time else f"not compiled within {self.timeout_s:g} s"
        self.close(again=True)
        raise Died(why)

    def close(self, again: bool = False) -> None:
        """Ends the process. `again`: the next request starts another one."""
        self._closed = self._closed or not again
        process, self._process = self._process, None
        if process and process.stdin and process.stdout:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout, self._words):
                with contextlib.suppress(OSError):  # what it did not read is lost
                    stream.close()

    def _start(self) -> None:
        if self._closed:
            raise Died("stopped")
        self._words = tempfile.TemporaryFile()  # noqa: SIM115, it lives as long as the process
        path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
        # A compiler for devices that are present must not take their memory.
        environment = os.environ | {"PYTHONPATH": path, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", _MODULE], env=environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._words,
        )  # fmt: skip
        assert self._process.stdin
        pickle.dump(self.target, self._process.stdin)

    def _end(self) -> str:
        """How the process ended, and its last words."""
        assert self._process
        code = self._process.wait()
        self._words.seek(0)
        words = self._words.read().decode(errors="replace").strip().splitlines()
        how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return f"the compiler's process {how}" + (f": {words[-1]:.{_LONGEST}}" if words else "")


def row_of(step: CompiledStep) -> dict[str, Any]:
    """The fields of `tsp_jax.plan.compiled.Compiled`."""
    found = step.report()
    times = found.timeline
    assert times is not None
    names = ("step_s", "compute_s", "contention_s", "comm_s", "exposed_comm_s", "exposed_host_s", "matmul_s")
    return {
        "peak_bytes": int(found.peak_bytes), "by_kind": dict(found.peak.by_kind), "host_bytes": found.peak.host_bytes,
        "peak_at": found.peak.at, "parts": peak_parts(found.peak, step.config),
        **{name: getattr(times, name) for name in names},
        "step_low_s": times.band().low, "step_high_s": times.band().high,
        "scenario_steps_s": {name: scenario.step_s for name, scenario in times.scenarios.items()},
        "received_bytes": sum(c.total_bytes for c in found.collectives),
        "kernel": step.kernel, "compile_s": round(step.compile_s, 1),
    }  # fmt: skip


def compile_row(job: tuple[Any, ...], target: Target) -> dict[str, Any]:
    config, step, chunk = job
    config = dataclasses.replace(config, cpu_devices=0)
    try:
        return {"row": row_of(compile_step(config, target, step, chunk))}
    except ConfigError as error:
        return {"refused": str(error)}
    except Exception as error:  # compilers refuse programs in many ways
        lines = str(error).splitlines() or [type(error).__name__]
        return {"refused": f"does not compile: {lines[0]:.{_LONGEST}}"}


def main() -> None:
    """The process: a target, then jobs, from standard input; a line of JSON for each to standard output."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what compilers print
    requests = sys.stdin.buffer
    target = pickle.load(requests)
    use_target(target)
    while True:
        try:
            job = pickle.load(requests)
        except EOFError:
            return
        answers.write(json.dumps(compile_row(job, target)).encode() + b"\n")
        answers.flush()


if __name__ == "__main__":
    main()
