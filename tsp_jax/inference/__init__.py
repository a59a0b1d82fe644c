"""Serving on the layouts, meshes and PartitionSpecs of training: prefill, decode, sampling."""

from tsp_jax.inference.cache import Cache
from tsp_jax.inference.generate import generate
from tsp_jax.inference.program import InferenceProgram, make_inference_program
from tsp_jax.inference.sampling import Sampling, sample

__all__ = ["Cache", "InferenceProgram", "Sampling", "generate", "make_inference_program", "sample"]
