"""What ``--plan`` chooses for the devices that a command finds, and what a run has chosen before."""

import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from tsp_jax.config import Config, DType, ModelConfig
from tsp_jax.errors import ConfigError
from tsp_jax.hardware.devices import HARDWARE, data_sheet
from tsp_jax.hardware.memory import memory_bytes
from tsp_jax.hardware.targets import Target
from tsp_jax.layout import get_layout, parse_mesh
from tsp_jax.plan.choose import Plan, choose
from tsp_jax.plan.compiled import Compiled, Job, Refused
from tsp_jax.plan.search import Minimise
from tsp_jax.plan.serving import Serving, choose_serving
from tsp_jax.plan.space import FIELDS, Choice
from tsp_jax.plan.worker import compile_row
from tsp_jax.training.optimizer import Optimizer
from tsp_jax.training.saved_run import is_run, read_run

MINIMISE: dict[str, Minimise] = {"fastest": "time", "leanest": "memory"}
SECONDS = 270.0
"""seconds after which no further steps are compiled for a target that need not be present"""
COMPILATIONS = 4
"""most steps that training compiles to choose; a run of several processes compiles none"""


def plan_training(
    config: Config, name: str, optimizer: Optimizer = None, say: Callable[[str], object] = print
) -> Config:
    """Returns the configuration with what `config.plan` chooses for the devices of this run; unchanged without a plan.

    Fields that flags set stay. A run that is resumed keeps its choice as long as model, tokens and number of devices
    are the same. A run of one process compiles its finalists; several processes choose by closed forms alone, so that
    all of them choose alike.

    Args:
      config: with `plan`.
      name: of the configuration, for messages.
      optimizer: the user's own; refused, since its memory is not known.
      say: called with one line about the choice.

    Raises:
      ConfigError: the rates of the devices are not known, or nothing fits them.
    """
    if not config.plan:
        return config
    fixed, target = fixed_fields(sys.argv[1:]), present_target()
    if recorded := _recorded(config, target.num_devices):
        kept = {k: v for k, v in dataclasses.asdict(Choice.of(recorded)).items() if FIELDS[k] not in fixed}
        choice = dataclasses.replace(Choice.of(config), **kept)
        say(f"plan={config.plan}: {choice.text()}, as the run in {config.workdir} has chosen before")
        return choice.apply(config)
    found = choose(
        config, target, fixed=fixed, minimise=MINIMISE[config.plan], name=name, optimizer=optimizer,
        compilations=COMPILATIONS if jax.process_count() == 1 else 0, compile=lambda jobs: _compile_here(jobs, target),
    )  # fmt: skip
    say(describe(config, found))
    return found.chosen.choice.apply(config)


def plan_for(
    config: Config, target: Target, name: str, optimizer: Optimizer = None,
    progress: Callable[[str], object] = lambda _: None, say: Callable[[str], object] = print,
) -> Config:  # fmt: skip
    """As `plan_training`, for devices that need not be present: finalists are compiled as tsp-plan compiles them."""
    if not config.plan:
        return config
    found = choose(
        config, target, fixed=fixed_fields(sys.argv[1:]), minimise=MINIMISE[config.plan], name=name,
        optimizer=optimizer, seconds=SECONDS, progress=progress,
    )  # fmt: skip
    say(describe(config, found))
    return found.chosen.choice.apply(config)


def plan_serving(
    model: ModelConfig, dtype: DType, *, capacity: int, new_tokens: int, layout: str, mesh: str
) -> Serving:
    """Returns the fastest way to serve one sequence on the devices of this process, by closed forms.

    Args:
      model: sizes.
      dtype: of weights, activations and cache.
      capacity: tokens of the sequence, prompt and new ones.
      new_tokens: tokens to generate.
      layout, mesh: what is given; what a flag sets stays.

    Raises:
      ConfigError: the rates of the devices are not known, or nothing fits them.
    """
    target, fixed = present_target(), fixed_fields(sys.argv[1:]) & {"layout", "mesh"}
    context = -(-capacity // 2048) * 2048 if capacity > 1024 else max(1 << (capacity - 1).bit_length(), 512)
    return choose_serving(
        model, context, 1, target, new_tokens=max(1, new_tokens), dtype=dtype, fixed=fixed, layout=layout, mesh=mesh,
        finalists=0,
    )[0]  # fmt: skip


def describe(config: Config, found: Plan) -> str:
    """One line about what a plan chose."""
    best = found.chosen
    how = "compiled and simulated" if best.compiled else "by closed forms"
    figures = f"{best.step_s:.3g} s a step, {best.peak_bytes / 1e9:.3g} GB a device ({how})"
    why = f"; {found.why[0]}" if found.why else ""
    return f"plan={config.plan} for {found.target}: {best.choice.text()}: {figures}{why}"


def fixed_fields(arguments: Sequence[str]) -> frozenset[str]:
    """The fields that flags set, among those that a plan chooses."""
    names = (argument.partition("=")[0].removeprefix("--") for argument in arguments if argument.startswith("--"))
    fields = {name.removeprefix("config.").replace("-", "_").replace(".no_", ".") for name in names}
    return frozenset(fields & {*FIELDS.values()})


def present_target() -> Target:
    """The devices of this run as a target, with the memory that they have.

    Raises:
      ConfigError: their rates are not known.
    """
    device = jax.devices()[0]
    hardware = HARDWARE["cpu"] if device.platform == "cpu" else data_sheet(device)
    if hardware is None:
        raise ConfigError(
            f"plan: the rates of {device.device_kind} are not known; leave --plan out, or plan for the nearest of "
            f"{', '.join(HARDWARE)} with plan.py"
        )
    memory = memory_bytes(jax.local_devices())
    if memory:
        hardware = dataclasses.replace(hardware, memory_bytes=float(memory))
    return Target(hardware, jax.device_count())


def _recorded(config: Config, num_devices: int) -> Config | None:
    """The configuration of the run in the working directory, if its choice is for the same step and devices."""
    if not is_run(config.workdir) or not (Path(config.workdir) / "config.json").is_file():
        return None
    found = read_run(config.workdir)
    same = ("plan", "model", "batch", "seq_len", "compute_dtype", "lora")
    if any(getattr(found, field) != getattr(config, field) for field in same):
        return None
    sizes = parse_mesh(found.mesh, get_layout(found.layout), num_devices)
    return found if math.prod(sizes.values()) == num_devices else None


def _compile_here(jobs: Sequence[Job], target: Target) -> list[Compiled | Refused]:
    """Compiles in this process: others could not use its devices."""
    rows = [compile_row(job, target) for job in jobs]
    return [Refused(row["refused"]) if "refused" in row else Compiled(**row["row"]) for row in rows]
