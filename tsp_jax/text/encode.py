"""Documents -> token ids, in order: from .npy files, as bytes, or by a folder's tokenizer."""

import abc
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from tsp_jax.config import DataConfig
from tsp_jax.errors import ConfigError
from tsp_jax.text.readers import Meter, Place, read_documents
from tsp_jax.text.sources import Source, reading
from tsp_jax.text.token_file import TokenFile

BYTES = "bytes"
"""the tokenizer whose token ids are the bytes of UTF-8"""
LARGEST_ID = 2**32 - 1
CHUNK = 1 << 22
"""token ids in memory at a time"""
_USE_IDS = f"use one dimension of integers from 0 to {LARGEST_ID}"


class Part(NamedTuple):
    """The next ids of a document."""

    ids: np.ndarray
    """[n] integers"""
    loss: np.ndarray | None
    """[n] uint8: 1 where the token counts as a label; None: everywhere"""
    document: str
    """name of the document, which decides on its split"""
    is_last: bool
    """whether the document ends with this part"""
    where: str
    """file and row, for messages"""
    after: Place
    """where the next document begins"""


class Encoder(abc.ABC):
    """Encodes the documents of a corpus.

    Args:
      data: settings.
      sources: files, in the order of documents.
    """

    def __init__(self, data: DataConfig, sources: Sequence[Source]):
        self._data, self._sources = data, sources

    @property
    def largest(self) -> tuple[int, str] | None:
        """Largest token id, and what has it; None: not known before everything is encoded."""
        return None

    @property
    @abc.abstractmethod
    def dtype(self) -> np.dtype:
        """Dtype in which ids are stored."""

    @property
    def key(self) -> list[str]:
        """What the ids depend on besides the files."""
        return []

    @abc.abstractmethod
    def parts(self, start: Place, meter: Meter) -> Iterator[Part]:
        """Yields the parts of all documents from a place on, in order. A document of no text has no part.

        Raises:
          ConfigError: a file cannot be read or encoded.
        """


class IdsEncoder(Encoder):
    """Token ids in .npy files.

    Raises:
      ConfigError: the arrays are not token ids.
    """

    @property
    def largest(self) -> tuple[int, str]:
        return self._largest

    @property
    def dtype(self) -> np.dtype:
        return np.min_scalar_type(self._largest[0])

    @functools.cached_property
    def _largest(self) -> tuple[int, str]:
        return max(((self._largest_of(source), str(source.path)) for source in self._sources), key=lambda one: one[0])

    def parts(self, start: Place, meter: Meter) -> Iterator[Part]:
        for index in range(start.source, len(self._sources)):
            source = self._sources[index]
            with meter.open(source):
                chunks = list(_spans(len(self._open(source))))
                for first, last in chunks:
                    ids, is_last = self._read(source, first, last), (first, last) == chunks[-1]
                    yield Part(ids, None, source.name, is_last, str(source.path), Place(index + 1))

    def _largest_of(self, source: Source) -> int:
        ranges = [
            (int(chunk.min()), int(chunk.max()))
            for chunk in (self._read(source, *span) for span in _spans(len(self._open(source))))
        ]
        low, high = min((low for low, _ in ranges), default=0), max((high for _, high in ranges), default=0)
        if low < 0 or high > LARGEST_ID:
            wrong = low if low < 0 else high
            raise ConfigError(f"data.files={self._data.files!r}: {source.path} holds {wrong}; {_USE_IDS}")
        return high

    def _open(self, source: Source) -> TokenFile:
        with reading(self._data, source.path):
            return TokenFile(source.path, _USE_IDS)

    def _read(self, source: Source, start: int, stop: int) -> np.ndarray:
        with reading(self._data, source.path):
            return TokenFile(source.path, "run again").read(start, stop)


class ByteEncoder(Encoder):
    """The bytes of texts. The bytes of a text file need not be UTF-8."""

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.uint8)

    @property
    def key(self) -> list[str]:
        return [BYTES, self._data.text_field, self._data.invalid_utf8]

    def parts(self, start: Place, meter: Meter) -> Iterator[Part]:
        for content, name, where, after in read_documents(self._data, self._sources, start, meter):
            if isinstance(content, dict):
                raise ConfigError(
                    f"data.tokenizer=bytes has no chat template for the messages in {where}; "
                    "use --data.tokenizer <a folder with a chat template>"
                )
            blocks = iter([content.encode()] if isinstance(content, str) else content)
            for block, is_last in look_ahead(block for block in blocks if block):
                yield Part(np.frombuffer(block, np.uint8), None, name, is_last, where, after)


def look_ahead(items: Iterator) -> Iterator[tuple]:
    """Yields (item, whether it is the last one)."""
    waiting = []
    for item in items:
        yield from ((one, False) for one in waiting)
        waiting = [item]
    yield from ((one, True) for one in waiting)


def _spans(length: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + CHUNK, length)) for start in range(0, length, CHUNK))
