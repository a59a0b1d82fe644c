"""Token ids on disk, in shards of whole documents. Finished shards survive a build that is killed.

A shard has these files for each split: ``00000.train.npy`` with token ids, ``00000.train.lengths.npy`` with the length
of each document, and ``00000.train.loss.npy`` if some tokens do not count as labels. Its record ``00000.json`` is
written last, and says where the next shard begins.
"""

import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import numpy as np

from tsp_jax.files import Count, FileError, read_json
from tsp_jax.text.encode import Part
from tsp_jax.text.readers import Place
from tsp_jax.text.token_file import Ids, TokenFile

Split = Literal["train", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "heldout")
SHARD = 1 << 25
"""tokens after which a shard ends with the document that it has begun"""
_OPEN_FILES = 64  # shards that a reader keeps open


class Segment(msgspec.Struct, frozen=True):
    """Tokens [start, stop) of a file, and the file with their loss; "": all of them count."""

    file: Annotated[str, msgspec.Meta(pattern=r"^\d{5,}\.(train|heldout)\.npy$")]
    start: Count
    stop: Count
    loss: Annotated[str, msgspec.Meta(pattern=r"^(\d{5,}\.(train|heldout)\.loss\.npy)?$")] = ""


class Record(msgspec.Struct):
    """The content of a shard's record."""

    source: Count
    row: Count
    """where the next shard begins"""
    max_token_id: Count
    max_token_file: str
    tokens: dict[Split, Count]
    with_loss: list[Split] = []


class ShardIds(Ids):
    """The items of segments of files, one after another.

    Args:
      folder: folder of the files.
      segments: (file, start, stop); an empty file name stands for ones.
      dtype: dtype of what is read; all files have it.
      advice: what an error tells the user to do if a file is damaged.

    Raises:
      FileError: a file is damaged. Later reads raise it too.
    """

    def __init__(self, folder: Path, segments: list[tuple[str, int, int]], dtype: np.dtype, advice: str):
        self.dtype = np.dtype(dtype)
        self._segments = segments
        self._ends = np.cumsum([stop - start for _, start, stop in segments], dtype=np.int64)

        @functools.lru_cache(maxsize=_OPEN_FILES)
        def opened(name: str) -> TokenFile:
            file = TokenFile(folder / name, advice)
            if file.dtype != self.dtype:
                raise FileError(f"{folder / name} is {file.dtype}, not {self.dtype}; {advice}")
            return file

        self._opened = opened
        for name, start, stop in segments:
            if not start <= stop <= (len(opened(name)) if name else stop):
                raise FileError(f"{folder / name} does not have tokens {start} to {stop}; {advice}")

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def read(self, start: int, stop: int) -> np.ndarray:
        """Returns items [start, stop)."""
        found = np.ones(stop - start, self.dtype)
        done, number = start, int(np.searchsorted(self._ends, start, side="right"))
        while done < stop:
            name, first, last = self._segments[number]
            begin = first + done - int(self._ends[number] - (last - first))
            count = min(stop - done, last - begin)
            if name:
                found[done - start : done - start + count] = self._opened(name).read(begin, begin + count)
            done, number = done + count, number + 1
        return found


class _GrowingFile:
    """A .npy file whose array grows. Its header is written again at the end: numpy leaves room for a longer shape."""

    def __init__(self, path: Path, dtype: np.dtype):
        self._file = open(path, "wb")  # noqa: SIM115, closed by `drop`
        self._dtype, self.count = np.dtype(dtype), 0
        self._write_header()

    def append(self, items: np.ndarray) -> None:
        # Plain writes: a full disk under a writable memory map kills the process instead of raising an error.
        self._file.write(items.astype(self._dtype, copy=False).tobytes())
        self.count += len(items)

    def close(self) -> None:
        self._file.seek(0)
        self._write_header()
        self._file.flush()
        os.fsync(self._file.fileno())
        self.drop()

    def drop(self) -> None:
        """Closes the file, complete or not."""
        self._file.close()

    def _write_header(self) -> None:
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": (self.count,)}
        np.lib.format.write_array_header_1_0(self._file, header)


class _SplitWriter:
    """One split of a shard that is being written."""

    def __init__(self, folder: Path, number: int, split: Split, dtype: np.dtype):
        self._path = folder / f"{number:05}.{split}"
        self.ids, self.loss = _GrowingFile(Path(f"{self._path}.npy"), dtype), None
        self._ends = [0]

    def append(self, part: Part) -> None:
        """Adds a part of a document."""
        if part.loss is not None and self.loss is None:
            self.loss = _GrowingFile(Path(f"{self._path}.loss.npy"), np.dtype(np.uint8))
            self.loss.append(np.ones(self.ids.count, np.uint8))
        self.ids.append(part.ids)
        if self.loss is not None:
            self.loss.append(np.ones(len(part.ids), np.uint8) if part.loss is None else part.loss)
        if part.is_last and self.ids.count > self._ends[-1]:  # a text may have no token
            self._ends.append(self.ids.count)

    def close(self) -> None:
        """Completes the files."""
        np.save(Path(f"{self._path}.lengths.npy"), np.diff(np.array(self._ends, np.int64)))
        self.ids.close()
        if self.loss is not None:
            self.loss.close()

    def drop(self) -> None:
        """Closes the files, complete or not."""
        self.ids.drop()
        if self.loss is not None:
            self.loss.drop()


class ShardsWriter:
    """Writes the parts of documents to shards in a folder, behind those that are there.

    Args:
      folder: the folder; what a killed process has left of an unfinished shard is written over.
      dtype: dtype of token ids.
      is_held_out: whether the document of a name is held out.
    """

    def __init__(self, folder: Path, dtype: np.dtype, is_held_out: Callable[[str], bool]):
        self._folder, self._dtype, self._is_held_out = folder, dtype, is_held_out
        self._number = len(read_records(folder))

    def write(self, parts: Iterator[Part]) -> None:
        """Writes all parts, and the records of full shards and of the last one."""
        writers: dict[Split, _SplitWriter] = {}
        largest, after = (-1, ""), Place()
        try:
            for part in parts:
                if not writers:
                    writers, largest = self._begin(), (-1, "")
                writers["heldout" if self._is_held_out(part.document) else "train"].append(part)
                largest = max(
                    largest, (int(part.ids.max()) if len(part.ids) else -1, part.where), key=lambda one: one[0]
                )
                after = part.after
                if part.is_last and sum(writer.ids.count for writer in writers.values()) >= SHARD:
                    self._finish(writers, after, largest)
                    writers = {}
            if writers:
                self._finish(writers, after, largest)
        finally:
            for writer in writers.values():
                writer.drop()

    def _begin(self) -> dict[Split, _SplitWriter]:
        return {split: _SplitWriter(self._folder, self._number, split, self._dtype) for split in SPLITS}

    def _finish(self, writers: dict[Split, _SplitWriter], after: Place, largest: tuple[int, str]) -> None:
        for writer in writers.values():
            writer.close()
        record = Record(
            *after, *largest, {split: writer.ids.count for split, writer in writers.items()},
            [split for split, writer in writers.items() if writer.loss is not None],
        )  # fmt: skip
        write_json(self._folder / f"{self._number:05}.json", record)
        self._number += 1


def write_json(path: Path, content: msgspec.Struct) -> None:
    """Writes a JSON file, which is there whole or not at all."""
    partial = path.with_suffix(".json.partial")
    partial.write_bytes(msgspec.json.format(msgspec.json.encode(content)) + b"\n")
    os.rename(partial, path)


def read_records(folder: Path) -> list[Record]:
    """Returns the records of the finished shards of a folder, in order."""
    records = []
    while (path := folder / f"{len(records):05}.json").exists():
        records.append(read_json(path, Record, advice=f"delete {folder}"))
    return records


def segments_of(records: list[Record]) -> dict[Split, list[Segment]]:
    """Returns what shards hold of each split."""
    segments: dict[Split, list[Segment]] = {split: [] for split in SPLITS}
    for split in SPLITS:
        for number, record in enumerate(records):
            if record.tokens[split]:
                name = f"{number:05}.{split}"
                loss = f"{name}.loss.npy" if split in record.with_loss else ""
                segments[split].append(Segment(f"{name}.npy", 0, record.tokens[split], loss))
    return segments


def lengths_of(folder: Path, records: list[Record], split: Split) -> np.ndarray:
    """Returns the lengths of the documents of a split, [documents] int64."""
    files = [folder / f"{number:05}.{split}.lengths.npy" for number in range(len(records))]
    return np.concatenate([np.zeros(0, np.int64), *(np.asarray(TokenFile(file, f"delete {folder}")) for file in files)])
