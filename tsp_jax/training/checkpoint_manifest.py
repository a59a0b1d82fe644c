"""The manifest of a checkpoint: SHA-256 of every file, written at the end of a save and verified before a restore."""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import msgspec

from tsp_jax.files import FileError, folders_below, open_regular, read_json

MANIFEST = "manifest.json"
THREADS = 8
"""number of files that are hashed at a time, in threads; hashing releases Python's global lock"""


class Manifest(msgspec.Struct):
    """The content of ``manifest.json``."""

    sha256: dict[str, Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]]
    """path below the folder -> SHA-256 of the file, in hexadecimal digits"""


def write_manifest(folder: Path) -> None:
    """Writes ``manifest.json``, the SHA-256 of every file below a folder; returns after it is on disk."""
    names = _files_below(folder)
    with ThreadPoolExecutor(THREADS) as pool:
        digests = pool.map(lambda name: _sha256(folder / name), names)
        listing = dict(zip(names, digests, strict=True))
    with (folder / MANIFEST).open("w") as file:
        json.dump({"sha256": listing}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def find_damage(folder: Path, part: int = 0, parts: int = 1) -> str | None:
    """Verifies some of a folder's files against its manifest, and that no file is missing or added.

    The files are divided into `parts` parts; the one with index `part` is verified. Returns the first damaged file and
    what is wrong with it, or None.
    """
    try:
        listing = read_json(folder / MANIFEST, Manifest).sha256
    except FileError as error:
        return f"{MANIFEST} ({_reason(error)})"
    if not listing:
        return f"{MANIFEST} (lists no file)"
    names = _files_below(folder)
    for name in sorted(listing.keys() ^ set(names)):
        return f"{name:.200} ({'is missing' if name in listing else f'is not listed in {MANIFEST}'})"
    with ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(lambda name: _damage(folder, name, listing[name]), names[part::parts])
        return next(filter(None, found), None)


def _files_below(folder: Path) -> list[str]:
    """Sorted paths, relative to a folder, of everything below it except folders and the manifest."""
    paths = (path for parent in folders_below(folder) for path in parent.iterdir() if not path.is_dir())
    return sorted(path.relative_to(folder).as_posix() for path in paths if path != folder / MANIFEST)


def _damage(folder: Path, name: str, digest: str) -> str | None:
    try:
        found = _sha256(folder / name)
    except (FileError, OSError) as error:
        return f"{name} ({_reason(error)})"
    return None if found == digest else f"{name} (its SHA-256 is not the manifest's)"


def _sha256(path: Path) -> str:
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _reason(error: Exception) -> str:
    return str(error).rpartition(";")[0] or str(error)  # without the advice
