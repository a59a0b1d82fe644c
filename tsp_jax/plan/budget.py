"""Memory of a device that a program may fill."""

import dataclasses

from tsp_jax.errors import ConfigError
from tsp_jax.hardware.devices import Hardware


@dataclasses.dataclass(frozen=True)
class Budget:
    """Bytes of a device's memory."""

    bytes: float
    """that a program may fill"""

    def to_json(self) -> dict[str, float]:
        """Plain numbers."""
        return dataclasses.asdict(self)


def usable_bytes(hardware: Hardware, fraction: float) -> Budget:
    """The share of a device's memory that a program may fill.

    Raises:
      ConfigError: `fraction` is not in (0, 1].
    """
    if not 0 < fraction <= 1:
        raise ConfigError(f"memory={fraction} must be above 0 and at most 1; use 0.9")
    return Budget(fraction * hardware.memory_bytes)
