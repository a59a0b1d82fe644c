"""What a user of this project may change about a bottleneck: flags, and the memory that they take by closed form."""

import dataclasses
import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

from tsp_jax.config import Config
from tsp_jax.cost.memory import step_memory
from tsp_jax.inspect import Collective
from tsp_jax.inspect.bottleneck import LARGER, Bottleneck
from tsp_jax.inspect.units import format_bytes
from tsp_jax.layout import Placement
from tsp_jax.ops.kernels import ABSENT, KERNELS

_FIELDS = {
    "attention": "attention_movement",
    "mlp": "mlp_movement",
    "experts": "mlp_movement",
    "loss": "vocab_movement",
    "embed": "vocab_movement",
}
"""op -> the field of `StreamConfig` that says what it moves"""
_DIMS = {"attention": "heads", "mlp": "mlp", "experts": "mlp", "loss": "vocab", "embed": "vocab"}
_KEEPS_MORE = {"full": ("save_attention", "none"), "save_attention": ("none",)}
_KEEPS_MORE |= {"offload": ("save_attention", "none"), "offload_attention": ("save_attention", "none")}
_ON_DEVICE = {"offload": "full", "offload_attention": "save_attention"}


class _Step(NamedTuple):
    config: Config
    placement: Placement
    buckets: dict[str, int]
    """op -> the most bytes that it receives at a time"""


def remedies(config: Config, placement: Placement, collectives: Iterable[Collective]) -> Callable[[Bottleneck], str]:
    """A function from a bottleneck of a step of this project to the flags that may remove it."""
    buckets: dict[str, int] = {}
    for c in collectives:
        buckets[_op(c.scope)] = max(c.bytes, buckets.get(_op(c.scope), 0))
    step = _Step(config, placement, buckets)

    def remedy(found: Bottleneck) -> str:
        return (_FLAGS[found.kind](step, found) if found.kind in _FLAGS else "") or found.remedy

    return remedy


def _op(text: str) -> str:
    """The first op of the project that a text names; empty if none."""
    found = re.search(r"tsp/(attention|mlp|experts|embed|loss)\b", text)
    return found[1] if found else ""


def _moves_buckets(step: _Step, op: str) -> bool:
    layout = step.placement.layout
    return op in _DIMS and bool(layout.axes(_DIMS[op]).folded) and not layout.whole_weights


def _less_waiting(step: _Step, found: Bottleneck) -> str:
    if not _moves_buckets(step, op := _op(found.mostly)):
        return "another --layout: scripts/compare.py compares them"
    field = _FIELDS[op]
    flag, now = f"--stream.{field.replace('_', '-')}", getattr(step.config.stream, field)
    return f"{flag} gather or activations (now {now}), another --stream.bucket-mib, or another --layout"


def _larger_buckets(step: _Step, found: Bottleneck) -> str:
    if not _moves_buckets(step, op := _op(found.part)):
        return ""
    mib = step.config.stream.bucket_mib
    if step.buckets.get(op, 0) < mib * 2**20 / 2:
        return "no flag: buckets are a quarter of the op's weights or tokens already; more tokens per device"
    return f"--stream.bucket-mib {LARGER * mib:g}, which takes more memory"


def _kernel(_: _Step, found: Bottleneck) -> str:
    names = [name for name in (*KERNELS, *ABSENT) if name in re.split(r"[ ,]", found.what)]
    flags = [f"--stream.kernel {name}" if name in KERNELS else f"no flag: {ABSENT[name]}" for name in names]
    return "; ".join(flags)


def _keep_more(step: _Step, _: Bottleneck) -> str:
    flags = (f"--remat {policy}{_extra(step, policy)}" for policy in _KEEPS_MORE.get(step.config.remat, ()))
    return " or ".join(flags)


def _keep_on_device(step: _Step, _: Bottleneck) -> str:
    policy = _ON_DEVICE.get(step.config.remat, "")
    return f"--remat {policy}{_extra(step, policy)}" if policy else ""


def _less_traffic(step: _Step, found: Bottleneck) -> str:
    if found.part in ("other", "optimizer") and step.config.optimizer.moments_dtype == "float32":
        return "--optimizer.moments-dtype bfloat16, for the optimizer's part"
    return ""


def _extra(step: _Step, policy: str) -> str:
    """The memory that another remat policy takes, by the closed form."""
    layout, sizes = step.placement.layout, dict(step.placement.mesh.shape)
    changed = dataclasses.replace(step.config, remat=policy)
    now, then = (sum(step_memory(config, layout, sizes).values()) for config in (step.config, changed))
    return f" ({'+' if then >= now else '-'}{format_bytes(abs(then - now))} of memory by the closed form)"


_FLAGS: dict[str, Callable[[_Step, Bottleneck], str]] = {
    "communication": _less_waiting, "fixed cost": _larger_buckets, "products": _larger_buckets, "attention": _kernel,
    "recomputation": _keep_more, "host": _keep_on_device, "memory": _less_traffic,
}  # fmt: skip
"""kind of a bottleneck -> a function that names flags, or returns nothing"""
