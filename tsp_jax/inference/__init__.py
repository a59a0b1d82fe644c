"""Serving on the layouts, meshes and PartitionSpecs of training: prefill, decode, sampling."""

from tsp_jax.inference.cache import Cache
from tsp_jax.inference.model import Continuation, Model, generate, load
from tsp_jax.inference.program import InferenceProgram, make_inference_program
from tsp_jax.inference.sampling import Sampling, sample
from tsp_jax.inference.token_loop import Stats, generate_tokens

__all__ = [
    "Cache",
    "Continuation",
    "InferenceProgram",
    "Model",
    "Sampling",
    "Stats",
    "generate",
    "generate_tokens",
    "load",
    "make_inference_program",
    "sample",
]
