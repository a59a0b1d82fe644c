"""The command tsp-calibrate: measures the devices that are present, and writes their rates to a file.

The file is what ``--hardware FILE`` of tsp-inspect and tsp-compare reads. One process measures one node; links between
nodes are not measured.
"""

import dataclasses
import datetime
import functools
import json
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from rich.table import Column, Table

from tsp_jax.errors import ConfigError
from tsp_jax.hardware import measure
from tsp_jax.hardware.devices import HARDWARE
from tsp_jax.hardware.measure import Band, Effort
from tsp_jax.inspect.flops import total_flops
from tsp_jax.inspect.parser import parse
from tsp_jax.inspect.render import console
from tsp_jax.ops.kernels import KERNELS, Kernel, arch_of, delta
from tsp_jax.ops.kernels.mask import Tokens
from tsp_jax.tools import cli
from tsp_jax.tools.inspect import check_writable

FORMAT = 1
"""version of the file's schema"""
LONGEST_NAME = 100
HEAD_DIMS = (128, 64, 256)
KV_HEADS, GROUP = 4, 4
DTYPE = "bfloat16"
"""of products and attention"""

Facts = dict[str, Any]
Progress = Callable[[str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrateOptions:
    """What to measure, and where to write it."""

    out: str = ""
    """file for the measured rates, as JSON; the other commands read it with --hardware"""
    quick: bool = False
    """measure fewer sizes, for a shorter time"""
    cpu_devices: int = 0
    """measure this many virtual CPU devices; 0: the devices that are present"""
    kernels: str = "auto"
    """attention kernels to measure, such as triton,xla; auto: all that these devices support"""
    base: str = ""
    """kind of device, such as h100, whose data sheet counts for what is not measured; empty: the kind of these
    devices"""
    name: str = ""
    """name of the node in the file; empty: the file's name without its ending"""

    def __post_init__(self):
        if self.cpu_devices < 0:
            raise ConfigError(f"cpu_devices={self.cpu_devices} must not be negative; use 0")


def calibrate(options: CalibrateOptions) -> Facts:
    """Measures all rates, prints them and writes them to ``options.out``; returns what the file holds.

    Raises:
      ConfigError: the file cannot be written, the devices are of no known kind, or a kernel is unknown or does not run
        on them. Nothing is measured then.
    """
    if not options.out:
        raise ConfigError(f"out='' is empty; use {cli.program()} --out my-node.json")
    check_writable(out=options.out)
    devices = jax.local_devices()
    facts = _heading(options, devices)
    kernels = choose_kernels(options.kernels, devices)
    with console(stderr=True).status("") as status:
        facts |= measure_node(devices, kernels, options.quick, lambda line: status.update(f"measuring {line}"))
    try:
        Path(options.out).write_text(json.dumps(facts, indent=1) + "\n")
    except OSError as error:
        raise ConfigError(f"out={options.out} cannot be written ({error.strerror}); use another file") from None
    _print_table(facts)  # after the file, which needs no standard output
    return facts


def _heading(options: CalibrateOptions, devices: list[Any]) -> Facts:
    """What the file says about the devices, apart from their rates."""
    name = options.name or Path(options.out).stem
    if len(name) > LONGEST_NAME:
        raise ConfigError(f"name={name:.20}... has {len(name)} characters; use --name with at most {LONGEST_NAME}")
    return {
        "format": FORMAT,
        "name": name,
        "base": find_base(options.base, devices[0]),
        "device_kind": devices[0].device_kind,
        "num_devices": len(devices),
        "date": datetime.date.today().isoformat(),
        "versions": {"jax": jax.__version__, "python": platform.python_version()},
    }


def find_base(name: str, device: Any) -> str:
    """The name in `HARDWARE` that is given, or else the kind of a device.

    Raises:
      ConfigError: the name is unknown, or the device is of no known kind.
    """
    known = ", ".join(HARDWARE)
    if name and name not in HARDWARE:
        raise ConfigError(f"base={name} is unknown; use one of {known}")
    found = name or next((each.name for each in HARDWARE.values() if each.is_kind_of(device)), "")
    if not found:
        raise ConfigError(f"base='': {device.device_kind} is of no known kind; use --base with one of {known}")
    return found


def choose_kernels(names: str, devices: list[Any]) -> dict[str, Kernel]:
    """name -> attention kernel to measure; `names` is ``auto``, or names in `KERNELS`, separated by commas.

    Raises:
      ConfigError: a name is unknown, or its kernel supports no head dim on these devices.
    """
    arch = arch_of(Mesh(np.array(devices[:1]), ("one",)))
    wanted = list(KERNELS) if names == "auto" else [name.strip() for name in names.split(",")]
    found = {}
    for name in wanted:
        if name not in KERNELS:
            raise ConfigError(f"kernels={names}: '{name}' is unknown; use auto, or some of {','.join(KERNELS)}")
        kernel = KERNELS[name].for_arch(arch)
        reasons = [kernel.unsupported(head_dim, DTYPE) for head_dim in HEAD_DIMS]
        if not all(reasons):
            found[name] = kernel
        elif names != "auto":
            raise ConfigError(f"kernels={names}: {name} {reasons[0]}; use --kernels auto")
    return found


# ------------------------------------------------------------------------------------------------ what is measured


def measure_node(devices: list[Any], kernels: dict[str, Kernel], quick: bool, progress: Progress) -> Facts:
    """All rates of a node, as the file has them."""
    device, effort = devices[0], Effort.of(quick)
    facts: Facts = {"products": []}
    for m, n, k in measure.product_shapes(device.platform, quick):
        progress(f"a product of {m} x {k} by {k} x {n}")
        band = measure.measure_product(device, (m, n, k), effort, DTYPE)
        facts["products"].append({"m": m, "n": n, "k": k, "dtype": DTYPE, **_rate("flops_per_s", band)})
    progress("memory")
    facts["memory"] = _rate("bytes_per_s", measure.measure_memory(device, effort))
    if len(devices) > 1:
        facts["collectives"] = {op: _collective(devices, op, quick, progress) for op in measure.RECEIVED}
    facts["attention"] = _attention(device, kernels, quick, progress)
    progress("copies to and from the host")
    if host := measure.measure_host(device, effort):
        facts["host"] = {f"{direction}_bytes_per_s": band.median for direction, band in host.items()}
    return facts


def _rate(name: str, band: Band) -> Facts:
    return {name: band.median, "low": band.low, "high": band.high}


def _collective(devices: list[Any], op: str, quick: bool, progress: Progress) -> Facts:
    points = []
    for size in measure.collective_sizes(devices, quick):
        progress(f"{op} of {size // 1024:,} KiB over {len(devices)} devices")
        points.append(measure.measure_collective(devices, op, size, Effort.of(quick)))
    return measure.fit_collective(points)


def _attention(device: Any, kernels: dict[str, Kernel], quick: bool, progress: Progress) -> list[Facts]:
    """A row for each kernel, head dim that it supports, and direction."""
    rows = []
    for name, kernel in kernels.items():
        for head_dim in HEAD_DIMS[: 1 if quick else None]:
            if kernel.unsupported(head_dim, DTYPE):
                continue
            progress(f"attention by {name}, heads of {head_dim}")
            found = measure_attention(device, kernel, head_dim, Effort.of(quick))
            if len(found) < 2:
                line = f"attention by {name}, heads of {head_dim}: its program does not say what it computes; left out"
                console(stderr=True).print(line, soft_wrap=True, highlight=False)
            for direction, band in found.items():
                row = {"kernel": name, "direction": direction, "head_dim": head_dim}
                rows.append(row | _rate("flops_per_s", band))
    return rows


def measure_attention(device: Any, kernel: Kernel, head_dim: int, effort: Effort) -> dict[str, Band]:
    """Operations/s of causal attention of one document to itself: ``forward`` and ``backward``.

    The operations are those of the matrix products that the kernel executes, as `tsp_jax.inspect` reads them from the
    compiled program: tiles at the diagonal count whole, and so does what backward recomputes (7 products by Triton's
    kernels, 5 by one kernel). A program's time is its operations, counted in the same way, over these rates. A
    direction is left out if its program does not say what it computes.
    """
    tokens = 256 if device.platform == "cpu" else 16384
    here = measure.on(device)
    heads, keys = (1, tokens, KV_HEADS, GROUP, head_dim), (1, tokens, KV_HEADS, head_dim)
    q, k, v, dout = (measure.random_array(i, keys if i in (1, 2) else heads, DTYPE, here) for i in range(4))
    place = Tokens.one_document(jax.device_put(jnp.arange(tokens, dtype=jnp.int32)[None], here))
    out, lse = jax.jit(functools.partial(attend, kernel))(q, k, v, place)

    def backward(dout, q, k, v, place, out, lse):
        return attend_backward(kernel, q, k, v, place, delta(out, dout), lse, dout)

    calls = {
        "forward": (functools.partial(attend, kernel), (q, k, v, place)),
        "backward": (backward, (dout, q, k, v, place, out, lse)),
    }
    found = {}
    for direction, (function, arguments) in calls.items():
        if not (flops := executed_flops(function, arguments)):
            continue
        times = measure.seconds_per_call(function, arguments, effort)
        found[direction] = Band.of([flops / seconds for seconds in times])
    return found


def attend(kernel: Kernel, q_BTKGH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, place: Tokens) -> Any:
    """(out, lse) of causal attention; with `attend_backward`, the only code here that knows how kernels are called."""
    return kernel.attend(q_BTKGH, k_BSKH, v_BSKH, place, place)


def attend_backward(kernel: Kernel, q_BTKGH, k_BSKH, v_BSKH, place: Tokens, delta_BTKG, lse_BTKG, dout_BTKGH) -> Any:
    """(dq, dk, dv) of causal attention."""
    return kernel.attend_backward(q_BTKGH, k_BSKH, v_BSKH, place, place, delta_BTKG, lse_BTKG, dout_BTKGH)


def executed_flops(function: Callable[..., Any], arguments: tuple[Any, ...]) -> float:
    """Operations of the matrix products of a compiled function, declared ones included."""
    return total_flops(parse(jax.jit(function).lower(*arguments).compile().as_text()))


# ------------------------------------------------------------------------------------------------ what is printed


def _print_table(facts: Facts) -> None:
    out = console()
    out.print(
        f"{facts['name']}: {facts['num_devices']} x {facts['device_kind']}, base {facts['base']}, measured "
        f"{facts['date']} with jax {facts['versions']['jax']}",
        soft_wrap=True, highlight=False,
    )  # fmt: skip
    right = [Column(title, justify="right") for title in ("median", "low", "high")]
    table = Table("", *right, "unit")
    for label, unit, *rates in _lines(facts):
        table.add_row(label, *(f"{rate / (1e12 if unit == 'TFLOP/s' else 1e9):.4g}" for rate in rates), unit)
    out.print(table, soft_wrap=True)
    out.print(
        "low, high: 10th and 90th percentile of the repeats; attention: of the products that the kernel executes; "
        "collectives: received bytes over the time beyond the fixed one",
        soft_wrap=True, highlight=False,
    )  # fmt: skip


def _lines(facts: Facts) -> list[tuple[str, str, float, float, float]]:
    """(label, unit, median, low, high) of each rate."""

    def line(label: str, unit: str, rate: Facts, key: str) -> tuple[str, str, float, float, float]:
        return label, unit, rate[key], rate["low"], rate["high"]

    lines = [
        line(f"product {p['m']} x {p['k']} by {p['k']} x {p['n']}, {p['dtype']}", "TFLOP/s", p, "flops_per_s")
        for p in facts["products"]
    ]
    lines.append(line("memory, read and written", "GB/s", facts["memory"], "bytes_per_s"))
    for op, rate in facts.get("collectives", {}).items():
        lines.append(line(f"{op}, after {rate['fixed_s'] * 1e6:.0f} us", "GB/s", rate, "bytes_per_s"))
    for row in facts["attention"]:
        label = f"attention {row['direction']}, {row['kernel']}, heads of {row['head_dim']}"
        lines.append(line(label, "TFLOP/s", row, "flops_per_s"))
    for key, rate in facts.get("host", {}).items():
        direction = key.removesuffix("_bytes_per_s").replace("_", " ")
        lines.append((f"copy {direction}", "GB/s", rate, rate, rate))
    return lines


def main() -> None:
    """Runs the command."""
    about = "Measure the devices that are present, and write their rates to a file that --hardware reads."
    with cli.errors_in_a_line():
        options = cli.parse_flags(CalibrateOptions(), ["", *sys.argv[1:]], about)
        cli.use_devices(options.cpu_devices)
        calibrate(options)
