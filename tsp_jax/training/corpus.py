"""Text or token files -> one memory-mapped array of token ids for each split, built once and then cached.

Every file is a document. About one file in `HELD_OUT` is held out. It is chosen by a hash of its path relative to the
fixed part of the glob, so that adding files moves no other file to the other split. If the hash leaves a split empty,
the last file is held out; of a single file, the last ``max(1, tokens // HELD_OUT)`` tokens are held out.
"""

import contextlib
import dataclasses
import glob
import hashlib
import json
import os
import shutil
import stat
import sysconfig
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from tsp_jax.config import DataConfig
from tsp_jax.errors import ConfigError

Split = Literal["train", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "heldout")
HELD_OUT = 50
"""one document in this many is held out"""

_FORMAT_VERSION = 1
_CHUNK = 1 << 22  # number of tokens in memory at a time while a corpus is built
_NOT_STDLIB = {"site-packages", "dist-packages", "__pycache__"}


class ByteTokenizer:
    """Encodes text as its UTF-8 bytes: a token id is a byte."""

    vocab_size = 256

    def encode(self, text: str | bytes) -> np.ndarray:
        """Text -> [n] uint8. A character that UTF-8 cannot encode (a lone surrogate) becomes ``?``."""
        return np.frombuffer(text.encode(errors="replace") if isinstance(text, str) else text, np.uint8)

    def decode(self, ids: np.ndarray | list[int]) -> str:
        """[n] integer ids -> text. Ids above 255, which a larger vocabulary can sample, are left out."""
        ids = np.asarray(ids, np.int64)
        return ids[(ids >= 0) & (ids < 256)].astype(np.uint8).tobytes().decode(errors="replace")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
    """One split: its documents concatenated to one array of tokens."""

    tokens: np.ndarray
    """[tokens] uint8, uint16 or uint32; memory-mapped"""
    starts: np.ndarray
    """[documents] int64: index of the first token of each document; strictly increasing from 0"""
    name: str
    """split and files, for messages"""
    digest: str
    """SHA-256 of tokens and starts: the same on every host, and when a run is resumed"""


def load_corpus(data: DataConfig, vocab_size: int, split: Split) -> Corpus:
    """Loads one split of a corpus from the cache; tokenizes the files first if they are not cached.

    Several processes may build the same corpus at once: each writes its own folder, and the first to rename it wins.

    Raises:
      ConfigError: the files are missing, empty, unreadable or not token ids; an id is not below `vocab_size`; the
        cache cannot be written.
    """
    root, sources = _find_sources(data)
    cache = _cache_dir(data)
    folder = cache / _digest_sources(root, sources)
    try:
        if not folder.is_dir():
            _build(folder, sources, data)
    except OSError as error:
        raise ConfigError(
            f"data.cache_dir={str(cache)!r} cannot be written ({error.strerror}); "
            "use data.cache_dir=<a folder with space>"
        ) from error
    try:
        facts = json.loads((folder / "corpus.json").read_text())
        arrays = [np.load(folder / f"{split}{part}.npy", mmap_mode="r") for part in ("", "_starts")]
    except (OSError, EOFError, ValueError) as error:
        raise ConfigError(f"data.cache_dir={str(cache)!r} holds a damaged corpus; delete {folder}") from error
    if facts["max_token_id"] >= vocab_size:
        is_text = not facts["max_token_file"].endswith(".npy")
        raise ConfigError(
            f"model.vocab_size={vocab_size} is too small for token id {facts['max_token_id']} in "
            f"{facts['max_token_file']}; "
            f"use model.vocab_size={ByteTokenizer.vocab_size if is_text else facts['max_token_id'] + 1}"
        )
    # asarray drops the memmap subclass, not the mapping
    tokens, starts = (np.asarray(array) for array in arrays)
    name = f"{split} split of data.files={data.files!r}"
    return Corpus(tokens=tokens, starts=starts, name=name, digest=facts["sha256"][split])


def is_text(data: DataConfig) -> bool:
    """Whether the files are text, whose bytes are the token ids; otherwise they are .npy files of token ids.

    Raises:
      ConfigError: there are no files, or files of both kinds.
    """
    _, sources = _find_sources(data)
    return sources[0].path.suffix != ".npy"


class _Source(NamedTuple):
    path: Path
    name: str  # path below the root, with forward slashes
    size: int  # bytes
    mtime_ns: int


class _Document(NamedTuple):
    path: Path
    name: str
    start: int  # the document is tokens [start, stop) of the file
    stop: int
    max_id: int


def _find_sources(data: DataConfig) -> tuple[Path, list[_Source]]:
    """Returns (folder that names are relative to, regular files sorted by name)."""
    if data.files:
        pattern = os.path.abspath(os.path.expanduser(data.files))
        fixed = pattern
        while glob.escape(fixed) != fixed:
            fixed = os.path.dirname(fixed)
        root = Path(fixed if fixed != pattern else os.path.dirname(pattern))
        paths = {Path(path) for path in glob.glob(pattern, recursive=True)}
    else:
        root, paths = Path(sysconfig.get_path("stdlib")), set()
        for folder, subfolders, names in os.walk(root):
            subfolders[:] = set(subfolders) - _NOT_STDLIB
            paths |= {Path(folder, name) for name in names if name.endswith(".py")}
    sources = []
    for path in paths:
        with _reading(data, path):
            status = path.stat()
        if stat.S_ISREG(status.st_mode):  # a glob such as ** matches folders too
            name = path.relative_to(root).as_posix()
            sources.append(_Source(path, name, status.st_size, status.st_mtime_ns))
    if not sources:
        fix = os.path.join(data.files, "**", "*.txt") if os.path.isdir(data.files) else "<a glob of text or .npy files>"
        raise ConfigError(f"data.files={data.files!r} matches no file ({root} was searched); use data.files={fix}")
    kinds = {source.path.suffix == ".npy": source.path for source in sources}
    if len(kinds) > 1:
        raise ConfigError(
            f"data.files={data.files!r} matches both text and token ids ({kinds[False]} and {kinds[True]}); "
            "use data.files=<a glob of one kind>"
        )
    return root, sorted(sources, key=lambda source: source.name)


def _digest_sources(root: Path, sources: list[_Source]) -> str:
    """Name of the cache folder. The root is hashed too: two unpacked corpora may agree in names and mtimes."""
    listing = [_FORMAT_VERSION, str(root), [source[1:] for source in sources]]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()[:32]


def _cache_dir(data: DataConfig) -> Path:
    default = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache"), "tsp_jax")
    return Path(os.path.expanduser(data.cache_dir or default))


def _build(folder: Path, sources: list[_Source], data: DataConfig) -> None:
    """Writes both splits to a folder of this process, then renames it to `folder`."""
    measured = (_measure(data, source) for source in sources)
    documents = [document for document in measured if document.stop]
    splits = _split_documents(data, documents)
    largest = max(documents, key=lambda document: document.max_id)
    dtype = np.min_scalar_type(largest.max_id)
    partial = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}.partial")
    partial.mkdir(parents=True)
    try:
        facts = {
            "max_token_id": largest.max_id,
            "max_token_file": str(largest.path),
            "sha256": {split: _write_split(data, partial, split, splits[split], dtype) for split in SPLITS},
        }
        (partial / "corpus.json").write_text(json.dumps(facts, indent=2) + "\n")
        try:
            os.rename(partial, folder)
        except OSError:
            if not folder.is_dir():  # else another process built the same corpus first
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _split_documents(data: DataConfig, documents: list[_Document]) -> dict[Split, list[_Document]]:
    """Applies the rule at the top of this file. Neither split is empty."""
    total = sum(document.stop for document in documents)
    if total < 2:
        raise ConfigError(f"data.files={data.files!r} matches files with {total} tokens in all; use 2 or more")
    if len(documents) == 1:
        (whole,) = documents
        border = whole.stop - max(1, whole.stop // HELD_OUT)
        return {"train": [whole._replace(stop=border)], "heldout": [whole._replace(start=border)]}
    digests = [hashlib.sha256(os.fsencode(document.name)).hexdigest() for document in documents]
    is_held = [int(digest, 16) % HELD_OUT == 0 for digest in digests]
    if len(set(is_held)) == 1:
        is_held = [document is documents[-1] for document in documents]
    splits: dict[Split, list[_Document]] = {"train": [], "heldout": []}
    for document, held in zip(documents, is_held, strict=True):
        splits["heldout" if held else "train"].append(document)
    return splits


def _measure(data: DataConfig, source: _Source) -> _Document:
    """Reads length and largest id of a file; refuses arrays that are not token ids."""
    length = source.size
    if source.path.suffix == ".npy":
        array = _map_npy(data, source.path)
        if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
            raise _not_ids(data, source.path, f"is {array.dtype} {list(array.shape)}")
        length = len(array)
    whole = _Document(source.path, source.name, 0, length, max_id=0)
    ranges = [(int(chunk.min()), int(chunk.max())) for chunk in _chunks(data, whole)]
    low, high = min((low for low, _ in ranges), default=0), max((high for _, high in ranges), default=0)
    if low < 0 or high > np.iinfo(np.uint32).max:
        raise _not_ids(data, source.path, f"holds {low if low < 0 else high}")
    return whole._replace(max_id=high)


def _write_split(data: DataConfig, folder: Path, split: Split, documents: list[_Document], dtype: np.dtype) -> str:
    """Writes the documents to one .npy file and their starts to another; returns the SHA-256 of both."""
    lengths = np.array([document.stop - document.start for document in documents], np.int64)
    starts = np.cumsum(lengths) - lengths
    np.save(folder / f"{split}_starts.npy", starts)
    digest = hashlib.sha256(starts.tobytes())
    header = {"descr": dtype.str, "fortran_order": False, "shape": (int(lengths.sum()),)}
    # Plain writes: a full disk under a writable memory map kills the process instead of raising an error.
    with open(folder / f"{split}.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for document in documents:
            for chunk in _chunks(data, document):
                content = chunk.astype(dtype).tobytes()
                digest.update(content)
                file.write(content)
    return digest.hexdigest()


def _chunks(data: DataConfig, document: _Document) -> Iterator[np.ndarray]:
    """Yields the tokens of a document, at most _CHUNK at a time."""
    for start in range(document.start, document.stop, _CHUNK):
        count = min(_CHUNK, document.stop - start)
        if document.path.suffix == ".npy":
            chunk = _map_npy(data, document.path)[start : start + count]
        else:
            with _reading(data, document.path):
                chunk = np.fromfile(document.path, np.uint8, count, offset=start)
        if len(chunk) != count:
            raise ConfigError(f"data.files={data.files!r}: {document.path} changed while it was read; run again")
        yield chunk


def _map_npy(data: DataConfig, path: Path) -> np.ndarray:
    with _reading(data, path):
        try:
            return np.lib.format.open_memmap(path, mode="r")
        except (ValueError, EOFError) as error:
            raise _not_ids(data, path, "is not a whole .npy array") from error


def _not_ids(data: DataConfig, path: Path, what: str) -> ConfigError:
    return ConfigError(f"data.files={data.files!r}: {path} {what}; use one dimension of integers from 0 to 2**32 - 1")


@contextlib.contextmanager
def _reading(data: DataConfig, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"data.files={data.files!r} matches {path}, which cannot be read ({error.strerror}); "
            "make it readable or use data.files=<a narrower glob>"
        ) from error
