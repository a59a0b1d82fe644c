"""Folders of safetensors files: read in slices, and written whole or not at all."""

import contextlib
import json
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tsp_jax.errors import ConfigError, install_hint
from tsp_jax.hf.config import read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = ("F32", "BF16", "F16")
"""dtypes of weights, as the format names them"""
MAX_FILE_BYTES = 5_000_000_000

Shape = tuple[int, ...]


def _safetensors() -> Any:
    try:
        import safetensors.numpy
    except ModuleNotFoundError:
        raise ConfigError(f"safetensors is not installed; {install_hint('hf')}") from None
    return safetensors


def open_file(path: Path) -> Any:
    """A safetensors file, of which only the header is read so far."""
    package = _safetensors()
    if not path.is_file():
        raise ConfigError(f"{path} does not exist; use a complete Hugging Face folder")
    try:
        return package.safe_open(path, framework="np")
    except (package.SafetensorError, OSError) as error:
        raise ConfigError(f"{path} is not an intact safetensors file ({error}); use a fresh copy") from None


class Tensors:
    """The tensors of a folder, by name. Opening it reads headers alone.

    Raises:
      ConfigError: a file is missing, broken, or lacks what the index says it has.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        single = self.folder / SINGLE
        if single.is_file():
            self.files = {single: open_file(single)}
            self.paths = dict.fromkeys(self.files[single].keys(), single)
            return
        self.paths = _weight_map(self.folder)
        self.files = {path: open_file(path) for path in dict.fromkeys(self.paths.values())}
        held = {path: set(file.keys()) for path, file in self.files.items()}
        for name, path in self.paths.items():
            if name not in held[path]:
                raise ConfigError(f"{path} lacks tensor {name}, which {INDEX} says it has; use a complete folder")

    def check(self, shapes: Mapping[str, Shape], ignored: Callable[[str], bool]) -> None:
        """Raises ConfigError unless these tensors are here, as floats of these shapes, and none that is not ignored."""
        for name, shape in shapes.items():
            if name not in self.paths:
                raise ConfigError(f"{self.folder} has no tensor {name}; use a complete folder of this model")
            tensor, path = self.files[self.paths[name]].get_slice(name), self.paths[name]
            if tuple(tensor.get_shape()) != shape:
                raise ConfigError(
                    f"{path}: tensor {name} has shape {list(tensor.get_shape())}, the model needs {list(shape)}; "
                    "use the config.json that belongs to these weights"
                )
            if tensor.get_dtype() not in FLOATS:
                raise ConfigError(f"{path}: tensor {name} is {tensor.get_dtype()}; use weights in {', '.join(FLOATS)}")
        for name, path in self.paths.items():
            if name not in shapes and not ignored(name):
                raise ConfigError(f"{path}: tensor {name} has no place in the model; use weights without it")

    def read(self, name: str, *index: slice) -> np.ndarray:
        """A part of a tensor, in the dtype of its file; nothing else is read."""
        return self.files[self.paths[name]].get_slice(name)[index]


def _weight_map(folder: Path) -> dict[str, Path]:
    if not (folder / INDEX).is_file():
        raise ConfigError(f"{folder} holds neither {SINGLE} nor {INDEX}; use a Hugging Face folder of safetensors")
    names = read_json(folder / INDEX).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ConfigError(f"{folder / INDEX} has no weight_map; use an intact copy")
    for tensor, name in names.items():
        if not isinstance(name, str) or Path(name).name != name:
            raise ConfigError(f"{folder / INDEX}: {tensor} is in {name!r}, no file of the folder; use an intact copy")
    return {tensor: folder / name for tensor, name in names.items()}


# ------------------------------------------------------------------------------------------------ writing


@contextlib.contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """A temporary folder that takes the given name once all is written, and vanishes if anything fails.

    Raises:
      ConfigError: the name is taken, or cannot be written.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"folder {folder} exists already; use another one, or remove it")
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.rename(folder)
    except (OSError, _safetensors().SafetensorError) as error:
        raise ConfigError(f"folder {folder} cannot be written ({error}); use another one") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def split_files(nbytes: Mapping[str, int], max_bytes: int) -> list[list[str]]:
    """Names of tensors, in order, a list for each file; a file exceeds `max_bytes` only if one tensor does."""
    files: list[list[str]] = [[]]
    room = max_bytes
    for name, size in nbytes.items():
        if files[-1] and size > room:
            files.append([])
            room = max_bytes
        files[-1].append(name)
        room -= size
    return files


def write_tensors(
    folder: Path | None,
    nbytes: Mapping[str, int],
    tensors: Iterable[tuple[str, np.ndarray]],
    max_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Writes safetensors files, and their index if there are several. Holds one file's tensors at a time.

    Args:
      folder: an empty one; None: only runs through `tensors` (a process that helps another one to write).
      nbytes: size of each tensor, in their order.
      tensors: (name, array).
      max_bytes: of a file.
    """
    files, tensors = split_files(nbytes, max_bytes), iter(tensors)
    weight_map = {}
    for number, names in enumerate(files, start=1):
        file = SINGLE if len(files) == 1 else f"model-{number:05}-of-{len(files):05}.safetensors"
        weight_map.update(dict.fromkeys(names, file))
        held = dict(value for _, value in zip(names, tensors, strict=False))
        assert list(held) == names, f"got {list(held)}, want {names}"
        if folder is not None:
            _safetensors().numpy.save_file(held, folder / file, metadata={"format": "pt"})
            (folder / file).chmod(folder.stat().st_mode & 0o666)  # save_file lets nobody else read it
    if folder is not None and len(files) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": sum(nbytes.values())}, "weight_map": weight_map})


def write_json(path: Path, content: Any) -> None:
    """As Hugging Face writes it: indented, characters as they are."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
