"""Report on one compiled program: its memory, its communication and a simulated timeline."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from tsp_jax.errors import ConfigError
from tsp_jax.hardware.devices import HARDWARE, Hardware
from tsp_jax.hardware.targets import Target, parse_target
from tsp_jax.inspect.bottleneck import Bottleneck, Bottlenecks, find_bottlenecks
from tsp_jax.inspect.collection import paused_collection
from tsp_jax.inspect.collectives import Collective, list_collectives
from tsp_jax.inspect.flops import total_flops
from tsp_jax.inspect.memory import Memory, compiled_memory, program_constants
from tsp_jax.inspect.module import UNSCHEDULED, Module, Trips
from tsp_jax.inspect.outline import outline
from tsp_jax.inspect.parser import parse
from tsp_jax.inspect.peak import Peak, find_peak
from tsp_jax.inspect.platforms import check_devices, check_platform, hardware_of, platform_assumption, platforms_of_text
from tsp_jax.inspect.scopes import readable_scope
from tsp_jax.inspect.timeline import TaskTotal, Timeline, Times, simulate
from tsp_jax.inspect.totals import total_buffers, total_scopes
from tsp_jax.inspect.unknown import unknown_figures

_LISTED = 100
"""buffers in the JSON of a report, the largest"""


@dataclasses.dataclass(frozen=True)
class FullWeight:
    """A sharded weight that no device should gather in full."""

    scope: str
    """of the op that uses it; empty: any"""
    elements: int
    """of the unsharded matrix"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What `report` found for one device.

    Nothing is measured: memory is read from the compiled program, and times are simulated.
    """

    module: Module
    mesh: dict[str, int] | None
    """axis -> size; None: unknown"""
    memory: Memory | None
    """as the compiler reports it; None if only text was given"""
    live: Peak | None
    """buffers alive at the peak, read from the text; None if the program is not scheduled"""
    collectives: list[Collective]
    """collectives of the program; if it is not scheduled, those that it has so far"""
    flops: float
    """operations of matrix products in one execution; of all devices if the program is not partitioned yet"""
    shardings: dict[str, str]
    """name of an argument -> its sharding, as the text writes it"""
    timeline: Timeline | None
    """simulated; None if the hardware is not known"""
    hardware: Hardware | None
    full_weights: tuple[FullWeight, ...] = ()
    unknown: dict[str, str] = dataclasses.field(default_factory=dict)
    """figure -> why the text does not tell it in full, and what counts instead"""
    remedy: Callable[[Bottleneck], str] = lambda found: found.remedy
    """what to do about a bottleneck; the default is in general words"""

    @functools.cached_property
    def bottlenecks(self) -> Bottlenecks | None:
        """What would shorten the step most, simulated when first asked for; None without a timeline."""
        if self.timeline is None:
            return None
        result = find_bottlenecks(self.timeline)
        found = tuple(dataclasses.replace(each, remedy=self.remedy(each)) for each in result.found)
        return dataclasses.replace(result, found=found)

    @property
    def missing(self) -> str:
        """What the text lacks for a peak and a timeline; empty if nothing."""
        return "" if self.module.is_scheduled else f"its text lacks {UNSCHEDULED}"

    @property
    def peak(self) -> Peak:
        """Buffers alive at the peak, read from the text.

        Raises:
          ConfigError: the program is not scheduled.
        """
        self.module.check_scheduled()
        assert self.live is not None
        return self.live

    @property
    def peak_bytes(self) -> int:
        """Peak memory as the compiler reports it; as read from the text if only text was given."""
        return self.memory.peak_bytes if self.memory else self.peak.bytes

    @property
    def exposed_fraction(self) -> float:
        """Share of the communication time that does not overlap with computation; 0 without communication.

        Raises:
          ConfigError: there is no timeline.
        """
        self.module.check_scheduled()
        if self.timeline is None:
            raise ConfigError(f"no timeline without a target; use target={next(iter(HARDWARE))}:8, for example")
        return self.timeline.exposed_comm_s / self.timeline.comm_s if self.timeline.comm_s else 0.0

    def hidden_fraction(self, collective: Collective) -> float | None:
        """Share of a collective's time that overlaps with computation; None without a timeline."""
        return self.timeline.hidden_fraction.get(collective.name) if self.timeline else None

    @paused_collection()
    def to_json(self) -> dict[str, Any]:
        """The report as plain numbers and strings."""
        return {
            "missing": self.missing, "device": self._device_json(), "memory": self._memory_json(),
            "flops": self.flops, "shardings": self.shardings,
            "collectives": [self._collective_json(c) for c in self.collectives],
            "timeline": self._timeline_json(), "unknown": self.unknown,
            "bottlenecks": self.bottlenecks.to_json() if self.bottlenecks else None,
        }  # fmt: skip

    def _device_json(self) -> dict[str, Any] | None:
        return {"name": self.hardware.name, "memory_bytes": self.hardware.memory_bytes} if self.hardware else None

    def _memory_json(self) -> dict[str, Any] | None:
        if (peak := self.live) is None:
            return None
        compiled = {field.name: getattr(self.memory, field.name, None) for field in dataclasses.fields(Memory)}
        return {
            **compiled, "peak_bytes": self.peak_bytes, "live_peak_bytes": peak.bytes, "host_bytes": peak.host_bytes,
            "by_kind": dict(peak.by_kind), "peak_at": peak.at,
            "largest": [dataclasses.asdict(b) | {"label": readable_scope(b.scope)} for b in peak.buffers[:_LISTED]],
            "curve": dataclasses.asdict(peak.curve), "buffers": total_buffers(peak.buffers),
        }  # fmt: skip

    def _collective_json(self, c: Collective) -> dict[str, Any]:
        names = ("op", "axis", "scope", "count", "bytes", "is_async", "dtype", "name", "total_bytes")
        total = self._collective_totals.get(c.name)
        return {name: getattr(c, name) for name in names} | {
            "hidden_fraction": self.hidden_fraction(c), "label": readable_scope(c.scope),
            "seconds": total.seconds if total else None, "exposed_s": total.exposed_s if total else None,
        }  # fmt: skip

    @functools.cached_property
    def _collective_totals(self) -> dict[str, TaskTotal]:
        return {total.task.name: total for total in self.timeline.collectives} if self.timeline else {}

    def _timeline_json(self) -> dict[str, Any] | None:
        if self.timeline is None:
            return None
        names = [field.name for field in dataclasses.fields(Times)]
        return {name: getattr(self.timeline, name) for name in (*names, "flops", "matmul_ratio")} | {
            "bands": {name: self.timeline.band(name)._asdict() for name in names},
            "scenarios": {name: dataclasses.asdict(times) for name, times in self.timeline.scenarios.items()},
            "exposed_fraction": self.exposed_fraction,
            "by_scope": self.timeline.by_scope,
            "scopes": total_scopes(self.timeline),
            "assumptions": list(self.timeline.assumptions),
            "outline": outline(self.timeline.outline),
        }


@paused_collection()
def report(
    program: Any, *, target: str | Hardware | Target | None = None, mesh_axes: Mapping[str, int] | None = None,
    full_weights: Sequence[FullWeight] | None = None, unknown_trips: Trips = 1, record: bool = False,
) -> Report:  # fmt: skip
    """Reports the memory, communication and simulated timeline of a compiled program.

    A text from before scheduling (without ``is_scheduled=true``) has no peak and no timeline; its report holds the
    products, shardings and collectives of the text, and says what is missing.

    Args:
      program: what ``jax.jit(f).lower(...)`` or its ``.compile()`` returned, or the text of a compiled program. A
        lowered one compiles for the devices that it was lowered for; `compile_for` lowers for others.
      target: hardware for the timeline, or its name, such as mi300x or mi300x:8; None: the program's own devices.
      mesh_axes: axis name -> size; None: the mesh of the program's arguments.
      full_weights: weights that must never be gathered whole (the contract no-full-weight); None: the sharded
        matrices among the arguments.
      unknown_trips: trips to assume for data-dependent loops that declare none; see `Module.executions`.
      record: keep the timeline's events, to write a trace.

    Raises:
      ConfigError: the program is not compiled, the text is not HLO, the mesh does not fit the program, the target is
        unknown, or the program was compiled for other hardware or another number of devices than the target's.
    """
    if not isinstance(program, str):
        program = _compiled(program)
    is_text = isinstance(program, str)
    module = parse(program if is_text else program.as_text())
    meshes = [] if is_text else [sharding.mesh for _, sharding in _arguments(program) if hasattr(sharding, "mesh")]
    mesh = max(meshes, key=lambda mesh: mesh.size, default=None)
    axes = dict(mesh_axes) if mesh_axes else dict(mesh.shape) if mesh is not None else None
    hardware = _hardware(target, None if is_text else program)
    if hardware and is_text:
        check_platform(hardware, platforms_of_text(module))
    elif hardware:
        check_devices(hardware, _devices(program))
    if not is_text or module.names_devices:
        _check_count(target, module)
    scheduled = module.is_scheduled
    timeline = (
        simulate(module, hardware, unknown_trips=unknown_trips, record=record) if hardware and scheduled else None
    )
    if is_text and timeline and hardware:
        assumptions = *timeline.assumptions, *platform_assumption(module, hardware)
        timeline = dataclasses.replace(timeline, assumptions=assumptions)
    memory = None
    if not is_text:
        memory = dataclasses.replace(compiled_memory(program), constant_bytes=program_constants(module))
    if full_weights is None:
        full_weights = () if is_text else _sharded_matrices(program)
    collectives = list_collectives(module, axes, unknown_trips=unknown_trips)
    unknown = unknown_figures(module, collectives, unknown_trips)
    if is_text:
        unknown |= _unknown_count(target, module)
    return Report(
        module=module, mesh=axes, memory=memory,
        live=find_peak(module) if scheduled else None, flops=total_flops(module, unknown_trips),
        shardings=_shardings(module), collectives=collectives, timeline=timeline, hardware=hardware,
        full_weights=tuple(full_weights), unknown=unknown,
    )  # fmt: skip


def _compiled(program: Any) -> Any:
    """``jax.stages.Compiled`` of what JAX, or a library around it, lowered or compiled."""
    program = getattr(program, "lowered", program)  # of Flax NNX and Equinox
    if hasattr(program, "compile"):
        program = program.compile()
    program = getattr(program, "compiled", program)
    if not hasattr(program, "as_text") or not hasattr(program, "input_shardings"):
        raise ConfigError(
            f"program={type(program).__name__} is not compiled; use inspect.compile_for(f, ..., target='h100:1')"
        )
    return program


def _arguments(compiled: Any) -> list[tuple[Any, Any]]:
    """(global aval, sharding) of every array argument that the program uses."""
    import jax

    avals, tree = jax.tree.flatten(compiled.in_avals)
    shardings = tree.flatten_up_to(compiled.input_shardings)  # None: the program does not use it
    return [(aval, sharding) for aval, sharding in zip(avals, shardings, strict=True) if sharding is not None]


def _devices(compiled: Any) -> Iterator[Any]:
    """The devices of a compiled program's arguments and results."""
    import jax

    for sharding in jax.tree.leaves((compiled.input_shardings, compiled.output_shardings)):
        yield from sharding.device_set


def _shardings(module: Module) -> dict[str, str]:
    parameters = (i for i in module.entry.instructions if i.opcode == "parameter")
    return {i.op_name or i.name: i.attributes["sharding"] for i in parameters if "sharding" in i.attributes}


def _sharded_matrices(compiled: Any) -> tuple[FullWeight, ...]:
    """The matrices among the arguments that are sharded over at least one of their last two dims."""
    import jax.numpy as jnp

    matrices = {
        aval.shape[-2] * aval.shape[-1]
        for aval, sharding in _arguments(compiled)
        if len(aval.shape) >= 2
        and jnp.issubdtype(aval.dtype, jnp.inexact)
        and sharding.shard_shape(aval.shape)[-2:] != aval.shape[-2:]
    }
    return tuple(FullWeight("", elements) for elements in sorted(matrices))


def _hardware(target: str | Hardware | Target | None, compiled: Any) -> Hardware | None:
    """The hardware of a target, or of the devices of a compiled program."""
    if isinstance(target, Hardware):
        return target
    if isinstance(target, Target):
        return target.hardware
    if target:
        return parse_target(target if ":" in target else f"{target}:1").hardware
    device = next(_devices(compiled), None) if compiled is not None else None
    return hardware_of(device) if device is not None else None


def _unknown_count(target: str | Hardware | Target | None, module: Module) -> dict[str, str]:
    """The line of `Report.unknown` on a target with a number of devices, of which the text says nothing."""
    target = _counted(target)
    if target is None or target.num_devices == 1 or module.names_devices:
        return {}
    number = target.num_devices
    return {
        "devices": f"whether it was compiled for {number} devices: its header names no number, which counts as one "
        f"device; if they are {number}, write num_partitions={number} into the header"
    }


def _counted(target: str | Hardware | Target | None) -> Target | None:
    """A target with a number of devices; None if it has none."""
    if isinstance(target, str):
        return parse_target(target) if ":" in target else None
    return target if isinstance(target, Target) else None


def _check_count(target: str | Hardware | Target | None, module: Module) -> None:
    """Raises ConfigError if a target with a number of devices is not of those that run the program together."""
    target = _counted(target)
    if target is not None and target.num_devices != module.num_devices:
        raise ConfigError(
            f"target={target} has {target.num_devices} devices, and the program was compiled for {module.num_devices}; "
            f"use target={target.hardware.name}:{module.num_devices}, or compile it for {target}"
        )
