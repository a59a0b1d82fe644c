"""The command tsp-export: writes the model of a run as a Hugging Face folder."""

import dataclasses
import sys

import jax

from tsp_jax.config import DType
from tsp_jax.errors import ConfigError
from tsp_jax.hf.weights import save_params
from tsp_jax.layout import Placement, get_layout, parse_mesh
from tsp_jax.mesh import make_mesh
from tsp_jax.tools import cli
from tsp_jax.training.saved_run import find_step, load_run_params, read_run, tokenizer_folder


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Which checkpoint to export, and with which devices."""

    step: int = 0
    """step of the checkpoint; 0: the newest"""
    dtype: DType = "float32"
    """dtype of the weights in the folder; checkpoints hold float32"""
    layout: str = "tsp"
    """layout in which the weights are read; it changes no value"""
    mesh: str = ""
    """mesh axis sizes, such as tsp=8; empty: all devices on the layout's own axes"""
    cpu_devices: int = 0
    """run on this many virtual CPU devices; 0: on the devices that are present"""

    def __post_init__(self):
        for name in ("step", "cpu_devices"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)} must not be negative; use 0")


def export(workdir: str, out: str, options: ExportOptions = ExportOptions()) -> int:
    """Writes the model of a checkpoint as a Hugging Face folder; returns the step.

    The folder gets the tokenizer of the folder that the run took its own from, if it took one.

    Args:
      workdir: working directory of the run.
      out: folder to write, absent or empty.
      options: step, dtype and devices.

    Raises:
      ConfigError: the run has no such checkpoint, its model has no place in a Hugging Face folder, or `out` cannot be
        written.
    """
    config = read_run(workdir)
    step = find_step(workdir, options.step)
    layout = get_layout(options.layout)
    placement = Placement(layout, make_mesh(parse_mesh(options.mesh, layout, len(jax.devices()))))
    params = load_run_params(workdir, config, placement, step)
    save_params(out, params, config.model, placement, dtype=options.dtype, source=tokenizer_folder(config))
    return step


def main() -> None:
    """Runs the command."""
    about = "Write the model of a run as a Hugging Face folder: tsp-export WORKDIR OUT [--step N]."
    with cli.errors_in_a_line():
        (workdir, out), options = cli.first_arguments(ExportOptions(), ("workdir", "out"), about=about)
        cli.use_devices(options.cpu_devices)
        step = export(workdir, out, options)
        print(f"{out} has the model of step {step} in {options.dtype}", file=sys.stderr)
