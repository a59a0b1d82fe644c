"""What tests of whole runs share: a small configuration on its own text, and the training script as a process."""

import dataclasses
import functools
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import numpy as np

from tsp_jax.config import Config, DataConfig, FaultsConfig, ModelConfig, OptimizerConfig
from tsp_jax.training.metrics import read_metrics

ROOT = Path(__file__).parents[2]
WORDS = ["def", "return", "import", "self", "value", "for", "in", "range", "yield", "lambda", "class"]


def write_text(folder: Path) -> str:
    """Writes 60 small documents; returns a glob of them."""
    rng = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    for number in range(60):
        (folder / f"{number:02}.txt").write_text(" ".join(rng.choice(WORDS, 60)))
    return str(folder / "*.txt")


def small_config(folder: Path, **changes) -> Config:
    """A run of twenty steps on one device, with everything it needs and writes in a folder."""
    config = Config(
        model=ModelConfig(vocab_size=264, d_model=24, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=48),
        data=DataConfig(files=write_text(folder / "text"), cache_dir=str(folder / "cache"), tokenizer="bytes"),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=3),
        layout="single",
        mesh="data=1",
        steps=20,
        batch=4,
        seq_len=96,
        compute_dtype="float32",
        remat="none",
        eval_batches=1,
        workdir=str(folder / "run"),
    )
    return dataclasses.replace(config, **changes)


def write_config(config: Config, path: Path, patch: str = "") -> Path:
    """Writes a configuration file for the scripts; `patch` is Python that is run before it."""
    names = [type(value).__name__ for value in _parts(config)]
    path.write_text(f"from tsp_jax.config import {', '.join(sorted(set(names)))}\n{patch}\nconfig = {config!r}\n")
    return path


def _parts(config: object) -> list[object]:
    inner = [getattr(config, field.name) for field in dataclasses.fields(config)]  # pyright: ignore
    return [config, *(part for value in inner if dataclasses.is_dataclass(value) for part in _parts(value))]


class _Compiled:
    """A jitted step that compiles once for each shape of batch, however often it is asked to."""

    def __init__(self, step):
        self._step, self._lowered = step, {}

    def lower(self, state, batch):
        shape = batch.tokens.shape
        if shape not in self._lowered:
            self._lowered[shape] = _Lowered(self._step.lower(state, batch))
        return self._lowered[shape]


class _Lowered:
    def __init__(self, lowered):
        self._lowered = lowered

    @functools.cached_property
    def _compiled(self):
        return self._lowered.compile()

    def compile(self, options=None):
        return self._compiled


def compile_once(make):
    """`make_program`, whose programs of like configurations are compiled once for all the runs of a test file."""
    programs = {}

    def make_or_find(config: Config, placement, optimizer=None):
        neutral = {"workdir": "w", "checkpoint_every": 0, "keep_checkpoints": 1, "keep_every": 0, "eval_every": 0}
        other = {"faults": FaultsConfig(), "data": DataConfig()}
        key = repr(dataclasses.replace(config, **neutral, **other)), repr(placement), optimizer
        if key not in programs:
            program = make(config, placement, optimizer)
            programs[key] = dataclasses.replace(program, step=_Compiled(program.step))
        return programs[key]

    return make_or_find


def start_train(path: Path, *flags: str, stderr: int | IO[str] = subprocess.PIPE) -> subprocess.Popen:
    """The training script on a configuration file, as a process."""
    env = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "PYTHONUNBUFFERED": "1",
    }
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), str(path), *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=env)


def start_processes(count: int, path: Path, *flags: str) -> list[subprocess.Popen]:
    """The training script as several processes of one run; their stderr goes to ``RANK.err`` beside the file."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        cluster = ["--cluster.launcher=explicit", f"--cluster.coordinator=localhost:{free.getsockname()[1]}"]
    cluster.append(f"--cluster.num-processes={count}")
    processes = []
    for rank in range(count):
        with (path.parent / f"{rank}.err").open("w") as stderr:
            processes.append(start_train(path, *flags, *cluster, f"--cluster.process-id={rank}", stderr=stderr))
    return processes


def finish(processes: list[subprocess.Popen], timeout_s: float) -> list[int]:
    """Exit codes of all processes, of which none may take longer than the timeout; none is left behind."""
    deadline = time.monotonic() + timeout_s
    try:
        for process in processes:
            process.communicate(timeout=max(0.1, deadline - time.monotonic()))
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    return [process.returncode for process in processes]


def numbers(workdir: Path) -> list[dict]:
    """Lines of metrics without what differs from run to run."""
    speed = ("tokens_per_s", "tflops_per_device", "mfu")
    return [{k: v for k, v in line.items() if k not in speed} for line in read_metrics(workdir / "metrics.jsonl")]
