"""Adapters in the format of Hugging Face's peft: adapter_config.json and adapter_model.safetensors.

peft stores A as lora_A [r, inputs] and B as lora_B [outputs, r], and adds (lora_alpha / r) B A, as we do.
Source: peft 0.21, tuners/lora/config.py and utils/save_and_load.py.

Dims: L layers, D model, r rank.
"""

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import msgspec
from flax import nnx
from jax.experimental import multihost_utils

from tsp_jax.config import DType, LoraConfig, ModelConfig, Target, check_local
from tsp_jax.errors import ConfigError, import_optional
from tsp_jax.files import Finite, Size, read_json
from tsp_jax.hf.names import Part
from tsp_jax.hf.params import Param, shapes, tensors
from tsp_jax.hf.tensors import Tensors, new_folder, write_json
from tsp_jax.layout import Placement
from tsp_jax.models.lora import ROWS_ARE_INPUTS
from tsp_jax.models.transformer import Transformer
from tsp_jax.stored import Padding, paddings

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MODULES: dict[Target, str] = {
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
}  # fmt: skip
"""target -> the module of a layer that has its adapter"""
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bias": ("none",), "init_lora_weights": (True, "gaussian"), "megatron_core": ("megatron.core",),
    "qalora_group_size": (16,),
}  # fmt: skip
"""key of adapter_config.json -> values that change nothing; of any other key, those that are false in Python. Other
initial values than these change the weights under the adapters too"""
_UNUSED = (
    "auto_mapping", "base_model_name_or_path", "inference_mode", "lora_dropout", "peft_version",
    "revision", "task_type",
)  # fmt: skip
"""keys that change nothing that a trained adapter computes"""


class _Config(msgspec.Struct):
    """The keys of adapter_config.json that are used."""

    peft_type: str
    r: Size
    lora_alpha: Finite
    target_modules: list[str]


def read_adapter_config(folder: str | Path) -> LoraConfig:
    """Reads rank, alpha and targets of adapters.

    Raises:
      ConfigError: the file is missing or broken, or asks for what `tsp_jax.models.lora` does not compute.
    """
    path = Path(folder) / CONFIG
    read, keys = read_json(path, _Config), read_json(path)
    targets: dict[str, Target] = {module.rpartition(".")[2]: name for name, module in MODULES.items()}
    for module in read.target_modules:
        if module not in targets:
            raise ConfigError(f"{path}: target_modules has {module!r:.80}; use only {', '.join(targets)}")
    for key, value in keys.items():
        if key in (*_Config.__struct_fields__[1:], *_UNUSED) or (key == "peft_type" and value == "LORA"):
            continue
        if value and value not in _NEUTRAL.get(key, ()):
            neutral = "LORA" if key == "peft_type" else _NEUTRAL.get(key, ("null",))[0]
            raise ConfigError(
                f"{path}: {key:.80}={value!r:.80} is not supported; use adapters with {key:.80}={neutral}"
            )
    return LoraConfig(
        rank=read.r, alpha=read.lora_alpha, targets=tuple(targets[module] for module in read.target_modules)
    )


def load_adapters(folder: str | Path, config: ModelConfig, lora: LoraConfig, placement: Placement) -> dict:
    """Loads the parameters of a `Transformer`'s adapters, float32 in stored form: target -> {left, right}.

    Args:
      folder: a folder with adapter_config.json and adapter_model.safetensors.
      config: the model under the adapters.
      lora: rank, alpha and targets, which must be those of the folder.
      placement: layout and mesh.

    Raises:
      ConfigError: the adapters are others, belong to another model, or their files are missing or broken.
    """
    there, path = read_adapter_config(folder), Path(folder) / WEIGHTS
    for field in ("rank", "alpha", "targets"):
        if getattr(lora, field) != getattr(there, field):
            raise ConfigError(
                f"lora.{field}={getattr(lora, field)}: the adapters in {folder} have {getattr(there, field)}; use that"
            )
    if not os.path.lexists(path):
        raise ConfigError(f"{folder} has no {WEIGHTS}; use a complete folder of adapters")
    found, tree = Tensors(folder, WEIGHTS), _param_tree(config, lora, placement)
    found.check(shapes(tree), lambda name: False)
    return jax.tree.map(lambda param: param.load(found, jnp.dtype(jnp.float32)), tree)


def save_adapters(
    folder: str | Path, adapters: dict, config: ModelConfig, lora: LoraConfig, placement: Placement, *,
    base: str = "", dtype: DType = "float32",
) -> None:  # fmt: skip
    """Writes adapters as peft does, completely or not at all. All processes must call it; the first one writes.

    Args:
      folder: absent or empty.
      adapters: target -> {left, right} in stored form, the parameters of a `Transformer`'s adapters.
      config: the model under the adapters.
      lora: the adapters' configuration.
      placement: layout and mesh of the adapters.
      base: folder of the model's own weights, which peft loads under the adapters.
      dtype: dtype in the file.

    Raises:
      ConfigError: the folder is not empty, is a URL, or cannot be written.
    """
    check_local("folder", str(folder))
    content = dict(tensors(_param_tree(config, lora, placement), adapters, jnp.dtype(dtype)))
    with new_folder(folder) if jax.process_index() == 0 else nullcontext() as partial:
        if partial:
            import_optional("safetensors.numpy", "hf").save_file(content, partial / WEIGHTS, metadata={"format": "pt"})
            (partial / WEIGHTS).chmod(partial.stat().st_mode & 0o666)  # save_file gives no permission to others
            write_json(partial / CONFIG, _config_json(lora, base))
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"saved {folder}")


def _config_json(lora: LoraConfig, base: str) -> dict[str, Any]:
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base or None, "bias": "none",
        "r": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": 0.0, "fan_in_fan_out": False, "inference_mode": True,
        "target_modules": [MODULES[name].rpartition(".")[2] for name in lora.targets],
    }  # fmt: skip


def _param_tree(config: ModelConfig, lora: LoraConfig, placement: Placement) -> dict:
    """The tree of a Transformer's adapters, with a `Param` for each factor."""
    model = nnx.eval_shape(lambda: Transformer(config, placement=placement, adapters=lora, rngs=nnx.Rngs(params=0)))
    state = nnx.state(model)

    def param(path: Any, stored: jax.ShapeDtypeStruct, form: Padding) -> Param:
        name, side = (entry.key for entry in path)
        transposed = name in ROWS_ARE_INPUTS
        factor = "lora_A" if (side == "left") == transposed else "lora_B"
        return Param(
            stored,
            Part(f"base_model.model.model.layers.{{}}.{MODULES[name]}.{factor}.weight", transposed=transposed),
            stacked=True,
            form=form,
        )

    params, forms = nnx.to_pure_dict(state)["adapters"], paddings(state)["adapters"]
    return jax.tree_util.tree_map_with_path(param, params, forms)
