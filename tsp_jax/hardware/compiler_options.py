"""Compiler options for each platform, each with the measurement that justifies it.

A compiler refuses an option that it does not know, and the compilers of different JAX releases know different options.
`compiler_options` therefore asks the compiler.
"""

import functools
import logging
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

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
    # 22.2 GB instead of 23.6 GB (v5p:8, jax 0.10.2); 22.0 GB instead of 23.4 GB by its successor (jax 0.12.0). The cost
    # in run time is not known.
    "tpu": {"exec_time_optimization_effort": -1.0},
}
"""platform (rocm, cuda or tpu) -> its options; there are none for cpu"""
SUCCESSORS = {"exec_time_optimization_effort": ("optimization_level", "O1")}
"""option that later compilers no longer know -> (option, value) that has the same effect in them"""
_UNKNOWN = re.compile(r"No such compile option: '(\w+)'")


@functools.cache
def compiler_options(device: Any) -> Mapping[str, Any]:
    """Options for ``lowered.compile(...)`` that the compiler of a device (present, or of a topology) knows."""
    options = dict(COMPILER_OPTIONS.get(_platform(device), {}))
    while options and (unknown := _unknown_option(device, options)):
        del options[unknown]
        if successor := SUCCESSORS.get(unknown):
            options.update([successor])
        else:
            text = "compiler option %s is left out: the compiler of %s in jax %s does not know it"
            logging.getLogger(__name__).warning(text, unknown, device.device_kind, jax.__version__)
    return MappingProxyType(options)


def _unknown_option(device: Any, options: Mapping[str, Any]) -> str | None:
    """The first option that a device's compiler does not know, found by compiling a scalar; None if it knows all."""
    # A process can compile for its own devices, all of which are of one kind.
    local = jax.local_devices()[0] if device in jax.devices() else device
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=SingleDeviceSharding(local))
    try:
        jax.jit(lambda x: x).lower(scalar).compile(dict(options))
    except jax.errors.JaxRuntimeError as error:
        found = _UNKNOWN.search(str(error))
        if not found or found[1] not in options:
            raise
        return found[1]
    return None


def _platform(device: Any) -> str:
    """The platform of a device: rocm, cuda, tpu or cpu."""
    if device.platform != "gpu":
        return device.platform
    # A client says "rocm 70200", or that of a topology "gfx942".
    return "rocm" if re.search("rocm|gfx", device.client.platform_version.lower()) else "cuda"
