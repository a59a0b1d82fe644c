"""Load and save weights of Hugging Face folders (Llama, Mistral, Qwen3); each device reads its own shard.

Matrices are [out, in] in a folder, and [rows, D] here. So `o_proj` and `down_proj`, whose out is D, are transposed.
Rows keep their order, because both formats rotate the two halves of a head (RoPE).
Dims: D model, F ffn, H head, L layers, V vocabulary; rows are heads x H, F or V.
"""

import dataclasses
import functools
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

from tsp_jax.config import DType, ModelConfig, check_local
from tsp_jax.errors import ConfigError
from tsp_jax.files import read_json
from tsp_jax.hf.config import config_json, read_config
from tsp_jax.hf.tensors import MAX_FILE_BYTES, Shape, Tensors, new_folder, write_json, write_tensors
from tsp_jax.layout import Placement
from tsp_jax.models.transformer import Transformer
from tsp_jax.stored import Padding, paddings

__all__ = ["abstract_params", "check_folder", "load_params", "read_config", "save_params"]

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
"""our parameter -> name of the tensor in a folder; {} stands for the layer number"""
TRANSPOSED = ("layers.attention.w_o", "layers.mlp.w_down")
COPIED = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json",
)  # fmt: skip
"""files beside the weights that an export copies from the source folder"""
PADDING_ROW = -2
"""stands in place of a logical row number where the stored row is padding"""


@dataclasses.dataclass(frozen=True)
class _Param:
    """A parameter and the tensors of a folder that hold it: one, or one for each layer."""

    stored: jax.ShapeDtypeStruct
    """shape and sharding of the stored array"""
    name: str
    """name of the tensor; if every layer has its own, {} stands for the layer number"""
    stacked: bool
    """the first dim of the array is L"""
    transposed: bool
    form: Padding

    def names(self, layers: slice = slice(None)) -> Iterator[str]:
        """Yields the names of the tensors. It makes no list, because a config.json may claim any number of layers."""
        numbers = range(self.stored.shape[0])[layers] if self.stacked else range(1)
        return (self.name.format(number) for number in numbers)

    @functools.cached_property
    def shape(self) -> Shape:
        """Shape of each tensor."""
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
                read = (slice(first, first + count), *index[1:])
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
        """Yields (name, tensor), one tensor at a time on the host. It communicates, so all processes must call it."""
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


def _param_tree(config: ModelConfig, placement: Placement) -> dict:
    """The tree of a Transformer's parameters, with a `_Param` for each."""
    model = nnx.eval_shape(lambda: Transformer(config, placement=placement, rngs=nnx.Rngs(params=0)))
    state = nnx.state(model)

    def param(path: Any, stored: jax.ShapeDtypeStruct, form: Padding) -> _Param:
        key = ".".join(entry.key for entry in path)
        return _Param(stored, NAMES[key], key.startswith("layers."), key in TRANSPOSED, form)

    return jax.tree_util.tree_map_with_path(param, nnx.to_pure_dict(state), paddings(state))


def abstract_params(config: ModelConfig, placement: Placement, dtype: jax.typing.DTypeLike) -> dict:
    """Returns shapes and shardings of what `load_params` returns."""

    def abstract(param: _Param) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(param.stored.shape, dtype, sharding=param.stored.sharding)

    return jax.tree.map(abstract, _param_tree(config, placement))


def check_folder(folder: str | Path, config: ModelConfig, placement: Placement) -> Tensors:
    """Opens and checks a model's weights.

    It reads only the headers. If the model is tied and the folder has an output head, it also compares that head with
    the embedding.

    Raises:
      ConfigError: a file or tensor is missing, is broken, has another shape, or is not part of the model. Also if the
        model is tied, but the folder's head differs from the embedding: transformers would use that head.
    """

    def ignored(name: str) -> bool:
        return name.endswith("rotary_emb.inv_freq") or (config.tie_embeddings and name == NAMES["head.table"])

    tensors = Tensors(folder)
    tensors.check(_shapes(_param_tree(config, placement)), ignored)
    head, table = NAMES["head.table"], NAMES["embed.table"]
    if config.tie_embeddings and head in tensors.paths and not tensors.equal(head, table):
        raise ConfigError(
            f"{tensors.paths[head]}: {head} is not {table}, as tie_word_embeddings=true says; "
            "use tie_word_embeddings=false in config.json"
        )
    return tensors


def _shapes(params: dict) -> Iterator[tuple[str, Shape]]:
    """Yields the name and shape of each tensor."""
    for param in jax.tree.leaves(params):
        yield from ((name, param.shape) for name in param.names())


def load_params(
    folder: str | Path, config: ModelConfig, placement: Placement, dtype: jax.typing.DTypeLike = jnp.float32
) -> dict:
    """Loads the parameters of a `Transformer`, in stored form, from a Hugging Face folder.

    The host holds one device's shard of one array at a time.

    Args:
      folder: a folder with model.safetensors, or with several safetensors files and their index.
      config: the model, as returned by `read_config`.
      placement: layout and mesh.
      dtype: dtype of the parameters; that of the files may differ.

    Raises:
      ConfigError: see `check_folder`.
    """
    tensors = check_folder(folder, config, placement)
    return jax.tree.map(lambda param: param.load(tensors, jnp.dtype(dtype)), _param_tree(config, placement))


def save_params(
    folder: str | Path, params: dict, config: ModelConfig, placement: Placement, *,
    dtype: DType = "float32", source: str | Path | None = None, max_file_bytes: int = MAX_FILE_BYTES,
) -> None:  # fmt: skip
    """Writes parameters as a Hugging Face folder, completely or not at all.

    All processes must call it; the first one writes.

    Args:
      folder: absent or empty.
      params: parameters in stored form, as returned by `load_params` or in a training state.
      config: the model.
      placement: layout and mesh of the parameters.
      dtype: dtype in the files.
      source: folder whose tokenizer and special token ids are copied.
      max_file_bytes: largest size of a file. The host holds the tensors of one file at a time.

    Raises:
      ConfigError: the folder is not empty, is a URL, or cannot be written.
    """
    check_local("folder", str(folder))
    config_json(config, dtype)  # refuses models that have no place in it
    tree, itemsize = _param_tree(config, placement), jnp.dtype(dtype).itemsize
    carried = read_json(Path(source) / "config.json") if source else None
    pairs = list(zip(jax.tree.leaves(tree), jax.tree.leaves(params), strict=True))
    tensors = (tensor for param, array in pairs for tensor in param.tensors(array, jnp.dtype(dtype)))
    nbytes = {name: int(np.prod(shape)) * itemsize for name, shape in _shapes(tree)}
    with new_folder(folder) if jax.process_index() == 0 else nullcontext() as partial:
        write_tensors(partial, nbytes, tensors, max_file_bytes)
        if partial:
            write_json(partial / "config.json", config_json(config, dtype, carried))
            for file in (Path(source) / name for name in COPIED) if source else ():
                if file.is_file():
                    shutil.copy(file, partial)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"saved {folder}")
