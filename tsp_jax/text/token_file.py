"""Token ids in .npy files, read as they are needed."""

import abc
import os
import tokenize
import warnings
import weakref
from pathlib import Path

import numpy as np

from tsp_jax.files import FileError, open_regular


class Ids(abc.ABC):
    """A one-dimensional array of integers that is read from files, indexed like the array that it holds."""

    dtype: np.dtype

    @abc.abstractmethod
    def __len__(self) -> int:
        """Number of items."""

    @abc.abstractmethod
    def read(self, start: int, stop: int) -> np.ndarray:
        """Returns items [start, stop)."""

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        return self.read(0, len(self)).astype(dtype or self.dtype, copy=False)

    def __getitem__(self, at: np.ndarray) -> np.ndarray:
        """[..., n] indices -> [..., n] items. Each row takes one read, from its smallest to its largest index."""
        found = np.empty(at.shape, self.dtype)
        for place in np.ndindex(at.shape[:-1]):
            first = int(at[place].min())
            found[place] = self.read(first, int(at[place].max()) + 1)[at[place] - first]
        return found


class TokenFile(Ids):
    """A one-dimensional .npy file of integers, indexed like the array that it holds.

    The file is read, not memory-mapped: if a mapped file is truncated, the next access kills the process (SIGBUS).

    Args:
      path: path of the file.
      advice: what an error tells the user to do if the file is damaged.

    Raises:
      FileError: the file cannot be read, or is not a complete one-dimensional array of integers. Later reads raise it
        too.
    """

    def __init__(self, path: Path, advice: str):
        self._path, self._advice = path, advice
        with open_regular(path, advice) as file:
            shape, self.dtype = _read_header(file, path, advice)
            self._offset, size = file.tell(), os.fstat(file.fileno()).st_size
            if len(shape) != 1 or not np.issubdtype(self.dtype, np.integer):
                raise FileError(f"{path} is {self.dtype} {list(shape)}; {advice}")
            (self._length,) = shape
            if not 0 <= self._length * self.dtype.itemsize <= size - self._offset:
                raise FileError(f"{path} is not a whole .npy array; {advice}")
            self._file = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._file)

    def __len__(self) -> int:
        return self._length

    def read(self, start: int, stop: int) -> np.ndarray:
        """Returns items [start, stop)."""
        found = np.empty(stop - start, self.dtype)
        content, done = found.view(np.uint8).data, 0
        while done < len(content):
            offset = self._offset + start * self.dtype.itemsize + done
            try:
                count = os.preadv(self._file, [content[done:]], offset)
            except OSError as error:
                raise FileError(f"{self._path} cannot be read ({error.strerror}); {self._advice}") from None
            if not count:
                raise FileError(f"{self._path} was truncated while it was read; {self._advice}")
            done += count
        return found


def _read_header(file, path: Path, advice: str) -> tuple[tuple[int, ...], np.dtype]:
    """Reads the header of a .npy file: (shape, dtype)."""
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        with warnings.catch_warnings(action="ignore"):  # of headers that Python 2 wrote
            shape, _, dtype = readers[np.lib.format.read_magic(file)](file)
        return shape, dtype
    except (ValueError, KeyError, TypeError, SyntaxError, RecursionError, tokenize.TokenError):
        raise FileError(f"{path} is not a whole .npy array; {advice}") from None
