"""Which compilers of absent hardware this environment has."""

import importlib.util

import pytest

PLUGINS = {"rocm": "jax_plugins.xla_rocm7", "cuda": "jax_plugins.xla_cuda12", "tpu": "libtpu"}


def installed(platform: str) -> bool:
    """Whether the compiler of a platform (rocm, cuda, tpu) is installed."""
    try:
        return importlib.util.find_spec(PLUGINS[platform]) is not None
    except ModuleNotFoundError:
        return False


def needs_compiler(platform: str) -> None:
    """Skips a test where the compiler of a platform is not installed, and says how to have it."""
    if not installed(platform):
        how = 'pip install ".[aot-cuda]"' if platform == "cuda" else "make newest"
        pytest.skip(f"no compiler for {platform}; {how} brings it")
