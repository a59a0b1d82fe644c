"""Hardware to compile for, present or not: ``cpu:8``, ``mi300x:8``, ``h100:8``, ``v5p:8``, any row of `HARDWARE`.

A target's devices are the machine's own if it has enough of them, else those of a topology that the platform's compiler
describes without any device. A program compiled for a topology can be inspected, but not run.
"""

import dataclasses
import functools
import importlib.util
import os
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from tsp_jax.errors import ConfigError, install_hint
from tsp_jax.hardware.devices import (
    HARDWARE,
    MOST_CPU_DEVICES,
    MOST_DEVICES,
    TPU_TOPOLOGIES,
    Hardware,
    is_present,
)
from tsp_jax.hardware.private_jax import register_rocm_plugin
from tsp_jax.hardware.rates_file import check_base, read_hardware
from tsp_jax.hardware.rocm_standins import load_rocm_libraries
from tsp_jax.hardware.virtual_devices import use_cpu_devices

_STANDINS: set[str] = set()
"""ROCm libraries that stand-ins replace in this process"""


@dataclasses.dataclass(frozen=True)
class Target:
    """A number of devices of one kind."""

    hardware: Hardware
    num_devices: int

    def __str__(self) -> str:
        return f"{self.hardware.name}:{self.num_devices}"

    def devices(self) -> list[Any]:
        """Devices for a mesh: those of the machine if there are enough, else those of a topology.

        Raises:
          ConfigError: the platform's compiler is not installed, or knows no topology of that many devices.
        """
        if self.hardware.platform == "cpu":
            devices = jax.devices("cpu")
            if len(devices) < self.num_devices:
                raise ConfigError(f"target={self}: there are {len(devices)} CPU devices; use cpu:{len(devices)}")
            return devices[: self.num_devices]
        return self._present() or list(_TOPOLOGIES[self.hardware.platform](self))

    def _present(self) -> list[Any]:
        """The machine's own devices of this kind; empty if there are too few."""
        if not is_present(self.hardware.platform):
            return []
        found = list(filter(self.hardware.is_kind_of, jax.devices()))
        return found[: self.num_devices] if len(found) >= self.num_devices else []


def use_target(target: Target) -> None:
    """Sets JAX up to compile for a target; call it before anything else uses a device."""
    if target.hardware.platform == "cpu":
        use_cpu_devices(target.num_devices)  # the program that would run
    elif not is_present(target.hardware.platform):
        jax.config.update("jax_platforms", "cpu")


def parse_target(text: str, attention_efficiency: float = 0.0, hardware_file: str = "") -> Target:
    """Parses the text of a target, such as ``mi300x:8``.

    Args:
      text: a name in `HARDWARE`, a colon, and a number of devices.
      attention_efficiency: share of the fastest product's rate that attention kernels reach; 0: by kernel and heads.
      hardware_file: file of measured rates, which replace the target's (`tsp_jax.hardware.rates_file`); empty: none.

    Raises:
      ConfigError: the name is unknown, the number or share is out of range, or the file is not one of such devices.
    """
    name, _, count = text.partition(":")
    if name not in HARDWARE:
        raise ConfigError(f"target={text} is unknown; use one of {', '.join(f'{known}:8' for known in HARDWARE)}")
    if not count.isdecimal() or not count.strip("0"):
        raise ConfigError(f"target={text} does not say how many devices; use {name}:8")
    hardware = HARDWARE[name]
    most = MOST_CPU_DEVICES if hardware.platform == "cpu" else MOST_DEVICES
    if len(count) > len(str(most)) or int(count) > most:
        raise ConfigError(f"target={text:.80} has too many devices; use {name}:{most} at most")
    if hardware_file:
        hardware = read_hardware(hardware_file)
        check_base(hardware_file, hardware, text)
    if attention_efficiency:
        hardware = dataclasses.replace(hardware, rates=hardware.rates.with_attention(attention_efficiency))
    return Target(hardware, int(count))


def standins_note() -> str:
    """Note for results that were compiled with stand-ins for ROCm's libraries; empty without stand-ins."""
    return "compiled with stand-ins for ROCm's libraries: compile-only, nothing can run" if _STANDINS else ""


def _package(target: Target, module: str) -> Path:
    """Folder of an installed compiler plugin."""
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # of a parent
        spec = None
    if spec is None or not spec.submodule_search_locations:
        hint = install_hint(f"aot-{target.hardware.platform}")
        raise ConfigError(f"target={target}: its compiler is not installed; {hint}")
    return Path(next(iter(spec.submodule_search_locations)))


def _gpu_topology(target: Target) -> Any:
    hardware, number = target.hardware, target.num_devices
    hosts, rest = divmod(number, hardware.node_size)
    if hosts and rest:
        raise ConfigError(f"target={target} is not whole nodes of 8; use {hardware.name}:{(hosts + 1) * 8}")
    options = {"topology": f"1x{hosts or 1}x{number // (hosts or 1)}", "target_config": hardware.description}
    return topologies.get_topology_desc(platform=hardware.platform, topology_name="", **options).devices


@functools.cache
def _rocm(target: Target) -> Any:
    _register_rocm(_package(target, "jax_plugins.xla_rocm7"), _package(target, "jax_rocm7_plugin"))
    return _gpu_topology(target)


@functools.cache
def _register_rocm(plugin: Path, runtime: Path) -> None:
    library = plugin / "xla_rocm_plugin.so"
    _STANDINS.update(load_rocm_libraries([library, *sorted(runtime.glob("*.so"))], cache_folder()))
    register_rocm_plugin(library, runtime.name, late=bool(_STANDINS))


@functools.cache
def _cuda(target: Target) -> Any:
    _package(target, "jax_plugins.xla_cuda12")
    # Lets the plugin register on a machine without a driver.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    return _gpu_topology(target)


@functools.cache
def _tpu(target: Target) -> Any:
    library = _package(target, "libtpu") / "libtpu.so"
    slices = TPU_TOPOLOGIES[target.hardware.name]
    if target.num_devices == 1:
        return _tpu(dataclasses.replace(target, num_devices=min(slices)))[:1]
    if target.num_devices not in slices:
        known = f"{target.hardware.name}: with one of 1, {', '.join(map(str, slices))}"
        raise ConfigError(f"target={target}: no such slice; use {known}")
    known = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5p-16", "TPU_WORKER_HOSTNAMES": "localhost"}
    if not is_present("tpu"):  # else one process alone may use the TPU, and libtpu locks it
        known["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    for name, value in (known | {"TPU_LIBRARY_PATH": str(library)}).items():
        os.environ.setdefault(name, value)
    name, bounds = slices[target.num_devices], {"chips_per_host_bounds": (2, 2, 1)}
    return topologies.get_topology_desc(platform="tpu", topology_name=name, **bounds).devices


_TOPOLOGIES = {"rocm": _rocm, "cuda": _cuda, "tpu": _tpu}


def cache_folder() -> Path:
    """Folder of built stand-ins: ``$XDG_CACHE_HOME/tsp_jax`` or ``~/.cache/tsp_jax``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tsp_jax"
