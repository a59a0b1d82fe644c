"""Tensor and sequence parallelism folded onto one mesh axis, for JAX.

config, mesh, layout    what a run is; axis sizes and meshes; the layout table
heads, stored           heads over ranks; how parameters are stored on a mesh
errors, files           errors and exit codes; files that users bring, read and checked
ops                     per-device functions: streamed weights, attention, kernels
nn, models              layers on global arrays; a decoder and its remat policies
hf                      Hugging Face folders: configurations, weights, tokenizers
training, inference     trainer, checkpoints, safety; KV cache, prefill, decode, sampling
cost                    closed forms: operations, bytes received, memory
hardware                devices, links, targets, compiling without a device
inspect                 compiled programs: memory, communication, simulated timeline
plan                    steps compiled for a target; the fastest that fits
tools                   the code of each command
"""

from tsp_jax import inference, nn
from tsp_jax.config import Config, ModelConfig, StreamConfig
from tsp_jax.errors import ConfigError
from tsp_jax.hardware.private_jax import hush_absent_plugins
from tsp_jax.hardware.virtual_devices import use_cpu_devices
from tsp_jax.layout import LAYOUTS, Layout, Placement, place
from tsp_jax.mesh import make_mesh

hush_absent_plugins()

__version__ = "0.1.0"
__all__ = [
    "LAYOUTS",
    "Config",
    "ConfigError",
    "Layout",
    "ModelConfig",
    "Placement",
    "StreamConfig",
    "inference",
    "make_mesh",
    "nn",
    "place",
    "use_cpu_devices",
]
