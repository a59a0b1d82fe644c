"""Files from outside: what is no regular file, too large, or not of the expected shape is refused in one line."""

import os

import msgspec
import pytest

from tsp_jax.files import FileError, Finite, Size, parse_json, read_bytes, read_json


class Example(msgspec.Struct):
    size: Size
    scale: Finite = 1.0
    names: list[str] | str | None = None


REFUSED = {
    '{"size": "8"}': 'size="8": Expected `int`, got `str`',
    '{"size": true}': "size=true: Expected `int`, got `bool`",
    '{"size": 0}': "size=0: Expected `int` >= 1",
    '{"size": 1' + "0" * 400 + "}": "Expected `int` <= 9223372036854775807",
    '{"size": 1, "scale": 1e400}': "scale=Infinity: Expected `float`",
    '{"size": 1, "scale": NaN}': "scale=NaN: Expected `float`",
    '{"size": 1, "names": ["a", 5]}': "names[1]=5: Expected `str`, got `int`",
    '{"size": 1, "size": 2}': "key 'size' stands twice",
    "{}": "missing required field `size`",
    "[]": "Expected `object`, got `array`",
    "[" * 100_000: "nested too deeply",
    '{"size": ': "cannot be read as JSON",
}


@pytest.mark.parametrize(("text", "reason"), REFUSED.items(), ids=[reason[:24] for reason in REFUSED.values()])
def test_json_of_the_wrong_shape_is_refused_by_key_and_value(text, reason):
    with pytest.raises(FileError, match=r"^a\.json.*; use an intact copy$") as error:
        parse_json(text, "a.json", Example)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


def test_json_of_the_right_shape(tmp_path):
    (tmp_path / "a.json").write_text('{"size": 3, "scale": 2, "further": []}')
    assert read_json(tmp_path / "a.json", Example) == Example(size=3, scale=2.0)


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    for name in ("fifo", "zero", "folder"):
        with pytest.raises(FileError, match=f"{name} is not a regular file"):
            read_bytes(tmp_path / name)


def test_paths_that_cannot_be_opened(tmp_path):
    for name, reason in {"no": "does not exist", "x" * 300: "cannot be read", "a\0b": "cannot be read"}.items():
        with pytest.raises(FileError, match=reason):
            read_bytes(tmp_path / name)


def test_size_and_encoding_are_bounded(tmp_path):
    (tmp_path / "a").write_bytes(b"\xff" * 9)
    with pytest.raises(FileError, match="more than 8 bytes"):
        read_bytes(tmp_path / "a", max_bytes=8)
    with pytest.raises(FileError, match="not UTF-8 text"):
        read_json(tmp_path / "a")
