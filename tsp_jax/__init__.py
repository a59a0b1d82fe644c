"""Tensor and sequence parallelism folded onto one mesh axis, for JAX.

config, layout         what a run is; the layout table
heads, stored           padded heads; how parameters are stored on a mesh
errors, files           exit codes; files from outside, read and checked
ops                     per-device functions: streamed weights, attention, kernels
nn, models              layers on global arrays; a decoder and its remat policies
hf                      Hugging Face folders: configurations, weights, tokenizers
training, inference     trainer, checkpoints, safety; KV cache, prefill, decode, sampling
cost                    closed forms: bytes received, memory
hardware                devices, links, targets, compilers without devices
inspect                 compiled programs: memory, communication, simulated timeline
tools                   bodies of the commands
"""

from tsp_jax import inference, nn
from tsp_jax.config import Config, ModelConfig, StreamConfig
from tsp_jax.errors import ConfigError
from tsp_jax.hardware.private_jax import hush_absent_plugins
from tsp_jax.layout import LAYOUTS, Layout, Placement, make_mesh, place

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
]
