"""The parameters of a model and the tensors of a Hugging Face folder that hold them, read and written part by part.

Matrices are [out, in] in a folder, and [rows, D] here. So `o_proj` and `down_proj`, whose out is D, are transposed.
Rows keep their order, because both formats rotate the two halves of a head (RoPE). A tensor may hold the rows of
several parameters, one after another (`FUSED`).
Dims: D model, F ffn, H head, L layers, V vocabulary; rows are heads x H, F or V.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from tsp_jax.config import ModelConfig
from tsp_jax.hf.names import tensor_names
from tsp_jax.hf.tensors import Shape, Tensors
from tsp_jax.layout import Placement
from tsp_jax.models.transformer import Transformer
from tsp_jax.stored import Padding, paddings

TRANSPOSED = ("layers.attention.w_o", "layers.mlp.w_down")
PADDING_ROW = -2
"""stands in place of a logical row number where the stored row is padding"""


@dataclasses.dataclass(frozen=True)
class Param:
    """A parameter and the tensors of a folder that hold it: one, or one for each layer."""

    stored: jax.ShapeDtypeStruct
    """shape and sharding of the stored array"""
    name: str
    """name of the tensor; if every layer has its own, {} stands for the layer number"""
    place: int
    """place among the parameters whose rows the tensor holds"""
    stacked: bool
    """the first dim of the array is L"""
    transposed: bool
    form: Padding
    first: int = 0
    """row of the tensor that is this parameter's first"""

    def names(self, layers: slice = slice(None)) -> Iterator[str]:
        """Yields the names of the tensors. It makes no list, because a config.json may claim any number of layers."""
        numbers = range(self.stored.shape[0])[layers] if self.stacked else range(1)
        return (self.name.format(number) for number in numbers)

    @functools.cached_property
    def shape(self) -> Shape:
        """Shape of each tensor's part."""
        stored = jax.ShapeDtypeStruct(self.stored.shape[self.stacked :], self.stored.dtype)
        logical = jax.eval_shape(self.form.unpad, stored).shape
        return logical[::-1] if self.transposed else logical

    @functools.cached_property
    def rows(self) -> np.ndarray:
        """[stored rows]: the logical row of each stored row, or PADDING_ROW. Computed by padding the row numbers."""
        count = self.shape[-1 if self.transposed else 0]
        numbers = jnp.arange(count, dtype=jnp.int32)[:, None] - PADDING_ROW
        return np.asarray(self.form.pad(numbers))[:, 0] + PADDING_ROW

    def slice(self, tensors: Tensors, index: tuple[slice, ...], dtype: Any) -> np.ndarray:
        """Reads a slice of the stored array, and nothing else."""
        out = np.zeros([len(range(size)[part]) for size, part in zip(self.stored.shape, index, strict=True)], dtype)
        layers, index = (index[0], index[1:]) if self.stacked else (slice(None), index)
        for name, target in zip(self.names(layers), out if self.stacked else out[None], strict=True):
            for start, first, count in _consecutive(self.rows[index[0]]):
                read = (slice(self.first + first, self.first + first + count), *index[1:])
                value = tensors.read(name, *(read[::-1] if self.transposed else read))
                target[start : start + count] = value.T if self.transposed else value
        return out

    def load(self, tensors: Tensors, dtype: Any) -> jax.Array:
        """Loads the stored array, one device after another: the host holds one device's shard at a time."""
        shape, sharding = self.stored.shape, self.stored.sharding
        assert sharding is not None
        slices = sharding.addressable_devices_indices_map(shape)
        arrays = [jax.device_put(self.slice(tensors, index or (), dtype), device) for device, index in slices.items()]
        return jax.make_array_from_single_device_arrays(shape, sharding, arrays)

    def tensors(self, array: jax.Array, dtype: Any) -> Iterator[tuple[str, np.ndarray]]:
        """Yields (name, part of the tensor), one at a time on the host. It communicates: all processes must call it."""
        real = self.rows != PADDING_ROW
        for number, name in enumerate(self.names()):
            stored = _on_host(array[number] if self.stacked else array)
            logical = np.empty((int(real.sum()), *stored.shape[1:]), dtype)
            logical[self.rows[real]] = stored[real]
            yield name, np.ascontiguousarray(logical.T) if self.transposed else logical


def _consecutive(rows: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """Yields (first stored row, first logical row, count) for each range of consecutive logical rows."""
    starts = np.flatnonzero(np.diff(rows) != 1) + 1
    for stored in np.split(np.arange(len(rows)), starts):
        if rows[stored[0]] != PADDING_ROW:
            yield int(stored[0]), int(rows[stored[0]]), len(stored)


def _on_host(array: jax.Array) -> np.ndarray:
    return np.asarray(array if array.is_fully_addressable else multihost_utils.process_allgather(array, tiled=True))


def param_tree(config: ModelConfig, placement: Placement, *, fused: bool = False) -> dict:
    """The tree of a Transformer's parameters, with a `Param` for each.

    `fused`: whether a tensor holds queries, keys and values, and another one gate and up of the MLP.
    """
    config.refuse_experts("a Hugging Face folder")
    model = nnx.eval_shape(lambda: Transformer(config, placement=placement, rngs=nnx.Rngs(params=0)))
    state, names = nnx.state(model), tensor_names(config, fused)

    def param(path: Any, stored: jax.ShapeDtypeStruct, form: Padding) -> Param:
        key = ".".join(entry.key for entry in path)
        return Param(stored, *names[key], key.startswith("layers."), key in TRANSPOSED, form)

    tree = jax.tree_util.tree_map_with_path(param, nnx.to_pure_dict(state), paddings(state))
    first: dict[tuple[str, int], int] = {}
    for group in groups(tree):
        rows = 0
        for part in group:
            first[part.name, part.place] = rows
            rows += part.shape[0]
    return jax.tree.map(lambda param: dataclasses.replace(param, first=first[param.name, param.place]), tree)


def groups(params: dict) -> list[list[Param]]:
    """The parameters of each tensor, in the order of their rows."""
    by_name: dict[str, list[Param]] = {}
    for param in jax.tree.leaves(params):
        by_name.setdefault(param.name, []).append(param)
    return [sorted(group, key=lambda param: param.place) for group in by_name.values()]


def shapes(params: dict) -> Iterator[tuple[str, Shape]]:
    """Yields the name and shape of each tensor."""
    for group in groups(params):
        rows, shape = sum(param.shape[0] for param in group), group[0].shape
        yield from ((name, (rows, *shape[1:])) for name in group[0].names())


def tensors(params: dict, arrays: dict, dtype: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (name, tensor) in the order of `shapes`, one at a time. It communicates, so all processes must call it."""
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(arrays), strict=True)
    by_part = {(param.name, param.place): array for param, array in pairs}
    for group in groups(params):
        arrays_of_group = (param.tensors(by_part[param.name, param.place], dtype) for param in group)
        for parts in zip(*arrays_of_group, strict=True):
            (name, tensor), *more = parts
            yield name, np.concatenate([tensor, *(part for _, part in more)]) if more else tensor
