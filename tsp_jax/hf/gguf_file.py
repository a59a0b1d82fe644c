"""The layout of GGUF files (ggml's docs/gguf.md): metadata, and tensors that stay on the disk until they are read.

Every length is checked against the size of the file before anything is read or allocated.
"""

import math
import stat
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tsp_jax.errors import ConfigError, import_optional
from tsp_jax.files import MAX_BYTES, FileError

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""type of a value -> its code in `struct`"""
STRING, ARRAY = 8, 9
VERSIONS = (2, 3)
MOST_ENTRIES, LONGEST_ARRAY, MOST_DIMS = 2**16, 2**22, 4
"""limits that no model reaches: metadata entries or tensors of a file, values of an array, dimensions of a tensor"""


class Tensor(NamedTuple):
    """A tensor of a file."""

    shape: tuple[int, ...]
    kind: Any
    """a gguf.GGMLQuantizationType"""
    data: np.ndarray
    """memory-mapped uint8, in the tensor's shape, except that the last dimension counts the bytes of a row"""

    def values(self) -> np.ndarray:
        """The tensor's values as float32."""
        dequantized = import_optional("gguf", "hf").dequantize(np.ascontiguousarray(self.data), self.kind)
        return dequantized.astype(np.float32, copy=False)


def read_gguf(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Reads the metadata of a GGUF file, and maps its tensors by name.

    Raises:
      FileError: the path is no regular file, or its content is not GGUF from beginning to end.
    """
    path = Path(path)
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise FileError(f"{path} is not a regular file; use a GGUF file")
        data = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.zeros(0, np.uint8)
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise FileError(f"{path} cannot be read ({error}); use an intact file") from None
    try:
        return _Reader(data).read()
    except (ValueError, OverflowError) as error:  # UnicodeDecodeError is one
        raise FileError(f"{path} cannot be read as GGUF ({error}); use an intact file") from None


class _Reader:
    """Reads values one after the other; raises ValueError if the file is malformed."""

    def __init__(self, data: np.ndarray):
        self.data, self.place = data, 0
        self.end = min(len(data), MAX_BYTES)
        """position before which the metadata and the list of tensors must end"""

    def read(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        if self.take(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        if (version := self.scalar("I")) not in VERSIONS:
            raise ValueError(f"version {version}, not {' or '.join(map(str, VERSIONS))}")
        tensors, entries = self.count(MOST_ENTRIES, "tensors"), self.count(MOST_ENTRIES, "entries")
        fields: dict[str, Any] = {}
        for _ in range(entries):
            _add(fields, self.string(), self.value(self.scalar("I")))
        infos: dict[str, tuple] = {}
        for _ in range(tensors):
            _add(infos, self.string(), self.info())
        alignment = fields.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1:
            raise ValueError(f"general.alignment={alignment!r:.80}")
        start = -(-self.place // alignment) * alignment
        return fields, {name: self.tensor(name, start, *info) for name, info in infos.items()}

    def take(self, size: int) -> bytes:
        if size > self.end - self.place:
            raise ValueError(f"it ends before the {size:,} bytes at byte {self.place:,}")
        self.place += size
        return self.data[self.place - size : self.place].tobytes()

    def scalar(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def count(self, most: int, what: str) -> int:
        if (number := self.scalar("Q")) > most:
            raise ValueError(f"{number:,} {what}, at most {most:,} are read")
        return number

    def string(self) -> str:
        return self.take(self.scalar("Q")).decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind in SCALARS:
            return self.scalar(SCALARS[kind])
        if kind != ARRAY:
            raise ValueError(f"type {kind} of a value is unknown")
        kind, number = self.scalar("I"), self.count(LONGEST_ARRAY, "values in an array")
        if kind == STRING:
            return [self.string() for _ in range(number)]
        if kind not in SCALARS:
            raise ValueError(f"type {kind} of an array is unknown")
        code = SCALARS[kind]
        return list(struct.unpack(f"<{number}{code}", self.take(number * struct.calcsize(f"<{code}"))))

    def info(self) -> tuple[tuple[int, ...], int, int]:
        """Reads (shape, type, offset) of a tensor."""
        if (dims := self.scalar("I")) > MOST_DIMS:
            raise ValueError(f"{dims:,} dimensions, at most {MOST_DIMS} are read")
        shape = tuple(self.scalar("Q") for _ in range(dims))[::-1]
        return shape, self.scalar("I"), self.scalar("Q")

    def tensor(self, name: str, start: int, shape: tuple[int, ...], kind: int, offset: int) -> Tensor:
        gguf = import_optional("gguf", "hf")
        known = gguf.GGMLQuantizationType(kind)
        block, block_bytes = gguf.GGML_QUANT_SIZES[known]
        if not shape or not all(shape) or shape[-1] % block:
            raise ValueError(f"tensor {name:.80} of type {known.name} has shape {list(shape)}")
        stored = (*shape[:-1], shape[-1] // block * block_bytes)
        begin = start + offset
        if begin + math.prod(stored) > len(self.data):
            raise ValueError(f"it ends before tensor {name:.80}")
        return Tensor(shape, known, self.data[begin : begin + math.prod(stored)].reshape(stored))


def _add(content: dict[str, Any], name: str, value: Any) -> None:
    if name in content:
        raise ValueError(f"{name:.80} stands twice")
    content[name] = value
