"""Meshes as jax makes them: Explicit and Manual axes, abstract meshes, and context meshes (`jax.set_mesh`)."""

import functools
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.builders.arrays import F32_TOLERANCE, assert_trees_near, normal
from tsp_jax.config import StreamConfig
from tsp_jax.errors import ConfigError
from tsp_jax.layout import LAYOUTS, WEIGHT_DIMS, Layout, Placement, place
from tsp_jax.nn import MLP, Attention

SIZES, NAMES = (2, 4), ("data", "tsp")
EXPLICIT, AUTO, MANUAL = ((kind,) * 2 for kind in (AxisType.Explicit, AxisType.Auto, AxisType.Manual))
PLACEMENT = place("tsp", data=2, tsp=4)
B, S, D, F = 2, 16, 16, 32


def make_mlp(placement: Placement) -> MLP:
    return MLP(D, F, placement=placement, dtype=jnp.float32, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("kinds", [EXPLICIT, AUTO, (AxisType.Explicit, AxisType.Auto)])
def test_axes_of_a_mesh_become_auto(kinds):
    assert Placement(LAYOUTS["tsp"], jax.make_mesh(SIZES, NAMES, axis_types=kinds)) == PLACEMENT
    abstract = Placement(LAYOUTS["tsp"], AbstractMesh(SIZES, NAMES, axis_types=kinds))
    assert abstract.mesh.axis_types == AUTO
    assert abstract.mesh.shape == PLACEMENT.mesh.shape


def test_manual_axes_are_refused():
    message = "mesh=data=2,tsp=4 (Manual, Manual) has Manual axes; use the mesh outside of jax.shard_map"
    with pytest.raises(ConfigError, match=re.escape(message)):
        Placement(LAYOUTS["tsp"], AbstractMesh(SIZES, NAMES, axis_types=MANUAL))


def test_values_on_a_mesh_with_explicit_axes():
    """Of a layer, and of an input that arrives sharded over that mesh."""
    x, mesh = normal(0, B, S, D), jax.make_mesh(SIZES, NAMES, axis_types=EXPLICIT)
    call = make_mlp(Placement(LAYOUTS["tsp"], mesh))
    desired = jax.jit(make_mlp(PLACEMENT))(x)
    sharded = jax.device_put(x, NamedSharding(mesh, P("data", "tsp", None)))
    np.testing.assert_array_equal(jax.jit(call)(x), desired)
    np.testing.assert_array_equal(jax.jit(call)(sharded), desired)
    np.testing.assert_array_equal(nnx.jit(lambda mlp, x: mlp(x))(call, x), desired)


@pytest.mark.parametrize(
    ("sizes", "names", "kinds", "text"),
    [
        (SIZES, NAMES, EXPLICIT, "data=2,tsp=4 (Explicit, Explicit)"),
        ((4, 2), ("x", "y"), AUTO, "x=4,y=2 (Auto, Auto)"),
        ((4, 2), ("tsp", "data"), AUTO, "tsp=4,data=2 (Auto, Auto)"),
    ],
)
def test_a_context_mesh_that_is_not_the_placements_is_refused(sizes, names, kinds, text):
    message = (
        f"the context mesh is {text}, that of the placement data=2,tsp=4 (Auto, Auto); use "
        "jax.set_mesh(placement.mesh), or set none, and call layers outside of jax.shard_map"
    )
    mlp, x = make_mlp(PLACEMENT), jax.ShapeDtypeStruct((B, S, D), jnp.float32)
    with jax.set_mesh(jax.make_mesh(sizes, names, axis_types=kinds)):
        for refused in (partial(make_mlp, PLACEMENT), partial(jax.eval_shape, mlp, x)):
            with pytest.raises(ConfigError, match=re.escape(message)):
                refused()


def test_the_placements_own_mesh_as_context_mesh():
    x = normal(0, B, S, D)
    desired = jax.jit(make_mlp(PLACEMENT))(x)
    with jax.set_mesh(PLACEMENT.mesh):
        np.testing.assert_array_equal(jax.jit(make_mlp(PLACEMENT))(x), desired)


def test_a_layer_inside_shard_map_is_refused():
    mlp, mesh = make_mlp(PLACEMENT), PLACEMENT.mesh
    mapped = jax.shard_map(mlp, mesh=mesh, in_specs=P(None, "data"), out_specs=P(None, "data"), axis_names={"data"})
    with pytest.raises(ConfigError, match=re.escape("the context mesh is data=2,tsp=4 (Manual, Auto)")):
        jax.eval_shape(mapped, jax.ShapeDtypeStruct((B, S, D), jnp.float32))


# ------------------------------------------------------------------------------------------------ other meshes, inputs

TWO_LEVELS = Layout(name="two", batch=(), sequence=("node", "gpu"), **dict.fromkeys(WEIGHT_DIMS, ("node", "gpu")))
"""both axes folded; attention with 9 heads stores them in units that all 8 ranks share"""


def make_layers(placement: Placement, movement: str):
    stream = StreamConfig(
        attention_movement=movement, mlp_movement="ring" if movement == "gather" else movement, bucket_mib=0.001
    )
    settings = {"placement": placement, "dtype": jnp.float32, "stream": stream}
    attention = Attention(D, 9, 3, 8, **settings, rngs=nnx.Rngs(1))
    mlp = MLP(D, F, **settings, rngs=nnx.Rngs(0))
    return lambda x: mlp(attention(x))


@functools.cache
def desired_of_layers():
    return jax.jit(make_layers(place("single"), "gather"))(normal(0, B, S, D))


@pytest.mark.parametrize("movement", ["gather", "activations"])
@pytest.mark.parametrize(
    ("layout", "sizes", "names"),
    [
        (TWO_LEVELS, (2, 4), ("node", "gpu")),
        (TWO_LEVELS, (4, 2), ("gpu", "node")),
        (LAYOUTS["tsp"], (4, 2), ("tsp", "data")),
        (LAYOUTS["tsp"], (2, 1, 4), ("other", "data", "tsp")),
    ],
)
def test_axes_in_any_order_and_further_axes(layout, sizes, names, movement):
    mesh = jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * len(names))
    actual = jax.jit(make_layers(Placement(layout, mesh), movement))(normal(0, B, S, D))
    assert_trees_near(actual, desired_of_layers(), F32_TOLERANCE)


@pytest.mark.parametrize("spec", [P(), P(None, None, "tsp"), P(None, ("tsp", "data")), P("data", None, "tsp")])
def test_inputs_that_arrive_with_another_sharding(spec):
    x = normal(0, B, S, D)
    sharded = jax.device_put(x, NamedSharding(PLACEMENT.mesh, spec))
    actual = jax.jit(make_layers(PLACEMENT, "gather"))(sharded)
    assert_trees_near(actual, desired_of_layers(), F32_TOLERANCE)


def test_shapes_and_a_lowered_program_on_an_abstract_mesh():
    placement = Placement(LAYOUTS["tsp"], AbstractMesh(SIZES, NAMES))
    graphdef, state = nnx.split(nnx.eval_shape(lambda: make_mlp(placement)))
    x = jax.ShapeDtypeStruct((B, S, D), jnp.float32)
    call = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))
    assert jax.eval_shape(call, state, x).shape == (B, S, D)
    assert "all_gather" in call.trace(state, x).lower(lowering_platforms=("cpu",)).as_text()


def test_a_layer_with_values_on_an_abstract_mesh_is_refused():
    with pytest.raises(ConfigError, match="MLP: the placement's mesh is a jax"):
        make_mlp(Placement(LAYOUTS["tsp"], AbstractMesh(SIZES, NAMES)))
