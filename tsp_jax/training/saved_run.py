"""A run that another command reads: its configuration, and the parameters of one of its checkpoints."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from tsp_jax.config import Config, DType
from tsp_jax.errors import ConfigError
from tsp_jax.files import FileError, check_json, read_json
from tsp_jax.hardware.memory import check_room, memory_bytes, shard_bytes
from tsp_jax.hf.byte_tokenizer import ByteTokenizer
from tsp_jax.hf.tokenizer import Tokenizer, read_stop_tokens
from tsp_jax.layout import Placement
from tsp_jax.models.lora import merge
from tsp_jax.stored import abstract_logical, in_dtype, to_stored
from tsp_jax.text.encode import BYTES
from tsp_jax.training.checkpoint import Meta, saved_steps
from tsp_jax.training.checkpoint_manifest import find_damage
from tsp_jax.training.frozen import check_digest, digest_weights, load_frozen
from tsp_jax.training.step import make_program

CHECKPOINTS = "checkpoints"


def is_run(folder: str | Path) -> bool:
    """Whether a folder is the working directory of a run, and not a Hugging Face folder."""
    return (Path(folder) / CHECKPOINTS).is_dir() or (Path(folder) / "metrics.jsonl").is_file()


def read_run(workdir: str | Path) -> Config:
    """Reads the configuration of a run.

    Raises:
      ConfigError: `config.json` is missing or damaged, or has a field that this version does not have.
    """
    path = Path(workdir) / "config.json"
    advice = "use the working directory of a run of this version"
    content = read_json(path, advice=advice)
    config = check_json(content, str(path), Config, advice)
    for name in _names(content) - _names(dataclasses.asdict(config)):
        raise FileError(f"{path}: {name:.80} is not a field of this version; {advice}")
    return config


def _names(content: Any, owner: str = "") -> set[str]:
    """Dotted names of all keys."""
    if not isinstance(content, dict):
        return set()
    nested = (_names(value, f"{owner}{key}.") for key, value in content.items())
    return {f"{owner}{key}" for key in content}.union(*nested)


def find_step(workdir: str | Path, step: int = 0) -> int:
    """Returns the step of an undamaged checkpoint of a run: `step`, or the newest one if `step` is 0.

    Raises:
      ConfigError: there is no checkpoint of that step, or it is damaged.
    """
    folder = Path(workdir) / CHECKPOINTS
    steps = saved_steps(folder)
    if not steps:
        raise ConfigError(f"{workdir} has no checkpoint; use the working directory of a run that saved one")
    if step and step not in steps:
        raise ConfigError(f"step={step} has no checkpoint in {workdir}; use one of {', '.join(map(str, steps))}")
    chosen = step or steps[-1]
    if damage := find_damage(folder / str(chosen)):
        others = ", ".join(str(other) for other in steps if other != chosen) or "another run"
        raise ConfigError(f"checkpoint {chosen} of {workdir} is damaged: {damage}; use step={others}")
    return chosen


def tokenizer_folder(config: Config) -> str | None:
    """Returns the folder of a run's tokenizer; None if its tokens are bytes, or ids that no tokenizer is known for."""
    return None if config.data.tokenizer in ("", BYTES) else config.data.tokenizer


def run_tokenizer(config: Config) -> tuple[Tokenizer | ByteTokenizer | None, tuple[int, ...]]:
    """Returns the tokenizer of a run, None if none is known, and the tokens that end a text.

    Raises:
      ConfigError: the folder of the tokenizer is not there any more, or is broken.
    """
    if config.data.tokenizer == BYTES:
        return ByteTokenizer(), ()
    folder = tokenizer_folder(config)
    return (Tokenizer(folder), read_stop_tokens(folder)) if folder else (None, ())


def load_run_params(
    workdir: str | Path, config: Config, placement: Placement, step: int, dtype: DType = "float32"
) -> dict:
    """Loads the model of a checkpoint onto a placement, which need not be the run's; adapters are merged.

    The optimizer's state is not read. Each device reads its own shards.

    Args:
      workdir: working directory of the run.
      config: the run's configuration, as `read_run` returns it.
      placement: layout and mesh of the result.
      step: step of the checkpoint, as `find_step` returns it.
      dtype: dtype of the result; checkpoints hold float32.

    Returns:
      Parameters in stored form, of a model without adapters.

    Raises:
      ConfigError: the parameters do not fit into the devices' memory, or the frozen weights under adapters are missing
        or are not those of the run.
    """
    program = make_program(config, placement)
    adapters = bool(config.lora.rank)
    trained = in_dtype(program.abstract_state.params, "float32" if adapters else dtype)
    nbytes = shard_bytes(trained) + shard_bytes(program.abstract_state.frozen)
    memory = memory_bytes(jax.local_devices())
    check_room(f"on each device {workdir} in {dtype}", nbytes, memory, "use more devices that shard weights")
    params = _restore(Path(workdir) / CHECKPOINTS / str(step), program.paddings.params, trained)
    if not adapters:
        return params
    frozen = load_frozen(config, program, placement)
    meta = read_json(Path(workdir) / CHECKPOINTS / str(step) / "meta.json", Meta)
    check_digest(config, digest_weights(program.paddings.frozen, frozen), meta.frozen, meta.config)
    merged = merge({**frozen, **params}, config.lora, placement)
    return jax.tree.map(lambda array: array.astype(dtype), merged)


def _restore(checkpoint: Path, paddings: Any, stored: Any) -> Any:
    """Reads the trained parameters of a checkpoint into arrays like `stored`."""
    item = {"params": abstract_logical(paddings, stored)}
    arguments = ocp.args.PyTreeRestore(
        item, restore_args=ocp.checkpoint_utils.construct_restore_args(item), partial_restore=True
    )
    with ocp.PyTreeCheckpointer() as reader:
        params = reader.restore((checkpoint / "state").absolute(), args=arguments)["params"]
    if not any(padding.padded for padding in jax.tree.leaves(paddings)):
        return params
    shardings = jax.tree.map(lambda array: array.sharding, stored)
    return jax.jit(lambda params: to_stored(paddings, params), out_shardings=shardings)(params)
