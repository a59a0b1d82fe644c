"""The parameters of a model and the tensors of a Hugging Face folder that hold them, read and written part by part.

Most matrices are [out, in] in a folder, and all are [rows, D] here. So `o_proj` and `down_proj`, whose out is D, are
transposed. Rows keep their order, because both formats rotate the two halves of a head (RoPE). A tensor may hold the
rows of several parameters, one after another or alternately. The rows of experts, one expert after another here, are in
a tensor for each expert or in one whose first dim is the experts. `tsp_jax.hf.names` says which tensor holds what.
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
from tsp_jax.hf.names import Part, tensor_names
from tsp_jax.hf.tensors import Shape, Tensors
from tsp_jax.layout import Placement
from tsp_jax.models.transformer import Transformer
from tsp_jax.stored import ExpertBiasPadding, ExpertPadding, Padding, paddings

PADDING_ROW = -2
"""stands in place of a logical row number where the stored row is padding"""


@dataclasses.dataclass(frozen=True)
class Param:
    """A parameter and the tensors of a folder that hold it: one, or one for each layer, or each layer's experts."""

    stored: jax.ShapeDtypeStruct
    """shape and sharding of the stored array"""
    part: Part
    stacked: bool
    """the first dim of the array is L"""
    form: Padding
    first: int = 0
    """row of the tensor that is this parameter's first"""
    step: int = 1
    """rows of the tensor from one of this parameter's to the next"""

    @property
    def experts(self) -> int:
        """E, if the rows are those of experts; else 0."""
        form = self.form.weights if isinstance(self.form, ExpertBiasPadding) else self.form
        return form.experts if isinstance(form, ExpertPadding) else 0

    @property
    def apart(self) -> bool:
        """Whether each expert has its own tensor."""
        return self.part.name.count("{}") > 1

    @property
    def axis(self) -> int:
        """The dim of the tensor that has this parameter's rows."""
        return -1 if self.part.transposed or len(self._logical) == 1 else -2

    def names(self) -> Iterator[str]:
        """Yields the names of the tensors. It makes no list, because a config.json may claim any number of layers."""
        experts = range(self.experts if self.apart else 1)
        return (self.part.name.format(layer, expert) for layer in self._layers() for expert in experts)

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
        shape = shape[::-1] if self.part.transposed else shape
        return (self.experts, *shape) if self.experts and not self.apart else shape

    @functools.cached_property
    def rows(self) -> np.ndarray:
        """The logical row of each stored row, or PADDING_ROW. Computed by padding the row numbers.

        [stored rows]; of experts' biases, each of which is a row without a width, [stored rows, D].
        """
        numbers = jnp.arange(self._logical[0], dtype=jnp.int32) - PADDING_ROW
        width = (1,) * (len(self._logical) - 1)
        padded = np.asarray(self.form.pad(numbers.reshape(-1, *width)))
        return padded.reshape(padded.shape[: padded.ndim - len(width)]) + PADDING_ROW

    def slice(self, tensors: Tensors, index: tuple[slice, ...], dtype: Any) -> np.ndarray:
        """Reads a slice of the stored array, and nothing else."""
        out = np.zeros([len(range(size)[part]) for size, part in zip(self.stored.shape, index, strict=True)], dtype)
        layers, index = (index[0], index[1:]) if self.stacked else (slice(None), index)
        rows_of_expert = self._logical[0] // (self.experts or 1)
        rows, width = self.rows[index[: self.rows.ndim]], index[self.rows.ndim :]
        for layer, target in zip(self._layers(layers), out if self.stacked else out[None], strict=True):
            target = target.reshape(rows.size, *target.shape[rows.ndim :])
            for start, first, count in _consecutive(rows.reshape(-1), rows_of_expert):
                expert, first = divmod(first, rows_of_expert)
                begin = self.first + first * self.step
                read = (slice(begin, begin + (count - 1) * self.step + 1, self.step), *width)
                read = read[::-1] if self.part.transposed else read
                name = self.part.name.format(layer, expert)
                if self.experts and not self.apart:
                    value = tensors.read(name, slice(expert, expert + 1), *read)[0]
                else:
                    value = tensors.read(name, *read)
                target[start : start + count] = value.T if self.part.transposed else value
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
            parts = parts.swapaxes(1, 2) if self.part.transposed else parts
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
        return Param(stored, names[key], key.startswith("layers."), form)

    tree = jax.tree_util.tree_map_with_path(param, nnx.to_pure_dict(state), paddings(state))
    rows: dict[Part, dict[str, int]] = {}
    for group in groups(tree):
        first = 0
        for member in group:
            interleaved = member.part.interleaved
            rows[member.part] = {"first": member.part.place, "step": len(group)} if interleaved else {"first": first}
            first += member.shape[member.axis] if len(group) > 1 else 0
    return jax.tree.map(lambda param: dataclasses.replace(param, **rows[param.part]), tree)


def groups(params: dict) -> list[list[Param]]:
    """The parameters of each tensor, in the order of their rows."""
    by_name: dict[str, list[Param]] = {}
    for param in jax.tree.leaves(params):
        by_name.setdefault(param.part.name, []).append(param)
    return [sorted(group, key=lambda param: param.part.place) for group in by_name.values()]


def shapes(params: dict) -> Iterator[tuple[str, Shape]]:
    """Yields the name and shape of each tensor."""
    for group in groups(params):
        shape = list(group[0].shape)
        if len(group) > 1:
            shape[group[0].axis] = sum(param.shape[param.axis] for param in group)
        yield from ((name, tuple(shape)) for name in group[0].names())


def tensors(params: dict, arrays: dict, dtype: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (name, tensor) in the order of `shapes`, one at a time. It communicates, so all processes must call it."""
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(arrays), strict=True)
    by_part = {param.part: array for param, array in pairs}
    for group in groups(params):
        arrays_of_group = (param.tensors(by_part[param.part], dtype) for param in group)
        for named in zip(*arrays_of_group, strict=True):
            names, parts = zip(*named, strict=True)
            yield names[0], _joined(group[0], parts)


def _joined(param: Param, parts: tuple[np.ndarray, ...]) -> np.ndarray:
    """The tensor of several parameters' parts, the first of which is that of `param`."""
    if len(parts) == 1:
        return parts[0]
    axis = parts[0].ndim + param.axis
    if not param.part.interleaved:
        return np.concatenate(parts, axis=axis)
    shape = parts[0].shape
    return np.stack(parts, axis=axis + 1).reshape(*shape[:axis], -1, *shape[axis + 1 :])
