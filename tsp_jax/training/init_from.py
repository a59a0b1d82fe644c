"""The initial state of a run: random weights, or those of a Hugging Face folder (`init_from`)."""

import dataclasses
from pathlib import Path
from typing import Any

import jax

from tsp_jax.config import Config, ModelConfig, RopeScaling
from tsp_jax.errors import ConfigError
from tsp_jax.hf.byte_tokenizer import ByteTokenizer
from tsp_jax.hf.weights import check_folder, load_params, read_config
from tsp_jax.layout import Placement
from tsp_jax.text.encode import BYTES
from tsp_jax.text.sources import is_text
from tsp_jax.training.checkpoint import saved_steps
from tsp_jax.training.corpus import name_tokenizer
from tsp_jax.training.frozen import init_adapters
from tsp_jax.training.step import TrainProgram, TrainState

FREE = ("init_std", "balance_loss", "z_loss")
"""fields of ModelConfig that a folder of weights does not determine"""
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
"""files of a tokenizer; if a folder has one of them, the tokens of its model are not bytes"""


def check_init_from(config: Config, placement: Placement) -> list[str]:
    """Raises ConfigError if the folder `init_from` does not suit the configured model or the data.

    The folder must have all weights of the configured model, and its model must use the same tokens as the data. Only
    RoPE may differ, if it is that of a longer context: a scaling, or a larger base. Returns a line about each such
    difference. Checks nothing if the run begins from scratch, or is resumed, since it then needs no initial weights,
    unless they are frozen.
    """
    resumed = not config.lora.rank and saved_steps(Path(config.workdir) / "checkpoints")
    if not config.weights_from or resumed:
        return []
    model = read_config(config.init_from)
    here, there, extended = map(_fields, (config.model, model, _extended(model, config.model)))
    different = [name for name, value in extended.items() if here[name] != value]
    if different:
        name = different[0]
        raise ConfigError(
            f"model.{name}={here[name]}, the checkpoint in init_from={config.init_from} has {there[name]}; "
            f"use init_from={config.init_from} as the configuration, or "
            f"{' '.join(_flag(name, there[name]) for name in different)}"
        )
    check_folder(config.init_from, config.model, placement)
    _check_tokens(config)
    return [
        f"model.{name}={here[name]}, was {there[name]} in init_from={config.init_from}"
        for name in there
        if here[name] != there[name]
    ]


def _check_tokens(config: Config) -> None:
    """Raises ConfigError if the data is text, and its tokens are not the model's."""
    data, folder = name_tokenizer(config).data, Path(config.init_from)
    texts = [part.files for _, _, part in data.sources() if is_text(part)]
    if not texts:
        return
    if data.tokenizer == config.init_from and not (folder / "tokenizer.json").exists():
        raise ConfigError(
            f"init_from={config.init_from} has no tokenizer.json, and data.files={texts[0]!r} is text; "
            "use --data.tokenizer <a folder with the model's tokenizer.json>, or .npy files of token ids"
        )
    found = [name for name in TOKENIZERS if (folder / name).exists()]
    larger = config.model.vocab_size > 2 * ByteTokenizer.vocab_size  # up to that, bytes may have been padded
    if data.tokenizer == BYTES and (found or larger):
        reason = found[0] if found else f"a vocabulary of {config.model.vocab_size:,}"
        raise ConfigError(
            f"data.tokenizer=bytes makes a token of each byte; the model in init_from={config.init_from} has {reason}, "
            "so its tokens are others; leave data.tokenizer out, or use .npy files of its token ids"
        )


def init_state(config: Config, program: TrainProgram, placement: Placement, frozen: dict) -> TrainState:
    """Returns the state of step 0, with the weights of `init_from` if it is set, or with adapters on frozen weights."""
    if frozen:
        return init_adapters(program, frozen)
    state = program.init()
    if not config.weights_from:
        return state
    jax.tree.map(lambda random: random.delete(), state.params)  # so that not both are in memory
    return state._replace(params=load_params(config.init_from, config.model, placement))


def _extended(there: ModelConfig, here: ModelConfig) -> ModelConfig:
    """A folder's model, with the RoPE of a longer context that the configuration asks for, if it asks for one."""
    if here.rope_theta > there.rope_theta:
        there = dataclasses.replace(there, rope_theta=here.rope_theta)
    if here.rope_scaling.kind == "none":
        return there
    scaling = dataclasses.replace(here.rope_scaling, fraction=there.rope_scaling.fraction)
    return dataclasses.replace(there, rope_scaling=scaling)


def _fields(model: Any, owner: str = "") -> dict[str, Any]:
    """Dotted name -> value, for each field that is not in `FREE`."""
    fields = {}
    for field in dataclasses.fields(model):
        value = getattr(model, field.name)
        if isinstance(value, RopeScaling):
            value = value.used()
        if dataclasses.is_dataclass(value):
            fields.update(_fields(value, f"{owner}{field.name}."))
        elif field.name not in FREE:
            fields[owner + field.name] = value
    return fields


def _flag(name: str, value: Any) -> str:
    flag = f"model.{name}".replace("_", "-")
    if isinstance(value, bool):
        owner, _, last = flag.rpartition(".")
        return f"--{flag}" if value else f"--{owner}.no-{last}"
    return f"--{flag} {' '.join(map(str, value)) if isinstance(value, tuple) else value}"
