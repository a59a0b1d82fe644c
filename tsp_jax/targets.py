"""Hardware to compile for, present or not: ``cpu:8``, ``mi300x:8``, ``mi355x:8``, ``h100:8``, ``v5p:8``.

A target's devices are the machine's own for ``cpu``, and elsewhere those of a topology that the platform's compiler
describes without any device. Programs compiled for a topology can be read, not run.
"""

import dataclasses
import functools
import importlib.util
import os
from pathlib import Path
from typing import Any, Literal

import jax
from jax.experimental import topologies

from tsp_jax.errors import ConfigError
from tsp_jax.private_jax import register_rocm_plugin
from tsp_jax.rocm_standins import load_rocm_libraries

Links = Literal["host", "full_mesh", "switch", "torus"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hardware:
    """One kind of device and how its like are joined. Rates are in units a second, per device and direction."""

    name: str
    platform: Literal["cpu", "rocm", "cuda", "tpu"]
    memory_bytes: float
    memory_bandwidth: float
    """bytes/s"""
    peak_flops: float
    """dense bfloat16 operations/s"""
    links: Links
    num_links: int
    """links of a device within a node (a torus: directions)"""
    link_bandwidth: float
    """bytes/s that one link sustains"""
    node_size: int
    """devices that these links join"""
    node_bandwidth: float
    """bytes/s of a device to other nodes"""
    source: str
    description: str = ""
    """the compiler's own description of the device (GPU): XLA's GpuTargetConfig as text"""


def _gpu(info: dict[str, Any], capability: str, platform: str, dnn: str, name: str) -> str:
    fields = "\n".join(f"  {key}: {value}" for key, value in info.items())
    return (
        f"gpu_device_info {{\n{fields}\n  {capability}\n}}\n"
        f'platform_name: "{platform}"\ndnn_version_info {{ {dnn} }}\ndevice_description_str: "{name}"\n'
    )


_BLOCK = {"threads_per_block_limit": 1024, "threads_per_core_limit": 2048, "fpus_per_core": 128}


def _amd(name: str, gfx: str, cores: int, shared: int, clock_ghz: float, memory: int, bandwidth: int) -> str:
    limits = {"block_dim_limit_x": 2147483647, "block_dim_limit_y": 65536, "block_dim_limit_z": 65536}
    shared_memory = dict.fromkeys(
        ("shared_memory_per_block", "shared_memory_per_core", "shared_memory_per_block_optin"), shared
    )
    registers = {"registers_per_core_limit": 131072, "registers_per_block_limit": 131072}
    info = _BLOCK | limits | shared_memory | registers
    info |= {"threads_per_warp": 64, "core_count": cores, "clock_rate_ghz": clock_ghz, "l2_cache_size": 4194304}
    info |= {"memory_bandwidth": bandwidth, "device_memory_size": memory}
    capability = f'rocm_compute_capability {{ gcn_arch_name: "{gfx}:sramecc+:xnack-" }}'
    return _gpu(info, capability, "ROCM", "major: 1 minor: 3 patch: 0", name)


_H100 = _BLOCK | {
    "threads_per_warp": 32, "shared_memory_per_block": 49152, "shared_memory_per_core": 233472, "core_count": 132,
    "block_dim_limit_x": 2147483647, "block_dim_limit_y": 65535, "block_dim_limit_z": 65535,
    "memory_bandwidth": 3352320000000, "l2_cache_size": 52428800, "clock_rate_ghz": 1.98,
    "device_memory_size": 85028765696, "shared_memory_per_block_optin": 232448,
    "registers_per_core_limit": 65536, "registers_per_block_limit": 65536,
}  # fmt: skip

HARDWARE = {
    hardware.name: hardware
    for hardware in (
        Hardware(
            name="cpu", platform="cpu", memory_bytes=24e9, memory_bandwidth=20e9, peak_flops=1e11, links="host",
            num_links=1, link_bandwidth=10e9, node_size=1 << 30, node_bandwidth=1e9,
            source="placeholders of a small host: virtual devices share one memory",
        ),
        Hardware(
            name="mi300x", platform="rocm", memory_bytes=192e9, memory_bandwidth=5.3e12, peak_flops=1307e12,
            links="full_mesh", num_links=7, link_bandwidth=48e9, node_size=8, node_bandwidth=50e9,
            source="AMD MI300X data sheet; usable xGMI rate from AMD's ROCm blog, March 2025 (64 GB/s raw)",
            description=_amd("AMD Instinct MI300X", "gfx942", 304, 65536, 2.1, 206141652992, 5300000000000),
        ),
        Hardware(
            name="mi355x", platform="rocm", memory_bytes=288e9, memory_bandwidth=8e12, peak_flops=2500e12,
            links="full_mesh", num_links=7, link_bandwidth=58e9, node_size=8, node_bandwidth=50e9,
            source="AMD MI355X data sheet (xGMI 76.8 GB/s raw; usable rate scaled as on MI300X)",
            description=_amd("AMD Instinct MI355X", "gfx950", 256, 163840, 2.4, 309220868096, 8000000000000),
        ),
        Hardware(
            name="h100", platform="cuda", memory_bytes=80e9, memory_bandwidth=3.35e12, peak_flops=989e12,
            links="switch", num_links=1, link_bandwidth=450e9, node_size=8, node_bandwidth=50e9,
            source="NVIDIA H100 SXM data sheet",
            description=_gpu(
                _H100, "cuda_compute_capability { major: 9 minor: 0 }", "CUDA", "major: 9 minor: 10",
                "NVIDIA H100 80GB HBM3",
            ),
        ),
        Hardware(
            name="v5p", platform="tpu", memory_bytes=95e9, memory_bandwidth=2.765e12, peak_flops=459e12,
            links="torus", num_links=6, link_bandwidth=90e9, node_size=8960, node_bandwidth=25e9,
            source="Google Cloud TPU v5p page (4,800 Gb/s of interconnect a chip, over six directions)",
        ),
    )
}  # fmt: skip

TPU_TOPOLOGIES = {4: "v5:2x2x1", 8: "v5:2x2x2", 16: "v5:2x2x4", 32: "v5:2x4x4", 64: "v5:4x4x4"}
EXTRAS = {"rocm": "aot-rocm", "cuda": "aot-cuda", "tpu": "aot-tpu"}


@dataclasses.dataclass(frozen=True)
class Target:
    """A number of devices of one kind."""

    hardware: Hardware
    num_devices: int

    def __str__(self) -> str:
        return f"{self.hardware.name}:{self.num_devices}"

    def devices(self) -> list[Any]:
        """Devices to build a mesh on; only those of ``cpu`` can run anything.

        Raises:
          ConfigError: the platform's compiler is not installed, or does not describe that many devices.
        """
        if self.hardware.platform == "cpu":
            devices = jax.devices("cpu")
            if len(devices) < self.num_devices:
                raise ConfigError(f"target={self}: there are {len(devices)} CPU devices; use cpu:{len(devices)}")
            return devices[: self.num_devices]
        return list(_TOPOLOGIES[self.hardware.platform](self))


def parse_target(text: str) -> Target:
    """``mi300x:8`` -> Target."""
    name, _, count = text.partition(":")
    if name not in HARDWARE:
        raise ConfigError(f"target={text} is unknown; use one of {', '.join(f'{known}:8' for known in HARDWARE)}")
    if not count.isdecimal() or int(count) < 1:
        raise ConfigError(f"target={text} does not say how many devices; use {name}:8")
    return Target(HARDWARE[name], int(count))


def _package(target: Target, module: str) -> Path:
    """Folder of an installed plugin."""
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # of a parent
        spec = None
    if spec is None or not spec.submodule_search_locations:
        extra = EXTRAS[target.hardware.platform]
        raise ConfigError(f'target={target}: its compiler is not installed; use pip install "tsp-jax[{extra}]"')
    return Path(next(iter(spec.submodule_search_locations)))


def _gpu_topology(target: Target) -> Any:
    hosts, rest = divmod(target.num_devices, target.hardware.node_size)
    shape = f"1x{hosts}x{target.hardware.node_size}" if hosts and not rest else f"1x1x{target.num_devices}"
    if hosts and rest:
        raise ConfigError(f"target={target} is not whole nodes of 8; use {target.hardware.name}:{(hosts + 1) * 8}")
    return topologies.get_topology_desc(
        platform=target.hardware.platform, topology_name="", topology=shape, target_config=target.hardware.description
    ).devices


@functools.cache
def _rocm(target: Target) -> Any:
    _register_rocm(target)
    return _gpu_topology(target)


@functools.cache
def _register_rocm_once(plugin: Path, runtime: Path) -> None:
    library = plugin / "xla_rocm_plugin.so"
    load_rocm_libraries([library, *sorted(runtime.glob("*.so"))], cache_folder())
    register_rocm_plugin(library)


def _register_rocm(target: Target) -> None:
    _register_rocm_once(_package(target, "jax_plugins.xla_rocm7"), _package(target, "jax_rocm7_plugin"))


@functools.cache
def _cuda(target: Target) -> Any:
    _package(target, "jax_plugins.xla_cuda12")
    # Lets the plugin register where there is no driver.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    return _gpu_topology(target)


@functools.cache
def _tpu(target: Target) -> Any:
    library = _package(target, "libtpu") / "libtpu.so"
    if target.num_devices not in TPU_TOPOLOGIES:
        raise ConfigError(f"target={target}: no such slice; use v5p: with one of {', '.join(map(str, TPU_TOPOLOGIES))}")
    known = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5p-16", "TPU_WORKER_HOSTNAMES": "localhost"}
    for name, value in (known | {"TPU_LIBRARY_PATH": str(library)}).items():
        os.environ.setdefault(name, value)
    bounds = {"chips_per_host_bounds": (2, 2, 1)}
    return topologies.get_topology_desc(
        platform="tpu", topology_name=TPU_TOPOLOGIES[target.num_devices], **bounds
    ).devices


_TOPOLOGIES = {"rocm": _rocm, "cuda": _cuda, "tpu": _tpu}


def cache_folder() -> Path:
    """Where built stand-ins are kept: ``$XDG_CACHE_HOME/tsp_jax`` or ``~/.cache/tsp_jax``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tsp_jax"
