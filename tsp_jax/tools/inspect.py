"""The command tsp-inspect: reports on a compiled step, or on the text of a compiled program, and checks contracts.

A report is printed as tables. It can also be written as JSON and as a page, and its simulated
timeline as a trace.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from tsp_jax.config import Config
from tsp_jax.errors import ConfigError
from tsp_jax.hardware.rates_file import read_hardware
from tsp_jax.hardware.targets import Target, parse_target, standins_note, use_target
from tsp_jax.inspect import Report, report
from tsp_jax.inspect.expect import broken, parse_expectations
from tsp_jax.inspect.render import console, show
from tsp_jax.inspect.texts import read_program
from tsp_jax.inspect.trace import write_trace
from tsp_jax.mesh import format_sizes, parse_sizes
from tsp_jax.plan.compile import Step, compile_step
from tsp_jax.tools import cli
from tsp_jax.tools.page import write_page
from tsp_jax.tools.planned import plan_for
from tsp_jax.tools.remedies import remedies
from tsp_jax.training.optimizer import Optimizer

BROKEN = 1
"""exit code if a contract is broken"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outputs:
    """Files to write, and contracts to check."""

    json: str = ""
    """file for the whole report, as JSON"""
    html: str = ""
    """file for the report as a page, .html, that any browser opens without a network"""
    trace: str = ""
    """file for the simulated timeline, .json or .json.gz, to open in ui.perfetto.dev"""
    expect: str = ""
    """contracts, such as no-full-weight,exposed<=0.1,peak<=24GB; exit code 1 if one is broken. Times and shares are
    those at typical rates"""
    largest: int = 12
    """largest number of rows to show of each table"""
    hardware: str = ""
    """file of measured rates, as JSON, which replace the target's; empty: published and assumed rates"""
    attention_efficiency: float = 0.0
    """share of the fastest product's FLOP/s that attention is assumed to reach; 0: by kernel, heads and direction"""

    def check(self) -> None:
        """Raises ConfigError if a file cannot be written or a contract is not understood. Call it before long work."""
        parse_expectations(self.expect)
        check_writable(json=self.json, html=self.html, trace=self.trace)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepOptions:
    """The step of a configuration to compile, and its target."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    target: str = "cpu:8"
    """devices to compile for, which need not be present: cpu:8, mi300x:8, mi325x:8, mi355x:8, h100:8, h200:8,
    b200:8, v5e:8, v5p:8, v6e:8, v7x:8"""
    step: Step = "train"
    """train (an optimizer step), forward (the loss of a batch), prefill, or decode (one token per sequence)"""
    chunk: int = 0
    """prompt tokens that one prefill step processes; 0: all of them"""
    dump_hlo: str = ""
    """file for the text of the compiled program"""
    outputs: Annotated[Outputs, tyro.conf.arg(name="")] = Outputs()


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextOptions:
    """Options for a compiled program that is given as text."""

    target: str = ""
    """devices that the program was compiled for, such as mi300x:8, or mi300x for any number; empty: no timeline"""
    mesh: str = ""
    """axis sizes in the order of the devices, such as data=1,tsp=8; empty: collectives are shown without axis names"""
    outputs: Annotated[Outputs, tyro.conf.arg(name="")] = Outputs()


def check_writable(**files: str) -> None:
    """Raises ConfigError if the folder of a file does not exist. Arguments are named like the flags of the files."""
    for field, file in files.items():
        if file and (Path(file).is_dir() or not Path(file).parent.is_dir()):
            raise ConfigError(f"{field}={file} cannot be written; use a file in a folder that exists")


def inspect_step(name: str, options: StepOptions, optimizer: Optimizer = None) -> int:
    """Compiles a step and prints a report; returns the exit code."""
    target = target_of(options)
    options.outputs.check()
    check_writable(dump_hlo=options.dump_hlo)
    found, facts, heading = compile_report(name, options, target, optimizer)
    title = f"{name}: {options.step} step on {target}"
    return _finish(found, facts, options.outputs, title, [heading, standins_note()])


def target_of(options: StepOptions) -> Target:
    """The target of a step, with the rates that the options ask for."""
    return parse_target(options.target, options.outputs.attention_efficiency, options.outputs.hardware)


def compile_report(
    name: str, options: StepOptions, target: Target, optimizer: Optimizer
) -> tuple[Report, dict[str, Any], str]:
    """Compiles a step; returns its report, the facts about it for JSON, and a heading."""
    use_target(target)
    with console(stderr=True).status(f"compiling {name} for {target}") as status:
        config = plan_for(options.config, target, name, optimizer, status.update)
        step = compile_step(config, target, options.step, options.chunk, optimizer)
    mesh = format_sizes(step.placement.mesh.shape)
    tokens = f"{options.chunk} of {config.seq_len}" if options.chunk else str(config.seq_len)
    heading = (
        f"{name}, {config.model.num_params / 1e9:.2f} B parameters, {options.step} step of {config.batch} x "
        f"{tokens} tokens, layout {step.placement.layout.name} on {target} ({mesh}), compiled in {step.compile_s:.1f} s"
    )
    if step.kernel:
        heading += f"; attention kernel {step.kernel}"
    if options.dump_hlo:
        Path(options.dump_hlo).write_text(step.compiled.as_text())
    found = step.report(record=bool(options.outputs.trace))
    found = dataclasses.replace(found, remedy=remedies(config, step.placement, found.collectives))
    if step.model_flops:
        heading += f"; its matrix products are {found.flops / step.model_flops:.2f} x the model's own without padding"
    return found, step.facts(), heading


def inspect_text(file: str, options: TextOptions) -> int:
    """Prints a report of a compiled program, whose text is in a file; returns the exit code."""
    options.outputs.check()
    found, facts = report_text(file, options.target, options.mesh, options.outputs)
    title = f"{Path(file).name} on {facts['target']}" if facts["target"] else Path(file).name
    return _finish(found, facts, options.outputs, title, [])


def report_text(file: str, target: str, mesh: str, outputs: Outputs) -> tuple[Report, dict[str, Any]]:
    """Reports on the text in a file; returns the report and the facts about it for JSON."""
    if outputs.hardware and not target:
        target = read_hardware(outputs.hardware).name
    name, rates = target if ":" in target else f"{target}:1", (outputs.attention_efficiency, outputs.hardware)
    devices = parse_target(name, *rates) if target else None
    if devices and ":" not in target:  # of any number
        devices = devices.hardware
    text = read_program(file)
    axes = parse_sizes(mesh) if mesh else None
    found = report(text, target=devices, mesh_axes=axes, record=bool(outputs.trace))
    return found, {"file": file, "target": target, "mesh": axes}


def _finish(
    found: Report, facts: dict[str, Any], outputs: Outputs, title: str, headings: Sequence[str | None]
) -> int:  # fmt: skip
    data = {**facts, **found.to_json()} if outputs.json or outputs.html else {}
    if outputs.json:
        Path(outputs.json).write_text(json.dumps(data, indent=1) + "\n")
    if outputs.html:
        write_page(Path(outputs.html), data, kind="inspect", title=title, lines=list(filter(None, headings)))
    if outputs.trace:
        if found.timeline is None:
            raise ConfigError("trace: there is no timeline without a target; use --target mi300x:8, for example")
        write_trace(found.timeline, Path(outputs.trace))
    out = console()  # after the files, which need no standard output
    for line in filter(None, headings):
        out.print(line, soft_wrap=True, highlight=False)
    show(found, out, largest=outputs.largest)
    failures = broken(found, parse_expectations(outputs.expect))
    for line in failures:
        out.print(f"broken: {line}", soft_wrap=True, highlight=False)
    return BROKEN if failures else 0


def main() -> None:
    """Runs the command."""
    from tsp_jax.tools import difference  # it compares what this module compiles and reads

    if difference.is_asked(sys.argv[1:]):
        difference.main()
    cli.main(
        inspect_step,
        lambda config: StepOptions(config=config),
        about="Compile a step for hardware that need not be present: its memory, communication and simulated time.\n"
        "In place of CONFIG, the text of a compiled program may be given: FILE.hlo or FILE.txt, gzipped or not.\n"
        "Two programs, A B, are compared; each is CONFIG, such a text, or FILE.json, which --json wrote.",
        text_command=(inspect_text, TextOptions()),
    )
