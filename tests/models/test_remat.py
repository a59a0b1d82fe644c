"""Layers under full remat whose gradients wait where their inputs were: values, gradients, memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests.builders.arrays import F32_TOLERANCE, assert_trees_near, normal, place_case
from tests.builders.targets import installed
from tsp_jax.hardware.targets import parse_target
from tsp_jax.inspect import compiled_memory, list_buffers, parse
from tsp_jax.layout import Placement, place
from tsp_jax.models.remat import run_layers
from tsp_jax.ops.mlp import mlp
from tsp_jax.ops.stream import Stream

L, B, D, F, ODD = 3, 2, 12, 48, 5
FEW, MANY = 16, 96
"""tokens of a sequence: a device of eight keeps fewer rows of them than of gradients, or more"""
BF16_TOLERANCE = 2**-7
"""relative; the same sums in the same order, some rounded to 8 bits at other places"""
NAMES = {None: None, "f32": jnp.float32, "bf16": jnp.bfloat16}
CASES = [
    *((layout, "f32", None, FEW) for layout in ("tp8", "data2_tsp4", "tp2_sp4", "mix2_4")),
    ("tp8", "bf16", "bf16", MANY),
    ("mix2_4", "bf16", "f32", FEW),
    *(("tsp8", x, sinks, MANY) for x in ("f32", "bf16") for sinks in (None, "f32", "bf16")),
    *(("tsp8", x, sinks, FEW) for x, sinks in (("f32", "bf16"), ("bf16", "f32"), ("bf16", None))),
]
"""(layout, dtype of x, of sinks, tokens): gradients wider and narrower than the slots, more and less of them"""


def arguments(dtype, tokens: int, layers: int = L):
    """(x, params, aux); `odd` and `scale` do not fill a row of the slots."""
    matrices = {name: normal(seed, layers, F, D, std=D**-0.5) for seed, name in enumerate(("gate", "up", "down"))}
    params = {**matrices, "odd": normal(7, layers, ODD), "scale": 1 + normal(8, layers, D, std=0.1)}
    return jnp.asarray(normal(9, B, tokens, D), dtype), params, normal(10, B, tokens)


def specs_of(placement: Placement) -> dict:
    row = placement.layout.spec("mlp", None)
    return {**dict.fromkeys(("gate", "up", "down"), P(None, *row)), "odd": P(None), "scale": P(None)}


def layer_of(placement: Placement):
    """A residual layer that reads every parameter and `aux`."""
    x_spec, w_spec = placement.layout.spec("batch", "sequence", None), placement.layout.spec("mlp", None)

    def local(x, *weights):
        return mlp(x, *weights, axes=placement.layout.axes("mlp"), stream=Stream())

    sharded = placement.shard_map(local, (x_spec, w_spec, w_spec, w_spec), x_spec)

    def layer(params, x_BTD, aux_BT):
        # Ascending weights, so that `odd` in another order shows.
        shift = (params["odd"] * np.arange(1.0, ODD + 1, dtype=np.float32)).sum() + aux_BT[..., None]
        normed = (x_BTD.astype(jnp.float32) * params["scale"][None, None] + shift).astype(x_BTD.dtype)
        return x_BTD + sharded(normed, *(params[name] for name in ("gate", "up", "down")))

    return layer


def plain_layers(layer, x_BTD, params, aux):
    """What `run_layers` should be: a scan of checkpoints."""
    turn = jax.checkpoint(lambda x, params: (layer(params, x, aux), None), prevent_cse=False)
    return lax.scan(turn, x_BTD, params)[0]


def run(placement: Placement, x_BTD, params, aux, sinks):
    return run_layers(layer_of(placement), x_BTD, params, sinks, aux, specs_of(placement), placement)


def slot_vjp(placement: Placement, sinks_dtype, cotangent, x_BTD, params, aux):
    """(y, dx, gradients) with gradients in the dtype of the sinks."""
    if sinks_dtype is None:
        y, vjp = jax.vjp(lambda x, params: run(placement, x, params, aux, None), x_BTD, params)
        return y, *vjp(cotangent)
    # What sinks hold is never read.
    sinks = jax.tree.map(lambda p: jnp.full(p.shape, jnp.nan, sinks_dtype), params)
    y, vjp = jax.vjp(lambda x, sinks: run(placement, x, params, aux, sinks), x_BTD, sinks)
    return y, *vjp(cotangent)


def plain_vjp(placement: Placement, sinks_dtype, cotangent, x_BTD, params, aux):
    """The same of `plain_layers`."""
    y, vjp = jax.vjp(lambda x, params: plain_layers(layer_of(placement), x, params, aux), x_BTD, params)
    dx, grads = vjp(cotangent)
    return y, dx, jax.tree.map(lambda grad: grad.astype(sinks_dtype or grad.dtype), grads)


def on(placement: Placement, x_BTD, params, aux, put=jax.device_put):
    """The arguments where they belong."""

    def at(array, spec):
        return put(array, NamedSharding(placement.mesh, spec))

    spec = placement.layout.spec
    x, aux = at(x_BTD, spec("batch", "sequence", None)), at(aux, spec("batch", "sequence"))
    return x, jax.tree.map(at, params, specs_of(placement)), aux


def abstract(array, sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)


@functools.cache
def desired(layout: str, x_dtype: str, tokens: int):
    placement = place_case(layout)
    x, params, aux = on(placement, *arguments(NAMES[x_dtype], tokens))
    f = functools.partial(plain_vjp, placement, None)
    return jax.jit(f)(cotangent_of(x), x, params, aux)


def cotangent_of(x_BTD: jax.Array) -> jax.Array:
    return jnp.asarray(normal(11, *x_BTD.shape), x_BTD.dtype)


@pytest.mark.parametrize(("layout", "x_dtype", "sinks", "tokens"), CASES)
def test_values_and_gradients_are_those_of_a_scan_of_checkpoints(layout, x_dtype, sinks, tokens):
    placement, dtype = place_case(layout), NAMES[sinks]
    x, params, aux = on(placement, *arguments(NAMES[x_dtype], tokens))
    y, dx, grads = jax.jit(functools.partial(slot_vjp, placement, dtype))(cotangent_of(x), x, params, aux)
    assert (y.dtype, dx.dtype) == (x.dtype, x.dtype)
    assert {grad.dtype for grad in grads.values()} == {jnp.dtype(dtype or jnp.float32)}
    narrow = x_dtype == "bf16" or sinks == "bf16"
    assert_trees_near((y, dx, grads), desired(layout, x_dtype, tokens), BF16_TOLERANCE if narrow else F32_TOLERANCE)


def test_micro_batches_in_a_scan_add_up():
    """As accumulation runs them: slots are made anew in each turn of the loop."""
    placement = place_case("tsp8")
    x, params, aux = on(placement, *arguments(jnp.float32, FEW))
    xs = jnp.stack([x, 2 * x, x - 1])

    def total(layers):
        def add(sums, x):
            y, vjp = jax.vjp(layers, params, x)
            return jax.tree.map(jnp.add, sums, vjp(y)[0]), None

        return lax.scan(add, jax.tree.map(jnp.zeros_like, params), xs)[0]

    def plain(params, x):
        return plain_layers(layer_of(placement), x, params, aux)

    actual = jax.jit(lambda: total(lambda params, x: run(placement, x, params, aux, None)))()
    assert_trees_near(actual, jax.jit(lambda: total(plain))(), F32_TOLERANCE)


def test_without_gradients_there_are_no_slots():
    placement = place_case("tsp8")
    arrays = on(placement, *arguments(jnp.float32, MANY, DEEP))
    forward = jax.jit(lambda x, params, aux: run(placement, x, params, aux, None))
    assert stacked_in_loops(forward.lower(*arrays).compile()) == set()


# ------------------------------------------------------------------------------------------------ memory

DEEP = 7
"""layers: a number that no other dimension has"""
ROWS = B * MANY // 8
"""tokens of a device, more than its rows of gradients: 3 F / 8, and one each for `odd` and `scale`"""


@functools.cache
def compiled_update(plain: bool):
    """A step that subtracts bfloat16 gradients from float32 parameters, which it donates."""
    placement = place_case("tsp8")
    x, params, aux = on(placement, *arguments(jnp.bfloat16, MANY, DEEP))

    def step(params, x, aux):
        _, dx, grads = (plain_vjp if plain else slot_vjp)(placement, jnp.bfloat16, x, x, params, aux)
        return jax.tree.map(lambda p, grad: p - grad.astype(jnp.float32), params, grads), dx

    return jax.jit(step, donate_argnums=0).lower(params, x, aux).compile()


def stacked_in_loops(compiled) -> set[tuple[int, ...]]:
    """Shapes of arrays of all layers that the loops over layers fill."""
    module = parse(compiled.as_text())
    found = [b for b in list_buffers(module) if b.computation != module.entry.name]
    return {b.shape for b in found if b.shape[:1] == (DEEP,)}


def test_gradients_have_no_memory_of_their_own_where_tokens_are_more():
    assert stacked_in_loops(compiled_update(plain=False)) == {(DEEP, ROWS, D)}


def test_a_scan_of_checkpoints_does_have_such_memory():
    """What is found nowhere above would be found."""
    assert stacked_in_loops(compiled_update(plain=True)) >= {(DEEP, B, MANY // 8, D), (DEEP, F // 8, D)}


def test_slots_save_the_memory_of_gradients():
    """Those of a scan are float32 until the loop ends, for autodiff gives them the dtype of the parameters."""
    slots, plain = (compiled_memory(compiled_update(plain)).temp_bytes for plain in (False, True))
    assert slots <= plain - DEEP * (3 * F // 8 + 1) * D * 4


def test_no_reader_of_one_row_has_all_slots_copied():
    """The TPU's compiler did, to the order in memory that suits the gradients of `scale`."""
    if not installed("tpu"):
        pytest.skip("its compiler is not installed")
    placement = place("tsp", parse_target("v5p:8").devices(), tsp=8)
    arrays = on(placement, *arguments(jnp.bfloat16, MANY, DEEP), put=abstract)

    def step(x, params, aux):
        _, dx, grads = slot_vjp(placement, jnp.bfloat16, x, x, params, aux)
        return jax.tree.map(lambda p, grad: p - grad.astype(jnp.float32), params, grads), dx

    module = parse(jax.jit(step, donate_argnums=1).lower(*arrays).compile().as_text())
    made = {(b.opcode, b.shape) for b in list_buffers(module)}
    assert ("copy", (DEEP, ROWS, D)) not in made
    assert (DEEP, ROWS, D) in {shape for _, shape in made}
