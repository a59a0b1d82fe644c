"""Schema of what a diff reads of a report's JSON (`Report.to_json`), from this process or from a file."""

from typing import TypedDict

from tsp_jax.files import Finite


class CollectiveJson(TypedDict):
    """A collective of a report; times are None without a timeline."""

    op: str
    axis: str
    scope: str
    count: Finite
    total_bytes: Finite
    seconds: Finite | None
    exposed_s: Finite | None


class BuffersJson(TypedDict):
    """Buffers that look alike; see `total_buffers`."""

    kind: str
    dtype: str
    shape: list[int]
    scope: str
    count: int
    bytes: Finite


class MemoryJson(TypedDict):
    """Memory of a report."""

    peak_bytes: Finite
    host_bytes: Finite
    by_kind: dict[str, Finite]
    buffers: list[BuffersJson]


class StepJson(TypedDict):
    """Times of a step in a scenario."""

    step_s: Finite


class ScopeJson(TypedDict):
    """Figures of a scope; see `total_scopes`."""

    compute_s: Finite
    exposed_s: Finite
    received: Finite
    flops: Finite


class TimelineJson(TypedDict):
    """Timeline of a report."""

    step_s: Finite
    compute_s: Finite
    contention_s: Finite
    comm_s: Finite
    exposed_comm_s: Finite
    host_s: Finite
    exposed_host_s: Finite
    matmul_s: Finite
    scenarios: dict[str, StepJson]
    scopes: dict[str, ScopeJson]
    assumptions: list[str]


class ReportJson(TypedDict):
    """What a diff reads of `Report.to_json`."""

    missing: str
    flops: Finite
    memory: MemoryJson | None
    timeline: TimelineJson | None
    collectives: list[CollectiveJson]
    unknown: dict[str, str]
