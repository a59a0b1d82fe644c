"""Files that users bring: regular files are read up to a bounded size, and JSON is checked against a schema."""

import io
import json
import os
import re
import stat
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec

from tsp_jax.errors import ConfigError

MAX_BYTES = 2**28
"""largest file, in bytes, that is read whole, unless the caller gives another limit"""
_MAX_FLOAT = 1.7976931348623157e308

Schema = TypeVar("Schema")
Finite = Annotated[float, msgspec.Meta(ge=-_MAX_FLOAT, le=_MAX_FLOAT)]
"""a number in a schema that is neither infinite nor NaN"""
Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
"""a non-negative int64 in a schema"""
Size = Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)]
"""a positive int64 in a schema"""


class FileError(ConfigError):
    """A file cannot be read, or does not hold what it should; the message is one line of path, reason and advice."""


def check_regular(path: str | Path, advice: str = "use an intact copy") -> None:
    """Raises FileError unless a path names a regular file; for files that another library opens."""
    os.close(_open(path, advice))


def read_bytes(path: str | Path, max_bytes: int = MAX_BYTES, advice: str = "use an intact copy") -> bytes:
    """Reads a regular file whole. Never waits for a FIFO or device, never reads more than `max_bytes`.

    Raises:
      FileError: the file does not exist, is not a regular file, is too large, or is not readable. The message ends with
        `advice`.
    """
    with os.fdopen(_open(path, advice), "rb") as file:
        try:
            content = file.read(max_bytes + 1)
        except OSError as error:
            raise FileError(f"{path} cannot be read ({error.strerror}); {advice}") from None
    if len(content) > max_bytes:
        raise FileError(f"{path} has more than {max_bytes:,} bytes; {advice}")
    return content


def _open(path: str | Path, advice: str) -> int:
    """Opens a regular file and returns its descriptor."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        raise FileError(f"{path} does not exist; {advice}") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise FileError(f"{path} cannot be read ({reason}); {advice}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FileError(f"{path} is not a regular file; {advice}")
    return descriptor


def read_text(path: str | Path, max_bytes: int = MAX_BYTES, advice: str = "use an intact copy") -> str:
    """Reads a regular file of UTF-8 text whole; raises FileError as `read_bytes` does, and if it is not UTF-8."""
    try:
        return read_bytes(path, max_bytes, advice).decode("utf-8")
    except UnicodeDecodeError as error:
        raise FileError(f"{path} is not UTF-8 text (byte {error.start}); {advice}") from None


def read_json(
    path: str | Path,
    schema: type[Schema] = dict[str, Any],
    max_bytes: int = MAX_BYTES,
    advice: str = "use an intact copy",
) -> Schema:
    """Reads a JSON file and checks it against a schema.

    `schema` is a type that msgspec converts to: a `msgspec.Struct`, or for example ``dict[str, int]``.

    Raises:
      FileError: `read_text` fails, the text is not JSON, a key occurs twice in one object, or the content does not fit
        the schema. In the last case the error names the key and its value.
    """
    return parse_json(read_text(path, max_bytes, advice), str(path), schema, advice)


def parse_json(
    text: str, source: str, schema: type[Schema] = dict[str, Any], advice: str = "use an intact copy"
) -> Schema:
    """Parses JSON text as `read_json` does; `source` names the text in errors."""
    try:
        content = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error).partition(";")[0]
        raise FileError(f"{source} cannot be read as JSON ({reason}); {advice}") from None
    return check_json(content, source, schema, advice)


def check_json(content: Any, source: str, schema: type[Schema], advice: str = "use an intact copy") -> Schema:
    """Converts parsed JSON to a schema; raises FileError, naming key and value, if the content does not fit."""
    try:
        return msgspec.convert(content, schema)
    except msgspec.ValidationError as error:
        reason, _, place = str(error).partition(" - at ")
        raise FileError(f"{source}: {_value_at(content, place.strip('`$'))}{reason}; {advice}") from None


def open_regular(path: str | Path, advice: str = "use an intact copy") -> io.BufferedReader:
    """Opens a regular file of any size for reading; raises FileError as `read_bytes` does."""
    return os.fdopen(_open(path, advice), "rb")


def folders_below(root: str | Path, *, hidden: bool = True) -> Iterator[Path]:
    """Yields a folder and the folders below it, sorted by depth and name; folders behind links come last.

    Each folder is yielded once, however many links lead to it. `hidden` includes folders whose name begins with a dot.
    """
    seen: set[tuple[int, int]] = set()
    folders, links = deque([Path(root)]), deque[Path]()
    while folders or links:
        folder = folders.popleft() if folders else links.popleft()
        try:
            status, entries = folder.stat(), sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError:
            continue
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        yield folder
        for entry in entries:
            if entry.is_dir() and (hidden or not entry.name.startswith(".")):
                (links if entry.is_symlink() else folders).append(folder / entry.name)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in content if keys.count(key) > 1)!r:.80} stands twice")
    return content


def _value_at(content: Any, place: str) -> str:
    """Returns ``key[index]=value: `` for a place as msgspec writes it (``.rope.factors[2]``), or "" for the root."""
    if not place:
        return ""
    if "[...]" in place:  # a value of a dict, whose key msgspec does not name
        return f"{place.removeprefix('.')}: "
    if isinstance(content, dict) and place[1:] in content:  # a key with dots
        return f"{place[1:]}={json.dumps(content[place[1:]]):.80}: "
    for key, index in re.findall(r"\.([^.\[]+)|\[(\d+)\]", place):
        content = content[int(index)] if index else content.get(key) if isinstance(content, dict) else None
    return f"{place.removeprefix('.')}={json.dumps(content):.80}: "
