"""Corpora: the tokenizer, the two splits, the cache, and files that are refused."""

import dataclasses
import io
import json
import os
import shutil
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from tests.builders.runs import small_config
from tests.builders.tokenizers import characters, save_tokenizer
from tsp_jax.config import DataConfig
from tsp_jax.errors import ConfigError
from tsp_jax.text import encode, readers, shards
from tsp_jax.text.shards import SPLITS, ShardsWriter
from tsp_jax.training import corpus as corpus_module
from tsp_jax.training.corpus import Corpus, load_corpus, name_tokenizer


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    """A glob of text files, none there yet."""
    return DataConfig(
        files=str(tmp_path / "text" / "**" / "*.txt"), cache_dir=str(tmp_path / "cache"), tokenizer="bytes"
    )


def write_files(folder: Path, contents: dict[str, bytes]) -> None:
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def write_many(folder: Path, count: int) -> dict[str, bytes]:
    contents = {f"part{i % 3}/file{i:03}.txt": f"file {i} holds this.".encode() * (i % 4) for i in range(count)}
    write_files(folder, contents)
    return contents


def documents_of(corpus: Corpus) -> list[bytes]:
    return [part.tobytes() for part in np.split(np.asarray(corpus.tokens), corpus.starts[1:])]


# --- corpus


def test_files_become_documents_in_path_order(data: DataConfig, tmp_path: Path):
    contents = write_many(tmp_path / "text", 200)
    splits = {split: load_corpus(data, 256, split) for split in SPLITS}
    held = set(documents_of(splits["heldout"]))
    expected = [content for _, content in sorted(contents.items()) if content and content not in held]
    assert documents_of(splits["train"]) == expected
    assert splits["train"].tokens.dtype == np.uint8
    assert splits["train"].starts.dtype == np.int64


def test_held_out_files_are_few_and_disjoint_from_train(data: DataConfig, tmp_path: Path):
    contents = write_many(tmp_path / "text", 400)
    train, held = (documents_of(load_corpus(data, 256, split)) for split in SPLITS)
    assert sorted(train + held) == sorted(filter(None, contents.values()))
    assert not set(train) & set(held)
    assert 1 <= len(held) <= 18  # 300 files with text, one in 50


def test_new_files_leave_the_others_in_their_split(data: DataConfig, tmp_path: Path):
    contents = write_many(tmp_path / "text", 200)
    before = set(documents_of(load_corpus(data, 256, "heldout")))
    write_many(tmp_path / "text", 300)
    after = set(documents_of(load_corpus(data, 256, "heldout")))
    assert after & set(contents.values()) == before


def test_last_file_is_held_out_when_the_hash_takes_none(data: DataConfig, tmp_path: Path):
    write_files(tmp_path / "text", {"b.txt": b"second", "a.txt": b"first", "c.txt": b"third", "d.txt": b""})
    assert documents_of(load_corpus(data, 256, "train")) == [b"first", b"second"]
    assert documents_of(load_corpus(data, 256, "heldout")) == [b"third"]


def test_last_file_is_held_out_when_the_hash_takes_all(data: DataConfig, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(corpus_module, "HELD_OUT", 1)
    write_files(tmp_path / "text", {"a.txt": b"first", "b.txt": b"second"})
    assert documents_of(load_corpus(data, 256, "train")) == [b"first"]


@pytest.mark.parametrize(("length", "held"), [(2, 1), (99, 1), (1000, 20)])
def test_one_file_gives_its_end_to_heldout(data: DataConfig, tmp_path: Path, length: int, held: int):
    content = bytes(range(250)) * 4
    write_files(tmp_path / "text", {"only.txt": content[:length]})
    assert documents_of(load_corpus(data, 256, "train")) == [content[: length - held]]
    assert documents_of(load_corpus(data, 256, "heldout")) == [content[length - held : length]]


@pytest.mark.parametrize("suffix", ["txt", "npy"])
def test_files_longer_than_a_chunk_are_read_whole(tmp_path: Path, monkeypatch, suffix: str):
    monkeypatch.setattr(encode, "CHUNK", 7)
    monkeypatch.setattr(readers, "BLOCK", 7)
    content = np.arange(100, 200, dtype=np.uint8)
    if suffix == "txt":
        content.tofile(tmp_path / "only.txt")
    else:
        np.save(tmp_path / "only.npy", content.astype(np.int64))
    data = DataConfig(files=str(tmp_path / f"only.{suffix}"), cache_dir=str(tmp_path / "cache"), tokenizer="bytes")
    parts = [load_corpus(data, 256, split).tokens for split in SPLITS]
    np.testing.assert_array_equal(np.concatenate(parts), content)
    assert [len(part) for part in parts] == [98, 2]


@pytest.mark.parametrize(("largest", "dtype"), [(255, np.uint8), (256, np.uint16), (70_000, np.uint32)])
def test_token_files_keep_their_ids_in_the_smallest_dtype(tmp_path: Path, largest: int, dtype: type):
    np.save(tmp_path / "a.npy", np.array([3, 1, largest], np.int64))
    np.save(tmp_path / "b.npy", np.array([2, 2], np.int16))
    np.save(tmp_path / "empty.npy", np.array([], np.int32))
    data = DataConfig(files=str(tmp_path / "*.npy"), cache_dir=str(tmp_path / "cache"), tokenizer="bytes")
    train = load_corpus(data, largest + 1, "train")
    assert train.tokens.dtype == dtype
    np.testing.assert_array_equal(train.tokens, [3, 1, largest])
    np.testing.assert_array_equal(load_corpus(data, largest + 1, "heldout").tokens, [2, 2])


def test_default_corpus_is_the_standard_library(tmp_path: Path, monkeypatch):
    library = tmp_path / "lib"
    kept = {"abc.py": b"import io", "json/decoder.py": b"import re", "readme.txt": b"not Python"}
    left_out = {"site-packages/x.py": b"x", "json/__pycache__/y.py": b"y", "dist-packages/z.py": b"z"}
    write_files(library, kept | left_out)
    monkeypatch.setattr(sysconfig, "get_path", {"stdlib": str(library)}.__getitem__)
    data = DataConfig(cache_dir=str(tmp_path / "cache"), tokenizer="bytes")
    documents = [documents_of(load_corpus(data, 256, split)) for split in SPLITS]
    assert documents == [[b"import io"], [b"import re"]]


def test_cache_is_where_xdg_says(tmp_path: Path, monkeypatch):
    write_files(tmp_path, {"a.txt": b"first", "b.txt": b"second"})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    load_corpus(DataConfig(files=str(tmp_path / "*.txt"), tokenizer="bytes"), 256, "train")
    assert len(list((tmp_path / "xdg" / "tsp_jax").glob("*/00000.train.npy"))) == 1


def test_a_cached_corpus_is_not_read_again(data: DataConfig, tmp_path: Path, monkeypatch):
    write_many(tmp_path / "text", 20)
    built = load_corpus(data, 256, "train")
    monkeypatch.setattr(readers, "read_blocks", None)
    loaded = load_corpus(data, 256, "train")
    np.testing.assert_array_equal(loaded.tokens, built.tokens)
    assert loaded.digest == built.digest


def test_a_changed_file_is_read_again(data: DataConfig, tmp_path: Path):
    write_files(tmp_path / "text", {"a.txt": b"first", "b.txt": b"second"})
    before = load_corpus(data, 256, "train")
    write_files(tmp_path / "text", {"a.txt": b"again"})
    os.utime(tmp_path / "text" / "a.txt", (1, 1))  # in case the clock did not move on between the writes
    after = load_corpus(data, 256, "train")
    assert documents_of(after) == [b"again"]
    assert after.digest != before.digest


def test_digest_depends_on_content_alone(tmp_path: Path):
    digests = []
    for folder in ("here", "there"):
        write_files(tmp_path / folder, {"a.txt": b"first", "b.txt": b"second"})
        data = DataConfig(files=str(tmp_path / folder / "*.txt"), cache_dir=str(tmp_path / "cache"), tokenizer="bytes")
        digests.append(load_corpus(data, 256, "train").digest)
    assert digests[0] == digests[1]


def test_an_interrupted_build_leaves_nothing(data: DataConfig, tmp_path: Path, monkeypatch):
    write_many(tmp_path / "text", 20)

    def interrupted(*_) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(np, "save", interrupted)
        load_corpus(data, 256, "train")
    assert not list((tmp_path / "cache").iterdir())
    assert len(load_corpus(data, 256, "train").tokens)


# --- a folder's tokenizer


@pytest.fixture
def tokenized(tmp_path: Path) -> DataConfig:
    """Rows of texts and of a chat, and a tokenizer with a template, whose end-of-text token is 2."""
    files = {"tokenizer_config.json": {"eos_token": "</s>"}}
    folder = save_tokenizer(tmp_path / "tokenizer", characters(), files)
    template = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    chat = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}]
    rows = [{"text": "abc"}, {"text": ""}, {"messages": chat}, {"text": "b"}]
    write_files(tmp_path, {"rows.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode()})
    return DataConfig(
        files=str(tmp_path / "rows.jsonl"), cache_dir=str(tmp_path / "cache"), tokenizer=str(tmp_path / "tokenizer")
    )


def test_a_corpus_of_texts_and_chats(tokenized: DataConfig):
    train, held = (load_corpus(tokenized, 100, split) for split in SPLITS)
    np.testing.assert_array_equal(train.tokens, [3, 4, 5, 2, 3, 4, 2, 5, 2])
    np.testing.assert_array_equal(train.starts, [0, 4])
    assert train.loss is not None
    np.testing.assert_array_equal(train.loss, [1, 1, 1, 1, 0, 0, 0, 1, 1])
    np.testing.assert_array_equal(held.tokens, [4, 2])
    assert held.loss is not None
    np.testing.assert_array_equal(held.loss, [1, 1])
    assert train.tokens.dtype == np.uint16


def test_the_loss_is_part_of_the_digest_and_of_the_cache_key(tokenized: DataConfig):
    every = load_corpus(dataclasses.replace(tokenized, loss="all"), 100, "train")
    some = load_corpus(tokenized, 100, "train")
    np.testing.assert_array_equal(every.tokens, some.tokens)
    assert every.loss is None
    assert every.digest != some.digest


def test_another_tokenizer_makes_another_corpus(tokenized: DataConfig, tmp_path: Path):
    before = load_corpus(tokenized, 100, "train")
    made = characters()
    made.add_tokens(["abc"])
    save_tokenizer(tmp_path / "tokenizer", made)
    after = load_corpus(tokenized, 100, "train")
    assert after.digest != before.digest
    assert after.tokens[np.array([0])] == made.token_to_id("abc")


def test_shards_of_any_size_are_one_corpus(tokenized: DataConfig, tmp_path: Path, monkeypatch):
    whole = load_corpus(tokenized, 100, "train")
    monkeypatch.setattr(shards, "SHARD", 1)
    small = load_corpus(dataclasses.replace(tokenized, cache_dir=str(tmp_path / "other")), 100, "train")
    assert small.digest == whole.digest
    np.testing.assert_array_equal(small.starts, whole.starts)


def test_a_killed_build_is_continued(tokenized: DataConfig, tmp_path: Path, monkeypatch):
    whole = load_corpus(dataclasses.replace(tokenized, cache_dir=str(tmp_path / "other")), 100, "train")
    monkeypatch.setattr(shards, "SHARD", 1)
    finish = ShardsWriter._finish

    def killed(writer, *rest):
        finish(writer, *rest)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ShardsWriter, "_finish", killed)
        load_corpus(tokenized, 100, "train")
    (left,) = (tmp_path / "cache").iterdir()
    record = left / "00000.json"
    written = record.stat().st_mtime_ns
    assert load_corpus(tokenized, 100, "train").digest == whole.digest
    (folder,) = (tmp_path / "cache").iterdir()
    assert (folder / record.name).stat().st_mtime_ns == written
    assert (folder / "00002.json").exists()


def test_rows_stay_in_their_split_when_a_file_grows(tokenized: DataConfig, tmp_path: Path):
    rows = [json.dumps({"text": f"a{number}"}) + "\n" for number in range(300)]
    write_files(tmp_path, {"rows.jsonl": "".join(rows[:200]).encode()})
    before = load_corpus(tokenized, 100, "heldout")
    write_files(tmp_path, {"rows.jsonl": "".join(rows).encode()})
    after = load_corpus(tokenized, 100, "heldout")
    assert 1 <= len(before.starts) < 12
    count = len(before.tokens)
    np.testing.assert_array_equal(np.asarray(after.tokens)[:count], before.tokens)
    assert len(after.tokens) > count


def test_a_run_has_the_tokenizer_of_its_weights_unless_it_names_one(tmp_path: Path):
    config = small_config(tmp_path)
    assert name_tokenizer(config).data.tokenizer == "bytes"
    unnamed = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=""))
    assert name_tokenizer(unnamed) == unnamed
    assert name_tokenizer(dataclasses.replace(unnamed, init_from="model")).data.tokenizer == "model"


# --- bad input


def expect_refusal(data: DataConfig, *parts: str, vocab_size: int = 256) -> None:
    with pytest.raises(ConfigError) as caught:
        load_corpus(data, vocab_size, "train")
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_refuses_a_glob_without_files(data: DataConfig):
    expect_refusal(data, f"data.files={data.files!r} matches no file", "use data.files=")


def test_refuses_a_folder_and_says_which_glob_to_use(tmp_path: Path):
    write_files(tmp_path / "text", {"a.txt": b"first"})
    data = DataConfig(files=str(tmp_path / "text"), cache_dir=str(tmp_path), tokenizer="bytes")
    expect_refusal(data, "matches no file", f"use data.files={tmp_path / 'text' / '**' / '*.txt'}")


def test_ignores_folders_among_the_matches(data: DataConfig, tmp_path: Path):
    write_files(tmp_path / "text", {"a.txt": b"first", "b.txt": b"second", "folder.txt/x.bin": b"no"})
    assert documents_of(load_corpus(data, 256, "train")) == [b"first"]


@pytest.mark.parametrize("contents", [(b"", b""), (b"x", b"")])
def test_refuses_files_without_tokens_for_two_splits(data: DataConfig, tmp_path: Path, contents: tuple[bytes, bytes]):
    write_files(tmp_path / "text", {"a.txt": contents[0], "b.txt": contents[1]})
    expect_refusal(data, "data.files=", f"{len(contents[0])} tokens in all; use 2 or more")


def test_refuses_a_dangling_link(data: DataConfig, tmp_path: Path):
    write_files(tmp_path / "text", {"a.txt": b"first"})
    (tmp_path / "text" / "b.txt").symlink_to(tmp_path / "nowhere")
    expect_refusal(data, "data.files=", "b.txt, which cannot be read (No such file", "narrower glob")


def test_refuses_a_file_that_may_not_be_read(data: DataConfig, tmp_path: Path, monkeypatch):
    write_files(tmp_path / "text", {"a.txt": b"first", "b.txt": b"second"})

    class Denied(io.BytesIO):
        def read(self, *_):
            raise PermissionError(13, "Permission denied")  # chmod would not stop a test that root runs

    monkeypatch.setattr(readers, "open_regular", lambda _: Denied())
    expect_refusal(data, "a.txt, which cannot be read (Permission denied)", "make it readable")


def test_refuses_a_file_that_shrinks_while_read(data: DataConfig, tmp_path: Path, monkeypatch):
    write_files(tmp_path / "text", {"a.txt": b"first", "b.txt": b"second"})
    monkeypatch.setattr(readers, "open_regular", lambda _: io.BytesIO(b"firs"))
    expect_refusal(data, "a.txt changed while it was read; run again")
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize(
    ("array", "what"),
    [
        (np.zeros((2, 3), np.int32), "is int32 [2, 3]"),
        (np.zeros(3, np.float32), "is float32 [3]"),
        (np.zeros(3, bool), "is bool [3]"),
        (np.array([4, -1, 2]), "holds -1"),
        (np.array([4, 2**32]), f"holds {2**32}"),
        (np.array([None]), "is object [1]"),
    ],
    ids=["matrix", "float", "bool", "negative", "large", "object"],
)
def test_refuses_arrays_that_are_no_token_ids(tmp_path: Path, array: np.ndarray, what: str):
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    data = DataConfig(files=str(tmp_path / "*.npy"), cache_dir=str(tmp_path / "cache"), tokenizer="bytes")
    expect_refusal(data, "data.files=", f"a.npy {what}", "one dimension of integers from 0")


@pytest.mark.parametrize("content", [b"", b"text, not an array"])
def test_refuses_npy_files_that_are_no_arrays(tmp_path: Path, content: bytes):
    write_files(tmp_path, {"a.npy": content})
    data = DataConfig(files=str(tmp_path / "*.npy"), cache_dir=str(tmp_path / "cache"), tokenizer="bytes")
    expect_refusal(data, "a.npy is not a whole .npy array")


def test_refuses_text_and_token_files_together(tmp_path: Path):
    write_files(tmp_path, {"a.txt": b"text"})
    np.save(tmp_path / "b.npy", np.arange(3))
    data = DataConfig(files=str(tmp_path / "[ab].*"), cache_dir=str(tmp_path / "cache"), tokenizer="bytes")
    expect_refusal(data, "both text and token ids", "a glob of one kind")


def test_refuses_a_vocabulary_without_room_for_text(data: DataConfig, tmp_path: Path):
    write_files(tmp_path / "text", {"a.txt": b"first", "b.txt": b"\xfe"})
    expect_refusal(
        data, "model.vocab_size=200 is too small for token id 254 in", "b.txt; use model.vocab_size=256", vocab_size=200
    )
    assert len(load_corpus(data, 255, "train").tokens)


def test_refuses_a_vocabulary_without_room_for_ids_of_either_split(tmp_path: Path):
    for name, ids in (("a", [1, 2]), ("b", [3, 1000])):
        np.save(tmp_path / f"{name}.npy", np.array(ids))
    data = DataConfig(files=str(tmp_path / "*.npy"), cache_dir=str(tmp_path / "cache"), tokenizer="bytes")
    expect_refusal(data, "token id 1000 in", "b.npy; use model.vocab_size=1001", vocab_size=1000)


def test_refuses_text_without_a_tokenizer(data: DataConfig, tmp_path: Path):
    write_files(tmp_path / "text", {"a.txt": b"first", "b.txt": b"second"})
    unnamed = dataclasses.replace(data, tokenizer="")
    expect_refusal(unnamed, "data.tokenizer='' names no tokenizer", "is text; use", "--data.tokenizer bytes")


def test_refuses_a_tokenizer_whose_ids_exceed_the_vocabulary(tokenized: DataConfig, tmp_path: Path):
    largest = characters().get_vocab_size() - 1
    words = f"too small for token id {largest} in the tokenizer in {tokenized.tokenizer}; use model.vocab_size"
    expect_refusal(tokenized, words, vocab_size=largest)
    assert not (tmp_path / "cache").exists()
    load_corpus(tokenized, largest + 1, "train")
    expect_refusal(tokenized, words, vocab_size=largest)


@pytest.mark.parametrize("content", [None, b"", b"{}"])
def test_refuses_a_folder_without_a_tokenizer(tokenized: DataConfig, tmp_path: Path, content: bytes | None):
    (tmp_path / "tokenizer" / "tokenizer.json").unlink()
    if content is not None:
        write_files(tmp_path / "tokenizer", {"tokenizer.json": content})
    expect_refusal(tokenized, str(tmp_path / "tokenizer" / "tokenizer.json"), "use a")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("row", [b'{"text": ', b'{"text": "\xff"}', b'{"messages": []}', b'{"body": "a"}'])
def test_a_bad_row_is_refused_and_nothing_is_written(tokenized: DataConfig, tmp_path: Path, monkeypatch, row: bytes):
    monkeypatch.setattr(shards, "SHARD", 1)
    write_files(tmp_path, {"rows.jsonl": b'{"text": "a"}\n' * 9 + row})
    expect_refusal(tokenized, "rows.jsonl line 10")
    assert not list((tmp_path / "cache").iterdir())


def test_refuses_a_cache_that_cannot_be_written(data: DataConfig, tmp_path: Path):
    write_files(tmp_path / "text", {"a.txt": b"first", "b.txt": b"second"})
    write_files(tmp_path, {"cache": b"a file stands where the folder should"})
    expect_refusal(data, f"data.cache_dir={data.cache_dir!r} cannot be written", "use data.cache_dir=")


def test_refuses_a_damaged_cache(data: DataConfig, tmp_path: Path):
    write_files(tmp_path / "text", {"a.txt": b"first", "b.txt": b"second"})
    load_corpus(data, 256, "train")
    (tokens,) = (tmp_path / "cache").glob("*/00000.train.npy")
    tokens.write_bytes(b"")
    expect_refusal(data, "holds a damaged corpus (", "is not a whole .npy array); delete", str(tokens.parent))
    shutil.rmtree(tokens.parent)
    assert len(load_corpus(data, 256, "train").tokens)
