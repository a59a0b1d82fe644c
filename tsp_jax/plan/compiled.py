"""What compiled steps hold and how long they take, as rows that are kept on disk.

Steps are compiled in worker processes (`tsp_jax.plan.worker`), several at a time: a compiler that crashes ends its own
process alone. A row is found again by everything that it depends on: configuration, target with its rates, versions of
JAX and of the compilers, and the sources of this package.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import queue
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from tsp_jax.config import ClusterConfig, Config, DataConfig, FaultsConfig
from tsp_jax.errors import ConfigError
from tsp_jax.files import read_json
from tsp_jax.hardware.targets import Target, cache_folder
from tsp_jax.plan.compile import Step
from tsp_jax.plan.worker import Died, Worker

_PACKAGE = Path(__file__).resolve().parents[1]
_NO_EFFECT = ("hf/", "text/", "tools/", "plan/", "cost/")
"""parts of the package that a row does not depend on"""
USED = ("plan/compile.py", "plan/worker.py", "plan/peak_parts.py", "cost/traffic.py", "cost/flops.py")
"""files in these parts that it does depend on"""
_COMPILERS = ("jax", "jaxlib", "flax", "optax", "jax-rocm7-pjrt", "jax-cuda12-pjrt", "libtpu")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """One compiled step. Bytes and seconds are per device and step; seconds are simulated, at typical rates."""

    peak_bytes: int
    by_kind: dict[str, int]
    """kind of buffer -> bytes at the peak"""
    host_bytes: int
    peak_at: str
    """scope of the instruction that runs at the peak"""
    parts: Mapping[str, Sequence[Any]]
    """of the peak; see `tsp_jax.plan.peak_parts.peak_parts`"""
    step_s: float
    step_low_s: float
    step_high_s: float
    scenario_steps_s: dict[str, float]
    """name in `SCENARIOS` -> step at its rates"""
    compute_s: float
    contention_s: float
    comm_s: float
    exposed_comm_s: float
    exposed_host_s: float
    matmul_s: float
    received_bytes: float
    kernel: str
    compile_s: float


class Refused(NamedTuple):
    """Why a step has no row."""

    why: str


class Job(NamedTuple):
    """A step to compile; see `compile_step`."""

    config: Config
    step: Step = "train"
    chunk: int = 0


Compile = Callable[[Sequence[Job]], "list[Compiled | Refused]"]


class Compilers:
    """Context manager: worker processes that compile for one target.

    Args:
      target: devices to compile for.
      workers: number of processes, each of which compiles one step at a time.
      cache: folder of rows; None: `cache_folder()`.
      progress: called with (job, its row or why there is none, whether it was on disk) as results come.
      timeout_s: seconds after which a compilation is given up.
    """

    def __init__(
        self, target: Target, *, workers: int = 2, cache: Path | None = None,
        progress: Callable[[Job, Compiled | Refused, bool], object] = lambda *_: None, timeout_s: float = 1800.0,
    ):  # fmt: skip
        self.target, self.progress = target, progress
        self.cache = cache_folder() / "plan" if cache is None else cache
        self._idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        self._workers = [Worker(target, timeout_s) for _ in range(workers)]
        self._threads = ThreadPoolExecutor(workers)

    def __enter__(self) -> "Compilers":
        for worker in self._workers:
            self._idle.put(worker)
        return self

    def __exit__(self, *_) -> None:
        for worker in self._workers:  # first, so that no thread waits for a compilation
            worker.close()
        self._threads.shutdown(cancel_futures=True)

    def __call__(self, jobs: Sequence[Job]) -> list[Compiled | Refused]:
        """The row of each job, or why it has none. Jobs that are on disk start no process."""
        return list(self._threads.map(self._row, jobs))

    def _row(self, job: Job) -> Compiled | Refused:
        entry = self._entry(job)
        found = self._read(entry)
        kept = found is not None
        found = found or self._compile(job, entry)
        self.progress(job, found, kept)
        return found

    def _compile(self, job: Job, entry: Path) -> Compiled | Refused:
        worker = self._idle.get()
        try:
            answer = worker.ask(job)
        except Died as error:  # may be the machine's fault: not kept
            return Refused(str(error))
        finally:
            self._idle.put(worker)
        _write(entry, {"target": str(self.target), "mesh": job.config.mesh, **answer})
        return _parse(answer)

    def _entry(self, job: Job) -> Path:
        facts = [_without_effectless(job.config), job.step, job.chunk, self.target, _versions(), _sources()]
        return self.cache / f"{hashlib.sha256(repr(facts).encode()).hexdigest()[:32]}.json"

    @staticmethod
    def _read(entry: Path) -> Compiled | Refused | None:
        if not entry.exists():
            return None
        try:
            return _parse(read_json(entry))
        except (ConfigError, KeyError, TypeError):  # broken, or of another version: compiled again
            return None


def _parse(answer: dict) -> Compiled | Refused:
    return Refused(answer["refused"]) if "refused" in answer else Compiled(**answer["row"])


def _write(entry: Path, content: dict) -> None:
    """Writes a row in one move. A folder that cannot be written only costs time."""
    with contextlib.suppress(OSError):
        entry.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=entry.parent, suffix=".tmp", delete=False) as file:
            json.dump(content, file)
        os.replace(file.name, entry)


def _without_effectless(config: Config) -> Config:
    """The configuration without what no compiled step depends on."""
    return dataclasses.replace(
        config, data=DataConfig(order=config.data.order), faults=FaultsConfig(), cluster=ClusterConfig(), cpu_devices=0,
        init_from="", from_scratch=False, seed=0, workdir="unused", checkpoint_every=0, keep_checkpoints=1,
        keep_every=0, eval_every=0, eval_batches=1, log="", profile="", plan="",
    )  # fmt: skip


def _versions() -> list[str]:
    found = []
    for name in _COMPILERS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    return found


@functools.cache
def _sources() -> str:
    digest = hashlib.sha256()
    for file in sorted(_PACKAGE.rglob("*.py")):
        name = file.relative_to(_PACKAGE).as_posix()
        if not name.startswith(_NO_EFFECT) or name in USED:
            digest.update(f"{name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()
