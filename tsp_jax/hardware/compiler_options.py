"""What each platform's compiler is told, each option with the measurement that speaks for it."""

from collections.abc import Mapping
from typing import Any

_OVERLAP = {
    # ROCm's compiler of jax 0.10 hides no latency unless asked to; later ones do, and take the option all the same.
    "xla_gpu_enable_latency_hiding_scheduler": True,
    # At most one collective may be under way at a time unless more are allowed, and of a bucket's keys and values one
    # is left with nothing to hide it: 48 % of communication is exposed with one, 0.3 % with four (llama_7b, 128 K,
    # mi300x:8, fused attention), for 0.07 GB; on h100:8 42 % and 8 %, for 0.12 GB.
    "xla_gpu_experimental_parallel_collective_overlap_limit": 4,
    # Pieces are sized to be messages. Combined, the last piece's gradients of the MLP wait for the first ones of
    # attention, and 5 % of communication is exposed instead of 3 %, for 0.02 GB more (the same step, mi300x:8).
    "xla_gpu_all_gather_combine_threshold_bytes": 0,
    "xla_gpu_reduce_scatter_combine_threshold_bytes": 0,
}
COMPILER_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "rocm": _OVERLAP,
    "cuda": _OVERLAP,
    # Less search for speed: a 7B step of 128 K tokens compiles in 17 s instead of 46 s, and peaks at 22.2 GB instead of
    # 23.6 GB (v5p:8, jax 0.10.2). What it costs in run time is not known.
    "tpu": {"exec_time_optimization_effort": -1.0},
}
"""By platform (rocm, cuda, tpu; the CPU's is told nothing). Every name is known to jax 0.10 to 0.12."""


def compiler_options(device: Any) -> dict[str, Any]:
    """What to pass to ``lowered.compile(...)`` for a device that is there, a `jax.Device`."""
    platform = device.platform
    if platform == "gpu":
        platform = "rocm" if "rocm" in device.client.platform_version.lower() else "cuda"
    return dict(COMPILER_OPTIONS.get(platform, {}))
