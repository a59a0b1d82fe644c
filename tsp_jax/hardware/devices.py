"""Facts about devices: data sheets, the links between devices, and the rates that programs reach (`Rates`)."""

import dataclasses
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from tsp_jax.hardware.rate_tables import RATES
from tsp_jax.hardware.rates import Rates

MOST_CPU_DEVICES = 1024
"""limit on virtual CPU devices: each starts threads, and a process with tens of thousands of threads dies"""
MOST_DEVICES = 16_384
"""limit on the devices of a target: a topology is made one device at a time"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hardware:
    """One kind of device and its links. Rates are per second, per device and per direction."""

    name: str
    platform: Literal["cpu", "rocm", "cuda", "tpu"]
    memory_bytes: float
    memory_bandwidth: float
    """peak bytes/s of main memory"""
    peak_flops: float
    """peak dense bfloat16 operations/s"""
    links: Literal["host", "full_mesh", "switch", "torus"]
    num_links: int
    """number of links of a device within a node; in a torus, one for each direction"""
    node_size: int
    """number of devices in a node, which these links connect"""
    rates: Rates
    """rates that programs reach"""
    source: str
    """of the data sheet"""
    jax_kind: str = ""
    """`device_kind` of such devices in JAX, where it does not contain `name`"""
    description: str = ""
    """for GPUs, the compiler's description of the device: XLA's GpuTargetConfig as text"""
    devices_per_chip: int = 1
    """devices that share a chip and its links; their rates above are one device's part of the chip's"""

    def is_kind_of(self, device: Any) -> bool:
        """Whether a JAX device, present or of a topology, is of this kind."""
        return self.name in f"{device.platform} {device.device_kind}".lower() or device.device_kind == self.jax_kind


def _gpu(info: dict[str, Any], capability: str, platform: str, dnn: str, name: str) -> str:
    fields = "\n".join(f"  {key}: {value}" for key, value in info.items())
    return (
        f"gpu_device_info {{\n{fields}\n  {capability}\n}}\n"
        f'platform_name: "{platform}"\ndnn_version_info {{ {dnn} }}\ndevice_description_str: "{name}"\n'
    )


_BLOCK = {"threads_per_block_limit": 1024, "threads_per_core_limit": 2048, "fpus_per_core": 128}


def _amd(gfx: str, cores: int, shared: int, clock_ghz: float, memory: int, bandwidth: int) -> str:
    info = _BLOCK | {
        "block_dim_limit_x": 2147483647, "block_dim_limit_y": 65536, "block_dim_limit_z": 65536,
        "shared_memory_per_block": shared, "shared_memory_per_core": shared, "shared_memory_per_block_optin": shared,
        "registers_per_core_limit": 131072, "registers_per_block_limit": 131072, "threads_per_warp": 64,
        "core_count": cores, "clock_rate_ghz": clock_ghz, "l2_cache_size": 4194304, "memory_bandwidth": bandwidth,
        "device_memory_size": memory,
    }  # fmt: skip
    capability = f'rocm_compute_capability {{ gcn_arch_name: "{gfx}:sramecc+:xnack-" }}'
    # Named by architecture: Pallas of jax 0.12 reads off the name of an absent device what it compiles for.
    return _gpu(info, capability, "ROCM", "major: 1 minor: 3 patch: 0", gfx)


def _nvidia(name: str, major: int, cores: int, l2: int, clock_ghz: float, memory: int, bandwidth: int) -> str:
    info = _BLOCK | {
        "threads_per_warp": 32, "shared_memory_per_block": 49152, "shared_memory_per_core": 233472,
        "core_count": cores, "block_dim_limit_x": 2147483647, "block_dim_limit_y": 65535, "block_dim_limit_z": 65535,
        "memory_bandwidth": bandwidth, "l2_cache_size": l2, "clock_rate_ghz": clock_ghz,
        "device_memory_size": memory, "shared_memory_per_block_optin": 232448,
        "registers_per_core_limit": 65536, "registers_per_block_limit": 65536,
    }  # fmt: skip
    capability = f"cuda_compute_capability {{ major: {major} minor: 0 }}"
    return _gpu(info, capability, "CUDA", "major: 9 minor: 10", name)


HARDWARE = {
    hardware.name: hardware
    for hardware in (
        Hardware(
            name="cpu", platform="cpu", memory_bytes=24e9, memory_bandwidth=20e9, peak_flops=1e11,
            links="host", num_links=1, node_size=1 << 30, rates=RATES["cpu"], source="placeholders of a small host",
        ),
        Hardware(
            name="mi300x", platform="rocm", jax_kind="gfx942",
            memory_bytes=192e9, memory_bandwidth=5.3e12, peak_flops=1307e12,
            links="full_mesh", num_links=7, node_size=8, rates=RATES["mi300x"], source="AMD MI300X data sheet",
            description=_amd("gfx942", 304, 65536, 2.1, 206141652992, 5300000000000),
        ),
        Hardware(
            # No jax_kind: the topology's devices are gfx942, as MI300X's are; a present one is AMD Instinct MI325X.
            name="mi325x", platform="rocm", memory_bytes=256e9, memory_bandwidth=6e12, peak_flops=1307e12,
            links="full_mesh", num_links=7, node_size=8, rates=RATES["mi325x"], source="AMD MI325X data sheet",
            description=_amd("gfx942", 304, 65536, 2.1, 274877906944, 6000000000000),
        ),
        Hardware(
            name="mi355x", platform="rocm", jax_kind="gfx950",
            memory_bytes=288e9, memory_bandwidth=8e12, peak_flops=2500e12,
            links="full_mesh", num_links=7, node_size=8, rates=RATES["mi355x"], source="AMD MI355X data sheet",
            description=_amd("gfx950", 256, 163840, 2.4, 309220868096, 8000000000000),
        ),
        Hardware(
            name="h100", platform="cuda", memory_bytes=80e9, memory_bandwidth=3.35e12, peak_flops=989e12,
            links="switch", num_links=1, node_size=8, rates=RATES["h100"], source="NVIDIA H100 SXM data sheet",
            description=_nvidia("NVIDIA H100 80GB HBM3", 9, 132, 52428800, 1.98, 85028765696, 3352320000000),
        ),
        Hardware(
            name="h200", platform="cuda", memory_bytes=141e9, memory_bandwidth=4.8e12, peak_flops=989e12,
            links="switch", num_links=1, node_size=8, rates=RATES["h200"], source="NVIDIA H200 SXM data sheet",
            description=_nvidia("NVIDIA H200 141GB HBM3e", 9, 132, 52428800, 1.98, 151397597184, 4800000000000),
        ),
        Hardware(
            name="b200", platform="cuda", memory_bytes=180e9, memory_bandwidth=8e12, peak_flops=2250e12,
            links="switch", num_links=1, node_size=8, rates=RATES["b200"],
            source="NVIDIA DGX B200 data sheet (1,440 GB on 8 GPUs)",
            description=_nvidia("NVIDIA B200", 10, 148, 132644864, 1.965, 191514411008, 7672320000000),
        ),
        Hardware(
            name="v5p", platform="tpu", jax_kind="TPU v5",
            memory_bytes=95e9, memory_bandwidth=2.765e12, peak_flops=459e12,
            links="torus", num_links=6, node_size=8960, rates=RATES["v5p"],
            source="Google Cloud TPU v5p page (4,800 Gb/s of interconnect a chip, over six directions)",
        ),
        Hardware(
            name="v5e", platform="tpu", jax_kind="TPU v5 lite",
            memory_bytes=16e9, memory_bandwidth=819e9, peak_flops=197e12,
            links="torus", num_links=4, node_size=256, rates=RATES["v5e"],
            source="Google Cloud TPU v5e page (400 GB/s of interconnect a chip both ways, over four directions)",
        ),
        Hardware(
            name="v6e", platform="tpu", jax_kind="TPU v6 lite",
            memory_bytes=32e9, memory_bandwidth=1638e9, peak_flops=918e12,
            links="torus", num_links=4, node_size=256, rates=RATES["v6e"],
            source="Google Cloud TPU v6e page (800 GB/s of interconnect a chip both ways, over four directions)",
        ),
        Hardware(
            name="v7x", platform="tpu", jax_kind="TPU7x", devices_per_chip=2,
            memory_bytes=96e9, memory_bandwidth=3.685e12, peak_flops=1153.5e12,
            links="torus", num_links=7, node_size=18432, rates=RATES["v7x"],
            source="Google Cloud TPU7x (Ironwood) page, halved: a device is one of a chip's two cores (a chip: 2,307 "
            "TFLOP/s, 192 GB, 7.37 TB/s, 1,200 GB/s of interconnect both ways over six directions); the link between "
            "the two cores is faster, and counts like one of them",
        ),
    )
}  # fmt: skip

_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
_SQUARES = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")


def _slices(name: str, shapes: Sequence[str], devices_per_chip: int = 1) -> dict[int, str]:
    """number of devices -> name of the slice for the compiler"""
    return {math.prod(map(int, shape.split("x"))) * devices_per_chip: f"{name}:{shape}" for shape in shapes}


TPU_TOPOLOGIES = {
    "v5p": _slices("v5", _CUBES),
    "v5e": _slices("v5e", _SQUARES),
    "v6e": _slices("v6e", _SQUARES),
    "v7x": _slices("tpu7x", _CUBES, 2),
}
"""kind of TPU -> number of devices of a slice -> its name, with the extents of its torus in chips"""
_DEVICE_FILES = {"rocm": ("/dev/kfd",), "cuda": ("/dev/nvidiactl",), "tpu": ("/dev/accel0", "/dev/vfio/0")}


def is_present(platform: str) -> bool:
    """Whether the machine has a device of a platform, judged by device files alone; no runtime is started."""
    return any(Path(file).exists() for file in _DEVICE_FILES.get(platform, ()))


def data_sheet(device: Any) -> Hardware | None:
    """The facts about a JAX device that is present; None for CPUs and for kinds and variants that are not listed.

    The listed GPUs are those of servers: PCIe and NVL cards of the same name have other rates, and GH200 is no H200.
    """
    kind = device.device_kind
    if device.platform == "cpu" or re.search(r"\b(PCIe|NVL)\b", kind, re.IGNORECASE):
        return None
    exact = (hardware for hardware in HARDWARE.values() if hardware.jax_kind == kind)
    named = (hardware for hardware in HARDWARE.values() if re.search(rf"\b{hardware.name}\b", kind, re.IGNORECASE))
    return next(exact, None) or next(named, None)
