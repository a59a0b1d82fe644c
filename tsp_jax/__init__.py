"""Tensor and sequence parallelism folded onto one mesh axis, for JAX."""

from tsp_jax import inference, nn
from tsp_jax.config import Config, ModelConfig, StreamConfig
from tsp_jax.errors import ConfigError
from tsp_jax.layout import LAYOUTS, Layout, Placement, make_mesh, place

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
