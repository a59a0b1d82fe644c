"""Checkpoints of global, unpadded arrays: saved under any layout and mesh, restored under any other.

The folder ``checkpoints/STEP/`` has ``state/`` (Orbax), ``meta.json`` and ``manifest.json``. It is written in the
background as ``STEP.partial`` and renamed when it is complete. So a folder whose name is a number was complete when it
was renamed; the manifest reveals later damage. A damaged checkpoint is renamed to ``STEP.damaged`` and never used.

With LoRA a checkpoint has the adapters, their moments, and a digest of the frozen weights. These weights themselves
come from the folder `init_from`, or from the seed, whenever the run is resumed.
"""

import contextlib
import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import msgspec
import orbax.checkpoint as ocp

from tsp_jax.config import LARGEST, Config
from tsp_jax.errors import NOT_SAVED, ConfigError, RunStopped
from tsp_jax.files import check_json, read_json
from tsp_jax.stored import abstract_logical, to_logical, to_stored
from tsp_jax.training.checkpoint_manifest import find_damage, write_manifest
from tsp_jax.training.distributed import broadcast_from_writer, gather_from_all, is_writer
from tsp_jax.training.frozen import check_adapters, check_digest
from tsp_jax.training.step import TrainProgram, TrainState

CONTINUED = ("seed", "batch", "seq_len", "seq_len_schedule", "steps", "optimizer", "z_loss")
CONTINUED += ("data.packing", "data.long_documents")
"""fields of Config that affect the losses of a resumed run; a field that differs from the checkpoint's is reported"""

METRICS = "metrics.jsonl"
"""name of the metrics file; lines that could not be written to it are saved in a checkpoint under the same name"""
SAVE_TIMEOUT_S = 1200
"""seconds after which a save in the background counts as failed"""


Shapes = dict[str, list[int]]
"""path in a state -> shape of the array there"""


class _Data(msgspec.Struct):
    digest: str


class Meta(msgspec.Struct):
    """The part of ``meta.json`` that is read back."""

    config: dict[str, Any]
    data: _Data
    opt_state: Shapes = {}
    """shapes of the optimizer's state; earlier versions did not save them"""
    frozen: str = ""
    """digest of the frozen weights; empty without LoRA"""


class _Saved(NamedTuple):
    """What a checkpoint holds of a TrainState: all but the frozen weights."""

    step: Any
    params: Any
    opt_state: Any

    @classmethod
    def of(cls, state: TrainState) -> "_Saved":
        return cls(state.step, state.params, state.opt_state)


def saved_steps(folder: Path) -> list[int]:
    """Returns the steps of the checkpoints in a folder, oldest first, damaged or not.

    A checkpoint is a folder whose name is a step, as a run writes it: 20, but not 020, 20.partial or 5000000000.
    """
    names = [path.name for path in folder.glob("[1-9]*") if path.is_dir()]
    return sorted(int(name) for name in names if re.fullmatch("[0-9]{1,10}", name) and int(name) <= LARGEST)


def steps_to_drop(steps: Iterable[int], newest: int, every: int) -> list[int]:
    """Returns the steps to delete. The last `newest` steps are kept, and so are multiples of `every` unless it is 0."""
    return [step for step in sorted(steps)[:-newest] if not (every and step % every == 0)]


class Checkpoints:
    """The checkpoints of one working directory. Every process of a run makes the same calls.

    Args:
      folder: folder of the checkpoints; the first save creates it.
      program: describes the state under this run's layout.
      config: saved with each checkpoint, and compared before a restore.
      data_digest: SHA-256 of the training split; saved and compared too.
      report: called with one line about each damaged checkpoint and each failed save.

    Raises:
      ConfigError: `folder` is a file or a dangling link.
    """

    def __init__(self, folder: Path, program: TrainProgram, config: Config, data_digest: str, report: Callable = print):
        self.folder, self.config, self.data_digest, self.report = folder.absolute(), config, data_digest, report
        if os.path.lexists(self.folder) and not self.folder.is_dir():
            raise ConfigError(f"{self.folder} is not a folder; move it away, or use another --workdir")
        paddings, stored = _Saved.of(program.paddings), _Saved.of(program.abstract_state)
        self._logical = abstract_logical(paddings, stored)
        self._to_logical = _convert(to_logical, paddings, self._logical)
        self._to_stored = _convert(to_stored, paddings, stored)
        self._frozen = ""
        self._writer = _orbax()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="tsp_commit")
        self._current: tuple[int, Future[None]] | None = None
        self.last: int | None = None
        """the last step that was saved or found undamaged"""
        self._last_undamaged: int | None = None
        if is_writer():
            for left in self.folder.glob("*.partial"):
                _remove(left)

    # -------------------------------------------------------------------------------------------- saving

    def save(self, state: TrainState, step: int, metrics: str = "") -> None:
        """Copies the state and writes it in the background. First waits for the previous save, as `wait` does.

        `metrics` are the lines that could not be written to the metrics file, such as when the disk is full. They are
        saved in the checkpoint.
        """
        self.wait()
        self.last = step
        meta = {
            "config": dataclasses.asdict(self.config),
            "data": {"step": step, "digest": self.data_digest},
            "opt_state": self._opt_state_shapes(),
            "frozen": self._frozen,
        }
        files = {"meta.json": json.dumps(meta, indent=1)} | ({METRICS: metrics} if metrics else {})
        failed: Future[None] = Future()
        try:
            # Orbax has copied the state when this returns; the next step may overwrite it.
            self._writer.save(self._partial(step) / "state", self._to_logical(_Saved.of(state)))
            self._current = step, self._pool.submit(self._commit, self._writer, step, files)
        except (OSError, RuntimeError, ValueError) as error:
            failed.set_exception(error)
            self._current = step, failed

    def poll(self) -> None:
        """Reports the current save if it is known to have failed; does not wait for it.

        Raises:
          RunStopped: a save failed and `faults.failed_save` is "stop".
        """
        if self._current and self._current[1].done():
            self.wait()

    def wait(self) -> None:
        """Waits for the current save to end, and reports it if it failed; raises what `poll` raises."""
        if not self._current:
            return
        step, future = self._current
        self._current = None
        error = future.exception()
        if error is None:
            self._last_undamaged = step
            return
        self._writer = _orbax()  # the old one may keep raising the error
        if is_writer():
            _remove(self._partial(step))
        self.report(f"checkpoint {step} could not be saved: {' '.join(str(error).split())[:300]}")
        if self.config.faults.failed_save == "stop":
            raise RunStopped(f"checkpoint {step} could not be saved; {self._resume_from()}", NOT_SAVED)

    def close(self, last: int = 0) -> None:
        """Waits for the current save and releases the thread.

        `last` is the last step of the run. Raises RunStopped if this step has no undamaged checkpoint. If `last` is 0,
        no checkpoint is required.
        """
        self.wait()
        self._pool.shutdown()
        if last and self._last_undamaged != last:
            raise RunStopped(f"step {last}, the last one, has no checkpoint; {self._resume_from()}", NOT_SAVED)
        if is_writer():
            self._drop_old()

    def _commit(self, writer: ocp.StandardCheckpointer, step: int, files: Mapping[str, str]) -> None:
        writer.wait_until_finished()
        if not is_writer():
            return
        folder = self._partial(step)
        for name, text in files.items():
            (folder / name).write_text(text)
        write_manifest(folder)
        folder.rename(self.folder / str(step))
        self._drop_old()

    def _drop_old(self) -> None:
        for step in steps_to_drop(saved_steps(self.folder), self.config.keep_checkpoints, self.config.keep_every):
            # renamed first: a partly deleted folder must not look like a checkpoint
            _remove((self.folder / str(step)).rename(self._partial(step)))

    def _partial(self, step: int) -> Path:
        return self.folder / f"{step}.partial"

    def _resume_from(self) -> str:
        return f"the newest is {max(saved_steps(self.folder), default='none')}"

    # -------------------------------------------------------------------------------------------- restoring

    def newest_undamaged(self) -> int | None:
        """Returns the step of the newest checkpoint whose files are all undamaged; None if there are no checkpoints.

        Each process verifies a part of the files. A damaged checkpoint is reported with the name of a damaged file and
        renamed to ``STEP.damaged``. Raises ConfigError if there are checkpoints and all are damaged.
        """
        damaged = 0
        while (step := broadcast_from_writer(max(saved_steps(self.folder), default=-1))) >= 0:
            damage = find_damage(self.folder / str(step), jax.process_index(), jax.process_count())
            if damage:
                self.report(f"checkpoint {step} is damaged: {damage}; trying the one before")
            if not any(gather_from_all(damage is not None)):
                self.last = self._last_undamaged = step
                return step
            damaged += 1
            if is_writer():
                self._move_aside(step)
        if damaged:
            raise ConfigError(
                f"workdir={self.config.workdir} has no checkpoint that is not damaged; "
                f"restore {self.folder} from a copy, or start afresh with another --workdir"
            )
        return None

    def _move_aside(self, step: int) -> None:
        aside = self.folder / f"{step}.damaged"
        _remove(aside)
        try:
            (self.folder / str(step)).rename(aside)
        except OSError as error:
            raise ConfigError(
                f"the damaged checkpoint {self.folder / str(step)} cannot be renamed to {aside} ({error.strerror}); "
                "move it away, or use another --workdir"
            ) from None

    def check(self, step: int) -> list[str]:
        """Compares a checkpoint with this run's configuration and data.

        Returns one line about each difference that does not prevent resuming. Raises ConfigError if the model or the
        optimizer differs, or ``meta.json`` does not say what they were.
        """
        path, advice = self.folder / str(step) / "meta.json", f"move checkpoints/{step} away, or use another --workdir"
        meta = read_json(path, Meta, advice=advice)
        model = check_json(meta.config.get("model"), f"{path}: config.model", dict[str, Any], advice)
        here, there = json.loads(json.dumps(dataclasses.asdict(self.config))), meta.config
        for field, value in model.items():
            if _differs(here["model"].get(field), value):
                raise ConfigError(
                    f"model.{field:.80}={here['model'].get(field)}: the checkpoint in workdir={self.config.workdir} "
                    f"has model.{field:.80}={value!s:.80}; use that, or another --workdir"
                )
        check_adapters(self.config, check_json(meta.config.get("lora", {}), f"{path}: config.lora", dict, advice))
        self._check_opt_state(meta.opt_state)
        pairs = [(field, _get(here, field), _get(there, field)) for field in CONTINUED]
        changed = [f"{field}={value}, was {was!s:.300}" for field, value, was in pairs if was not in (None, value)]
        if meta.data.digest != self.data_digest:
            text = "text, or its mixture," if self.config.data.mixture else "text"
            changed.append(f"the training {text} is not the one that the checkpoint was trained on")
        return changed

    def check_frozen(self, digest: str, step: int) -> None:
        """Takes the digest of the frozen weights, which is saved in every checkpoint from now on.

        Raises ConfigError if the checkpoint of `step` was trained with others; step 0 is no checkpoint.
        """
        self._frozen = digest
        if step:
            meta = read_json(self.folder / str(step) / "meta.json", Meta)
            check_digest(self.config, digest, meta.frozen, meta.config)

    def restore(self, step: int, frozen: Mapping[str, Any] = MappingProxyType({})) -> TrainState:
        """Restores the state of a step, in this run's layout; `frozen` are the frozen weights."""
        saved = self._to_stored(self._writer.restore(self.folder / str(step) / "state", self._logical))
        return TrainState(*saved, frozen=dict(frozen))

    def _opt_state_shapes(self) -> Shapes:
        """Path -> shape of each array of the optimizer."""
        leaves = jax.tree_util.tree_leaves_with_path(self._logical.opt_state)
        return {jax.tree_util.keystr(path): list(leaf.shape) for path, leaf in leaves}

    def _check_opt_state(self, saved: Shapes) -> None:
        here = self._opt_state_shapes()
        for name in {**saved, **here} if saved else ():
            if saved.get(name) != here.get(name):
                raise ConfigError(
                    f"optimizer: its state has {name:.200}={here.get(name)}, the checkpoint in workdir="
                    f"{self.config.workdir} has {name:.200}={saved.get(name)!s:.80}; use the optimizer that it was "
                    "trained with, or another --workdir"
                )


def _differs(here: Any, there: Any) -> bool:
    """Whether a field differs from its saved value; a field of an older release may lack some fields of its own."""
    if isinstance(here, dict) and isinstance(there, dict):
        return any(_differs(here.get(name), value) for name, value in there.items())
    return here != there


def _get(config: dict[str, Any], field: str) -> Any:
    """A field of a saved configuration, such as data.packing; None if an earlier version did not save it."""
    owner, _, name = field.rpartition(".")
    part = config.get(owner) if owner else config
    return part.get(name) if isinstance(part, dict) else None


def _remove(path: Path) -> None:
    """Deletes a folder, a file or a link; ignores errors."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _orbax() -> ocp.StandardCheckpointer:
    # If folders were made in the background, threads would wait until the timeout for one that cannot be made.
    options = ocp.AsyncOptions(timeout_secs=SAVE_TIMEOUT_S, create_directories_asynchronously=False)
    return ocp.StandardCheckpointer(async_options=options)


def _convert(function: Callable, paddings: _Saved, result: _Saved) -> Callable[[_Saved], _Saved]:
    if not any(padding.padded for padding in jax.tree.leaves(paddings)):
        return lambda state: state
    shardings = jax.tree.map(lambda array: array.sharding, result)
    return jax.jit(partial(function, paddings), out_shardings=shardings)
