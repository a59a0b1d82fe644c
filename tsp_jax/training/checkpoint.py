"""Checkpoints of global logical arrays: one saved under any layout and mesh is restored under any other.

Orbax writes a step into a temporary folder and renames it when it is whole, so a failed save damages nothing.
"""

import dataclasses
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec

from tsp_jax.config import Config
from tsp_jax.errors import ConfigError
from tsp_jax.nn import to_logical, to_stored
from tsp_jax.training.step import TrainProgram, TrainState

CONTINUED = ("seed", "batch", "seq_len", "steps", "optimizer", "z_loss")
"""fields that a resumed run should share with the one that saved, for losses to go on as if nothing had happened"""


class Checkpoints:
    """The checkpoints of one working directory.

    Args:
      folder: made if it is missing.
      program: what the state looks like here.
      config: saved with each checkpoint; its model is compared on restore.
      data_digest: of the training text; a run resumed on another text says so.
    """

    def __init__(self, folder: Path, program: TrainProgram, config: Config, data_digest: str):
        self.program, self.config, self.data_digest = program, config, data_digest
        options = ocp.CheckpointManagerOptions(
            max_to_keep=config.keep_checkpoints, enable_async_checkpointing=False, cleanup_tmp_directories=True
        )
        self.manager = ocp.CheckpointManager(folder.absolute(), options=options)
        self._logical = _abstract_logical(program)
        padded = any(form.padded for form in jax.tree.leaves(program.forms))
        self._to_logical = _convert(to_logical, program.forms, self._logical) if padded else _same
        self._to_stored = _convert(to_stored, program.forms, program.abstract_state) if padded else _same

    def latest_step(self) -> int | None:
        """The newest whole checkpoint's step, or None."""
        return self.manager.latest_step()

    def save(self, state: TrainState, step: int) -> None:
        """Writes the state as logical arrays; returns when it is whole."""
        meta = {"config": dataclasses.asdict(self.config), "data": {"step": step, "digest": self.data_digest}}
        self.manager.save(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardSave(self._to_logical(state)), meta=ocp.args.JsonSave(meta)),
        )
        self.manager.wait_until_finished()

    def check(self, step: int) -> list[str]:
        """Compares a checkpoint's run with this one.

        Returns:
          Differences that do not prevent resuming, a line each.

        Raises:
          ConfigError: it is a checkpoint of another model.
        """
        meta = self.manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        here, there = json.loads(json.dumps(dataclasses.asdict(self.config))), meta["config"]
        for field, value in there["model"].items():
            if here["model"].get(field) != value:
                raise ConfigError(
                    f"model.{field}={here['model'].get(field)}: the checkpoint in workdir={self.config.workdir} has "
                    f"model.{field}={value}; use that, or another --workdir"
                )
        changed = [f"{f}={here[f]}, was {there[f]}" for f in CONTINUED if here[f] != there.get(f)]
        if meta["data"]["digest"] != self.data_digest:
            changed.append("the training text is not the one that the checkpoint was trained on")
        return changed

    def restore(self, step: int) -> TrainState:
        """The state of a step, in this run's layout."""
        state = ocp.args.StandardRestore(self._logical)
        return self._to_stored(self.manager.restore(step, args=ocp.args.Composite(state=state))["state"])

    def close(self) -> None:
        """Waits for what is under way."""
        self.manager.close()


def _same(state: TrainState) -> TrainState:
    return state


def _convert(function: Callable, forms: TrainState, result: TrainState) -> Callable[[TrainState], TrainState]:
    shardings = jax.tree.map(lambda array: array.sharding, result)
    return jax.jit(partial(function, forms), out_shardings=shardings)


def _abstract_logical(program: TrainProgram) -> TrainState:
    shapes = jax.eval_shape(partial(to_logical, program.forms), program.abstract_state)
    return jax.tree.map(_with_logical_sharding, shapes, program.abstract_state)


def _with_logical_sharding(logical: jax.ShapeDtypeStruct, stored: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """The stored array's sharding where the logical shape allows it, else replicated along that dimension."""
    mesh, spec = stored.sharding.mesh, stored.sharding.spec

    def fits(dim: int, names: Any) -> bool:
        names = (names,) if isinstance(names, str) else names or ()
        return logical.shape[dim] % math.prod(mesh.shape[name] for name in names) == 0

    kept = [names if fits(dim, names) else None for dim, names in enumerate(spec)]
    return jax.ShapeDtypeStruct(logical.shape, logical.dtype, sharding=NamedSharding(mesh, PartitionSpec(*kept)))
