"""What a program's text does not tell, so that a report can say it instead of counting it as nothing."""

import re
from collections.abc import Iterable

from tsp_jax.inspect.collectives import Collective
from tsp_jax.inspect.flops import product_flops
from tsp_jax.inspect.module import Module, Trips
from tsp_jax.inspect.scopes import declared_flops, declared_trips

_WITHOUT_PRODUCTS = re.compile(
    r"Sharding|SPMD\w+Shape|AllocateBuffer|CreateBuffer|AsyncCollective\w+|annotate_device_placement|MoveTo\w+|"
    r"LayoutConstraint|GatherScatterIndices\w+|PrepareAsyncCall\w+|xla\.sdy\.\w+|X64\w+|TopK|PartialReduce|ApproxTopK|"
    r"Pin|Unpin|AssumeGatherIndicesInBound|"
    r"SliceToDynamic|PadToStatic|ResizeNearest|__cub\$\w+|mhlo\.topk|cu_threefry2x32\w*|\w*RngBitGenerator\w*|\w*topk\w*"
)
"""targets of custom calls that hold no matrix product"""
_MOST_NAMES = 6


def unknown_figures(module: Module, collectives: Iterable[Collective], unknown_trips: Trips = 1) -> dict[str, str]:
    """Figure of a report -> why the text does not tell it in full, and what the report counts instead."""
    found = {
        "trips": _loops(module, unknown_trips), "flops": _kernels(module), "sizes": _dynamic_dims(module),
        "communication": _everyone(module, collectives),
        "peak": "" if module.is_scheduled else "the order of instructions, and so which arrays are alive together",
    }  # fmt: skip
    return {figure: reason for figure, reason in found.items() if reason}


def _loops(module: Module, unknown_trips: Trips) -> str:
    loops = (i for i, _ in module.walk(unknown_trips) if i.base == "while" and i.phase in ("", "start"))
    names = [i.name for i in loops if module.trip_count(i) is None and declared_trips(i) is None]
    times = "as often as the caller says" if callable(unknown_trips) else f"{unknown_trips:g} times"
    return f"how often loops run that end by their data; each counts as run {times}: {_listed(names)}" if names else ""


def _kernels(module: Module) -> str:
    targets = {
        i.custom_call_target or i.name
        for computation, _ in module.executions(fusions=True)
        for i in computation.instructions
        if i.opcode.startswith("custom-call") and i.phase in ("", "start")
        if not _WITHOUT_PRODUCTS.fullmatch(i.custom_call_target)
        if not declared_flops(i) and not product_flops(computation, i)
    }
    return f"work inside custom calls; their products are not counted: {_listed(sorted(targets))}" if targets else ""


def _dynamic_dims(module: Module) -> str:
    return "sizes of dynamic dims; each counts at its bound" if module.memo.get("dynamic") else ""


def _everyone(module: Module, collectives: Iterable[Collective]) -> str:
    if module.num_devices > 1:
        return ""
    instructions = ((c, module.computations[c.computation].by_name[c.name]) for c in collectives)
    names = [c.name for c, i in instructions if re.fullmatch(r"\{\s*\}", i.attributes.get("replica_groups", "{}"))
             and c.op != "collective-permute"]  # fmt: skip
    if not names:
        return ""
    return (
        "the number of devices: collectives run over all of them, and the header names none, which counts as one "
        f"device; if there are more, write num_partitions=N into the header: {_listed(names)}"
    )


def _listed(names: list[str]) -> str:
    rest = len(names) - _MOST_NAMES
    return ", ".join(name[:80] for name in names[:_MOST_NAMES]) + (f" and {rest} more" if rest > 0 else "")
