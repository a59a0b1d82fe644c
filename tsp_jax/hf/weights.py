"""Load and save weights of Hugging Face folders (`tsp_jax.hf.families`); each device reads its own shard."""

import shutil
from contextlib import nullcontext
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from tsp_jax.config import DType, ModelConfig, check_local
from tsp_jax.errors import ConfigError
from tsp_jax.files import read_json
from tsp_jax.hf.config import config_json, read_config, read_model_type, read_quantization
from tsp_jax.hf.families import FAMILIES
from tsp_jax.hf.mxfp4 import Mxfp4Tensors
from tsp_jax.hf.names import EMBEDDING, HEAD
from tsp_jax.hf.params import abstract_state, param_tree, shapes, tensors
from tsp_jax.hf.tensors import MAX_FILE_BYTES, Tensors, new_folder, write_json, write_tensors
from tsp_jax.layout import Placement
from tsp_jax.stored import in_dtype

__all__ = ["abstract_params", "check_folder", "load_params", "read_config", "save_params"]

COPIED = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json",
)  # fmt: skip
"""files beside the weights that an export copies from the source folder"""


def abstract_params(config: ModelConfig, placement: Placement, dtype: jax.typing.DTypeLike) -> dict:
    """Returns shapes and shardings of what `load_params` returns."""
    return in_dtype(nnx.to_pure_dict(abstract_state(config, placement)), dtype)


def check_folder(folder: str | Path, config: ModelConfig, placement: Placement) -> Tensors:
    """Opens and checks a model's weights.

    It reads only the headers. If the model is tied and the folder has an output head, it also compares that head with
    the embedding.

    Raises:
      ConfigError: a file or tensor is missing, is broken, has another shape, or is not part of the model. Also if the
        model is tied, but the folder's head differs from the embedding: transformers would use that head.
    """

    def ignored(name: str) -> bool:
        return name.endswith("rotary_emb.inv_freq") or (config.tie_embeddings and name == HEAD)

    found = Mxfp4Tensors(folder) if read_quantization(folder) == "mxfp4" else Tensors(folder)
    found.check(shapes(_folder_tree(folder, config, placement)), ignored)
    if config.tie_embeddings and HEAD in found.paths and not found.equal(HEAD, EMBEDDING):
        raise ConfigError(
            f"{found.paths[HEAD]}: {HEAD} is not {EMBEDDING}, as tie_word_embeddings=true says; "
            "use tie_word_embeddings=false in config.json"
        )
    return found


def _folder_tree(folder: str | Path, config: ModelConfig, placement: Placement) -> dict:
    """The tree of parameters, with the names of tensors that the folder's family has."""
    return param_tree(config, placement, FAMILIES[read_model_type(folder)])


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
    found, tree = check_folder(folder, config, placement), _folder_tree(folder, config, placement)
    return jax.tree.map(lambda param: param.load(found, jnp.dtype(dtype)), tree)


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
      source: folder whose tokenizer and special token ids are copied, and whose family is kept if it describes the
        model.
      max_file_bytes: largest size of a file. The host holds the tensors of one file at a time.

    Raises:
      ConfigError: the folder is not empty, is a URL, or cannot be written, or no family describes the model.
    """
    check_local("folder", str(folder))
    carried = read_json(Path(source) / "config.json") if source else None
    content = config_json(config, dtype, carried)
    tree = param_tree(config, placement, FAMILIES[content["model_type"]])
    nbytes = {name: int(np.prod(shape)) * jnp.dtype(dtype).itemsize for name, shape in shapes(tree)}
    with new_folder(folder) if jax.process_index() == 0 else nullcontext() as partial:
        write_tensors(partial, nbytes, tensors(tree, params, jnp.dtype(dtype)), max_file_bytes)
        if partial:
            write_json(partial / "config.json", content)
            for file in (Path(source) / name for name in COPIED) if source else ():
                if file.is_file():
                    shutil.copy(file, partial)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"saved {folder}")
