"""Files of token ids and the cache of a corpus: damage is refused in a line, also where it happens during training."""

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest

from tests.builders.fuzz import check_door
from tsp_jax.config import DataConfig
from tsp_jax.errors import ConfigError
from tsp_jax.files import FileError
from tsp_jax.text.token_file import TokenFile
from tsp_jax.training.corpus import load_corpus
from tsp_jax.training.data import Batches


def npy(array: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()


@pytest.fixture
def write(tmp_path):
    def write(content: bytes) -> Path:
        (tmp_path / "a.npy").write_bytes(content)
        return tmp_path / "a.npy"

    return write


@pytest.mark.parametrize("dtype", ["u1", "<u2", ">u2", "<u4", "<i8"])
def test_indexing_is_that_of_the_array(dtype, write):
    array = np.random.default_rng(0).integers(0, 200, 500).astype(dtype)
    tokens = TokenFile(write(npy(array)), "")
    at = np.random.default_rng(1).integers(0, 500, (3, 2, 7))
    assert (len(tokens), tokens.dtype) == (500, array.dtype)
    np.testing.assert_array_equal(tokens[at], array[at])
    np.testing.assert_array_equal(np.asarray(tokens), array)
    assert len(np.asarray(TokenFile(write(npy(array[:0])), ""))) == 0


def header(**changes) -> bytes:
    """A .npy file of 8 bytes of data with another header."""
    text = repr({"descr": "|u1", "fortran_order": False, "shape": (8,)} | changes).ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode() + bytes(8)


BAD = {
    b"": "is not a whole .npy array",
    header(shape=(9,)): "is not a whole .npy array",
    header(shape=(-1,)): "is not a whole .npy array",
    header(shape=(10**30,)): "is not a whole .npy array",
    header(shape=()): "is uint8 []",
    header(shape=(2, 4)): "is uint8 [2, 4]",
    header(descr="<f4", shape=(2,)): "is float32 [2]",
    header(descr="|O", shape=(1,)): "is object [1]",
    header(descr="?"): "is bool [8]",
    header(descr="x y"): "is not a whole .npy array",
    header()[:30]: "is not a whole .npy array",
}


@pytest.mark.parametrize("content", BAD, ids=range(len(BAD)))
def test_what_is_no_array_of_integers_is_refused(content, write):
    with pytest.raises(FileError, match=r"a\.npy .*; advice$") as error:
        TokenFile(write(content), "advice")
    assert BAD[content] in str(error.value)


@pytest.mark.soak
def test_fuzz_of_a_token_file(write):
    contents = [npy(np.arange(300, dtype=dtype)) for dtype in ("u1", "<u2", "<i8")]
    check_door(lambda content: np.asarray(TokenFile(write(content), "")), contents, (FileError,))


# ------------------------------------------------------------------------------------------------ the cache


@pytest.fixture
def cached(tmp_path):
    """(data, folder in the cache) of two documents."""
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.txt").write_text("some text " * 5_000)
    data = DataConfig(files=str(tmp_path / "*.txt"), cache_dir=str(tmp_path / "cache"), tokenizer="bytes")
    load_corpus(data, 256, "train")
    (folder,) = (tmp_path / "cache").iterdir()
    return data, folder


def test_a_file_that_is_truncated_while_it_trains_is_refused_and_kills_nothing(cached):
    data, folder = cached
    corpus = load_corpus(data, 256, "train")
    batches = Batches(corpus, batch=4, seq_len=512, seed=0, order="zigzag", sequence_shards=1, shuffle=True)
    before = batches.at(0)
    os.truncate(folder / "00000.train.npy", 200)
    with pytest.raises(ConfigError, match=rf"00000\.train\.npy was truncated while it was read; delete {folder}"):
        batches.at(0)
    assert before.tokens.shape == (4, 512)


def test_a_source_that_is_truncated_while_it_is_read_is_refused(tmp_path, monkeypatch):
    np.save(tmp_path / "a.npy", np.arange(1000, dtype=np.int64))
    data = DataConfig(files=str(tmp_path / "*.npy"), cache_dir=str(tmp_path / "cache"), tokenizer="bytes")
    read = TokenFile.read
    monkeypatch.setattr(TokenFile, "read", lambda *_: os.truncate(tmp_path / "a.npy", 200) or read(*_))
    with pytest.raises(ConfigError, match=r"data.files=.*a\.npy was truncated while it was read; run again"):
        load_corpus(data, 2000, "train")


def segment(changes: dict) -> dict:
    """corpus.json's entry of a split of one segment."""
    one = {"file": "00000.train.npy", "start": 0, "stop": 5} | changes
    return {"train": {"sha256": "0" * 64, "segments": [one]}}


DAMAGES = {
    "corpus.json": ["", "[]", "{}", "[" * 100_000, "\udcff", {"max_token_id": -1}, {"max_token_id": 2**32},
                    {"max_token_id": "1"}, {"train": {}}, {"max_token_file": 5}, {"dtype": "float32"},
                    {"dtype": "uint16"},
                    {"train": {"sha256": "0" * 64, "segments": []}}, segment({"stop": 10**9}), segment({"start": 9}),
                    segment({"file": "../a.npy"})],
    "00000.train.npy": [b"", npy(np.arange(3.0)), npy(np.arange(3, dtype=np.uint8))],
    "train_starts.npy": [b"", *(npy(np.array(starts)) for starts in ([], [1, 2], [0, 0], [0, 9, 3], [0, 10**9]))],
}  # fmt: skip


@pytest.mark.parametrize(("name", "damage"), [(name, damage) for name in DAMAGES for damage in DAMAGES[name]])
def test_a_damaged_cache_is_refused_in_a_line(name, damage, cached):
    data, folder = cached
    if isinstance(damage, dict):
        damage = json.dumps(json.loads((folder / name).read_text()) | damage)
    (folder / name).write_bytes(damage if isinstance(damage, bytes) else damage.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError, match=rf"^data.cache_dir=.* holds a damaged corpus \(.*\); delete {folder}$"):
        load_corpus(data, 256, "train")


@pytest.mark.parametrize("name", ["corpus.json", "00000.train.npy", "train_starts.npy"])
def test_what_is_no_regular_file_in_a_cache_is_not_waited_for(name, cached):
    data, folder = cached
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(ConfigError, match=rf"damaged corpus \(.*{name} is not a regular file\)"):
        load_corpus(data, 256, "train")


@pytest.mark.soak
def test_fuzz_of_corpus_json(cached):
    data, folder = cached
    path = folder / "corpus.json"
    check_door(
        lambda content: (path.write_bytes(content), load_corpus(data, 256, "train")),
        [path.read_bytes()],
        (ConfigError,),
    )
