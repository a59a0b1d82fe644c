"""Report on one compiled program: its memory, its communication and a simulated timeline."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from tsp_jax.errors import ConfigError
from tsp_jax.hardware.devices import HARDWARE, Hardware
from tsp_jax.inspect.collectives import Collective, list_collectives
from tsp_jax.inspect.memory import Memory, compiled_memory
from tsp_jax.inspect.module import Module, Trips
from tsp_jax.inspect.parser import parse
from tsp_jax.inspect.peak import Peak, find_peak
from tsp_jax.inspect.timeline import Timeline, simulate


@dataclasses.dataclass(frozen=True)
class FullWeight:
    """A sharded weight that no device should gather in full."""

    scope: str
    """of the op that uses it; empty: any"""
    elements: int
    """of the unsharded matrix"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What `report` found for one device. Nothing is measured: memory is read from the compiled program, and times are
    simulated."""

    module: Module
    mesh: dict[str, int] | None
    """axis -> size; None: unknown"""
    memory: Memory | None
    """as the compiler reports it; None if only text was given"""
    peak: Peak
    """buffers alive at the peak, read from the text"""
    collectives: list[Collective]
    timeline: Timeline | None
    """simulated; None if the hardware is not known"""
    hardware: Hardware | None
    full_weights: tuple[FullWeight, ...] = ()

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
        if self.timeline is None:
            raise ConfigError(f"no timeline without a target; use target={next(iter(HARDWARE))}:8, for example")
        return self.timeline.exposed_comm_s / self.timeline.comm_s if self.timeline.comm_s else 0.0

    def hidden_fraction(self, collective: Collective) -> float | None:
        """Share of a collective's time that overlaps with computation; None without a timeline."""
        return self.timeline.hidden_fraction.get(collective.name) if self.timeline else None

    def to_json(self) -> dict[str, Any]:
        """The report as plain numbers and strings."""
        compiled = {field.name: getattr(self.memory, field.name, None) for field in dataclasses.fields(Memory)}
        peak = self.peak
        return {
            "memory": {
                **compiled, "peak_bytes": self.peak_bytes, "live_peak_bytes": peak.bytes, "host_bytes": peak.host_bytes,
                "by_kind": dict(peak.by_kind), "peak_at": peak.at,
                "largest": [dataclasses.asdict(buffer) for buffer in peak.buffers[:20]],
            },
            "collectives": [self._collective_json(c) for c in self.collectives],
            "timeline": self._timeline_json(),
        }  # fmt: skip

    def _collective_json(self, c: Collective) -> dict[str, Any]:
        names = ("op", "axis", "scope", "count", "bytes", "is_async", "dtype", "name", "total_bytes")
        return {name: getattr(c, name) for name in names} | {"hidden_fraction": self.hidden_fraction(c)}

    def _timeline_json(self) -> dict[str, Any] | None:
        if self.timeline is None:
            return None
        names = ("step_s", "compute_s", "comm_s", "exposed_comm_s", "matmul_s", "host_s", "exposed_host_s", "flops")
        return {name: getattr(self.timeline, name) for name in (*names, "matmul_ratio")} | {
            "exposed_fraction": self.exposed_fraction,
            "by_scope": self.timeline.by_scope,
            "assumptions": list(self.timeline.assumptions),
        }


def report(
    program: Any, *, target: str | Hardware | None = None, mesh_axes: Mapping[str, int] | None = None,
    full_weights: Sequence[FullWeight] | None = None, unknown_trips: Trips = 1, record: bool = False,
) -> Report:  # fmt: skip
    """Reports the memory, communication and simulated timeline of a compiled program.

    Args:
      program: what ``jax.jit(f).lower(...)`` or its ``.compile()`` returned, or the text of a compiled program.
      target: hardware for the timeline, or its name, such as mi300x or mi300x:8; None: the program's own devices.
      mesh_axes: axis name -> size; None: the mesh of the program's arguments.
      full_weights: weights that must never be gathered whole (the contract no-full-weight); None: the sharded
        matrices among the arguments.
      unknown_trips: trips to assume for data-dependent loops that declare none; see `Module.executions`.
      record: keep the timeline's events, to write a trace.

    Raises:
      ConfigError: the text is no compiled HLO, or mesh or target do not fit it.
    """
    if hasattr(program, "compile"):
        program = program.compile()
    is_text = isinstance(program, str)
    module = parse(program if is_text else program.as_text())
    meshes = [] if is_text else [sharding.mesh for _, sharding in _arguments(program) if hasattr(sharding, "mesh")]
    mesh = max(meshes, key=lambda mesh: mesh.size, default=None)
    axes = dict(mesh_axes) if mesh_axes else dict(mesh.shape) if mesh is not None else None
    hardware = _hardware(target, mesh)
    timeline = simulate(module, hardware, unknown_trips=unknown_trips, record=record) if hardware else None
    if full_weights is None:
        full_weights = () if is_text else _sharded_matrices(program)
    return Report(
        module=module, mesh=axes, memory=None if is_text else compiled_memory(program), peak=find_peak(module),
        collectives=list_collectives(module, axes, unknown_trips=unknown_trips),
        timeline=timeline, hardware=hardware, full_weights=tuple(full_weights),
    )  # fmt: skip


def _arguments(compiled: Any) -> list[tuple[Any, Any]]:
    """(global aval, sharding) of every array argument."""
    import jax

    avals, shardings = jax.tree.leaves(compiled.in_avals), jax.tree.leaves(compiled.input_shardings)
    return list(zip(avals, shardings, strict=False)) if len(avals) == len(shardings) else []


def _sharded_matrices(compiled: Any) -> tuple[FullWeight, ...]:
    """The matrices among the arguments whose last two dims are sharded."""
    matrices = {
        aval.shape[-2] * aval.shape[-1]
        for aval, sharding in _arguments(compiled)
        if len(aval.shape) >= 2 and aval.dtype.kind in "fV" and sharding.shard_shape(aval.shape)[-2:] != aval.shape[-2:]
    }
    return tuple(FullWeight("", elements) for elements in sorted(matrices))


def _hardware(target: str | Hardware | None, mesh: Any) -> Hardware | None:
    if isinstance(target, Hardware):
        return target
    if target:
        if found := HARDWARE.get(target.partition(":")[0]):
            return found
        raise ConfigError(f"target={target} is unknown; use one of {', '.join(HARDWARE)}")
    if mesh is None or not hasattr(mesh, "devices"):
        return None
    return next((hardware for hardware in HARDWARE.values() if hardware.is_kind_of(mesh.devices.flat[0])), None)
