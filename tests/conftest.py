"""Eight virtual CPU devices, strict promotion, warnings as errors (pyproject.toml)."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
# Most of the time of these tests goes into compilation; without LLVM's optimizations it is about half, and without the
# new emitters of fusions half of that (XLA of jax 0.12 has no others, and ignores the option).
os.environ["XLA_FLAGS"] = (
    "--xla_backend_optimization_level=0 --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters "
    "--xla_cpu_collective_call_terminate_timeout_seconds=600 "
    + os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
)
os.environ["PJRT_NPROC"] = "32"  # four threads a device, as in tsp_jax.use_cpu_devices

import jax
import pytest

from tests.quick import is_for_newest, is_quick
from tsp_jax.hardware.private_jax import number_collectives

number_collectives()
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_collection_modifyitems(items):
    for item in items:
        if is_quick(item.nodeid):
            item.add_marker("quick")
        if is_for_newest(item.nodeid):
            item.add_marker("newest")


@pytest.fixture(scope="module", autouse=True)
def compiled_programs_of_one_file():
    """Programs and traces that JAX keeps grow to 7 GB over all tests; what files share is little."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="module")
def optax_promotes():
    """For tests that run optax, which raises floats to integer powers."""
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    yield
    jax.config.update("jax_numpy_dtype_promotion", "strict")
