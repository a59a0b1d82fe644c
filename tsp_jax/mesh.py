"""Sizes of mesh axes as text, and device meshes. This module does not know layouts."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AbstractMesh, AxisType, Mesh

from tsp_jax.errors import ConfigError


def parse_sizes(text: str, example: str = "data=1,tsp=8") -> dict[str, int]:
    """Parses ``data=1,tsp=8`` into axis sizes in that order, for any axis names."""
    sizes: dict[str, int] = {}
    for item in text.split(","):
        name, _, size = item.partition("=")
        name = name.strip()
        if not name or not parse_size(size):
            raise ConfigError(f"mesh={text}: '{item}' is not axis=size; use, for example, --mesh {example}")
        if name in sizes:
            raise ConfigError(f"mesh={text}: axis '{name}' is named twice; use, for example, --mesh {example}")
        sizes[name] = parse_size(size)
    return sizes


def parse_size(text: str) -> int:
    """Parses a positive number of at most nine digits; 0 if the text is not such a number."""
    return int(text) if re.fullmatch(r"\s*\d{1,9}\s*", text) else 0


def format_sizes(sizes: Mapping[str, int]) -> str:
    """The text that `parse_sizes` parses, such as ``data=1,tsp=8``."""
    return ",".join(f"{name}={size}" for name, size in sizes.items())


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of Auto axes, outermost first, over as many of the first `devices` as it needs (None: `jax.devices()`).

    Raises:
      ConfigError: there are fewer devices than the mesh needs.
    """
    devices = list(jax.devices()) if devices is None else list(devices)
    needed = math.prod(sizes.values())
    if needed > len(devices):
        raise ConfigError(
            f"mesh={format_sizes(sizes)} needs {needed} devices, there are {len(devices)}; "
            f"use a smaller mesh or --cpu-devices {needed}"
        )
    shape, types = tuple(sizes.values()), (AxisType.Auto,) * len(sizes)
    try:
        return jax.make_mesh(shape, tuple(sizes), axis_types=types, devices=devices[:needed])
    except NotImplementedError:
        # On a torus (TPU v5p) JAX refuses axes that are no products of whole dimensions. Here an axis may split one.
        split = create_device_mesh(shape, devices[:needed], allow_split_physical_axes=True)
        return Mesh(split, tuple(sizes), axis_types=types)


def describe_mesh(mesh: Mesh | AbstractMesh) -> str:
    """Describes a mesh, such as ``data=1,tsp=8 (Auto, Auto)``."""
    return f"{format_sizes(mesh.shape)} ({', '.join(kind.name for kind in mesh.axis_types)})"


def with_auto_axes(mesh: Mesh | AbstractMesh) -> Any:
    """The mesh with Auto axes: layers say how arrays are sharded, so array types need not carry shardings.

    Raises ConfigError if an axis is Manual, as inside of `jax.shard_map`.
    """
    if AxisType.Manual in mesh.axis_types:
        raise ConfigError(f"mesh={describe_mesh(mesh)} has Manual axes; use the mesh outside of jax.shard_map")
    return mesh.update(axis_types=(AxisType.Auto,) * len(mesh.axis_names))
