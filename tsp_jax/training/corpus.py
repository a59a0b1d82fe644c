"""Text or token files -> one file of token ids for each split, built once and then cached.

Every file is a document. About one of every `HELD_OUT` files is held out. Whether a file is held out depends on a hash
of its path, relative to the part of the glob before the first wildcard. So added files do not move other files to the
other split. If the hash leaves a split empty, the last file is held out. If there is only one file, its last
``max(1, tokens // HELD_OUT)`` tokens are held out.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import msgspec
import numpy as np

from tsp_jax.config import DataConfig
from tsp_jax.errors import ConfigError
from tsp_jax.files import FileError, read_json
from tsp_jax.training.sources import Source, find_sources, reading
from tsp_jax.training.token_file import TokenFile

Split = Literal["train", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "heldout")
HELD_OUT = 50
"""about one document in this many is held out"""

LARGEST_ID = 2**32 - 1
_FORMAT_VERSION = 1
_CHUNK = 1 << 22  # number of tokens in memory at a time while a corpus is built
_USE_IDS = f"use one dimension of integers from 0 to {LARGEST_ID}"


class ByteTokenizer:
    """Encodes text as its UTF-8 bytes: a token id is a byte."""

    vocab_size = 256

    def encode(self, text: str | bytes) -> np.ndarray:
        """Text -> [n] uint8. A character that UTF-8 cannot encode (a lone surrogate) becomes ``?``."""
        return np.frombuffer(text.encode(errors="replace") if isinstance(text, str) else text, np.uint8)

    def decode(self, ids: np.ndarray | list[int]) -> str:
        """[n] integer ids -> text. Ids above 255, which a model with a larger vocabulary can sample, are left out."""
        ids = np.asarray(ids, np.int64)
        return ids[(ids >= 0) & (ids < 256)].astype(np.uint8).tobytes().decode(errors="replace")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
    """One split of a corpus: its documents, concatenated into one array of tokens."""

    tokens: TokenFile | np.ndarray
    """[tokens] uint8, uint16 or uint32"""
    starts: np.ndarray
    """[documents] int64: index of the first token of each document; strictly increasing from 0"""
    name: str
    """split and files, for messages"""
    digest: str
    """SHA-256 of tokens and starts: the same on every host, and when a run is resumed"""
    loss: TokenFile | np.ndarray | None = None
    """[tokens] uint8: 1 where the token counts as a label; None: every token counts"""


Digest = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


class Digests(msgspec.Struct):
    """SHA-256 of each split."""

    train: Digest
    heldout: Digest


class Facts(msgspec.Struct):
    """The content of ``corpus.json``."""

    max_token_id: Annotated[int, msgspec.Meta(ge=0, le=LARGEST_ID)]
    max_token_file: str
    sha256: Digests


def load_corpus(data: DataConfig, vocab_size: int, split: Split) -> Corpus:
    """Loads one split of a corpus from the cache; tokenizes the files first if they are not cached.

    Several processes may build the same corpus at once: each writes its own folder, and the first to rename it wins.

    Raises:
      ConfigError: the files are missing, empty, unreadable or not token ids; an id is not below `vocab_size`; the
        cache cannot be written.
    """
    root, sources = find_sources(data)
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
        facts, tokens, starts = _open_cached(folder, split)
    except FileError as error:
        reason = str(error).partition(";")[0]
        raise ConfigError(f"data.cache_dir={str(cache)!r} holds a damaged corpus ({reason}); delete {folder}") from None
    if facts.max_token_id >= vocab_size:
        fitting = facts.max_token_id + 1 if facts.max_token_file.endswith(".npy") else ByteTokenizer.vocab_size
        raise ConfigError(
            f"model.vocab_size={vocab_size} is too small for token id {facts.max_token_id} in "
            f"{facts.max_token_file:.500}; use model.vocab_size={fitting}"
        )
    name = f"{split} split of data.files={data.files!r}"
    return Corpus(tokens=tokens, starts=starts, name=name, digest=getattr(facts.sha256, split))


def _open_cached(folder: Path, split: Split) -> tuple[Facts, TokenFile, np.ndarray]:
    """Returns (facts, tokens, starts); raises FileError if one of the files is damaged."""
    facts = read_json(folder / "corpus.json", Facts)
    tokens = TokenFile(folder / f"{split}.npy", f"delete {folder}")
    starts = np.asarray(TokenFile(folder / f"{split}_starts.npy", f"delete {folder}"))
    if not (len(starts) and starts[0] == 0 and (np.diff(starts) > 0).all() and starts[-1] < len(tokens)):
        raise FileError(f"{split}_starts.npy does not divide {split}.npy")
    return facts, tokens, starts


class _Document(NamedTuple):
    path: Path
    name: str
    start: int  # the document is tokens [start, stop) of the file
    stop: int
    max_id: int


def _digest_sources(root: Path, sources: list[Source]) -> str:
    """Name of the cache folder: a hash of sources and root, since two corpora may have equal names and mtimes."""
    listing = [_FORMAT_VERSION, str(root), [source[1:] for source in sources]]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()[:32]


def _cache_dir(data: DataConfig) -> Path:
    default = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache"), "tsp_jax")
    return Path(os.path.expanduser(data.cache_dir or default))


def _build(folder: Path, sources: list[Source], data: DataConfig) -> None:
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
    """Divides documents into two splits by the rule at the top of this file. Neither split is empty."""
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


def _measure(data: DataConfig, source: Source) -> _Document:
    """Finds the number of tokens and the largest token id of a file; refuses arrays that are not token ids."""
    length = source.size
    if source.path.suffix == ".npy":
        with reading(data, source.path):
            length = len(TokenFile(source.path, _USE_IDS))
    whole = _Document(source.path, source.name, 0, length, max_id=0)
    ranges = [(int(chunk.min()), int(chunk.max())) for chunk in _chunks(data, whole)]
    low, high = min((low for low, _ in ranges), default=0), max((high for _, high in ranges), default=0)
    if low < 0 or high > LARGEST_ID:
        wrong = low if low < 0 else high
        raise ConfigError(f"data.files={data.files!r}: {source.path} holds {wrong}; {_USE_IDS}")
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
        with reading(data, document.path):
            if document.path.suffix == ".npy":
                chunk = TokenFile(document.path, "run again").read(start, start + count)
            else:
                chunk = np.fromfile(document.path, np.uint8, count, offset=start)
        if len(chunk) != count:
            raise ConfigError(f"data.files={data.files!r}: {document.path} changed while it was read; run again")
        yield chunk
