"""What a run is made of before it compiles: its placement, its data, its folder. All refusals happen here."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax

from tsp_jax.config import Config
from tsp_jax.errors import ConfigError
from tsp_jax.layout import Placement, check_fits, get_layout, make_mesh, parse_mesh
from tsp_jax.training.corpus import load_corpus
from tsp_jax.training.data import Batches
from tsp_jax.training.optimizer import make_schedule


def place_run(config: Config) -> Placement:
    """The layout of a configuration on the devices of this run; checks that everything divides."""
    layout = get_layout(config.layout)
    sizes = parse_mesh(config.mesh, layout, jax.device_count())
    check_fits(config, layout, sizes)
    make_schedule(config.optimizer, config.steps)
    mesh = make_mesh(sizes)
    idle = set(range(jax.process_count())) - {device.process_index for device in mesh.devices.flat}
    if idle:
        raise ConfigError(
            f"mesh={config.mesh} leaves processes {sorted(idle)} without a device; "
            f"use a mesh of all {jax.device_count()} devices, or fewer processes"
        )
    return Placement(layout, mesh)


def describe(placement: Placement) -> str:
    """``tsp, data=1 x tsp=8, cpu``, and how many processes if there are several."""
    mesh = " x ".join(f"{name}={size}" for name, size in placement.mesh.shape.items())
    processes = f", {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return f"{placement.layout.name}, {mesh}, {jax.devices()[0].device_kind}{processes}"


@dataclasses.dataclass(frozen=True)
class RunData:
    """Both splits of a run's text."""

    train: Batches
    held_out: Batches
    digest: str
    """of the training split"""


def load_data(config: Config, placement: Placement) -> RunData:
    """Reads, or finds in the cache, the text of a run."""

    def batches(split: Any, shuffle: bool):
        corpus = load_corpus(config.data, config.model.vocab_size, split)
        return corpus, Batches(
            corpus, batch=config.batch, seq_len=config.seq_len, seed=config.seed, order=config.data.order,
            sequence_shards=placement.size("sequence"), shuffle=shuffle,
        )  # fmt: skip

    corpus, train_batches = batches("train", shuffle=True)
    return RunData(train_batches, batches("heldout", shuffle=False)[1], corpus.digest)


def open_workdir(config: Config) -> Path:
    """The folder of a run, made if it is missing."""
    workdir = Path(config.workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / f".writable.{jax.process_index()}.{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"workdir={workdir} cannot be written ({error.strerror}); use --workdir runs/NAME") from error
    return workdir
