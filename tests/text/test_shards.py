"""Shards on disk: what a killed build leaves is kept, and processes take turns."""

import os
import threading
from pathlib import Path

import numpy as np
import pytest

from tsp_jax.errors import ConfigError
from tsp_jax.files import FileError
from tsp_jax.text import shards
from tsp_jax.text.build import build_once
from tsp_jax.text.encode import Part
from tsp_jax.text.readers import Place
from tsp_jax.text.shards import SPLITS, ShardIds, ShardsWriter, lengths_of, read_records, segments_of
from tsp_jax.text.token_file import TokenFile

LENGTHS = (3, 10, 1, 25, 7, 40, 2, 2, 9, 30)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(shards, "SHARD", 10)
    monkeypatch.setattr(shards, "_OPEN_FILES", 2)


def parts_of(start: Place = Place(), with_loss: bool = False):
    """The parts of documents, each of 8 tokens at most; document 7 is the first with a loss."""
    for number in range(start.source, len(LENGTHS)):
        ids = 1000 * number + np.arange(LENGTHS[number], dtype=np.int64)
        pieces = np.split(ids, range(8, len(ids), 8))
        for place, piece in enumerate(pieces):
            loss = (piece % 2).astype(np.uint8) if with_loss and number >= 7 else None
            yield Part(piece, loss, f"{number}", place == len(pieces) - 1, f"file {number}", Place(number + 1))


def is_held(document: str) -> bool:
    return int(document) % 3 == 2


def write(folder: Path, parts) -> None:
    ShardsWriter(folder, np.dtype(np.uint16), is_held).write(parts)


def read(folder: Path, split: str, loss: bool = False) -> ShardIds:
    segments = segments_of(read_records(folder))[split]
    files = [(one.loss if loss else one.file, one.start, one.stop) for one in segments]
    return ShardIds(folder, files, np.dtype(np.uint8 if loss else np.uint16), "advice")


def expected(split: str, loss: bool = False) -> np.ndarray:
    chosen = [part for part in parts_of(with_loss=loss) if is_held(part.document) == (split == "heldout")]
    if loss:
        return np.concatenate([np.ones(len(one.ids)) if one.loss is None else one.loss for one in chosen])
    return np.concatenate([one.ids for one in chosen])


@pytest.mark.parametrize("split", SPLITS)
def test_splits_are_the_documents_in_order(split, tmp_path):
    write(tmp_path, parts_of())
    np.testing.assert_array_equal(read(tmp_path, split), expected(split))
    lengths = [length for number, length in enumerate(LENGTHS) if is_held(str(number)) == (split == "heldout")]
    np.testing.assert_array_equal(lengths_of(tmp_path, read_records(tmp_path), split), lengths)
    assert len(read_records(tmp_path)) == 5


def test_any_range_is_read_over_the_borders_of_shards(tmp_path):
    write(tmp_path, parts_of())
    ids, whole = read(tmp_path, "train"), expected("train")
    for start in range(0, len(whole), 7):
        for stop in range(start, len(whole) + 1, 5):
            np.testing.assert_array_equal(ids.read(start, stop), whole[start:stop])
    at = np.array([[0, 5, 60], [70, 3, 4]])
    np.testing.assert_array_equal(ids[at], whole[at])


@pytest.mark.parametrize("split", SPLITS)
def test_loss_is_one_where_a_document_has_none(split, tmp_path):
    write(tmp_path, parts_of(with_loss=True))
    np.testing.assert_array_equal(read(tmp_path, split, loss=True), expected(split, loss=True))
    assert not (tmp_path / f"00000.{split}.loss.npy").exists()


def test_records_say_which_token_is_the_largest_and_where(tmp_path):
    write(tmp_path, parts_of())
    found = [(record.max_token_id, record.max_token_file) for record in read_records(tmp_path)]
    assert found == [(1009, "file 1"), (3024, "file 3"), (5039, "file 5"), (8008, "file 8"), (9029, "file 9")]


@pytest.mark.parametrize("done", range(1, 12))
def test_a_build_goes_on_after_its_last_shard(done, tmp_path):
    """However far it came when it ended."""

    def interrupted():
        for number, part in enumerate(parts_of()):
            if number == done:
                raise KeyboardInterrupt
            yield part

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, interrupted())
    kept = read_records(tmp_path)
    times = [os.stat(tmp_path / f"{number:05}.train.npy").st_mtime_ns for number in range(len(kept))]
    write(tmp_path, parts_of(Place(kept[-1].source if kept else 0)))
    for split in SPLITS:
        np.testing.assert_array_equal(read(tmp_path, split), expected(split))
    assert times == [os.stat(tmp_path / f"{number:05}.train.npy").st_mtime_ns for number in range(len(kept))]


@pytest.mark.parametrize("damage", ["dtype", "short", "gone"])
def test_a_damaged_shard_is_refused(damage, tmp_path):
    write(tmp_path, parts_of())
    path = tmp_path / "00001.train.npy"
    if damage == "gone":
        path.unlink()
    else:
        ids = np.asarray(TokenFile(path, ""))
        np.save(path, ids.astype(np.uint32) if damage == "dtype" else ids[:-1])
    with pytest.raises(FileError, match=r"00001\.train\.npy .*; advice"):
        read(tmp_path, "train")


# ------------------------------------------------------------------------------------------------ turns


def test_the_second_process_waits_and_finds_what_the_first_has_built(tmp_path, capsys):
    """Locks are of open files, so two threads exclude each other as two processes do."""
    folder, begun, may_end, built = tmp_path / "cache" / "a", threading.Event(), threading.Event(), []

    def build(where: Path) -> None:
        built.append(where)
        begun.set()
        assert may_end.wait(20)
        (where / "content").write_text("one")

    threads = [threading.Thread(target=build_once, args=(folder, build, lambda _: True)) for _ in range(3)]
    threads[0].start()
    assert begun.wait(20)
    for thread in threads[1:]:
        thread.start()
    threads[1].join(0.5)
    assert threads[1].is_alive()
    may_end.set()
    for thread in threads:
        thread.join(20)
    assert len(built) == 1
    assert (folder / "content").read_text() == "one"
    assert [path.name for path in folder.parent.iterdir()] == ["a"]
    assert "waiting for another process" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "keep", "left"),
    [(ConfigError("bad"), True, []), (KeyboardInterrupt(), True, ["a.partial"]), (KeyboardInterrupt(), False, [])],
)
def test_what_a_failed_build_leaves(error, keep, left, tmp_path):
    def build(where: Path) -> None:
        (where / "content").write_text("half")
        raise error

    with pytest.raises(type(error)):
        build_once(tmp_path / "a", build, lambda _: keep)
    assert [path.name for path in tmp_path.iterdir()] == left
    seen = []
    build_once(tmp_path / "a", lambda where: seen.extend(path.name for path in where.glob("content")), lambda _: True)
    assert seen == (["content"] if left else [])


def test_after_one_fails_the_next_builds(tmp_path):
    folder, begun, tries = tmp_path / "a", threading.Event(), []

    def build(where: Path) -> None:
        tries.append(where)
        begun.set()
        if len(tries) == 1:
            threading.Event().wait(0.5)
            raise ConfigError("bad")
        (where / "content").write_text("two")

    def first() -> None:
        with pytest.raises(ConfigError):
            build_once(folder, build, lambda _: False)

    thread = threading.Thread(target=first)
    thread.start()
    assert begun.wait(20)
    build_once(folder, build, lambda _: False)
    thread.join(20)
    assert (folder / "content").read_text() == "two"
    assert len(tries) == 2


def test_without_locks_the_first_to_finish_wins(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", none)
    folder = tmp_path / "a"

    def build(where: Path) -> None:
        (where / "content").write_text("outer")
        if not folder.exists():
            build_once(folder, lambda inner: (inner / "content").write_text("inner") and None, lambda _: False)

    build_once(folder, build, lambda _: False)
    assert (folder / "content").read_text() == "inner"
    assert [path.name for path in tmp_path.iterdir() if path.name != "a.partial"] == ["a"]
