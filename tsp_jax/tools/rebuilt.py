"""Compiles the program nearest to a published run, in a process of its own, and keeps what is compiled in a cache.

A cached program is found by everything that it depends on: target, configuration, published kernel, remat policy, jax,
and the package's sources. So it is also found where its compiler is not installed.
"""

import dataclasses
import gzip
import hashlib
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import jax

import tsp_jax
from tsp_jax.config import Config, Remat
from tsp_jax.errors import ConfigError
from tsp_jax.hardware.targets import cache_folder, parse_target, use_target
from tsp_jax.plan.compile import compile_step
from tsp_jax.tools.priced import priced_kernel
from tsp_jax.tools.published import NotRebuilt, Rebuilt, read_runs, rebuild

_ROOT = Path(tsp_jax.__file__).parent
_NO_EFFECT = (
    "inspect", "cost", "hf", "inference", "plan", "tools", "hardware/rate", "hardware/product", "hardware/links",
)  # fmt: skip
"""parts of the package that a compiled program does not depend on"""
_COMPILERS = {"cuda": "jax-cuda12-pjrt", "rocm": "jax-rocm7-pjrt", "tpu": "libtpu"}


@dataclasses.dataclass(frozen=True)
class CompiledRun:
    """A compiled program and its facts."""

    remat: Remat
    layers: int
    text: str
    """HLO"""
    peak_bytes: int
    compile_s: float
    compiler: str
    """name and version"""


class OutOfMemory(NotRebuilt):
    """The compiler refuses a program that its device cannot hold."""


def compile_run(path: str | Path, rebuilt: Rebuilt, remat: Remat, timeout_s: float, layers: int = 0) -> CompiledRun:
    """The program of a run under a remat policy, from the cache or compiled in a new process.

    `path` is the file that holds the run; `layers` replaces the model's number of layers, unless it is 0.

    Raises:
      OutOfMemory: the compiler says that the device cannot hold the program.
      NotRebuilt: the target's compiler is not installed, or it fails, or takes longer than `timeout_s`.
    """
    config = _config(rebuilt, remat, layers)
    entry = cache_folder() / "published" / _key(rebuilt, config)
    refused = entry.with_suffix(".refused")
    if refused.exists():
        raise OutOfMemory(refused.read_text())
    if not entry.with_suffix(".json").exists():
        entry.parent.mkdir(parents=True, exist_ok=True)
        command = [
            sys.executable,
            "-m",
            "tsp_jax.tools.rebuilt",
            str(path),
            rebuilt.run.id,
            remat,
            str(layers),
            str(entry),
        ]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
        except subprocess.TimeoutExpired:
            raise NotRebuilt(f"not compiled within {timeout_s:g} s; use a longer --timeout") from None
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            why = f"does not compile: {lines[-1].removeprefix('error: '):.300}"
            if "RESOURCE_EXHAUSTED" not in done.stderr:
                raise NotRebuilt(why)
            refused.write_text(why)
            raise OutOfMemory(why)
    facts = json.loads(entry.with_suffix(".json").read_text())
    text = gzip.decompress(entry.with_suffix(".hlo.gz").read_bytes()).decode()
    return CompiledRun(remat, config.model.num_layers, text, **facts)


def _config(rebuilt: Rebuilt, remat: Remat, layers: int) -> Config:
    model = rebuilt.config.model
    model = dataclasses.replace(model, num_layers=layers or model.num_layers)
    return dataclasses.replace(rebuilt.config, remat=remat, model=model)


def _key(rebuilt: Rebuilt, config: Config) -> str:
    facts = [rebuilt.target, repr(config), rebuilt.kernel, str(rebuilt.backward_products), jax.__version__]
    for file in sorted(_ROOT.rglob("*.py")):
        name = file.relative_to(_ROOT).as_posix()
        if not name.startswith(_NO_EFFECT) or name in ("tools/priced.py", "plan/compile.py"):
            facts.append(f"{name} {hashlib.sha256(file.read_bytes()).hexdigest()}")
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:24]


def _compile(rebuilt: Rebuilt, config: Config, entry: Path) -> None:
    target = parse_target(rebuilt.target)
    use_target(target)
    with priced_kernel(rebuilt.kernel, rebuilt.backward_products):
        step = compile_step(config, target)
    name = _COMPILERS.get(target.hardware.platform, "jaxlib")
    facts = {
        "peak_bytes": step.report().peak_bytes, "compile_s": round(step.compile_s, 1),
        "compiler": f"{name} {importlib.metadata.version(name)}",
    }  # fmt: skip
    entry.with_suffix(".hlo.gz").write_bytes(gzip.compress(step.compiled.as_text().encode(), mtime=0))
    entry.with_suffix(".json").write_text(json.dumps(facts) + "\n")  # last: it says that the entry is complete


def main() -> None:
    """The new process: FILE ROW REMAT LAYERS ENTRY."""
    path, name, remat, layers, entry = sys.argv[1:]
    try:
        rebuilt = rebuild(next(run for run in read_runs(path) if run.id == name))
        config = _config(rebuilt, remat, int(layers))  # pyright: ignore[reportArgumentType]
        _compile(rebuilt, config, Path(entry))
    except ConfigError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
