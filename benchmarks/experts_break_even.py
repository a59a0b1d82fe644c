"""From how many tokens a device on do experts past tokens cost less than tokens past experts?

One layer of experts with the sizes of Qwen3-30B-A3B, forward and backward, is compiled with either movement for devices
that need not be present. Bytes that a device receives are read from the compiled programs, and must equal
`tsp_jax.cost.traffic.experts_traffic`; seconds are simulated at typical rates, with balanced routers. Prints a table.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import tyro
from flax import nnx
from jax.sharding import NamedSharding

from tsp_jax.config import ExpertsConfig, Movement, StreamConfig
from tsp_jax.cost.traffic import OpSharding, experts_traffic
from tsp_jax.errors import ConfigError
from tsp_jax.hardware.compiler_options import compiler_options
from tsp_jax.hardware.targets import Target, parse_target, use_target
from tsp_jax.inspect import report
from tsp_jax.layout import Placement, place
from tsp_jax.nn import Experts

D_MODEL, D_FF, EXPERTS = 2048, 768, ExpertsConfig(number=128, per_token=8)
MOVEMENTS: dict[Movement, str] = {"gather": "experts past tokens", "activations": "tokens past experts"}


@dataclasses.dataclass(frozen=True)
class Args:
    """Options of the command."""

    target: str = "mi300x:8"
    """kind and number of devices to compile for; all of them are one folded axis"""
    tokens: tuple[int, ...] = tuple(1 << n for n in range(10, 19))
    """tokens on each device"""
    bucket_mib: float = 64.0
    """size of a bucket"""


@dataclasses.dataclass(frozen=True)
class Found:
    """What one program costs on a device."""

    received: float
    """bytes, of experts alone"""
    step_s: float
    exposed_s: float


def compiled(target: Target, placement: Placement, tokens: int, stream: StreamConfig) -> Found:
    """Forward and backward of the layer, with so many tokens on each device."""
    kwargs = {"placement": placement, "stream": stream, "remat": "full"}
    layer = nnx.eval_shape(lambda: Experts(D_MODEL, D_FF, EXPERTS, **kwargs, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(layer)
    specs = nnx.to_pure_dict(nnx.get_partition_spec(state))

    def shaped(array: jax.ShapeDtypeStruct, spec: jax.P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=NamedSharding(placement.mesh, spec))

    params = jax.tree.map(shaped, nnx.to_pure_dict(state), specs)
    shape = jax.ShapeDtypeStruct((1, tokens * target.num_devices, D_MODEL), jnp.bfloat16)
    x = shaped(shape, placement.layout.spec("batch", "sequence", None))

    def step(params, x_BTD, dy_BTD):
        def forward(params, x_BTD):
            copy = jax.tree.map(lambda leaf: leaf, state)
            nnx.replace_by_pure_dict(copy, params)
            return nnx.merge(graphdef, copy)(x_BTD)[0]

        y_BTD, backward = jax.vjp(forward, params, x_BTD)
        return y_BTD, backward(dy_BTD)

    options = compiler_options(target.devices()[0])
    found = report(jax.jit(step).lower(params, x, x).compile(dict(options)), target=target.hardware)
    received = sum(c.total_bytes for c in found.collectives if "tsp/experts" in c.scope)
    assert found.timeline
    return Found(received, found.timeline.step_s, found.timeline.exposed_comm_s)


def closed_form(placement: Placement, tokens: int, stream: StreamConfig, movement: str) -> float:
    """Bytes that a device receives."""
    sizes = dict(placement.mesh.shape)
    sharding = OpSharding.of(
        placement.layout, sizes, "mlp", batch=1, seq_len=tokens * math.prod(sizes.values()), itemsize=2,
        grad_itemsize=jnp.dtype(stream.grad_dtype).itemsize,
    )  # fmt: skip
    stored = -(-EXPERTS.number // sharding.folded) * sharding.folded * D_FF
    kinds = experts_traffic(sharding, movement, d_model=D_MODEL, stored_rows=stored, per_token=EXPERTS.per_token)
    return sum(kinds.values())


def crossing(tokens: tuple[int, ...], gather: list[float], activations: list[float]) -> str:
    """Where gather begins to cost less, between two points of the table on logarithmic scales."""
    ratios = [math.log(g / a) for g, a in zip(gather, activations, strict=True)]
    for at in range(1, len(tokens)):
        if ratios[at - 1] > 0 >= ratios[at]:
            share = ratios[at - 1] / (ratios[at - 1] - ratios[at])
            return f"{tokens[at - 1] * (tokens[at] / tokens[at - 1]) ** share / 1024:.3g} K tokens a device"
    return "none within the table"


def main(args: Args) -> int:
    """Prints the table; returns exit code 1 if a program does not receive what the closed form says."""
    target = parse_target(args.target)
    use_target(target)
    placement = place("tsp", target.devices(), data=1, tsp=target.num_devices)
    found: dict[str, list[Found]] = {movement: [] for movement in MOVEMENTS}
    wrong = 0
    print(
        "| tokens a device | "
        + " | ".join(f"{name}: received GB | step ms | exposed ms" for name in MOVEMENTS.values())
        + " |"
    )
    print("|---|" + "---|" * 6)
    for tokens in args.tokens:
        cells = []
        for movement in MOVEMENTS:
            stream = StreamConfig(mlp_movement=movement, bucket_mib=args.bucket_mib, grad_dtype="bfloat16")
            row = compiled(target, placement, tokens, stream)
            expected = closed_form(placement, tokens, stream, movement)
            if row.received != expected:
                wrong += 1
                print(f"{movement}: {row.received:.0f} bytes compiled, {expected:.0f} by the closed form")
            found[movement].append(row)
            cells.append(f"{row.received / 1e9:.3f} | {1e3 * row.step_s:.2f} | {1e3 * row.exposed_s:.2f}")
        print(f"| {tokens // 1024} K | {' | '.join(cells)} |", flush=True)
    for what, name in {"received": "bytes received (compiled)", "step_s": "seconds (simulated)"}.items():
        columns = ([getattr(row, what) for row in found[movement]] for movement in MOVEMENTS)
        print(f"Break-even in {name}: {crossing(args.tokens, *columns)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    try:
        raise SystemExit(main(tyro.cli(Args)))
    except ConfigError as error:
        raise SystemExit(f"error: {error}") from None
