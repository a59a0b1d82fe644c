"""Facts about devices: data sheets, rates that real programs reach, and the links between devices."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from tsp_jax.errors import ConfigError

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
    link_bandwidth: float
    """bytes/s that one link sustains"""
    node_size: int
    """number of devices in a node, which these links connect"""
    node_bandwidth: float
    """bytes/s between a device and other nodes"""
    sustained_flops: float
    """dense bfloat16 operations/s that matrix products of real programs reach"""
    sustained_bandwidth: float
    """bytes/s of main memory that real programs reach"""
    host_bandwidth: float
    """bytes/s between the device and its host's memory"""
    source: str
    attention_forward: float = 1.0
    """share of sustained_flops that the fused attention kernel reaches; `attention_backward` likewise"""
    attention_backward: float = 1.0
    attention_source: str = "no fused kernel is known"
    jax_kind: str = ""
    """`device_kind` of such devices in JAX, where it does not contain `name`"""
    description: str = ""
    """for GPUs, the compiler's description of the device: XLA's GpuTargetConfig as text"""
    devices_per_chip: int = 1
    """devices that share a chip and its links; their rates above are one device's part of the chip's"""

    @property
    def efficiency(self) -> dict[str, float]:
        """Kind of kernel, as programs declare it -> share of sustained_flops that the kernel reaches."""
        return {"attention_forward": self.attention_forward, "attention_backward": self.attention_backward}

    def is_kind_of(self, device: Any) -> bool:
        """Whether a JAX device, present or of a topology, is of this kind."""
        return self.name in f"{device.platform} {device.device_kind}".lower() or device.device_kind == self.jax_kind

    def with_attention(self, efficiency: float) -> "Hardware":
        """A copy whose attention kernels, forward and backward, reach this share of `sustained_flops`.

        Raises:
          ConfigError: `efficiency` is not in (0, 1].
        """
        if not 0 < efficiency <= 1:
            raise ConfigError(f"attention_efficiency={efficiency} must be above 0 and at most 1; use 0.6")
        both = {"attention_forward": efficiency, "attention_backward": efficiency}
        return dataclasses.replace(self, **both, attention_source="as the caller says")


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
            name="cpu", platform="cpu", memory_bytes=24e9, memory_bandwidth=20e9, peak_flops=1e11, links="host",
            num_links=1, link_bandwidth=10e9, node_size=1 << 30, node_bandwidth=1e9,
            sustained_flops=5e10, sustained_bandwidth=10e9, host_bandwidth=10e9,
            source="placeholders of a small host: virtual devices share one memory",
        ),
        Hardware(
            name="mi300x", platform="rocm", jax_kind="gfx942",
            memory_bytes=192e9, memory_bandwidth=5.3e12, peak_flops=1307e12,
            links="full_mesh", num_links=7, link_bandwidth=48e9, node_size=8, node_bandwidth=50e9,
            sustained_flops=620e12, sustained_bandwidth=4.1e12, host_bandwidth=50e9,
            source="AMD MI300X data sheet; usable xGMI rate from AMD's ROCm blog, March 2025 (64 GB/s raw); bf16 "
            "products 620 TFLOP/s by SemiAnalysis, December 2024; memory as copies like BabelStream's reach "
            "(4.0-4.3 TB/s); host link 0.8 of PCIe 5.0 x16: assumed, no measurement known",
            attention_forward=0.7, attention_backward=0.45,
            attention_source="forward: the share taken for MI355X; backward: the ratio taken for H100; both assumed, "
            "no measurement of a Triton kernel on this device known",
            description=_amd("gfx942", 304, 65536, 2.1, 206141652992, 5300000000000),
        ),
        Hardware(
            # No jax_kind: the topology's devices are gfx942, as MI300X's are; a present one is AMD Instinct MI325X.
            name="mi325x", platform="rocm", memory_bytes=256e9, memory_bandwidth=6e12, peak_flops=1307e12,
            links="full_mesh", num_links=7, link_bandwidth=48e9, node_size=8, node_bandwidth=50e9,
            sustained_flops=620e12, sustained_bandwidth=4.6e12, host_bandwidth=50e9,
            source="AMD MI325X data sheet; the compute dies and links are MI300X's, so products and links are as "
            "there; memory the share of the peak that MI300X reaches: assumed, no measurement known",
            attention_forward=0.7, attention_backward=0.45, attention_source="those of MI300X, whose dies it has",
            description=_amd("gfx942", 304, 65536, 2.1, 274877906944, 6000000000000),
        ),
        Hardware(
            name="mi355x", platform="rocm", jax_kind="gfx950",
            memory_bytes=288e9, memory_bandwidth=8e12, peak_flops=2500e12,
            links="full_mesh", num_links=7, link_bandwidth=58e9, node_size=8, node_bandwidth=50e9,
            sustained_flops=1180e12, sustained_bandwidth=6.2e12, host_bandwidth=50e9,
            source="AMD MI355X data sheet (xGMI 76.8 GB/s raw; usable rate scaled as on MI300X); sustained rates are "
            "the share of the peak that MI300X reaches: assumed, no measurement known",
            attention_forward=0.7, attention_backward=0.45,
            attention_source="forward: Triton's kernel at 845 TFLOP/s, causal, 16 K tokens, heads of 128, in "
            "a figure's data of HipKittens (arXiv 2511.08083), over an assumed sustained rate; backward: the ratio "
            "taken for H100, assumed",
            description=_amd("gfx950", 256, 163840, 2.4, 309220868096, 8000000000000),
        ),
        Hardware(
            name="h100", platform="cuda", memory_bytes=80e9, memory_bandwidth=3.35e12, peak_flops=989e12,
            links="switch", num_links=1, link_bandwidth=450e9, node_size=8, node_bandwidth=50e9,
            sustained_flops=720e12, sustained_bandwidth=3.0e12, host_bandwidth=50e9,
            source="NVIDIA H100 SXM data sheet; bf16 products about 720 TFLOP/s by SemiAnalysis, December 2024; memory "
            "0.9 of the peak and host link 0.8 of PCIe 5.0 x16: assumed, no measurement known",
            attention_forward=0.6, attention_backward=0.37,
            attention_source="forward: Triton's kernel at 395 (FlashAttention-3, arXiv 2407.08608) to 477 TFLOP/s "
            "(TorchBench, July 2024), 16 K tokens, heads of 128, causal or not is not said; backward: assumed, after "
            "265 TFLOP/s of a Triton kernel in a TritonBench report that names no card",
            description=_nvidia("NVIDIA H100 80GB HBM3", 9, 132, 52428800, 1.98, 85028765696, 3352320000000),
        ),
        Hardware(
            name="h200", platform="cuda", memory_bytes=141e9, memory_bandwidth=4.8e12, peak_flops=989e12,
            links="switch", num_links=1, link_bandwidth=450e9, node_size=8, node_bandwidth=50e9,
            sustained_flops=720e12, sustained_bandwidth=4.3e12, host_bandwidth=50e9,
            source="NVIDIA H200 SXM data sheet; the chip is H100's, so products are as there; memory 0.9 of the peak "
            "and host link 0.8 of PCIe 5.0 x16: assumed, no measurement known",
            attention_forward=0.6, attention_backward=0.37, attention_source="those of H100, whose chip it has",
            description=_nvidia("NVIDIA H200 141GB HBM3e", 9, 132, 52428800, 1.98, 151397597184, 4800000000000),
        ),
        Hardware(
            name="b200", platform="cuda", memory_bytes=180e9, memory_bandwidth=8e12, peak_flops=2250e12,
            links="switch", num_links=1, link_bandwidth=900e9, node_size=8, node_bandwidth=50e9,
            sustained_flops=1640e12, sustained_bandwidth=7.2e12, host_bandwidth=50e9,
            source="NVIDIA DGX B200 data sheet (1,440 GB on 8 GPUs); products 0.73 of the peak, H100's share, memory "
            "0.9 of the peak, host link as for H100: assumed, no measurement known",
            attention_source="no Triton kernel of this package runs on sm_100",
            description=_nvidia("NVIDIA B200", 10, 148, 132644864, 1.965, 191514411008, 7672320000000),
        ),
        Hardware(
            name="v5p", platform="tpu", jax_kind="TPU v5",
            memory_bytes=95e9, memory_bandwidth=2.765e12, peak_flops=459e12,
            links="torus", num_links=6, link_bandwidth=90e9, node_size=8960, node_bandwidth=25e9,
            sustained_flops=367e12, sustained_bandwidth=2.5e12, host_bandwidth=16e9,
            source="Google Cloud TPU v5p page (4,800 Gb/s of interconnect a chip, over six directions); products 0.8 "
            "and memory 0.9 of the peak, host link of PCIe 3.0 x16: assumed, no measurement known",
        ),
        Hardware(
            name="v5e", platform="tpu", jax_kind="TPU v5 lite",
            memory_bytes=16e9, memory_bandwidth=819e9, peak_flops=197e12,
            links="torus", num_links=4, link_bandwidth=45e9, node_size=256, node_bandwidth=3e9,
            sustained_flops=157e12, sustained_bandwidth=735e9, host_bandwidth=16e9,
            source="Google Cloud TPU v5e page (400 GB/s of interconnect a chip both ways, over four directions; 200 "
            "Gb/s of network for 8 chips); rates are the shares of the peak taken for v5p, host link too: assumed",
        ),
        Hardware(
            name="v6e", platform="tpu", jax_kind="TPU v6 lite",
            memory_bytes=32e9, memory_bandwidth=1638e9, peak_flops=918e12,
            links="torus", num_links=4, link_bandwidth=90e9, node_size=256, node_bandwidth=12e9,
            sustained_flops=734e12, sustained_bandwidth=1470e9, host_bandwidth=50e9,
            source="Google Cloud TPU v6e page (800 GB/s of interconnect a chip both ways, over four directions; PCIe "
            "5.0 to the host); rates are the shares of the peak taken for v5p, network 100 Gb/s a chip: assumed",
        ),
        Hardware(
            name="v7x", platform="tpu", jax_kind="TPU7x", devices_per_chip=2,
            memory_bytes=96e9, memory_bandwidth=3.685e12, peak_flops=1153.5e12,
            links="torus", num_links=7, link_bandwidth=45e9, node_size=18432, node_bandwidth=6e9,
            sustained_flops=923e12, sustained_bandwidth=3.3e12, host_bandwidth=25e9,
            source="Google Cloud TPU7x (Ironwood) page, halved: a device is one of a chip's two cores (a chip: 2,307 "
            "TFLOP/s, 192 GB, 7.37 TB/s, 1,200 GB/s of interconnect both ways over six directions); the link between "
            "the two cores is faster, and counts like one of them; rates are the shares of the peak taken for v5p, "
            "host link half of PCIe 5.0 x16, network 50 Gb/s: assumed",
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
