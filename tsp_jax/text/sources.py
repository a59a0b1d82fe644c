"""The files of a corpus: found by a glob, or the Python standard library's sources."""

import contextlib
import glob
import os
import stat
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from tsp_jax.config import DataConfig
from tsp_jax.errors import ConfigError
from tsp_jax.files import FileError, folders_below

_NOT_STDLIB = {"site-packages", "dist-packages", "__pycache__"}

Kind = Literal["ids", "text", "lines", "parquet", "arrow"]
Packed = Literal["", ".gz", ".zst"]
_KINDS: dict[str, Kind] = {
    ".npy": "ids", ".jsonl": "lines", ".ndjson": "lines", ".parquet": "parquet", ".arrow": "arrow", ".feather": "arrow",
}  # fmt: skip
"""ending of a file -> what it holds; a file with any other ending is one text"""


class Source(NamedTuple):
    """A file of a corpus."""

    path: Path
    name: str
    """path below the root, with forward slashes"""
    size: int
    """bytes"""
    mtime_ns: int

    @property
    def packed(self) -> Packed:
        """How the file is compressed."""
        ending = self.path.suffix.lower()
        return ending if ending in (".gz", ".zst") else ""

    @property
    def kind(self) -> Kind:
        """What the file holds: token ids, one text, or rows as lines of JSON, Parquet or Arrow."""
        path = self.path.with_suffix("") if self.packed else self.path
        return _KINDS.get(path.suffix.lower(), "text")


def find_sources(data: DataConfig) -> tuple[Path, list[Source]]:
    """Returns (folder that names are relative to, regular files sorted by name)."""
    if data.files:
        pattern = os.path.abspath(os.path.expanduser(data.files))
        fixed = pattern
        while glob.escape(fixed) != fixed:
            fixed = os.path.dirname(fixed)
        root = Path(fixed if fixed != pattern else os.path.dirname(pattern))
        paths = _match(pattern)
    else:
        root, paths = Path(sysconfig.get_path("stdlib")), set()
        for folder, subfolders, names in os.walk(root):
            subfolders[:] = set(subfolders) - _NOT_STDLIB
            paths |= {Path(folder, name) for name in names if name.endswith(".py")}
    sources = []
    for path in paths:
        with reading(data, path):
            status = path.stat()
        if stat.S_ISREG(status.st_mode):  # a glob such as ** matches folders too
            name = path.relative_to(root).as_posix()
            sources.append(Source(path, name, status.st_size, status.st_mtime_ns))
    if not sources:
        fix = (
            os.path.join(data.files, "**", "*.txt")
            if os.path.isdir(data.files)
            else "<a glob of text, .jsonl, .parquet or .npy files>"
        )
        raise ConfigError(f"data.files={data.files!r} matches no file ({root} was searched); use data.files={fix}")
    for source in sources:
        if source.packed and source.kind not in ("text", "lines"):
            raise ConfigError(
                f"data.files={data.files!r} matches {source.path}, and only text and .jsonl are read from "
                f"{source.packed} files; unpack it"
            )
    kinds = {source.kind == "ids": source.path for source in sources}
    if len(kinds) > 1:
        raise ConfigError(
            f"data.files={data.files!r} matches both text and token ids ({kinds[False]} and {kinds[True]}); "
            "use data.files=<a glob of one kind>"
        )
    return root, sorted(sources, key=lambda source: source.name)


def is_text(data: DataConfig) -> bool:
    """Whether the files are text, which a tokenizer encodes; otherwise they are .npy files of token ids.

    Raises:
      ConfigError: there are no files, or files of both kinds.
    """
    _, sources = find_sources(data)
    return sources[0].kind != "ids"


@contextlib.contextmanager
def reading(data: DataConfig, path: Path) -> Iterator[None]:
    """Context manager that turns errors in reading a source into a ConfigError of one line."""
    try:
        yield
    except FileError as error:
        raise ConfigError(f"data.files={data.files!r}: {error}") from None
    except (OSError, EOFError, zlib.error) as error:  # the last two: of a damaged .gz file
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise ConfigError(
            f"data.files={data.files!r} matches {path}, which cannot be read ({reason:.200}); "
            "make it readable or use data.files=<a narrower glob>"
        ) from error


def _match(pattern: str) -> set[Path]:
    """The paths that match an absolute pattern, as in glob, except that ``**`` searches no folder twice."""
    parts = pattern.split(os.sep)
    if "**" not in parts:
        return set(map(Path, glob.glob(pattern)))
    place = parts.index("**")
    rest = parts[place + 1 :] or ["*"]
    folders = {
        below for top in glob.glob(os.sep.join(parts[:place]) or os.sep) for below in folders_below(top, hidden=False)
    }
    return set().union(*(_match(os.path.join(glob.escape(str(folder)), *rest)) for folder in folders))
