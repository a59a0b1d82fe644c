"""``tsp-inspect A B``: what differs between two programs.

Each of A and B is a report that ``--json`` wrote, the text of a compiled program, or a configuration. Flags apply to
both, except to reports, which are as they were written. So two steps of one configuration are compared in two commands:
``tsp-inspect NAME --json before.json`` and ``tsp-inspect before.json NAME --remat full``.
"""

import dataclasses
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tsp_jax.errors import ConfigError
from tsp_jax.files import check_json, read_json
from tsp_jax.inspect.diff import Diff, diff
from tsp_jax.inspect.render import console
from tsp_jax.inspect.render_diff import show_diff
from tsp_jax.inspect.report_json import ReportJson
from tsp_jax.inspect.units import format_bytes, format_seconds
from tsp_jax.tools import cli
from tsp_jax.tools import inspect as command
from tsp_jax.training.optimizer import Optimizer

ABOUT = "Compare two programs, A and B: reports that --json wrote, texts of compiled programs, or configurations."
_ADVICE = "use a report that --json of this command wrote"
_QUANTITIES = {"peak": "peak_bytes", "received": "received", "step": "step_s", "exposed-time": "exposed_comm_s"}
_USED = ("json", "expect", "largest", "hardware", "attention_efficiency")
"""fields of `Outputs` that mean something to two programs"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextPair(command.TextOptions):
    """Options for two texts or reports."""

    across_targets: bool = False
    """compare programs of different targets"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepPair(command.StepOptions):
    """Options if a configuration is among the two programs."""

    across_targets: bool = False
    """compare programs of different targets"""


class _Program(NamedTuple):
    heading: str
    target: str
    report: ReportJson


def is_asked(arguments: Sequence[str]) -> bool:
    """Whether a command line names two programs."""
    return len(arguments) > 1 and not any(argument.startswith("-") for argument in arguments[:2])


def main() -> None:
    """Runs the command for ``A B [--flag value ...]``."""
    with cli.errors_in_a_line():
        sys.exit(compare(sys.argv[1:3], sys.argv[3:]))


def compare(names: Sequence[str], flags: Sequence[str]) -> int:
    """Reads or compiles two programs and prints their difference; returns the exit code."""
    steps = [name for name in names if not _is_report(name) and not name.endswith(cli.TEXT_ENDINGS)]
    parsed = {name: cli.parse([name, *flags], lambda config: StepPair(config=config), about=ABOUT) for name in steps}
    options = parsed[steps[0]][1] if steps else cli.parse_flags(TextPair(), [" ".join(names), *flags], ABOUT)
    bounds = _check(options)
    found = {
        name: read_report(name) if _is_report(name) else _text(name, options) for name in names if name not in parsed
    }
    _check_targets(
        [found[name].target if name in found else str(command.target_of(parsed[name][1])) for name in names], options
    )
    _check_times(found, options)
    before, after = (found[name] if name in found else _compiled(*parsed[name]) for name in names)
    result = diff(before.report, after.report)
    if options.outputs.json:
        facts = {key: {"program": each.heading, "target": each.target} for key, each in (("a", before), ("b", after))}
        Path(options.outputs.json).write_text(json.dumps(facts | result.to_json(), indent=1) + "\n")
    out = console()
    show_diff(result, (before.heading, after.heading), out, largest=options.outputs.largest)
    failures = [line for bound in bounds if (line := _broken(result, *bound))]
    for line in failures:
        out.print(f"broken: {line}", soft_wrap=True, highlight=False)
    return command.BROKEN if failures else 0


def _is_report(name: str) -> bool:
    return name.endswith(".json")


def _check(options: Any) -> list[tuple[str, str, float]]:
    """Checks what can be checked before anything is read; returns the contracts."""
    outputs, plain = options.outputs, command.Outputs()
    unused = [f.name for f in dataclasses.fields(outputs) if f.name not in _USED]
    unused = [name for name in unused if getattr(outputs, name) != getattr(plain, name)]
    if getattr(options, "dump_hlo", ""):
        unused.append("dump_hlo")
    if unused:
        raise ConfigError(f"{unused[0]} means nothing to two programs; inspect one of them alone for it")
    command.check_writable(json=outputs.json)
    return [_bound(item.strip()) for item in outputs.expect.split(",") if item.strip()]


def _bound(item: str) -> tuple[str, str, float]:
    """(contract, quantity, bound) of a contract such as step<=1.02x."""
    match = re.fullmatch(r"([\w-]+)\s*<=\s*(\d+(?:\.\d+)?)x", item)
    if not match or match[1] not in _QUANTITIES:
        known = ", ".join(_QUANTITIES)
        raise ConfigError(f"expect={item} is no contract of two programs; use one of {known} with <=1.02x, for example")
    return item, match[1], float(match[2])


def _broken(result: Diff, item: str, quantity: str, bound: float) -> str:
    pair = result.totals[_QUANTITIES[quantity]]
    if pair.before is None or pair.after is None:
        raise ConfigError(f"expect={item}: {quantity} is not known of both programs; {'; '.join(result.unknown)}")
    show = format_seconds if _QUANTITIES[quantity].endswith("_s") else format_bytes
    text = f"{item}: from {show(pair.before)} to {show(pair.after)}"
    return "" if pair.after <= bound * pair.before else text


def read_report(file: str) -> _Program:
    """Reads a report that --json wrote; raises ConfigError if the file is none."""
    content = read_json(file, advice=_ADVICE)
    for key in ("missing", "flops", "memory", "timeline", "collectives"):
        if key not in content:
            raise ConfigError(f"{file} has no {key}; {_ADVICE}")
    report = check_json(content, file, ReportJson, f"{_ADVICE}, as an earlier version wrote other fields")
    target = str(content.get("target") or "")
    return _Program(file + f" of {target}" * bool(target), target, report)


def _text(file: str, options: Any) -> _Program:
    mesh = options.config.mesh if isinstance(options, StepPair) else options.mesh
    found, facts = command.report_text(file, options.target, mesh, options.outputs)
    return _Program(file + f" of {facts['target']}" * bool(facts["target"]), facts["target"], _json(found))


def _compiled(name: str, options: StepPair, optimizer: Optimizer) -> _Program:
    target = command.target_of(options)
    found, _, heading = command.compile_report(name, options, target, optimizer)
    return _Program(heading, str(target), _json(found))


def _json(found: Any) -> ReportJson:
    return check_json(found.to_json(), "report", ReportJson)


def _check_targets(targets: Sequence[str], options: Any) -> None:
    before, after = targets
    if before and after and before != after and not options.across_targets:
        raise ConfigError(f"A is of {before} and B of {after}; compile both for one target, or use --across-targets")


def _check_times(found: Mapping[str, _Program], options: Any) -> None:
    """Raises ConfigError if a target is named, which asks for times, and a program that was read has none."""
    if not isinstance(options, TextPair) or not options.target:
        return
    for name, program in found.items():
        if program.report["timeline"] is None:
            reason = program.report["missing"] or "it was inspected without a target"
            advice = "leave out --target to compare the rest"
            raise ConfigError(f"target={options.target}: {name} has no timeline: {reason}; {advice}")
