"""Compiler options for each platform, each with the measurement that justifies it."""

from collections.abc import Mapping
from typing import Any

_OVERLAP = {
    # ROCm's compiler of jax 0.10 overlaps nothing without this option; later ones do by default, and accept it.
    "xla_gpu_enable_latency_hiding_scheduler": True,
    # The default is one collective in flight at a time, so either the keys or the values of a bucket overlap with
    # nothing: 48 % of communication is exposed with one, 0.3 % with four (llama_7b, 128 K, mi300x:8, fused attention),
    # for 0.07 GB more; on h100:8 42 % and 8 %, for 0.12 GB more.
    "xla_gpu_experimental_parallel_collective_overlap_limit": 4,
    # Buckets have the size of a good message. If they are combined, gradients of the MLP's last bucket wait for the
    # first ones of attention: 5 % of communication is exposed instead of 3 %, for 0.02 GB more (same step, mi300x:8).
    "xla_gpu_all_gather_combine_threshold_bytes": 0,
    "xla_gpu_reduce_scatter_combine_threshold_bytes": 0,
}
COMPILER_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "rocm": _OVERLAP,
    "cuda": _OVERLAP,
    # Less optimization effort: a 7B step of 128 K tokens compiles in 17 s instead of 46 s, and its peak memory is
    # 22.2 GB instead of 23.6 GB (v5p:8, jax 0.10.2). The cost in run time is not known.
    "tpu": {"exec_time_optimization_effort": -1.0},
}
"""platform (rocm, cuda, tpu; none for CPU) -> options; jax 0.10 to 0.12 know all of them"""


def compiler_options(device: Any) -> dict[str, Any]:
    """Options for ``lowered.compile(...)`` on a device of this machine."""
    platform = device.platform
    if platform == "gpu":
        platform = "rocm" if "rocm" in device.client.platform_version.lower() else "cuda"
    return dict(COMPILER_OPTIONS.get(platform, {}))
