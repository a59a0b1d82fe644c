"""Arguments of a function as shapes on a target: which are inputs of its program, and how they are sharded."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from tsp_jax.errors import ConfigError


def is_array(leaf: Any) -> bool:
    """Whether a leaf is an input of a program: an array of JAX or numpy, a shape, or a tracer."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def split(tree: Any) -> tuple[Any, Any]:
    """(the arrays of a tree, everything else in it), each with None where the other has a leaf."""
    arrays = jax.tree.map(lambda leaf: leaf if is_array(leaf) else None, tree)
    return arrays, jax.tree.map(lambda leaf: None if is_array(leaf) else leaf, tree)


def join(arrays: Any, rest: Any) -> Any:
    """The tree that `split` took apart."""
    return jax.tree.map(
        lambda array, other: other if array is None else array, arrays, rest, is_leaf=lambda leaf: leaf is None
    )


def first_mesh(tree: Any) -> Mesh | AbstractMesh | None:
    """The mesh of the first sharding over a mesh in a tree of arrays, shapes and shardings; None if it has none."""
    for leaf in jax.tree.leaves(tree):
        sharding = getattr(leaf, "sharding", leaf)
        if isinstance(sharding, NamedSharding):
            return sharding.mesh
    return None


def place_shapes(tree: Any, device: Any, mesh: Mesh | None) -> Any:
    """The tree with the shapes of its arrays, on one device, or sharded over a mesh as they say themselves.

    Arrays that say nothing, or are on one device, are left to the compiler if there is a mesh.
    """
    return jax.tree.map(lambda leaf: _placed(leaf, None, device, mesh), tree)


def place_arguments(args: tuple[Any, ...], shardings: Any, device: Any, mesh: Mesh | None) -> tuple[Any, ...]:
    """`place_shapes` for positional arguments; `shardings` are those of `compile_for`.

    Raises:
      ConfigError: there is no mesh, a sharding is none, or shardings are no prefix of the arguments.
    """
    if shardings is None:
        return place_shapes(args, device, mesh)
    if mesh is None:
        raise ConfigError(f"in_shardings={shardings} needs a mesh; use mesh='data=1', for example")
    for sharding in jax.tree.leaves(shardings, is_leaf=_is_sharding):
        if not _is_sharding(sharding):
            raise ConfigError(f"in_shardings: {sharding!r:.80} is no sharding; use PartitionSpec('data'), for example")
        _over(mesh, sharding)
    prefix = tuple(shardings) if type(shardings) is list else shardings
    place = lambda sharding, tree: jax.tree.map(lambda leaf: _placed(leaf, sharding, device, mesh), tree)
    try:
        return jax.tree.map(place, prefix, args, is_leaf=_is_sharding)
    except ValueError as error:
        cause = " ".join(str(error).split())
        raise ConfigError(
            f"in_shardings is no tree prefix of the {len(args)} positional arguments ({cause:.200}); "
            "use a tuple with one item for each"
        ) from error


def holds_nnx_objects(tree: Any) -> bool:
    """Whether a tree has modules or optimizers of Flax NNX, which a function changes in place."""
    return any(map(_is_nnx, jax.tree.leaves(tree, is_leaf=_is_nnx)))


def _is_nnx(node: Any) -> bool:
    return any(c.__module__.startswith("flax.nnx") and c.__name__ == "Pytree" for c in type(node).__mro__)


def _is_sharding(node: Any) -> bool:
    return node is None or isinstance(node, (PartitionSpec, jax.sharding.Sharding))


def _placed(leaf: Any, sharding: Any, device: Any, mesh: Mesh | None) -> Any:
    """An array's shape on the target, anything else as it is; `sharding` goes before the array's own."""
    if not is_array(leaf):
        return leaf
    own = getattr(leaf, "sharding", None) if sharding is None else sharding
    placed = SingleDeviceSharding(device) if mesh is None else _over(mesh, own)
    weak = bool(getattr(leaf, "weak_type", False))
    dtype = leaf.dtype  # of numpy's, JAX may not have enabled 64 bits
    if not jnp.issubdtype(dtype, jax.dtypes.extended):
        dtype = jax.dtypes.canonicalize_dtype(dtype)
    return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=placed, weak_type=weak)


def _over(mesh: Mesh, sharding: Any) -> NamedSharding | None:
    """A sharding over the mesh of the target; None: left to the compiler."""
    if sharding is None or isinstance(sharding, SingleDeviceSharding):
        return None
    if isinstance(sharding, PartitionSpec):
        sharding = NamedSharding(_checked(mesh, sharding), sharding)
    if not isinstance(sharding, NamedSharding):
        raise ConfigError(f"{sharding!r:.120} names no mesh axes; use a NamedSharding, or in_shardings")
    host = {"memory_kind": "pinned_host"} if sharding.memory_kind == "pinned_host" else {}
    return NamedSharding(_checked(mesh, sharding.spec), sharding.spec, **host)


def _checked(mesh: Mesh, spec: PartitionSpec) -> Mesh:
    """The mesh, if it has the axes of a PartitionSpec."""
    names = [name for axes in spec if axes is not None for name in ((axes,) if isinstance(axes, str) else axes)]
    if unknown := [name for name in names if name not in mesh.shape]:
        raise ConfigError(f"{spec!r} names axis {unknown[0]!r}; the mesh has {', '.join(mesh.shape)}")
    return mesh
