"""The parameters of a model and the tensors of a Hugging Face folder that hold them, read and written part by part.

Matrices are [out, in] in a folder, and [rows, D] here. So `o_proj` and `down_proj`, whose out is D, are transposed.
Rows keep their order, because both formats rotate the two halves of a head (RoPE). A tensor may hold the rows of
several parameters, one after another (`FUSED`). The rows of experts, one expert after another here, are in a tensor
for each expert or in one whose first dim is the experts (`EXPERTS`).
Dims: D model, E experts, F ffn, H head, L layers, V vocabulary; rows are heads x H, F, E x F or V.
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
from tsp_jax.hf.families import FAMILIES, Family
from tsp_jax.hf.names import tensor_names
from tsp_jax.hf.tensors import Shape, Tensors
from tsp_jax.layout import Placement
from tsp_jax.models.transformer import Transformer
from tsp_jax.stored import ExpertPadding, Padding, paddings

TRANSPOSED = ("layers.attention.w_o", "layers.mlp.w_down")
PADDING_ROW = -2
"""stands in place of a logical row number where the stored row is padding"""


@dataclasses.dataclass(frozen=True)
class Param:
    """A parameter and the tensors of a folder that hold it: one, or one for each layer, or each layer's experts."""

    stored: jax.ShapeDtypeStruct
    """shape and sharding of the stored array"""
    name: str
    """name of the tensor; if every layer has its own, {} stands for the layer number, a second {} for the expert's"""
    place: int
    """place among the parameters whose rows the tensor holds"""
    stacked: bool
    """the first dim of the array is L"""
    transposed: bool
    form: Padding
    first: int = 0
    """row of the tensor that is this parameter's first"""

    @property
    def experts(self) -> int:
        """E, if the rows are those of experts; else 0."""
        return self.form.experts if isinstance(self.form, ExpertPadding) else 0

    @property
    def apart(self) -> bool:
        """Whether each expert has its own tensor."""
        return self.name.count("{}") > 1

    def names(self) -> Iterator[str]:
        """Yields the names of the tensors. It makes no list, because a config.json may claim any number of layers."""
        experts = range(self.experts if self.apart else 1)
        return (self.name.format(layer, expert) for layer in self._layers() for expert in experts)

    def _layers(self, layers: slice = slice(None)) -> range:
        return range(self.stored.shape[0])[layers] if self.stacked else range(1)

    @functools.cached_property
    def _logical(self) -> Shape:
        """Shape of the rows of a layer, without padding."""
        stored = jax.ShapeDtypeStruct(self.stored.shape[self.stacked :], self.stored.dtype)
        return jax.eval_shape(self.form.unpad, stored).shape

    @functools.cached_property
    def shape(self) -> Shape:
        """Shape of each tensor's part."""
        rows, *width = self._logical
        shape = rows // (self.experts or 1), *width
        shape = shape[::-1] if self.transposed else shape
        return (self.experts, *shape) if self.experts and not self.apart else shape

    @functools.cached_property
    def rows(self) -> np.ndarray:
        """[stored rows]: the logical row of each stored row, or PADDING_ROW. Computed by padding the row numbers."""
        numbers = jnp.arange(self._logical[0], dtype=jnp.int32)[:, None] - PADDING_ROW
        return np.asarray(self.form.pad(numbers))[:, 0] + PADDING_ROW

    def slice(self, tensors: Tensors, index: tuple[slice, ...], dtype: Any) -> np.ndarray:
        """Reads a slice of the stored array, and nothing else."""
        out = np.zeros([len(range(size)[part]) for size, part in zip(self.stored.shape, index, strict=True)], dtype)
        layers, index = (index[0], index[1:]) if self.stacked else (slice(None), index)
        rows_of_expert = self._logical[0] // (self.experts or 1)
        for layer, target in zip(self._layers(layers), out if self.stacked else out[None], strict=True):
            for start, first, count in _consecutive(self.rows[index[0]], rows_of_expert):
                expert, first = divmod(first, rows_of_expert)
                read = (slice(self.first + first, self.first + first + count), *index[1:])
                read = read[::-1] if self.transposed else read
                name = self.name.format(layer, expert)
                if self.experts and not self.apart:
                    value = tensors.read(name, slice(expert, expert + 1), *read)[0]
                else:
                    value = tensors.read(name, *read)
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
        real, names = self.rows != PADDING_ROW, self.names()
        for layer in self._layers():
            stored = _on_host(array[layer] if self.stacked else array)
            logical = np.empty(self._logical, dtype)
            logical[self.rows[real]] = stored[real]
            parts = logical.reshape(self.experts or 1, -1, *self._logical[1:])
            parts = parts.swapaxes(1, 2) if self.transposed else parts
            for part in parts if self.apart or not self.experts else parts[None]:
                yield next(names), np.ascontiguousarray(part)


def _consecutive(rows: np.ndarray, most: int) -> Iterator[tuple[int, int, int]]:
    """Yields (first stored row, first logical row, count) for each range of consecutive logical rows.

    A range crosses no multiple of `most` logical rows.
    """
    starts = np.flatnonzero((np.diff(rows) != 1) | (rows[1:] % most == 0)) + 1
    for stored in np.split(np.arange(len(rows)), starts):
        if rows[stored[0]] != PADDING_ROW:
            yield int(stored[0]), int(rows[stored[0]]), len(stored)


def _on_host(array: jax.Array) -> np.ndarray:
    return np.asarray(array if array.is_fully_addressable else multihost_utils.process_allgather(array, tiled=True))


def abstract_state(config: ModelConfig, placement: Placement) -> nnx.State:
    """Shapes and shardings of a Transformer's parameters, and their paddings."""
    return nnx.state(nnx.eval_shape(lambda: Transformer(config, placement=placement, rngs=nnx.Rngs(params=0))))


def param_tree(config: ModelConfig, placement: Placement, family: Family = FAMILIES["llama"]) -> dict:
    """The tree of a Transformer's parameters, with a `Param` for each; `family` names the tensors."""
    state, names = abstract_state(config, placement), tensor_names(config, family)

    def param(path: Any, stored: jax.ShapeDtypeStruct, form: Padding) -> Param:
        key = ".".join(entry.key for entry in path)
        return Param(stored, *names[key], key.startswith("layers."), key in TRANSPOSED, form)

    tree = jax.tree_util.tree_map_with_path(param, nnx.to_pure_dict(state), paddings(state))
    first: dict[tuple[str, int], int] = {}
    for group in groups(tree):
        rows = 0
        for part in group:
            first[part.name, part.place] = rows
            rows += part.shape[-2] if len(group) > 1 else 0
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
        shape = group[0].shape
        if len(group) > 1:
            shape = (*shape[:-2], sum(param.shape[-2] for param in group), shape[-1])
        yield from ((name, shape) for name in group[0].names())


def tensors(params: dict, arrays: dict, dtype: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (name, tensor) in the order of `shapes`, one at a time. It communicates, so all processes must call it."""
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(arrays), strict=True)
    by_part = {(param.name, param.place): array for param, array in pairs}
    for group in groups(params):
        arrays_of_group = (param.tensors(by_part[param.name, param.place], dtype) for param in group)
        for parts in zip(*arrays_of_group, strict=True):
            (name, tensor), *more = parts
            yield name, np.concatenate([tensor, *(part for _, part in more)], axis=-2) if more else tensor
