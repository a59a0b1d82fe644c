"""Small HLO programs for tests of `tsp_jax.inspect`: their text, and what is compiled or simulated from it."""

import dataclasses
import re

import jax
import jax.numpy as jnp
from jax import lax

from tsp_jax.hardware.devices import HARDWARE, Hardware
from tsp_jax.hardware.rates import flat_rates
from tsp_jax.inspect import parse
from tsp_jax.inspect.roofline import Costs
from tsp_jax.inspect.timeline import Timeline, simulate

MESH = {"data": 2, "tsp": 4}
F32 = 4
LAYERS, BUCKETS, D = 3, 5, 8


def at_rates(
    hardware: Hardware = HARDWARE["h100"],
    *,
    flops: float = 1.0,
    memory: float = 1.0,
    host: float = 1.0,
    link: float = 1.0,
    between_nodes: float = 1.0,
) -> Hardware:
    """`hardware` with 1 of everything a second: operations, bytes of memory, of a link, of the host, between nodes."""
    rates = flat_rates(
        flops=flops, memory=memory, host=host, link=link, between_nodes=between_nodes, num_links=hardware.num_links
    )
    return dataclasses.replace(hardware, rates=rates)


UNIT = at_rates()
TPU_UNIT = dataclasses.replace(UNIT, platform="tpu")
GROUPS = "replica_groups={{0,1,2,3,4,5,6,7}}"
SYNC = 'backend_config={"collective_backend_config":{"is_sync":true}}'
ADD = """%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}
"""


def module_of(entry: str, *computations: str, header: str = "num_partitions=8"):
    """A program from the lines of its entry and whole other computations."""
    others = "\n".join(computations)
    return parse(
        f"HloModule test, is_scheduled=true, {header}\n\n{ADD}\n{others}\n\nENTRY %main () -> f32[] {{\n{entry}\n}}\n"
    )


def simulated(entry: str, *computations: str, hardware=UNIT, **options) -> Timeline:
    return simulate(module_of(entry, *computations), hardware, **options)


def kernel(name: str, seconds: int, extra: str = "") -> str:
    """A copy that takes so many seconds: it reads and writes 4 bytes an element."""
    return f"%{name} = f32[{seconds // 8}] copy(f32[{seconds // 8}] %p.{name}){extra}"


def gather(name: str, seconds: int) -> tuple[str, str]:
    """Start and done of a gather that takes so many seconds: of 4 bytes an element, 7 / 8 come from others."""
    n = seconds // 28
    assert n * 28 == seconds
    start = f"%{name} = (f32[{n}], f32[{8 * n}]) all-gather-start(f32[{n}] %x.{name}), {GROUPS}, dimensions={{0}}"
    return start, f"%{name}-done = f32[{8 * n}] all-gather-done(%{name})"


OPERAND = re.compile(r"(\w+\[[\d,]*\](?:\{[^}]*\})?|\([^()]*\)) (%[px]\.[\w.]+)")


def lines(*instructions: str) -> str:
    """Instructions, after a parameter for every operand that is named p.* or x.*, which nothing makes."""
    made = {name: shape for line in instructions for shape, name in OPERAND.findall(line)}
    parameters = [f"{name} = {shape} parameter({number})" for number, (name, shape) in enumerate(made.items())]
    return "\n".join(f"  {line}" for line in (*parameters, *instructions, "ROOT %end = () tuple()"))


def overlapped(moved: int, computed: int) -> str:
    start, done = gather("g", moved)
    return lines(start, kernel("k", computed), done)


def loop(name: str, body: str, trips: int | None, op_name: str = "", inner: str = "") -> tuple[str, str]:
    """A while instruction, and its computations."""
    known = f', backend_config={{"known_trip_count":{{"n":"{trips}"}}}}' if trips is not None else ""
    named = f', metadata={{op_name="{op_name}"}}' if op_name else ""
    text = f"%{name} = (f32[2]) while((f32[2]) %x.{name}), condition=%{name}.cond, body=%{name}.body{named}{known}"
    go = "  %c = (f32[2]) parameter(0)\n  ROOT %go = pred[] constant(true)"
    cond = f"%{name}.cond (c: (f32[2])) -> pred[] {{\n{go}\n}}\n"
    return text, f"{inner}\n{cond}\n%{name}.body (b: (f32[2])) -> (f32[2]) {{\n{body}\n}}\n"


def iteration_of(number: int | str, moved: int, computed: tuple[int, int]) -> list[str]:
    start, done = gather(f"g{number}", moved)
    return [start, kernel(f"k{number}", computed[0]), done, kernel(f"l{number}", computed[1])]


def cost(instruction: str, *computations: str, on_chip: bool = False):
    """(flops, bytes) of the first instruction that is no parameter."""
    parsed = module_of(lines(instruction), *computations)
    (found,) = [i for i in parsed.entry.instructions if i.opcode not in ("parameter", "tuple")]
    result = Costs(parsed, on_chip=on_chip).of(found)
    return result.flops, result.bytes


def compiled(f, in_specs, out_specs, *shapes, axes=None, dtype=jnp.float32, **jit_options):
    axes = axes or MESH
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(jax.sharding.AxisType.Auto,) * len(axes))
    mapped = jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    return jax.jit(mapped, **jit_options).lower(*arguments).compile()


def text_of(program):
    text = program.as_text()
    assert text
    return text


def ring(x, axis="tsp", size=4):
    return lax.ppermute(x, axis, [(k, (k + 1) % size) for k in range(size)])


def entry(lines, header="num_partitions=8"):
    """A program of the given lines and nothing else."""
    return parse(f"HloModule test, is_scheduled=true, {header}\n\nENTRY %main () -> f32[] {{\n{lines}\n}}\n")
