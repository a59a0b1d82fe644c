"""Layers under every remat policy: values, gradients, their dtype, and the memory of gradients under full remat."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests.builders.arrays import F32_TOLERANCE, assert_trees_near, normal, place_case
from tests.builders.targets import needs_compiler
from tsp_jax.errors import ConfigError
from tsp_jax.hardware.targets import parse_target
from tsp_jax.inspect import compiled_memory, list_buffers, parse
from tsp_jax.inspect.memory import Buffer
from tsp_jax.layout import Placement, place
from tsp_jax.models.buffers import BufferFormat
from tsp_jax.models.remat import run_layers
from tsp_jax.ops.mlp import mlp
from tsp_jax.ops.stream import Stream

L, B, D, F, ODD = 3, 2, 12, 48, 5
DEEP = 7
"""layers where memory is read: a number that no other dimension has"""
FEW, MANY = 16, 96
"""tokens of a sequence: one of eight devices has fewer rows of tokens than of gradients, or more"""
BF16_TOLERANCE = 2**-7
"""relative; the same sums in the same order, some rounded to 8 bits at other places"""
F32, BF16 = "float32", "bfloat16"
CASES = [
    ("full", "tp8", F32, F32, FEW),
    ("full", "data2_tsp4", F32, F32, FEW),
    ("full", "tp2_sp4", F32, F32, FEW),
    ("full", "mix2_4", F32, F32, FEW),
    ("full", "tp8", BF16, BF16, MANY),
    ("full", "mix2_4", BF16, F32, FEW),
    ("full", "tsp8", F32, F32, MANY),
    ("full", "tsp8", F32, BF16, MANY),
    ("full", "tsp8", BF16, F32, MANY),
    ("full", "tsp8", BF16, BF16, MANY),
    ("full", "tsp8", F32, BF16, FEW),
    ("full", "tsp8", BF16, F32, FEW),
    ("none", "tsp8", F32, F32, FEW),
    ("none", "tsp8", F32, BF16, FEW),
    ("save_attention", "data2_tsp4", F32, BF16, FEW),
    ("save_attention", "tsp8", BF16, BF16, MANY),
    ("save_attention", "tsp8", BF16, F32, FEW),
    ("save_attention", "tp8", F32, F32, FEW),
    ("offload", "mix2_4", BF16, BF16, FEW),
    ("offload", "tsp8", F32, BF16, FEW),
    ("offload_attention", "mix2_4", BF16, BF16, FEW),
    ("offload_attention", "tp2_sp4", F32, F32, FEW),
]
POLICIES = "none", "full", "save_attention", "offload", "offload_attention"
"""(policy, layout, dtype of x, grad dtype, tokens): gradients wider and narrower than the buffers, more and less of
them"""


def arguments(dtype, tokens: int, layers: int = L):
    """(x, params, aux); `odd` and `scale` do not fill a row of a buffer."""
    matrices = {name: normal(seed, layers, F, D, std=D**-0.5) for seed, name in enumerate(("gate", "up", "down"))}
    params = {**matrices, "odd": normal(7, layers, ODD), "scale": 1 + normal(8, layers, D, std=0.1)}
    return jnp.asarray(normal(9, B, tokens, D), dtype), params, normal(10, B, tokens)


def specs_of(placement: Placement) -> dict:
    row = placement.layout.spec("mlp", None)
    return {**dict.fromkeys(("gate", "up", "down"), P(None, *row)), "odd": P(None), "scale": P(None)}


class Attended(NamedTuple):
    """What stands for attention's results: the same dtypes and numbers of elements a token."""

    out: Any
    """[B, T, D]"""
    lse: Any
    """[B, T], float32"""


@jax.custom_vjp
def as_attended(x, known: Attended):
    """The outputs that `attend` has computed from x: lse tanh(x), where lse counts as a constant."""
    return known.out


def as_attended_backward(known: Attended, grad):
    lse, out, grad = (array.astype(jnp.float32) for array in (known.lse[..., None], known.out, grad))
    return ((lse - out**2 / lse) * grad).astype(known.out.dtype), None


as_attended.defvjp(lambda x, known: (known.out, known), as_attended_backward)


def attended_specs(placement: Placement) -> Attended:
    spec = placement.layout.spec
    return Attended(spec("batch", "sequence", None), spec("batch", "sequence"))


def attend(x, recall) -> Attended:
    known = recall and recall()[1]
    if known is None:
        lse = lax.stop_gradient(1 + jax.nn.sigmoid(x.astype(jnp.float32).sum(-1)))
        return Attended((lse[..., None] * jnp.tanh(x.astype(jnp.float32))).astype(x.dtype), lse)
    return known._replace(out=as_attended(x, known))


def layer_of(placement: Placement):
    """A residual layer that reads every parameter and `aux`."""
    x_spec, w_spec = placement.layout.spec("batch", "sequence", None), placement.layout.spec("mlp", None)

    def local(x, *weights):
        return mlp(x, *weights, axes=placement.layout.axes("mlp"), stream=Stream())

    sharded = placement.shard_map(local, (x_spec, w_spec, w_spec, w_spec), x_spec)

    def layer(both, x_BTD, aux_BT, recall=None):
        params = both[0] | both[1]
        # Ascending weights, so that `odd` in another order shows.
        shift = (params["odd"] * np.arange(1.0, ODD + 1, dtype=np.float32)).sum() + aux_BT[..., None]
        normed = (x_BTD.astype(jnp.float32) * params["scale"][None, None] + shift).astype(x_BTD.dtype)
        attended = attend(normed, recall)
        x_BTD += attended.out
        y_BTD = x_BTD + sharded(normed, *(params[name] for name in ("gate", "up", "down")))
        return y_BTD, jax.tree.map(lax.stop_gradient, attended), ()

    return layer


def plain_layers(layer, x_BTD, params, aux):
    """What `run_layers` should be: a scan of checkpoints."""
    step = jax.checkpoint(lambda x, params: (layer((params, {}), x, aux)[0], None), prevent_cse=False)
    return lax.scan(step, x_BTD, params)[0]


def run_all(layer, placement: Placement, x_BTD, params, aux, policy="full", grad_dtype=F32, frozen=None):
    specs = specs_of(placement)
    return run_layers(
        (layer,), x_BTD, (params, frozen or {}), aux,
        specs={name: specs[name] for name in params}, attended_specs=attended_specs(placement),
        placement=placement, policy=policy, grad_dtype=grad_dtype,
    )  # fmt: skip


def run(placement: Placement, *args, **kwargs):
    """`run_all` of layers without small arrays."""
    return run_all(layer_of(placement), placement, *args, **kwargs)[0]


def vjp_of(layers, cotangent, x_BTD, params):
    """(y, dx, gradients) of (x, params) -> y."""
    y, vjp = jax.vjp(layers, x_BTD, params)
    return y, *vjp(cotangent)


def run_vjp(placement: Placement, policy: str, grad_dtype: str, cotangent, x_BTD, params, aux):
    return vjp_of(lambda x, params: run(placement, x, params, aux, policy, grad_dtype), cotangent, x_BTD, params)


def plain_vjp(placement: Placement, cotangent, x_BTD, params, aux):
    return vjp_of(lambda x, params: plain_layers(layer_of(placement), x, params, aux), cotangent, x_BTD, params)


def on(placement: Placement, x_BTD, params, aux, put=jax.device_put):
    """The arguments on the devices of a placement."""

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
    x, params, aux = on(placement, *arguments(x_dtype, tokens))
    return jax.jit(functools.partial(plain_vjp, placement))(cotangent_of(x), x, params, aux)


def cotangent_of(x_BTD: jax.Array) -> jax.Array:
    return jnp.asarray(normal(11, *x_BTD.shape), x_BTD.dtype)


@pytest.mark.parametrize(("policy", "layout", "x_dtype", "grad_dtype", "tokens"), CASES)
def test_values_and_gradients_are_those_of_a_scan_of_checkpoints(policy, layout, x_dtype, grad_dtype, tokens):
    placement = place_case(layout)
    x, params, aux = on(placement, *arguments(x_dtype, tokens))
    f = functools.partial(run_vjp, placement, policy, grad_dtype)
    y, dx, grads = jax.jit(f)(cotangent_of(x), x, params, aux)
    assert (y.dtype, dx.dtype) == (x.dtype, x.dtype)
    assert {grad.dtype for grad in grads.values()} == {jnp.dtype(F32)}
    rounded = {name: bool((grad == grad.astype(BF16).astype(F32)).all()) for name, grad in grads.items()}
    assert set(rounded.values()) == {grad_dtype == BF16}, "gradients wait in grad_dtype"
    tolerance = BF16_TOLERANCE if BF16 in (x_dtype, grad_dtype) else F32_TOLERANCE
    assert_trees_near((y, dx, grads), desired(layout, x_dtype, tokens), tolerance)


@pytest.mark.parametrize("policy", POLICIES)
def test_small_arrays_of_layers_have_gradients(policy):
    """What each layer returns beside its output, stacked over layers; the loss depends on both."""
    placement = place_case("tsp8")
    x, params, aux = on(placement, *arguments(F32, FEW))
    plain, weights_L = layer_of(placement), jnp.arange(1.0, L + 1)

    def with_small(*args):
        y_BTD, attended, _ = plain(*args)
        return y_BTD, attended, {"square": jnp.square(y_BTD).mean(), "first": y_BTD[0, 0]}

    def loss(outputs):
        y_BTD, small = outputs
        return jnp.vdot(cotangent_of(x), y_BTD) + (weights_L * small["square"]).sum() + jnp.sin(small["first"]).sum()

    def actual(x, params):
        return loss(run_all(with_small, placement, x, params, aux, policy))

    def desired(x, params):
        def step(x, params):
            y_BTD, _, small = with_small((params, {}), x, aux, None)
            return y_BTD, small

        return loss(lax.scan(step, x, params))

    found, wanted = (jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(x, params) for f in (actual, desired))
    assert_trees_near(found, wanted, F32_TOLERANCE)


@pytest.mark.parametrize("policy", POLICIES)
def test_frozen_parameters_get_no_gradients_and_change_no_other(policy):
    placement = place_case("tsp8")
    x, params, aux = on(placement, *arguments(F32, FEW))
    frozen = {name: params[name] for name in ("up", "odd")}
    trained = {name: param for name, param in params.items() if name not in frozen}

    def both_vjp(x, trained, frozen):
        y, vjp = jax.vjp(lambda *args: run(placement, *args[:2], aux, policy, F32, args[2]), x, trained, frozen)
        return y, *vjp(cotangent_of(x))

    y, dx, grads, zeros = jax.jit(both_vjp)(x, trained, frozen)
    desired_y, desired_dx, desired_grads = desired("tsp8", F32, FEW)
    assert_trees_near(
        (y, dx, grads), (desired_y, desired_dx, {name: desired_grads[name] for name in trained}), F32_TOLERANCE
    )
    assert not any(grad.any() for grad in jax.tree.leaves(zeros))


@pytest.mark.parametrize("policy", POLICIES)
def test_gradients_of_frozen_parameters_are_never_stacked(policy):
    """They are all there are of this shape; `test_a_scan_of_checkpoints_does_have_such_memory` finds them."""
    placement = place_case("tsp8")
    x, params, aux = on(placement, *arguments(F32, MANY, DEEP))
    frozen = {name: params[name] for name in ("gate", "up", "down")}
    trained = {name: params[name] for name in ("odd", "scale")}

    def grads(x, trained, frozen):
        _, vjp = jax.vjp(lambda *args: run(placement, *args, aux, policy, F32, frozen), x, trained)
        return vjp(cotangent_of(x))

    found = stacked_in_loops(jax.jit(grads).lower(x, trained, frozen).compile())
    assert (DEEP, F // 8, D) not in found
    assert found


def test_micro_batches_in_a_scan_add_up():
    """As gradient accumulation runs them: each iteration of the loop has new buffers."""
    placement = place_case("tsp8")
    x, params, aux = on(placement, *arguments(F32, FEW))
    xs = jnp.stack([x, 2 * x, x - 1])

    def total(layers):
        def add(sums, x):
            y, vjp = jax.vjp(layers, params, x)
            return jax.tree.map(jnp.add, sums, vjp(y)[0]), None

        return lax.scan(add, jax.tree.map(jnp.zeros_like, params), xs)[0]

    def plain(params, x):
        return plain_layers(layer_of(placement), x, params, aux)

    actual = jax.jit(lambda: total(lambda params, x: run(placement, x, params, aux)))()
    assert_trees_near(actual, jax.jit(lambda: total(plain))(), F32_TOLERANCE)


def test_forward_alone_has_no_buffers():
    placement = place_case("tsp8")
    arrays = on(placement, *arguments(F32, MANY, DEEP))
    forward = jax.jit(lambda x, params, aux: run(placement, x, params, aux))
    assert stacked_in_loops(forward.lower(*arrays).compile()) == set()


# ------------------------------------------------------------------------------------------------ memory

ROWS = B * MANY // 8
"""tokens of a device, more than its rows of gradients: 3 F / 8, and one each for `odd` and `scale`"""


@functools.cache
def compiled_update(policy: str, grad_dtype: str = BF16):
    """A step that subtracts gradients from float32 parameters, which it donates; `plain`: of `plain_layers`."""
    placement = place_case("tsp8")
    x, params, aux = on(placement, *arguments(BF16, MANY, DEEP))

    def step(params, x, aux):
        vjp = plain_vjp if policy == "plain" else functools.partial(run_vjp, policy=policy, grad_dtype=grad_dtype)
        _, dx, grads = vjp(placement, cotangent=x, x_BTD=x, params=params, aux=aux)
        return jax.tree.map(jnp.subtract, params, grads), dx

    return jax.jit(step, donate_argnums=0).lower(params, x, aux).compile()


def stacked_in_loops(compiled) -> set[tuple[int, ...]]:
    """Shapes of arrays of all layers that the loops over layers fill."""
    module = parse(compiled.as_text())
    found = [b for b in list_buffers(module) if b.computation != module.entry.name]
    return {b.shape for b in found if b.shape[:1] == (DEEP,)}


SAVED_ROWS = {"full": ROWS, "save_attention": 2 * ROWS + 4}
"""rows of a buffer: of ROWS layer inputs, as many outputs of attention, and ROWS float32 numbers"""


@pytest.mark.parametrize("policy", SAVED_ROWS)
def test_gradients_have_no_memory_of_their_own_where_tokens_are_more(policy):
    assert stacked_in_loops(compiled_update(policy)) == {(DEEP, SAVED_ROWS[policy], D)}


def test_a_scan_of_checkpoints_does_have_such_memory():
    """What is found nowhere above would be found."""
    assert stacked_in_loops(compiled_update("plain")) >= {(DEEP, B, MANY // 8, D), (DEEP, F // 8, D)}


GRADS = DEEP * (3 * F // 8 + 1) * D
"""numbers in the gradients of all layers on one device, without those of `odd`"""


def test_buffers_save_the_memory_of_gradients():
    """A scan stacks float32 gradients until the loop ends, for autodiff gives them the dtype of the parameters."""
    full, plain = (compiled_memory(compiled_update(policy)).temp_bytes for policy in ("full", "plain"))
    assert full <= plain - 0.9 * GRADS * 4  # the compiler of jax 0.12 needs 336 bytes more elsewhere


def test_other_policies_stack_gradients_in_grad_dtype():
    narrow, wide = (compiled_memory(compiled_update("none", dtype)).temp_bytes for dtype in (BF16, F32))
    assert narrow <= wide - GRADS * 2


def buffers_made(target: str, grad_dtype: str) -> list[Buffer]:
    """What a step with policy full makes, compiled for eight devices that are not here."""
    placement = place("tsp", parse_target(target).devices(), tsp=8)
    arrays = on(placement, *arguments(BF16, MANY, DEEP), put=abstract)

    def step(x, params, aux):
        _, dx, grads = run_vjp(placement, "full", grad_dtype, x, x, params, aux)
        return jax.tree.map(jnp.subtract, params, grads), dx

    return list_buffers(parse(jax.jit(step, donate_argnums=1).lower(*arrays).compile().as_text()))


def test_no_reader_of_one_row_makes_the_compiler_copy_all_buffers():
    """The TPU compiler did, to the order in memory that suits the gradients of `scale`."""
    needs_compiler("tpu")
    made = {(b.opcode, b.shape) for b in buffers_made("v5p:8", BF16)}
    assert ("copy", (DEEP, ROWS, D)) not in made
    assert (DEEP, ROWS, D) in {shape for _, shape in made}


@pytest.mark.parametrize(("platform", "target"), [("tpu", "v5p:8"), ("rocm", "mi300x:8")])
def test_float32_gradients_of_all_layers_are_not_copied_out_of_the_buffers(platform, target):
    """Where buffers had the tokens' dtype, both compilers put all gradients together before they read them."""
    needs_compiler(platform)
    made = {(b.dtype, b.shape) for b in buffers_made(target, F32)}
    narrow = {shape for dtype, shape in made if dtype == "bf16" and shape[:1] == (DEEP,)}
    assert narrow <= {(DEEP, F // 8, D)}, "parameters in the compute dtype"
    assert ("f32", (DEEP, 3 * F // 8 + 2, D)) in made


@pytest.mark.parametrize("policy", POLICIES)
def test_second_derivatives_are_refused(policy):
    """They would miss what the weights' gradients owe to the weights."""
    placement = place_case("tsp2")
    x, params, aux = arguments(F32, FEW)
    gradient = jax.grad(lambda params: (run(placement, x, params, aux, policy) ** 2).sum())
    for second in (lambda p: jax.jvp(gradient, (p,), (p,)), jax.grad(lambda p: gradient(p)["odd"].sum())):
        with pytest.raises(ConfigError, match="the decoder has no second derivatives"):
            jax.eval_shape(second, params)


@pytest.mark.parametrize("width", [5, 6, 7])
def test_a_wider_array_fills_whole_words_of_a_narrower_buffer(width):
    """A row of an odd number of bfloat16 elements is no whole number of float32 elements."""
    placement = place_case("single")
    saved = jnp.zeros((1, 2, width), jnp.bfloat16), normal(0, 1)
    params, none = {"scale": jnp.zeros((2, 1), jnp.bfloat16)}, P()
    form = BufferFormat.of(placement, saved, (none, none), params, {"scale": P(None)}, jnp.dtype("bfloat16"))
    buffers = form.write_saved(form.zeros(), jnp.int32(1), saved)
    np.testing.assert_array_equal(form.read_saved(buffers, jnp.int32(1))[1], saved[1])
