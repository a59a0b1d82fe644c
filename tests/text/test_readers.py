"""Documents of every kind of file, from any row on; and files that are refused by name, line and offset."""

import gzip
import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest

from tests.builders.fuzz import check_door
from tsp_jax.config import DataConfig
from tsp_jax.errors import ConfigError
from tsp_jax.text import readers
from tsp_jax.text.encode import ByteEncoder
from tsp_jax.text.readers import Meter, Place, decode, read_documents
from tsp_jax.text.sources import find_sources

TEXTS = [f"text {number}: n\u00e9 \u4e2d" for number in range(700)]
CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def lines(rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def zstd(content: bytes) -> bytes:
    return pa.Codec("zstd").compress(content, asbytes=True)


def parquet(rows) -> bytes:
    file = io.BytesIO()
    pa.parquet.write_table(pa.Table.from_pylist(rows), file, row_group_size=100)
    return file.getvalue()


def feather(rows) -> bytes:
    file = io.BytesIO()
    pa.feather.write_feather(pa.Table.from_pylist(rows), file, chunksize=100)
    return file.getvalue()


def arrow_stream(rows) -> bytes:
    file, table = io.BytesIO(), pa.Table.from_pylist(rows)
    with pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=100)
    return file.getvalue()


ROWS = {
    "a.jsonl": lines,
    "a.jsonl.gz": lambda rows: gzip.compress(lines(rows[:9])) + gzip.compress(lines(rows[9:])),
    "a.ndjson.zst": lambda rows: zstd(lines(rows[:9])) + zstd(lines(rows[9:])),
    "a.parquet": parquet,
    "a.feather": feather,
    "a.arrow": arrow_stream,
}
"""file name -> function of rows to content"""


@pytest.fixture
def write(tmp_path):
    """Writes a file; returns settings that read it."""

    def call(name: str, content: bytes, **changes) -> DataConfig:
        (tmp_path / name).write_bytes(content)
        return DataConfig(files=str(tmp_path / name), tokenizer="bytes", **changes)

    return call


def read(data: DataConfig, start: Place = Place()) -> list:
    """Contents of the documents, as texts or messages."""
    sources = find_sources(data)[1]
    documents = read_documents(data, sources, start, Meter(sources, start))
    return [content if isinstance(content, str | dict) else b"".join(content) for content, *_ in documents]


@pytest.mark.parametrize("name", ROWS)
def test_each_row_is_a_document(name, write):
    assert read(write(name, ROWS[name]([{"number": 1, "text": text} for text in TEXTS]))) == TEXTS


@pytest.mark.parametrize("start", [1, 250, 699, 700])
@pytest.mark.parametrize("name", ROWS)
def test_rows_are_read_from_any_place_on(name, start, write):
    data = write(name, ROWS[name]([{"text": text} for text in TEXTS]))
    assert read(data, Place(0, start)) == TEXTS[start:]


@pytest.mark.parametrize("name", ROWS)
def test_a_document_says_where_the_next_begins(name, write):
    data = write(name, ROWS[name]([{"text": text} for text in TEXTS]))
    sources = find_sources(data)[1]
    document = list(read_documents(data, sources, Place(), Meter(sources)))[123]
    assert read(data, document.after) == TEXTS[124:]
    assert document.where.endswith(("line 124", "row 124"))
    assert document.name == f"{name}:123"


@pytest.mark.parametrize("name", ROWS)
def test_rows_hold_messages(name, write):
    rows = [{"messages": CHAT, "tools": [{"name": "f"}]}, {"messages": CHAT[:1], "tools": None}]
    assert read(write(name, ROWS[name](rows))) == rows


def test_any_field_may_be_named(write):
    rows = [{"text": "a", "messages": CHAT, "other": "b"}]
    assert read(write("a.jsonl", lines(rows), text_field="other")) == ["b"]
    assert read(write("a.jsonl", lines(rows), text_field="messages")) == [{"messages": CHAT, "tools": None}]


@pytest.mark.parametrize(("name", "pack"), [("a.txt", bytes), ("a.md.gz", gzip.compress), ("a.zst", zstd)])
def test_a_text_file_is_one_document(name, pack, write, monkeypatch):
    monkeypatch.setattr(readers, "BLOCK", 7)
    content = "".join(TEXTS).encode()
    assert read(write(name, pack(content))) == [content]


def test_progress_counts_bytes_of_files(write):
    data = write("a.txt.gz", gzip.compress(b"some text"))
    sources = find_sources(data)[1]
    meter = Meter(sources)
    for document in read_documents(data, sources, Place(), meter):
        assert b"".join(document.content) == b"some text"
    assert meter.read == meter.total == sources[0].size


# ------------------------------------------------------------------------------------------------ UTF-8

BROKEN = "n\u00e9".encode() * 3 + b"\xff" + b"abc"


@pytest.mark.parametrize("block", [1, 2, 5, 100])
@pytest.mark.parametrize(("content", "offset"), [(BROKEN, 9), (b"ab\xc3", 2), (b"\xe4\xb8", 0)])
def test_what_is_no_utf8_is_refused_with_its_offset(content, offset, block):
    blocks = (content[start : start + block] for start in range(0, len(content), block))
    with pytest.raises(ConfigError, match=rf"a\.txt is not UTF-8 at byte {offset}; use --data.invalid-utf8 replace"):
        list(decode(DataConfig(), blocks, "a.txt"))


@pytest.mark.parametrize("block", [1, 2, 5, 100])
def test_what_is_no_utf8_is_replaced_if_told(block):
    blocks = (BROKEN[start : start + block] for start in range(0, len(BROKEN), block))
    assert "".join(decode(DataConfig(invalid_utf8="replace"), blocks, "")) == BROKEN.decode(errors="replace")


LINES = lines([{"text": "caf\u00e9"}]) + b'{"text": "\xff"}\n'


def test_offsets_in_lines_are_those_of_the_file(write):
    offset = LINES.index(b"\xff")
    with pytest.raises(ConfigError, match=rf"a\.jsonl line 2 is not UTF-8 at byte {offset};"):
        read(write("a.jsonl", LINES))
    assert read(write("a.jsonl", LINES, invalid_utf8="replace")) == ["caf\u00e9", "\ufffd"]


@pytest.mark.parametrize("name", ["a.parquet", "a.feather", "a.arrow"])
def test_text_of_columns_is_checked(name, write):
    texts = pa.array([b"fine", b"caf\xff"]).view(pa.string())
    file = io.BytesIO()
    table = pa.table({"text": texts})
    if name == "a.parquet":
        pa.parquet.write_table(table, file)
    else:
        pa.feather.write_feather(table, file)
    with pytest.raises(ConfigError, match=rf"text in .*{name} row 2 is not UTF-8 at byte 3;"):
        read(write(name, file.getvalue()))
    assert read(write(name, file.getvalue(), invalid_utf8="replace")) == ["fine", "caf\ufffd"]


def test_halves_of_surrogate_pairs_are_refused_or_replaced(write):
    content = rb'{"text": "a\ud800b \ud83d\ude00 \\ud800"}'
    with pytest.raises(ConfigError, match=r"a\.jsonl line 1 .*surrogate"):
        read(write("a.jsonl", content))
    assert read(write("a.jsonl", content, invalid_utf8="replace")) == ["a\ufffdb \U0001f600 \\ud800"]


# ------------------------------------------------------------------------------------------------ bad input

BAD = [
    ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', "a.jsonl line 3 is no object in JSON"),
    ("a.jsonl", b'["text"]\n', "a.jsonl line 1 is no object in JSON"),
    ("a.jsonl", b"[" * 100_000, "a.jsonl line 1 is no object in JSON"),
    ("a.jsonl", lines([{"text": "a"}, {"body": "b", "id": 1}]), "line 2 has no text or messages, it has body, id; use"),
    ("a.jsonl", lines([{"text": "a", "messages": CHAT}]), "line 1 has text and messages; use --data.text-field text"),
    ("a.jsonl", lines([{"text": None}]), "text in .* line 1 is None"),
    ("a.jsonl", lines([{"text": 5}]), "text in .* line 1 is 5"),
    ("a.jsonl", lines([{"messages": []}]), r"messages in .* line 1 is \[\]; use one message or more"),
    ("a.jsonl", lines([{"messages": [{"content": "a"}]}]), "messages in .* line 1 is .*; use one message or more"),
    ("a.jsonl", lines([{"messages": ["a"]}]), "messages in .* line 1 is .*; use one message or more"),
    ("a.jsonl.gz", gzip.compress(lines([{"text": "a"}] * 999), mtime=0)[:-20], "a.jsonl.gz, which cannot be read"),
    ("a.jsonl.gz", b"no gzip", "a.jsonl.gz, which cannot be read"),
    ("a.txt.zst", zstd(b"abc" * 99)[:-4], "a.txt.zst, which cannot be read"),
    ("a.txt.zst", b"no zstd", "a.txt.zst, which cannot be read"),
    ("a.parquet", parquet([{"body": "b", "id": 1}]), "a.parquet has no text or messages, it has body, id; use"),
    ("a.parquet", parquet([{"text": "b", "messages": "c"}]), "a.parquet has text and messages; use --data.text-field"),
    ("a.parquet", parquet([{"text": "a"}, {"text": None}]), "text in .*a.parquet row 2 is None"),
    ("a.parquet", b"PAR1 no", "a.parquet, which cannot be read"),
    ("a.arrow", feather([{"body": "b"}]), "a.arrow has no text or messages, it has body; use"),
    ("a.arrow", b"no arrow", "a.arrow, which cannot be read"),
    ("a.arrow", feather([{"text": "b" * 99}])[:-9], "a.arrow, which cannot be read"),
    ("a.parquet.gz", b"", "a.parquet.gz, and only text and .jsonl are read from .gz files; unpack it"),
    ("a.npy.zst", b"", "a.npy.zst, and only text and .jsonl are read from .zst files; unpack it"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "words"), BAD)
def test_bad_files_are_refused_in_a_line(name, content, words, write):
    with pytest.raises(ConfigError, match=words) as error:
        read(write(name, content))
    assert "\n" not in str(error.value)
    assert "data.files=" in str(error.value) or "--data.text-field" in str(error.value)


def test_a_field_that_is_not_there_is_refused(write):
    for name in ROWS:
        with pytest.raises(ConfigError, match=r"a\..* has no body, it has text; use --data.text-field NAME"):
            read(write(name, ROWS[name]([{"text": "a"}]), text_field="body"))


def test_bytes_have_no_chat_template(write):
    data = write("a.jsonl", lines([{"messages": CHAT}]))
    sources = find_sources(data)[1]
    with pytest.raises(ConfigError, match=r"data.tokenizer=bytes has no chat template for the messages in .* line 1"):
        list(ByteEncoder(data, sources).parts(Place(), Meter(sources)))


def test_rows_are_encoded_as_bytes(write):
    data = write("a.parquet", parquet([{"text": "caf\u00e9"}, {"text": ""}, {"text": "b"}]))
    sources = find_sources(data)[1]
    parts = list(ByteEncoder(data, sources).parts(Place(), Meter(sources)))
    assert [np.asarray(part.ids).tobytes().decode() for part in parts] == ["caf\u00e9", "b"]
    assert [part.document for part in parts] == ["a.parquet:0", "a.parquet:2"]


@pytest.mark.soak
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.ndjson.zst", "a.parquet", "a.feather", "a.arrow"])
def test_any_file_is_read_or_refused_in_a_line(name, write):
    content = ROWS[name]([{"text": "n\u00e9", "messages": None}, {"text": None, "messages": CHAT}] * 9)
    check_door(lambda changed: read(write(name, changed, text_field="text")), [content], (ConfigError,))
