"""Meshes as jax makes them: Explicit and Manual axes, abstract meshes, and context meshes (`jax.set_mesh`)."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.builders.arrays import normal
from tsp_jax.errors import ConfigError
from tsp_jax.layout import LAYOUTS, Placement, place
from tsp_jax.nn import MLP

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
