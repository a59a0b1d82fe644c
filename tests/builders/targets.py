"""Which compilers of absent hardware this environment has."""

import importlib.util

PLUGINS = {"rocm": "jax_plugins.xla_rocm7", "cuda": "jax_plugins.xla_cuda12", "tpu": "libtpu"}


def installed(platform: str) -> bool:
    """Whether the compiler of a platform (rocm, cuda, tpu) is installed."""
    try:
        return importlib.util.find_spec(PLUGINS[platform]) is not None
    except ModuleNotFoundError:
        return False
