"""Which platform a program was compiled for, as far as its devices or its text tell."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from tsp_jax.errors import ConfigError
from tsp_jax.hardware.devices import HARDWARE, Hardware
from tsp_jax.inspect.module import Module
from tsp_jax.inspect.shapes import leaves

_GPU = ("rocm", "cuda")
"""what JAX calls gpu, and texts do not tell apart"""
_MARKS = (
    (("tpu",), re.compile(r":T\(\d|tpu_custom_call|AsyncCollectiveStart")),
    (_GPU, re.compile(r'"operation_queue_id"|"collective_backend_config"|__gpu\$|__cublas\$|__cudnn\$|__triton')),
    (("cpu",), re.compile(r'"outer_dimension_partitions"|__ynn_|__onednn\$|xla_ffi_python_cpu_callback|__cpu\$')),
)
"""platforms, and what only their compilers write into layouts, backend_config and targets of custom calls"""


def hardware_of(device: Any) -> Hardware | None:
    """The row of `HARDWARE` for a JAX device; None if there is none."""
    return next((hardware for hardware in HARDWARE.values() if hardware.is_kind_of(device)), None)


def platforms_of_text(module: Module) -> tuple[str, ...]:
    """The platforms for which a text may have been compiled; empty if it has no mark of any platform."""
    if "platforms" not in module.memo:
        module.memo["platforms"] = _platforms_of_text(module)
    return module.memo["platforms"]


def _platforms_of_text(module: Module) -> tuple[str, ...]:
    plain: set[int] = set()
    for computation in module.computations.values():
        for i in computation.instructions:
            if not i.attributes and id(i.shape) in plain:  # programs repeat a few shapes many times
                continue
            plain.add(id(i.shape))
            text = " ".join([i.custom_call_target, i.backend_config, *(leaf.layout for leaf in leaves(i.shape))])
            for platforms, mark in _MARKS:
                if mark.search(text):
                    return platforms
    return ()


def check_platform(hardware: Hardware, platforms: tuple[str, ...]) -> None:
    """Raises ConfigError if a program cannot have been compiled for a target's platform."""
    if platforms and hardware.platform not in platforms:
        fits = [h.name for h in HARDWARE.values() if h.platform in platforms]
        raise _compiled_for(hardware, " or ".join(platforms), fits)


def check_devices(hardware: Hardware, devices: Iterable[Any]) -> None:
    """Raises ConfigError if the devices of a compiled program are not of a target's kind."""
    for device in devices:
        # Devices of a topology are named as the compiler's description names them: MI300X and MI325X are both gfx942.
        named = f'device_description_str: "{device.device_kind}"'
        if hardware.is_kind_of(device) or named in hardware.description:
            return
        fits = [h.name for h in HARDWARE.values() if h.is_kind_of(device) or named in h.description]
        raise _compiled_for(hardware, fits[0] if fits else f"{device.platform} {device.device_kind}", fits)


def _compiled_for(hardware: Hardware, compiled: str, fits: Sequence[str]) -> ConfigError:
    return ConfigError(
        f"target={hardware.name} is of platform {hardware.platform}, and the program was compiled for {compiled}; "
        f"compile it with inspect.compile_for(f, ..., target='{hardware.name}:8')"
        + (f", or use target={fits[0]}" if fits else "")
    )


def platform_assumption(module: Module, hardware: Hardware) -> list[str]:
    """One line that states the assumed platform; no line if the program's text shows the platform."""
    platforms = platforms_of_text(module)
    if platforms == (hardware.platform,):
        return []
    told = f"only that it is {' or '.join(platforms)}" if platforms else "nothing"
    return [f"the program was compiled for {hardware.platform}: its text says {told} about its platform"]
