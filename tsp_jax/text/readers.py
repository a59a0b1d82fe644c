"""Files of a corpus -> documents, in order. A text file is a document; in the other files each row is one."""

import codecs
import contextlib
import gzip
import io
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import msgspec

from tsp_jax.config import DataConfig
from tsp_jax.errors import ConfigError, import_optional
from tsp_jax.files import MAX_BYTES, open_regular
from tsp_jax.text.sources import Source, reading

BLOCK = 1 << 22
"""bytes of a text file in memory at a time"""
FIELDS = ("text", "messages")
"""fields of a row that hold a document, unless data.text_field names another"""
_ROWS = 256  # rows of a Parquet file in memory at a time

Chat = dict[str, Any]
"""a conversation: its messages, and the tools it may use, if any"""


class Place(NamedTuple):
    """Where a document begins: number of its file, and of its row in the file."""

    source: int = 0
    row: int = 0


class Document(NamedTuple):
    """A document, whose content must be read before the next document is."""

    content: Iterator[bytes] | str | Chat
    """the bytes of a text file, one block at a time; the text of a row; or its conversation"""
    name: str
    """decides on which split the document is in"""
    where: str
    """file and row, for messages"""
    after: Place
    """where the next document begins"""


class _Row(NamedTuple):
    value: Any
    number: int
    where: str


class Meter:
    """Opens files, and counts the bytes that are read of them."""

    def __init__(self, sources: Sequence[Source], start: Place = Place()):
        self.total = sum(source.size for source in sources)
        self._before = sum(source.size for source in sources[: start.source])
        self._file: io.BufferedReader | None = None
        self._size = 0

    @contextlib.contextmanager
    def open(self, source: Source) -> Iterator[io.BufferedIOBase]:
        """Context manager: a file, for reading what it holds when it is decompressed."""
        with open_regular(source.path) as file:
            self._file, self._size = file, source.size
            if source.packed == ".gz":
                yield gzip.GzipFile(fileobj=file)
            elif source.packed == ".zst":
                arrow = import_optional("pyarrow", "data")
                yield io.BufferedReader(arrow.CompressedInputStream(arrow.PythonFile(file, mode="r"), "zstd"))
            else:
                yield file
            self._file, self._before = None, self._before + source.size

    @property
    def read(self) -> int:
        """Bytes read of the files so far, compressed as they are."""
        file = self._file
        return self._before + (min(self._size, file.tell()) if file and not file.closed else 0)


def read_documents(data: DataConfig, sources: Sequence[Source], start: Place, meter: Meter) -> Iterator[Document]:
    """Yields the documents from a place on.

    Raises:
      ConfigError: a file cannot be read, or a row holds neither a text nor messages.
    """
    for index in range(start.source, len(sources)):
        source = sources[index]
        if source.kind == "text":
            blocks = read_blocks(data, source, meter)
            yield Document(blocks, source.name, str(source.path), Place(index + 1))
            continue
        first = start.row if index == start.source else 0
        with reading(data, source.path), meter.open(source) as file:
            for value, number, where in _ROW_READERS[source.kind](data, source, file, first):
                content = _content(data, value, where)
                yield Document(content, f"{source.name}:{number}", where, Place(index, number + 1))


def read_blocks(data: DataConfig, source: Source, meter: Meter) -> Iterator[bytes]:
    """Yields the content of a text file, one block at a time."""
    read = 0
    with reading(data, source.path), meter.open(source) as file:
        while block := file.read(BLOCK):
            read += len(block)
            yield block
    if not source.packed and read != source.size:
        raise ConfigError(f"data.files={data.files!r}: {source.path} changed while it was read; run again")


def decode(data: DataConfig, blocks: Iterator[bytes], where: str, offset: int = 0) -> Iterator[str]:
    """Yields the text of blocks of UTF-8 that follow one another, the first at byte `offset` of its file.

    Raises:
      ConfigError: the bytes are not UTF-8, and `data.invalid_utf8` is "refuse".
    """
    decoder = codecs.getincrementaldecoder("utf-8")("strict" if data.invalid_utf8 == "refuse" else "replace")
    for block in blocks:
        yield _decode(data, decoder, block, where, offset)
        offset += len(block)
    yield _decode(data, decoder, b"", where, offset, final=True)


def _decode(data: DataConfig, decoder: Any, block: bytes, where: str, offset: int, final: bool = False) -> str:
    waiting = len(decoder.getstate()[0])  # bytes of a character that the last block has cut in two
    try:
        return decoder.decode(block, final)
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"data.files={data.files!r}: {where} is not UTF-8 at byte {offset - waiting + error.start:,}; "
            "use --data.invalid-utf8 replace, or a file of UTF-8"
        ) from None


def _content(data: DataConfig, value: Any, where: str) -> str | Chat:
    """The text of a row, or its conversation; refuses what is neither."""
    wanted = [data.text_field] if data.text_field else [name for name in FIELDS if name in value]
    if len(wanted) != 1 or wanted[0] not in value:
        refuse_fields(data, list(value), where)
    (name,) = wanted
    content = value[name]
    if isinstance(content, bytes):
        content = "".join(decode(data, iter([content]), f"{name} in {where}"))
    if isinstance(content, str):
        return _whole(data, content, where)
    if not isinstance(content, list):
        raise ConfigError(f"data.files={data.files!r}: {name} in {where} is {content!r:.80}; use a text, or messages")
    if not content or not all(isinstance(message, dict) and message.get("role") for message in content):
        raise ConfigError(
            f"data.files={data.files!r}: {name} in {where} is {content!r:.80}; "
            "use one message or more, each with its role and content"
        )
    return {"messages": content, "tools": value.get("tools")}


def refuse_fields(data: DataConfig, names: list[str], where: str) -> None:
    """Raises ConfigError for rows in which not exactly one field can be the document."""
    fields = ", ".join(names) or "nothing"
    if not data.text_field and set(FIELDS) <= set(names):
        raise ConfigError(f"{where} has text and messages; use --data.text-field text or --data.text-field messages")
    wanted = data.text_field or " or ".join(FIELDS)
    raise ConfigError(
        f"data.files={data.files!r}: {where} has no {wanted}, it has {fields:.300}; use --data.text-field NAME"
    )


def _whole(data: DataConfig, text: str, where: str) -> str:
    """The text; halves of surrogate pairs, which JSON can write and UTF-8 cannot, are refused or replaced."""
    if text.isascii() or not (found := re.search("[\ud800-\udfff]", text)):
        return text
    if data.invalid_utf8 == "refuse":
        raise ConfigError(
            f"data.files={data.files!r}: {where} has half a surrogate pair at character {found.start():,}; "
            "use --data.invalid-utf8 replace"
        )
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


# ------------------------------------------------------------------------------------------------ rows


def _lines(data: DataConfig, source: Source, file: IO[bytes], start: int) -> Iterator[_Row]:
    """Rows of a file of JSON lines; blank lines are none."""
    offset = number = 0
    while line := file.readline(MAX_BYTES):
        where = f"{source.path} line {number + 1:,}"
        if len(line) == MAX_BYTES:
            raise ConfigError(f"data.files={data.files!r}: {where} has more than {MAX_BYTES:,} bytes; divide it")
        if number >= start and not line.isspace():
            text = "".join(decode(data, iter([line]), where, offset))
            yield _Row(_parse(data, text, where), number, where)
        offset, number = offset + len(line), number + 1


def _parse(data: DataConfig, text: str, where: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError) as error:
        if "surrogate" in str(error) and data.invalid_utf8 == "replace":
            return _parse(data, _whole_json(text), where)
        raise ConfigError(
            f"data.files={data.files!r}: {where} is no object in JSON ({error!s:.200}); use one object a line"
        ) from None


def _whole_json(text: str) -> str:
    """JSON in which halves of surrogate pairs are replaced."""
    pair = r"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"
    half = r"\\u[dD][89a-fA-F][0-9a-fA-F]{2}"
    return re.sub(rf"(\\\\|{pair})|{half}", lambda found: found[1] or r"\ufffd", text)


def _parquet(data: DataConfig, source: Source, file: IO[bytes], start: int) -> Iterator[_Row]:
    """Rows of a Parquet file; groups of rows before `start` are not read."""
    parquet = import_optional("pyarrow.parquet", "data")
    with _damage():
        content = parquet.ParquetFile(file)
        columns = _columns(data, content.schema_arrow.names, source.path)
        number = 0
        for group in range(content.num_row_groups):
            size = content.metadata.row_group(group).num_rows
            if number + size > start:
                batches = content.iter_batches(_ROWS, row_groups=[group], columns=columns)
                yield from _batch_rows(batches, source, number, start)
            number += size


def _arrow(data: DataConfig, source: Source, file: IO[bytes], start: int) -> Iterator[_Row]:
    """Rows of an Arrow file in either of its formats, the file and the stream; Feather is the first."""
    arrow = import_optional("pyarrow", "data")
    with _damage():
        magic = file.read(6)
        file.seek(0)
        if magic == b"ARROW1":
            opened = arrow.ipc.open_file(file)
            batches = (opened.get_batch(number) for number in range(opened.num_record_batches))
        else:
            opened = batches = arrow.ipc.open_stream(file)
        columns = _columns(data, opened.schema.names, source.path)
        yield from _batch_rows((batch.select(columns) for batch in batches), source, 0, start)


_ROW_READERS: dict[str, Callable[[DataConfig, Source, Any, int], Iterator[_Row]]] = {
    "lines": _lines, "parquet": _parquet, "arrow": _arrow,
}  # fmt: skip
"""kind of a file -> generator of its rows from one on"""


def _batch_rows(batches: Iterator[Any], source: Source, number: int, start: int) -> Iterator[_Row]:
    """Rows from `start` on of batches whose first row has a number."""
    for batch in batches:
        batch = _check(batch)
        for begin in range(max(0, start - number), batch.num_rows, _ROWS):
            for at, value in enumerate(batch.slice(begin, _ROWS).to_pylist(), number + begin):
                yield _Row(value, at, f"{source.path} row {at + 1:,}")
        number += batch.num_rows


def _check(batch: Any) -> Any:
    """The batch, with a text in its first column as bytes, which `decode` checks; pyarrow checks nothing by itself."""
    arrow = import_optional("pyarrow", "data")
    binary = {arrow.string(): arrow.binary(), arrow.large_string(): arrow.large_binary()}
    if kind := binary.get(batch.schema.field(0).type):
        batch = batch.set_column(0, batch.schema.names[0], batch.column(0).cast(kind))
    batch.validate(full=True)
    return batch


def _columns(data: DataConfig, names: list[str], path: Path) -> list[str]:
    """The columns to read; ConfigError if no column, or more than one, can be the document."""
    wanted = [data.text_field] if data.text_field else [name for name in FIELDS if name in names]
    if len(wanted) != 1 or wanted[0] not in names:
        refuse_fields(data, names, str(path))
    return wanted + [name for name in ("tools",) if name in names and name not in wanted]


@contextlib.contextmanager
def _damage() -> Iterator[None]:
    """Context manager: what pyarrow says of a damaged file becomes an OSError."""
    try:
        yield
    except (import_optional("pyarrow", "data").ArrowException, UnicodeDecodeError, MemoryError) as error:
        raise OSError(str(error) or "it needs too much memory") from error
