"""Weights of Hugging Face folders (Llama, Mistral, Qwen3), in and out, each device its own slice.

Their RoPE turns halves against each other as ours does, so no row moves. Their [out, in] matrices are our [rows, D]
where rows go out; `o_proj` and `down_proj`, where rows come in, are transposed. Dims: L layers, D model, H head, V
vocabulary; rows are heads x H or F.
"""

import dataclasses
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from tsp_jax.config import DType, ModelConfig
from tsp_jax.errors import ConfigError
from tsp_jax.heads import HeadPadding, NoPadding, paddings
from tsp_jax.hf.config import config_json, read_config, read_json
from tsp_jax.hf.files import MAX_FILE_BYTES, Shape, Tensors, new_folder, write_json, write_tensors
from tsp_jax.layout import Placement
from tsp_jax.models.transformer import Transformer

__all__ = ["check_folder", "load_params", "read_config", "save_params"]

NAMES = {
    "embed.table": "model.embed_tokens.weight",
    "layers.attention_norm.scale": "model.layers.{}.input_layernorm.weight",
    "layers.attention.w_q": "model.layers.{}.self_attn.q_proj.weight",
    "layers.attention.w_k": "model.layers.{}.self_attn.k_proj.weight",
    "layers.attention.w_v": "model.layers.{}.self_attn.v_proj.weight",
    "layers.attention.w_o": "model.layers.{}.self_attn.o_proj.weight",
    "layers.attention.q_norm": "model.layers.{}.self_attn.q_norm.weight",
    "layers.attention.k_norm": "model.layers.{}.self_attn.k_norm.weight",
    "layers.mlp_norm.scale": "model.layers.{}.post_attention_layernorm.weight",
    "layers.mlp.w_gate": "model.layers.{}.mlp.gate_proj.weight",
    "layers.mlp.w_up": "model.layers.{}.mlp.up_proj.weight",
    "layers.mlp.w_down": "model.layers.{}.mlp.down_proj.weight",
    "final_norm.scale": "model.norm.weight",
    "head.table": "lm_head.weight",
}
"""ours -> theirs, with the layer's number in braces"""
TRANSPOSED = ("layers.attention.w_o", "layers.mlp.w_down")
COPIED = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json",
)  # fmt: skip
"""files beside the weights that an export takes along"""
NOWHERE = -2
"""stored row of no logical one"""


@dataclasses.dataclass(frozen=True)
class _Param:
    """One of our arrays, and the tensors of theirs that it is made of: one, or one of each layer."""

    stored: jax.ShapeDtypeStruct
    """with its sharding"""
    names: list[str]
    stacked: bool
    transposed: bool
    rows: np.ndarray
    """[stored rows] -> logical row, or NOWHERE"""

    @property
    def shape(self) -> Shape:
        """Of each of their tensors."""
        ours = (int((self.rows != NOWHERE).sum()), *self.stored.shape[1 + self.stacked :])
        return ours[::-1] if self.transposed else ours

    def slice(self, tensors: Tensors, index: tuple[slice, ...], dtype: Any) -> np.ndarray:
        """A slice of our array; reads only what is in it."""
        out = np.zeros([len(range(n)[cut]) for n, cut in zip(self.stored.shape, index, strict=True)], dtype)
        layers, index = (index[0], index[1:]) if self.stacked else (slice(None), index)
        for name, target in zip(self.names[layers], out if self.stacked else out[None], strict=True):
            for start, first, count in _runs(self.rows[index[0]]):
                read = (slice(first, first + count), *index[1:])
                piece = tensors.read(name, *(read[::-1] if self.transposed else read))
                target[start : start + count] = piece.T if self.transposed else piece
        return out

    def load(self, tensors: Tensors, dtype: Any) -> jax.Array:
        """Our array, built a device at a time, so that the host holds one device's slice."""
        shape, sharding = self.stored.shape, self.stored.sharding
        assert sharding is not None
        slices = sharding.addressable_devices_indices_map(shape)
        arrays = [jax.device_put(self.slice(tensors, index or (), dtype), device) for device, index in slices.items()]
        return jax.make_array_from_single_device_arrays(shape, sharding, arrays)

    def tensors(self, array: jax.Array, dtype: Any) -> Iterator[tuple[str, np.ndarray]]:
        """(name, tensor) of theirs, one at a time on the host. A collective where there are several processes."""
        real = self.rows != NOWHERE
        for number, name in enumerate(self.names):
            stored = _on_host(array[number] if self.stacked else array)
            logical = np.empty((int(real.sum()), *stored.shape[1:]), dtype)
            logical[self.rows[real]] = stored[real]
            yield name, np.ascontiguousarray(logical.T) if self.transposed else logical


def _runs(rows: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """(start, first logical row, count) of consecutive logical rows."""
    cuts = np.flatnonzero(np.diff(rows) != 1) + 1
    for run in np.split(np.arange(len(rows)), cuts):
        if rows[run[0]] != NOWHERE:
            yield int(run[0]), int(rows[run[0]]), len(run)


def _on_host(array: jax.Array) -> np.ndarray:
    return np.asarray(array if array.is_fully_addressable else multihost_utils.process_allgather(array, tiled=True))


def _param_tree(config: ModelConfig, placement: Placement) -> dict:
    """Like the parameters of a Transformer, a `_Param` each."""
    _check_divides(config, placement)
    model = nnx.eval_shape(lambda: Transformer(config, placement=placement, rngs=nnx.Rngs(params=0)))
    state = nnx.state(model)

    def param(path: Any, stored: jax.ShapeDtypeStruct, form: NoPadding | HeadPadding) -> _Param:
        key = ".".join(entry.key for entry in path)
        stacked = key.startswith("layers.")
        names = [NAMES[key].format(layer) for layer in range(config.num_layers)] if stacked else [NAMES[key]]
        return _Param(stored, names, stacked, key in TRANSPOSED, _logical_rows(stored.shape[stacked], form))

    return jax.tree_util.tree_map_with_path(param, nnx.to_pure_dict(state), paddings(state))


def _logical_rows(count: int, form: NoPadding | HeadPadding) -> np.ndarray:
    """[stored rows] -> logical row, or NOWHERE; from padding the numbers of the logical rows."""
    logical = jax.eval_shape(form.unpad, jax.ShapeDtypeStruct((count, 1), jnp.int32)).shape[0]
    numbers = jnp.arange(logical, dtype=jnp.int32)[:, None] - NOWHERE
    return np.asarray(form.pad(numbers))[:, 0] + NOWHERE


def _check_divides(config: ModelConfig, placement: Placement) -> None:
    """Sizes of given weights cannot be changed, so it is the mesh that must fit."""
    for field, dim in (("vocab_size", "vocab"), ("d_ff", "mlp")):
        value, shards = getattr(config, field), placement.size(dim)
        if value % shards:
            works = max(n for n in range(1, shards) if value % n == 0)
            axes = ",".join(getattr(placement.layout, dim))
            raise ConfigError(f"{field}={value} of these weights is not divisible by {shards} over {axes}; use {works}")


def check_folder(folder: str | Path, config: ModelConfig, placement: Placement) -> Tensors:
    """Opens the weights of a model; reads headers alone.

    Raises:
      ConfigError: a file or tensor is missing, broken, of another shape, or unknown to the model.
    """
    tensors = Tensors(folder)
    tensors.check(_shapes(_param_tree(config, placement)), lambda name: _ignored(name, config))
    return tensors


def _shapes(params: dict) -> dict[str, Shape]:
    return {name: param.shape for param in jax.tree.leaves(params) for name in param.names}


def _ignored(name: str, config: ModelConfig) -> bool:
    """Tensors that some folders hold besides the weights."""
    return name.endswith("rotary_emb.inv_freq") or (config.tie_embeddings and name == NAMES["head.table"])


def load_params(
    folder: str | Path, config: ModelConfig, placement: Placement, dtype: jax.typing.DTypeLike = jnp.float32
) -> dict:
    """The parameters of a `Transformer` of this configuration, in stored form, from a Hugging Face folder.

    Each device's slice is read for itself; the host holds one slice of one array at a time.

    Args:
      folder: with model.safetensors, or several files and their index.
      config: as `read_config` gives it.
      placement: layout and mesh.
      dtype: of the parameters, whatever that of the files.

    Raises:
      ConfigError: as `check_folder`; or the mesh does not divide the model's sizes.
    """
    tensors = check_folder(folder, config, placement)
    return jax.tree.map(lambda param: param.load(tensors, jnp.dtype(dtype)), _param_tree(config, placement))


def save_params(
    folder: str | Path,
    params: dict,
    config: ModelConfig,
    placement: Placement,
    *,
    dtype: DType = "float32",
    source: str | Path | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Writes parameters as a Hugging Face folder, whole or not at all; every process takes part, the first one writes.

    Args:
      folder: does not exist yet, or is empty.
      params: in stored form, as `load_params` or a training state has them.
      config: the model.
      placement: layout and mesh of the parameters.
      dtype: of the files.
      source: folder whose tokenizer and special token ids to take along.
      max_file_bytes: about the size of a file, and what the host holds at a time.

    Raises:
      ConfigError: the folder exists, or cannot be written.
    """
    tree, itemsize = _param_tree(config, placement), jnp.dtype(dtype).itemsize
    carried = read_json(Path(source) / "config.json") if source else None
    pairs = list(zip(jax.tree.leaves(tree), jax.tree.leaves(params), strict=True))
    tensors = (tensor for param, array in pairs for tensor in param.tensors(array, jnp.dtype(dtype)))
    nbytes = {name: int(np.prod(shape)) * itemsize for name, shape in _shapes(tree).items()}
    with new_folder(folder) if jax.process_index() == 0 else nullcontext() as partial:
        write_tensors(partial, nbytes, tensors, max_file_bytes)
        if partial:
            write_json(partial / "config.json", config_json(config, dtype, carried))
            for file in (Path(source) / name for name in COPIED) if source else ():
                if file.is_file():
                    shutil.copy(file, partial)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"saved {folder}")
