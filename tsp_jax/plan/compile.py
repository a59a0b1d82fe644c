"""Compile a step of a configuration ahead of time, for hardware that need not be present."""

import dataclasses
import functools
import math
import tempfile
import time
from typing import Any, Literal, get_args

import jax

from tsp_jax.config import Config
from tsp_jax.cost.flops import step_flops
from tsp_jax.cost.step import Step as Sizes
from tsp_jax.errors import ConfigError
from tsp_jax.hardware.compiler_options import compiler_options
from tsp_jax.hardware.targets import Target
from tsp_jax.inference.forward import decode_placement
from tsp_jax.inference.program import make_inference_program
from tsp_jax.inspect import FullWeight, Report, report
from tsp_jax.layout import Layout, Placement, check_fits, get_layout, parse_mesh, place
from tsp_jax.mesh import format_sizes
from tsp_jax.ops.kernels import choose_kernel, describe_kernel
from tsp_jax.ops.kernels.mask import Scores
from tsp_jax.training.optimizer import Optimizer
from tsp_jax.training.step import make_program

Step = Literal["train", "forward", "prefill", "decode"]


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """A step of a configuration, compiled for a target."""

    config: Config
    target: Target
    placement: Placement
    step: Step
    compiled: Any
    """jax.stages.Compiled"""
    compile_s: float
    """seconds of tracing, lowering and compiling"""

    def report(self, *, record: bool = False) -> Report:
        """Reports the step's memory, communication and simulated time; `record` keeps the events for a trace."""
        weights = full_weights(self.config, self.placement)
        return report(self.compiled, target=self.target.hardware, full_weights=weights, record=record)

    @property
    def model_flops(self) -> float:
        """Number of operations per device in the model's matrix products, without padding; 0 for prefill and decode."""
        if self.step not in ("train", "forward"):
            return 0.0
        products = choose_kernel(*self._attention).backward_products
        flops = step_flops(self.config, forward=self.step == "forward", backward_products=products)
        return sum(flops.values()) / self.target.num_devices

    @property
    def kernel(self) -> str:
        """Name of the attention kernel, and why those before it in the table of kernels cannot run; empty for decode.

        A decode step attends with plain matrix products.
        """
        if self.step == "decode":
            return ""
        return describe_kernel(*self._attention)

    @property
    def _attention(self) -> tuple[Any, ...]:
        """What decides on the attention kernel."""
        config, model = self.config, self.config.model
        return config.stream.kernel, self.placement.mesh, model.head_dim, config.compute_dtype, Scores.of(model)

    def facts(self) -> dict[str, Any]:
        """What the JSON of a report says about the program and its target."""
        config = self.config
        return {
            "target": str(self.target), "num_devices": self.target.num_devices,
            "layout": self.placement.layout.name, "mesh": dict(self.placement.mesh.shape), "step": self.step,
            "seq_len": config.seq_len, "batch": config.batch, "num_params": config.model.num_params,
            "kernel": self.kernel, "model_flops": self.model_flops, "compile_s": round(self.compile_s, 2),
            "jax": jax.__version__,
        }  # fmt: skip


def place_on(config: Config, target: Target) -> Placement:
    """Places a configuration's layout on all devices of a target.

    Raises:
      ConfigError: the layout, mesh, target and sizes do not fit together, or the target's compiler is not installed.
    """
    layout, sizes = mesh_on(config, target)
    return place(layout, target.devices(), **sizes)


def mesh_on(config: Config, target: Target) -> tuple[Layout, dict[str, int]]:
    """(layout, sizes of its mesh) of a configuration on all devices of a target; needs no device and no compiler.

    Raises:
      ConfigError: the layout, mesh, target and sizes do not fit together.
    """
    layout = get_layout(config.layout)
    sizes = parse_mesh(config.mesh, layout, target.num_devices)
    if (devices := math.prod(sizes.values())) != target.num_devices:
        raise ConfigError(
            f"mesh={format_sizes(sizes)} has {devices} devices, target={target} has {target.num_devices}; "
            f"use --target {target.hardware.name}:{devices}"
        )
    check_fits(config, layout, sizes)
    return layout, sizes


def compile_step(
    config: Config, target: Target, step: Step = "train", chunk: int = 0, optimizer: Optimizer = None
) -> CompiledStep:
    """Compiles one step and runs nothing.

    Args:
      config: model, layout, mesh, batch and seq_len; `cpu_devices` is ignored.
      target: devices to compile for.
      step: train (an optimizer step), forward (loss of a batch), prefill, or decode (one token per sequence).
      chunk: prompt tokens that one prefill step processes; 0: all of them.
      optimizer: the user's own, for step train; None: the one that `config.optimizer` names.

    Raises:
      ConfigError: the step is unknown, or `place_step` refuses it.
    """
    if step not in get_args(Step):
        raise ConfigError(f"step={step} is unknown; use one of {', '.join(get_args(Step))}")
    placement = place_step(config, target, step, chunk)
    began = time.perf_counter()
    options = dict(compiler_options(target.devices()[0]))
    if target.hardware.platform in ("rocm", "cuda"):
        # Steps of one model share kernels, which take most of a compilation: 13 s of CPU time instead of 21 for
        # llama_7b with remat=full after save_attention (mi300x:8, jax 0.10.2), with the same memory and schedule.
        options["xla_gpu_kernel_cache_file"] = f"{_scratch().name}/kernels"
    compiled = _lower(config, placement, step, chunk, optimizer).compile(options)
    return CompiledStep(config, target, placement, step, compiled, time.perf_counter() - began)


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    """A folder that goes with this process."""
    return tempfile.TemporaryDirectory(prefix="tsp_jax_")


def full_weights(config: Config, placement: Placement) -> tuple[FullWeight, ...]:
    """For each op with sharded weights, the number of elements of these weights in their stored form.

    No device should gather all of an op's weights at once.
    """
    layout, step = placement.layout, Sizes(config, placement.layout, placement.mesh.shape)
    query, kv = step.heads.stored
    ops = [
        ("attention/queries", layout.heads, query), ("attention/keys_values", layout.heads, 2 * kv),
        ("attention/out", layout.heads, query), ("mlp", layout.mlp, 3 * step.d_ff),
        ("experts", layout.mlp, 3 * step.expert_rows), ("embed", layout.vocab, step.vocab_size),
        ("loss", layout.vocab, step.vocab_size),
    ]  # fmt: skip
    return tuple(FullWeight(f"tsp/{scope}", rows * config.model.d_model) for scope, axes, rows in ops if axes and rows)


def place_step(config: Config, target: Target, step: Step, chunk: int) -> Placement:
    """`place_on` for a step. Also raises ConfigError if the layout cannot run the step, or `chunk` does not suit it."""
    if chunk and step != "prefill":
        raise ConfigError(f"chunk={chunk} means nothing to step={step}; use --step prefill")
    if not 0 <= chunk <= config.seq_len:
        raise ConfigError(f"chunk={chunk} must be part of seq_len={config.seq_len}; use 0 for all of it")
    placement = place_on(config, target)
    if step in ("prefill", "decode"):
        decode_placement(placement)
    return placement


def _lower(config: Config, placement: Placement, step: Step, chunk: int, optimizer: Optimizer) -> jax.stages.Lowered:
    """Lowers a step. Prefill processes `chunk` tokens of a prompt, or all of it; the KV cache holds seq_len tokens."""
    if step in ("train", "forward"):
        program = make_program(config, placement, optimizer if step == "train" else None)
        if step == "train":
            return program.lower_step(config)
        batch = program.abstract_batch((1, config.batch, config.seq_len))
        return program.evaluate.lower(program.abstract_state.weights, batch)
    serving = make_inference_program(
        config.model, placement, stream=config.stream, dtype=config.compute_dtype, batch=config.batch,
        capacity=config.seq_len, chunk=(chunk or config.seq_len) if step == "prefill" else placement.size("sequence"),
    )  # fmt: skip
    if step == "prefill":
        return serving.prefill.lower(serving.abstract_params, serving.abstract_cache, *serving.abstract_chunk)
    return serving.decode.lower(serving.abstract_params, serving.abstract_cache, serving.abstract_tokens)
