"""SHA-256 of every file of a checkpoint: written before it is committed, compared before it is restored."""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

MANIFEST = "manifest.json"
THREADS = 8
"""files hashed at a time; hashing leaves Python's lock alone"""


def write_manifest(folder: Path) -> None:
    """Writes ``manifest.json``: of every file below a folder, its digest; returns when the disk has it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor(THREADS) as pool:
        digests = pool.map(_sha256, files)
        listing = {path.relative_to(folder).as_posix(): digest for path, digest in zip(files, digests, strict=True)}
    with (folder / MANIFEST).open("w") as file:
        json.dump({"sha256": listing}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def find_damage(folder: Path, part: int = 0, parts: int = 1) -> str | None:
    """The first damaged file of a folder and what is wrong with it, or None.

    Args:
      folder: with a manifest.
      part: which share of the files is read.
      parts: into which the files are dealt; the manifest itself is read in each.
    """
    try:
        listing = json.loads((folder / MANIFEST).read_text())["sha256"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} ({_reason(error)})"
    if not listing:
        return f"{MANIFEST} (lists no file)"
    with ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(lambda item: _damage(folder, *item), sorted(listing)[part::parts])
        return next(filter(None, found), None)


def _damage(folder: Path, name: str, digest: str) -> str | None:
    try:
        found = _sha256(folder / name)
    except (OSError, ValueError) as error:
        return f"{name} ({_reason(error)})"
    return None if found == digest else f"{name} (its SHA-256 is not the manifest's)"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or "is not as it was written"
