"""The command tsp-plan: which layout, mesh, remat policy and buckets a model should have on a target."""

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Annotated

import jax
import tyro

from tsp_jax.config import Config
from tsp_jax.errors import ConfigError, install_hint
from tsp_jax.hardware.devices import HARDWARE, Hardware
from tsp_jax.hardware.targets import Target, parse_target, use_target
from tsp_jax.inspect.render import console
from tsp_jax.plan.budget import usable_bytes
from tsp_jax.plan.choose import Plan, choose
from tsp_jax.plan.limits import Count, device_counts, largest_that_pays
from tsp_jax.plan.search import Minimise
from tsp_jax.tools import cli
from tsp_jax.tools.config_file import config_flags, config_source
from tsp_jax.tools.inspect import check_writable
from tsp_jax.tools.page import write_page
from tsp_jax.tools.plan_table import show_counts, show_plan
from tsp_jax.tools.plan_to_serve import plan_to_serve
from tsp_jax.tools.planned import SECONDS, fixed_fields
from tsp_jax.training.optimizer import Optimizer

NEW_TOKENS = 256
"""default of `new_tokens`"""
FINALISTS = 3
"""most ways to serve that are compiled, two programs each"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """The model and its tokens, the devices, and what is least. A flag for what a plan chooses fixes it."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    target: str = "mi300x:8"
    """devices to plan for, which need not be present, such as mi300x:8; mi300x:? finds how many are enough"""
    nodes: int = 0
    """number of whole nodes, with a target such as mi300x; 0: the target says how many devices"""
    memory: float = 0.9
    """share of a device's memory that a program may fill"""
    minimise: Minimise = "time"
    """time of a step; memory; or cost, in device-hours per token"""
    narrow: bool = False
    """also search bfloat16 moments and gradients, which change the numbers of training"""
    compilations: int = 12
    """most steps to compile; 0: closed forms alone decide"""
    seconds: float = SECONDS
    """no round of compilations starts that would end later; 0: no limit"""
    workers: int = 2
    """processes that compile"""
    serve: bool = False
    """plan for serving instead of training: `batch` sequences, each with a context of `seq_len` tokens"""
    new_tokens: int = NEW_TOKENS
    """tokens to generate for each sequence, of a plan for serving"""
    hardware: str = ""
    """file of measured rates, as JSON, which replace the target's; empty: published and assumed rates"""
    attention_efficiency: float = 0.0
    """share of the fastest product's FLOP/s that attention is assumed to reach; 0: by kernel, heads and direction"""
    out: str = ""
    """file for the configuration, .py, which the commands take; empty: only the flags are printed"""
    json: str = ""
    """file for the plan, as JSON"""
    html: str = ""
    """file for the plan as a page, .html, that any browser opens without a network"""
    png: str = ""
    """file for a chart of the front (needs matplotlib)"""

    def __post_init__(self):
        for name, least in (("nodes", 0), ("compilations", 0), ("seconds", 0), ("workers", 1), ("new_tokens", 1)):
            if not getattr(self, name) >= least:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least {least}; use {least}")
        if self.out and not self.out.endswith(".py"):
            raise ConfigError(f"out={self.out} is no .py file; use {Path(self.out).stem}.py")
        if self.serve:
            self._check_serving()
        elif self.new_tokens != NEW_TOKENS:
            raise ConfigError(f"new_tokens={self.new_tokens} means nothing to a plan for training; use --serve")

    def _check_serving(self) -> None:
        unused = [name for name in ("out", "html", "png", "narrow") if getattr(self, name)]
        unused += ["minimise"] * (self.minimise != "time")
        if unused:
            value = f"{unused[0]}={getattr(self, unused[0])}"
            raise ConfigError(f"{value} means nothing to a plan for serving; use --json, or no --serve")
        if self.target.endswith(":?"):
            raise ConfigError(f"target={self.target} says no number of devices to serve on; use one, or no --serve")


def plan(name: str, options: PlanOptions, optimizer: Optimizer = None) -> None:
    """Finds the best configuration, prints it with the reasons, and writes the files."""
    check_writable(out=options.out, json=options.json, html=options.html, png=options.png)
    draw = _drawer() if options.png else None
    target, counts = _target(name, options)
    use_target(target)
    if options.serve:
        plan_to_serve(
            name, options.config, target, memory=options.memory, new_tokens=options.new_tokens,
            finalists=min(FINALISTS, options.compilations // 2), workers=options.workers, path=options.json,
        )  # fmt: skip
        return
    with console(stderr=True).status("") as status:

        def progress(line: str) -> None:
            status.update(line)
            if not sys.stderr.isatty():
                print(line, file=sys.stderr, flush=True)

        found = choose(
            options.config, target, fixed=fixed_fields(sys.argv[1:]), memory=options.memory, narrow=options.narrow,
            minimise=options.minimise, name=name, optimizer=optimizer, compilations=options.compilations,
            seconds=options.seconds or math.inf, workers=options.workers, progress=progress,
        )  # fmt: skip
    command = _write(found, options)
    if draw:
        draw(found, Path(options.png))
    if counts:
        show_counts(counts, options.config)
    show_plan(found)
    console().print(f"train with: {command}", soft_wrap=True, highlight=False, markup=False)


def _target(name: str, options: PlanOptions) -> tuple[Target, list[Count]]:
    """The target, and the numbers of devices that were compared to find it."""
    text = options.target
    kind, colon, count = text.partition(":")
    if options.nodes:
        hardware = _hardware(kind, options)
        if colon or hardware.platform not in ("rocm", "cuda"):
            use = f"--target {kind} --nodes {options.nodes}" if hardware.platform in ("rocm", "cuda") else f"{kind}:8"
            wrong = f"target={text} says how many devices itself" if colon else f"target={text} is no GPU"
            raise ConfigError(f"nodes={options.nodes} counts nodes of GPUs, and {wrong}; use {use}")
        text = f"{kind}:{options.nodes * hardware.node_size}"
    if count != "?":
        return parse_target(text, options.attention_efficiency, options.hardware), []
    hardware = _hardware(kind, options)
    limit = usable_bytes(hardware, options.memory).usable_bytes
    counts = device_counts(options.config, hardware, limit, fixed_fields(sys.argv[1:]), options.narrow)
    fitting = [count for count in counts if count.candidate]
    if not fitting:
        raise ConfigError(
            f"target={text}: {name} at {options.config.batch} x {options.config.seq_len} tokens fits on none of "
            f"{counts[0].num_devices} to {counts[-1].num_devices} devices; use a shorter --seq-len"
        )
    number = largest_that_pays(fitting) if options.minimise == "time" else None
    if options.minimise == "cost":
        number = min(fitting, key=Count.device_seconds).num_devices
    return Target(hardware, number or fitting[0].num_devices), counts


def _hardware(kind: str, options: PlanOptions) -> Hardware:
    known = f"{kind}:1" if kind in HARDWARE and HARDWARE[kind].platform != "tpu" else f"{kind}:8"
    return parse_target(known, options.attention_efficiency, options.hardware).hardware


def _drawer():
    try:
        from tsp_jax.tools.chart import draw_front
    except ImportError:
        raise ConfigError(f"png: matplotlib is not installed; {install_hint('viz')}") from None
    return draw_front


def _write(found: Plan, options: PlanOptions) -> str:
    """Writes the configuration and the JSON; returns the command that trains."""
    train = "tsp-train"
    if sys.argv[0].endswith(".py"):
        train = f"python {Path(sys.argv[0]).with_name('train.py')}"
    config, model = found.config(), sys.argv[1]
    command = " ".join(filter(None, [train, model, config_flags(config, cli.load_config(model))]))
    if options.out:
        command = f"{train} {options.out}"
        best = found.chosen
        kind = "compiled" if best.compiled else "by closed forms"
        about = (
            f"{found.name} on {found.target}: {best.choice.text()}.\n\n"
            f"Command:  {command}\nHardware: {found.target}; not run yet.\n"
            f"Expected: {best.step_s:.3g} s a step, {best.peak_bytes / 1e9:.1f} GB a device, {kind} and simulated.\n"
        )
        Path(options.out).write_text(config_source(config, about))
    facts = {"command": command, "jax": jax.__version__, "rates": found.target.hardware.rates.origin}
    if options.json:
        Path(options.json).write_text(json.dumps({**found.to_json(), **facts}, indent=1) + "\n")
    if options.html:
        title = f"{found.name}: plan of a training step on {found.target}"
        lines = [f"{found.base.batch} x {found.base.seq_len} tokens a step; train with: {command}"]
        write_page(Path(options.html), {**found.to_json(), **facts}, kind="plan", title=title, lines=lines)
    return command


def main() -> None:
    """Runs the command."""
    cli.main(
        plan,
        lambda config: PlanOptions(config=config),
        about="Plan a run on hardware that need not be present: the fastest layout, mesh, remat and buckets that fit.",
    )
