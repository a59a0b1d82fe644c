"""Experts whose weights are quantized in MXFP4, read as if they were not (gpt-oss).

A weight X [E, D_in, D_out] is held as two tensors of bytes. X_blocks [E, D_out, D_in / 32, 16] has two elements in each
byte, the first in its low 4 bits; X_scales [E, D_out, D_in / 32] has the exponent of each 32 elements, plus 127.

Source: OCP Microscaling Formats (MX) Specification 1.0; integrations/mxfp4.py of transformers 5.24.
"""

import numpy as np

from tsp_jax.errors import ConfigError
from tsp_jax.hf.tensors import FLOATS, Shape, Tensors

BLOCK = 32
"""elements that share a scale"""
BIAS = 127
"""of the exponents"""
_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1 = np.array([*_POSITIVE, *(-value for value in _POSITIVE)], np.float32)
"""value of each 4 bits: a sign, two bits of an exponent, one of a mantissa"""
PAIRS = np.stack([np.tile(E2M1, 16), np.repeat(E2M1, 16)], axis=-1).view(np.uint64)[:, 0]
"""[256]: the two values of each byte, joined: one look-up is faster than two"""


def dequantize(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """uint8 [..., 16] and [...] -> float32 [..., 32]; a bfloat16 holds each of these values exactly."""
    factors = np.ldexp(np.float32(1), scales.astype(np.int32) - BIAS)
    return PAIRS.take(blocks).view(np.float32) * factors[..., None]


class Mxfp4Tensors(Tensors):
    """The tensors of a folder, some of which are in MXFP4: these are read by the name X that they would have."""

    def _parts(self, name: str) -> tuple[str, str] | None:
        """The names of blocks and scales of a tensor that is quantized."""
        parts = f"{name}_blocks", f"{name}_scales"
        return None if name in self.paths or parts[0] not in self.paths else parts

    def _check(self, name: str, shape: Shape, dtypes: tuple[str, ...] = FLOATS) -> tuple[str, ...]:
        if (parts := self._parts(name)) is None or len(shape) != 3:
            return super()._check(name, shape, dtypes)
        experts, inputs, outputs = shape
        if inputs % BLOCK:
            raise ConfigError(
                f"{self.paths[parts[0]]}: tensor {parts[0]} has blocks of {BLOCK} of {inputs} elements; use the "
                "config.json that belongs to these weights"
            )
        blocks = experts, outputs, inputs // BLOCK
        super()._check(parts[0], (*blocks, BLOCK // 2), ("U8",))
        super()._check(parts[1], blocks, ("U8",))
        return parts

    def read(self, name: str, *index: slice) -> np.ndarray:
        """Reads only a slice of a tensor from its file: float32 if it is quantized, else in the dtype there."""
        if (parts := self._parts(name)) is None:
            return super().read(name, *index)
        experts, inputs, outputs = index
        groups = self.files[self.paths[parts[1]]].get_slice(parts[1]).get_shape()[2]
        start, stop, step = inputs.indices(groups * BLOCK)
        first = start // BLOCK
        held = experts, outputs, slice(first, -(-stop // BLOCK))
        values = dequantize(super().read(parts[0], *held), super().read(parts[1], *held))
        columns = values.reshape(*values.shape[:2], -1)[..., start - first * BLOCK : stop - first * BLOCK : step]
        return columns.swapaxes(1, 2)
