"""Shapes of HLO values: one array, or a nested tuple of arrays."""

import dataclasses
import functools
import math
import re
from typing import TypeAlias

from tsp_jax.errors import ConfigError

HOST_MEMORY_SPACE = 5
"""memory space of arrays in the host's memory"""
_BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128}


@dataclasses.dataclass(frozen=True)
class Shape:
    """The shape of an array on one device. Comparisons ignore the layout.

    A program has few shapes, and each is asked for its size again and again: the properties are computed once.
    """

    dtype: str
    dims: tuple[int, ...]
    layout: str = dataclasses.field(default="", compare=False)
    """order of dims, tiles and memory space, as text"""

    @functools.cached_property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.dims)

    @functools.cached_property
    def bytes(self) -> int:
        """Bytes without tile padding. Elements of less than a byte are packed only if the layout says so, as in XLA.

        Raises:
          ConfigError: the dtype is unknown and its name holds no width.
        """
        bits = _bits(self.dtype)
        packed = not self.layout or "E(" in self.layout
        return -(-self.size * (bits if packed or bits >= 8 or not bits else 8) // 8)

    @functools.cached_property
    def memory_space(self) -> int:
        """The memory space: 0 is the device's main memory; on TPU, 1 is on-chip memory and 5 the host's memory."""
        space = re.search(r"S\((\d+)\)", self.layout)
        return int(space[1]) if space else 0


@functools.lru_cache(maxsize=1024)
def _bits(dtype: str) -> int:
    """Bits of an element."""
    if dtype in _BITS:
        return _BITS[dtype]
    width = re.match(r"[a-z]+(\d+)", dtype)
    if not width:
        raise ConfigError(f"dtype={dtype} in HLO text has no known size; add it to tsp_jax.inspect.shapes")
    return int(width[1])


ShapeTree: TypeAlias = "Shape | tuple[ShapeTree, ...]"


def ints(text: str) -> tuple[int, ...]:
    """The integers in a text. Raises ConfigError if one has more than 18 digits: no program has such numbers."""
    return tuple(-natural(digits) if sign else natural(digits) for sign, digits in re.findall(r"(-?)(\d+)", text))


def natural(text: str) -> int:
    """Parses a natural number. Raises ConfigError if it has more than 18 digits, ValueError if the text is not one."""
    if len(text) > 18 and text.isdecimal():
        raise ConfigError(f"number {text:.40} in HLO text has more than 18 digits; pass compiled.as_text()")
    if not text.isdecimal():
        raise ValueError(text)
    return int(text)


def leaves(shape: ShapeTree) -> tuple[Shape, ...]:
    """The arrays of a nested tuple shape, in order."""
    return (shape,) if isinstance(shape, Shape) else tuple(leaf for part in shape for leaf in leaves(part))


def nbytes(shape: ShapeTree) -> int:
    """Bytes of all arrays of a shape."""
    return sum(leaf.bytes for leaf in leaves(shape))
