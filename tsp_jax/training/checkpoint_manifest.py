"""The manifest of a checkpoint: SHA-256 of every file, written before the commit and verified before a restore."""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

MANIFEST = "manifest.json"
THREADS = 8
"""number of files hashed at a time; hashing releases Python's lock"""


def write_manifest(folder: Path) -> None:
    """Writes ``manifest.json``, the SHA-256 of every file below a folder; returns after it is on disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor(THREADS) as pool:
        digests = pool.map(_sha256, files)
        listing = {path.relative_to(folder).as_posix(): digest for path, digest in zip(files, digests, strict=True)}
    with (folder / MANIFEST).open("w") as file:
        json.dump({"sha256": listing}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def find_damage(folder: Path, part: int = 0, parts: int = 1) -> str | None:
    """Verifies one of `parts` parts of a folder's files against its manifest, and the manifest itself.

    Returns the first damaged file and what is wrong with it, or None.
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
