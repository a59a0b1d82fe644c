"""Folders of safetensors files: read slice by slice, and written completely or not at all."""

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np

from tsp_jax.errors import ConfigError, import_optional
from tsp_jax.files import check_regular, read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = ("F32", "BF16", "F16")
"""dtypes of weights, as safetensors names them"""
MAX_FILE_BYTES = 5_000_000_000
EQUAL_ELEMENTS = 2**24
"""elements of a tensor that are compared at a time"""
MAX_NAME = 255
"""longest file name, in characters, on common file systems"""

Shape = tuple[int, ...]


def open_file(path: Path) -> Any:
    """Opens a safetensors file, reading only its header."""
    package = import_optional("safetensors", "hf")
    check_regular(path, "use a complete Hugging Face folder")
    try:
        return package.safe_open(path, framework="np")
    except (package.SafetensorError, OSError) as error:
        raise ConfigError(f"{path} is not an intact safetensors file ({error}); use a fresh copy") from None


class Tensors:
    """The tensors of a folder, by name. Opening a folder reads only the headers of its files.

    Args:
      folder: the folder.
      name: name of the file that has all tensors, if there is one; otherwise an index names the files.

    Raises:
      ConfigError: a file is missing or broken, or lacks a tensor that the index places in it.
    """

    def __init__(self, folder: str | Path, name: str = SINGLE):
        self.folder = Path(folder)
        single = self.folder / name
        if os.path.lexists(single):
            self.files = {single: open_file(single)}
            self.paths = dict.fromkeys(self.files[single].keys(), single)
            return
        self.paths = _weight_map(self.folder)
        self.files = {path: open_file(path) for path in dict.fromkeys(self.paths.values())}
        names = {path: set(file.keys()) for path, file in self.files.items()}
        for name, path in self.paths.items():
            if name not in names[path]:
                raise ConfigError(
                    f"{path} lacks tensor {name!r:.80}, which {INDEX} places in it; use a complete folder"
                )
        # transformers reads tensors that the index leaves out, too
        self.paths = {name: path for path, held in names.items() for name in held} | self.paths

    def check(self, shapes: Iterable[tuple[str, Shape]], ignored: Callable[[str], bool]) -> None:
        """Checks that the folder has the tensors with these names and shapes, in a float dtype, and no other tensors.

        Raises ConfigError for the first tensor that is wrong. Other tensors are allowed if `ignored(name)`.
        """
        found = {held for name, shape in shapes for held in self._check(name, shape)}
        for name, path in self.paths.items():
            if name not in found and not ignored(name):
                raise ConfigError(f"{path}: tensor {name!r:.80} has no place in the model; use weights without it")

    def _check(self, name: str, shape: Shape, dtypes: tuple[str, ...] = FLOATS) -> tuple[str, ...]:
        """Checks one tensor; returns the names of the tensors of the files that hold it."""
        if name not in self.paths:
            raise ConfigError(f"{self.folder} has no tensor {name}; use a complete folder of this model")
        tensor, path = self.files[self.paths[name]].get_slice(name), self.paths[name]
        if tuple(tensor.get_shape()) != shape:
            raise ConfigError(
                f"{path}: tensor {name} has shape {list(tensor.get_shape())}, the model needs {list(shape)}; "
                "use the config.json that belongs to these weights"
            )
        if tensor.get_dtype() not in dtypes:
            raise ConfigError(f"{path}: tensor {name} is {tensor.get_dtype()}; use weights in {', '.join(dtypes)}")
        return (name,)

    def equal(self, first: str, second: str) -> bool:
        """Whether two matrices have the same shape and values; reads some rows of each at a time."""
        a, b = (self.files[self.paths[name]].get_slice(name) for name in (first, second))
        shape = a.get_shape()
        if shape != b.get_shape() or len(shape) != 2 or {a.get_dtype(), b.get_dtype()} - set(FLOATS):
            return False
        step = max(1, EQUAL_ELEMENTS // max(1, shape[1]))
        rows = (slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step))
        return all(np.array_equal(a[part].astype(np.float32), b[part].astype(np.float32)) for part in rows)

    def read(self, name: str, *index: slice) -> np.ndarray:
        """Reads only a slice of a tensor from its file, in the dtype that it has there."""
        tensor, (*others, last) = self.files[self.paths[name]].get_slice(name), index
        if last.step in (None, 1):
            return tensor[index]
        # safetensors reads elements with a step one by one, 50 times slower than all that lies between them.
        return tensor[(*others, slice(last.start, last.stop))][..., :: last.step]


class _Index(msgspec.Struct):
    """The keys of an index file that are read."""

    weight_map: Annotated[dict[str, str], msgspec.Meta(min_length=1)]
    """name of a tensor -> name of its file"""


def _weight_map(folder: Path) -> dict[str, Path]:
    index = folder / INDEX
    if not os.path.lexists(index):
        raise ConfigError(f"{folder} holds neither {SINGLE} nor {INDEX}; use a Hugging Face folder of safetensors")
    names = read_json(index, _Index).weight_map
    for tensor, name in names.items():
        if Path(name).name != name or name == ".." or len(name) > MAX_NAME or not name.isprintable():
            value = f"{tensor!r:.80} is in {name!r:.80}"
            raise ConfigError(f"{index}: {value}, no file of the folder; use an intact copy")
    return {tensor: folder / name for tensor, name in names.items()}


# ------------------------------------------------------------------------------------------------ writing


@contextlib.contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """Yields a temporary folder, renamed to `folder` if all goes well, and removed if anything fails.

    Raises:
      ConfigError: the folder exists and is not empty, or cannot be written.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"folder {folder} exists already; use another one, or remove it")
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.rename(folder)
    except (OSError, import_optional("safetensors", "hf").SafetensorError) as error:
        raise ConfigError(f"folder {folder} cannot be written ({error}); use another one") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def split_files(nbytes: Mapping[str, int], max_bytes: int) -> list[list[str]]:
    """Distributes tensors, in order, over files of at most `max_bytes`; a larger tensor gets a file of its own.

    `nbytes` has each tensor's size. Returns the names of the tensors of each file.
    """
    files: list[list[str]] = [[]]
    free_bytes = max_bytes
    for name, size in nbytes.items():
        if files[-1] and size > free_bytes:
            files.append([])
            free_bytes = max_bytes
        files[-1].append(name)
        free_bytes -= size
    return files


def write_tensors(
    folder: Path | None, nbytes: Mapping[str, int], tensors: Iterator[tuple[str, np.ndarray]], max_bytes: int
) -> None:
    """Writes (name, array) pairs as safetensors files, with an index if there are several.

    The host holds the arrays of one file at a time. `nbytes` has the sizes of all arrays, in the order of `tensors`. If
    `folder` is None, as on all processes but the first, `tensors` is iterated over and nothing is written.
    """
    files = split_files(nbytes, max_bytes)
    weight_map = {}
    for number, names in enumerate(files, start=1):
        file = SINGLE if len(files) == 1 else f"model-{number:05}-of-{len(files):05}.safetensors"
        weight_map.update(dict.fromkeys(names, file))
        content = dict(value for _, value in zip(names, tensors, strict=False))
        assert list(content) == names, f"got {list(content)}, want {names}"
        if folder is not None:
            import_optional("safetensors.numpy", "hf").save_file(content, folder / file, metadata={"format": "pt"})
            (folder / file).chmod(folder.stat().st_mode & 0o666)  # save_file gives no permission to others
    if folder is not None and len(files) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": sum(nbytes.values())}, "weight_map": weight_map})


def write_json(path: Path, content: Any) -> None:
    """Writes JSON as Hugging Face does: indented, with non-ASCII characters unescaped."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
