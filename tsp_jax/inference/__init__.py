"""Serving on the layouts, meshes and PartitionSpecs of training.

model       text to text: `load` a Hugging Face folder, `generate` continuations of prompts
token_loop  tokens to tokens: prefill in chunks, then one token per step
program     prefill and decode as jitted functions, and the shapes and shardings of their arguments
forward     the decoder over a KV cache, traced by the program
cache       the KV cache: shapes, shardings, which rank keeps which token
sampling    the next token from logits
"""

from tsp_jax.inference.cache import Cache
from tsp_jax.inference.model import Continuation, Model, generate, load
from tsp_jax.inference.program import InferenceProgram, make_inference_program
from tsp_jax.inference.sampling import Sampling, sample
from tsp_jax.inference.token_loop import Stats, generate_tokens

__all__ = [
    "Cache", "Continuation", "InferenceProgram", "Model", "Sampling", "Stats", "generate", "generate_tokens", "load",
    "make_inference_program", "sample",
]  # fmt: skip
