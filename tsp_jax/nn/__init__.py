"""Flax NNX layers over global arrays, to use in a model of your own.

Each layer holds ordinary global parameters with sharding metadata, and runs its op in one `jax.shard_map` on a
`Placement` (a layout on a mesh). Weights are stored [rows, D]: the first dimension is the one that is sharded.
Only reverse-mode derivatives (`jax.grad`, `jax.vjp`) are supported.
"""

from tsp_jax.nn.attention import Attention
from tsp_jax.nn.embed import Embed
from tsp_jax.nn.experts import Experts
from tsp_jax.nn.layer import residual_std
from tsp_jax.nn.mlp import MLP

__all__ = ["MLP", "Attention", "Embed", "Experts", "residual_std"]
