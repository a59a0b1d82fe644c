"""The files of a corpus -> token ids for each split, encoded once and then cached.

A text file is a document, and so is a row of a file of rows. About one of every `HELD_OUT` documents is held out.
Whether one is held out depends on a hash of its row and its file's path, relative to the part of the glob before the
first wildcard. So added files do not move other documents to the other split. If the hash leaves a split empty, the
last document is held out. If there is only one, its last ``max(1, tokens // HELD_OUT)`` tokens are held out.
"""

import dataclasses
import hashlib
import json
import os
from functools import partial
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np

from tsp_jax.config import Config, DataConfig
from tsp_jax.errors import ConfigError
from tsp_jax.files import FileError, read_json
from tsp_jax.hf.byte_tokenizer import ByteTokenizer
from tsp_jax.text.build import build_once, progress
from tsp_jax.text.encode import BYTES, CHUNK, LARGEST_ID, ByteEncoder, Encoder, IdsEncoder
from tsp_jax.text.readers import Meter, Place
from tsp_jax.text.shards import (
    SPLITS,
    Record,
    Segment,
    ShardIds,
    ShardsWriter,
    Split,
    lengths_of,
    read_records,
    segments_of,
    write_json,
)  # fmt: skip
from tsp_jax.text.sources import Source, find_sources
from tsp_jax.text.token_file import Ids, TokenFile
from tsp_jax.text.tokenize import TokenEncoder

HELD_OUT = 50
"""about one document in this many is held out"""
_FORMAT_VERSION = 2
_DTYPES = {"uint8": np.uint8, "uint16": np.uint16, "uint32": np.uint32}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
    """One split of a corpus: its documents, concatenated into one array of tokens."""

    tokens: Ids | np.ndarray
    """[tokens] uint8, uint16 or uint32"""
    starts: np.ndarray
    """[documents] int64: index of the first token of each document; strictly increasing from 0"""
    loss: Ids | np.ndarray | None = None
    """[tokens] uint8: 1 where the token counts as a label; None: everywhere"""
    name: str
    """split and files, for messages"""
    digest: str
    """SHA-256 of starts, tokens and loss: the same on every host, and when a run is resumed"""


class SplitFacts(msgspec.Struct):
    """What a split is made of."""

    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
    segments: Annotated[list[Segment], msgspec.Meta(min_length=1)]


class Facts(msgspec.Struct):
    """The content of ``corpus.json``."""

    max_token_id: Annotated[int, msgspec.Meta(ge=0, le=LARGEST_ID)]
    max_token_file: str
    dtype: Annotated[str, msgspec.Meta(pattern=f"^({'|'.join(_DTYPES)})$")]
    train: SplitFacts
    heldout: SplitFacts


def name_tokenizer(config: Config) -> Config:
    """Returns the configuration; if its data names no tokenizer, with that of the folder `init_from`."""
    if config.data.tokenizer or not config.init_from:
        return config
    return dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=config.init_from))


def load_corpus(data: DataConfig, vocab_size: int, split: Split) -> Corpus:
    """Loads one split of a corpus from the cache; encodes the files first if they are not cached.

    Several processes may ask for the same corpus at once: one builds it, and the others wait. If it is killed, the next
    one goes on after its last finished shard.

    Raises:
      ConfigError: the files are missing, empty, unreadable or not what they should be; no tokenizer is named; an id is
        not below `vocab_size`; the cache cannot be written.
    """
    root, sources = find_sources(data)
    encoder = make_encoder(data, sources)
    cache = _cache_dir(data)
    folder = cache / _digest_sources(root, sources, encoder)
    try:
        if not folder.is_dir():
            _check_vocabulary(encoder.largest, vocab_size)
            build_once(folder, partial(_build, data=data, sources=sources, encoder=encoder), _has_shards)
    except OSError as error:
        raise ConfigError(
            f"data.cache_dir={str(cache)!r} cannot be written ({error.strerror}); "
            "use data.cache_dir=<a folder with space>"
        ) from error
    try:
        facts = read_json(folder / "corpus.json", Facts)
        tokens, starts, loss = _open_cached(folder, split, facts)
    except FileError as error:
        reason = str(error).partition(";")[0]
        raise ConfigError(f"data.cache_dir={str(cache)!r} holds a damaged corpus ({reason}); delete {folder}") from None
    _check_vocabulary((facts.max_token_id, facts.max_token_file), vocab_size)
    name = f"{split} split of data.files={data.files!r}"
    return Corpus(tokens=tokens, starts=starts, loss=loss, name=name, digest=getattr(facts, split).sha256)


def make_encoder(data: DataConfig, sources: list[Source]) -> Encoder:
    """Returns what encodes the files; raises ConfigError if they are text and no tokenizer is named."""
    if sources[0].kind == "ids":
        return IdsEncoder(data, sources)
    if not data.tokenizer:
        raise ConfigError(
            f"data.tokenizer='' names no tokenizer, and data.files={data.files!r} is text; "
            "use --data.tokenizer <a folder with tokenizer.json>, or --data.tokenizer bytes"
        )
    return ByteEncoder(data, sources) if data.tokenizer == BYTES else TokenEncoder(data, sources)


def _check_vocabulary(largest: tuple[int, str] | None, vocab_size: int) -> None:
    """Raises ConfigError if the largest token id, and what has it, is not below `vocab_size`."""
    if largest and largest[0] >= vocab_size:
        number, where = largest
        fitting = ByteTokenizer.vocab_size if number < ByteTokenizer.vocab_size else number + 1
        raise ConfigError(
            f"model.vocab_size={vocab_size} is too small for token id {number} in {where:.500}; "
            f"use model.vocab_size={fitting}"
        )


def _open_cached(folder: Path, split: Split, facts: Facts) -> tuple[Ids, np.ndarray, Ids | None]:
    """Returns (tokens, starts, loss); raises FileError if one of the files is damaged."""
    advice = f"delete {folder}"
    starts = np.asarray(TokenFile(folder / f"{split}_starts.npy", advice))
    tokens, loss = _open_segments(folder, getattr(facts, split).segments, facts.dtype)
    if not (len(starts) and starts[0] == 0 and (np.diff(starts) > 0).all() and starts[-1] < len(tokens)):
        raise FileError(f"{split}_starts.npy does not divide the {len(tokens)} tokens of the split")
    return tokens, starts, loss


def _open_segments(folder: Path, segments: list[Segment], dtype: str) -> tuple[Ids, Ids | None]:
    """(tokens, loss) of segments."""
    advice = f"delete {folder}"
    tokens = ShardIds(folder, [(one.file, one.start, one.stop) for one in segments], np.dtype(dtype), advice)
    if not any(one.loss for one in segments):
        return tokens, None
    return tokens, ShardIds(folder, [(one.loss, one.start, one.stop) for one in segments], np.dtype(np.uint8), advice)


def _digest_sources(root: Path, sources: list[Source], encoder: Encoder) -> str:
    """Name of the cache folder: a hash of sources and root, since two corpora may have equal names and mtimes."""
    listing = [_FORMAT_VERSION, HELD_OUT, str(root), [source[1:] for source in sources], encoder.key]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()[:32]


def _cache_dir(data: DataConfig) -> Path:
    default = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache"), "tsp_jax")
    return Path(os.path.expanduser(data.cache_dir or default))


# ------------------------------------------------------------------------------------------------ building


def _build(folder: Path, data: DataConfig, sources: list[Source], encoder: Encoder) -> None:
    """Writes the shards that are missing in a folder, and then what makes them two splits."""
    records = read_records(folder)
    start = Place(records[-1].source, records[-1].row) if records else Place()
    meter = Meter(sources, start)
    with progress(meter, "tokenizing") as show:

        def parts():
            for part in encoder.parts(start, meter):
                show()
                yield part

        ShardsWriter(folder, encoder.dtype, _is_held_out).write(parts())
    records = read_records(folder)
    splits = _divide(folder, data, records)
    largest = encoder.largest or max(
        ((record.max_token_id, record.max_token_file) for record in records), key=lambda one: one[0]
    )
    facts = [
        SplitFacts(sha256=_digest(folder, split, segments, str(encoder.dtype)), segments=segments)
        for split, segments in splits.items()
    ]
    write_json(folder / "corpus.json", Facts(*largest, str(encoder.dtype), *facts))


def _has_shards(folder: Path) -> bool:
    return bool(read_records(folder))


def _is_held_out(document: str) -> bool:
    return int(hashlib.sha256(os.fsencode(document)).hexdigest(), 16) % HELD_OUT == 0


def _divide(folder: Path, data: DataConfig, records: list[Record]) -> dict[Split, list[Segment]]:
    """Divides shards into two splits by the rule at the top of this file, and writes the starts of both."""
    segments = segments_of(records)
    lengths = {split: lengths_of(folder, records, split) for split in SPLITS}
    total = sum(int(lengths[split].sum()) for split in SPLITS)
    if total < 2:
        raise ConfigError(f"data.files={data.files!r} matches files with {total} tokens in all; use 2 or more")
    pairs: tuple[tuple[Split, Split], ...] = (("train", "heldout"), ("heldout", "train"))
    for full, empty in pairs:
        if not segments[empty]:
            moved = int(lengths[full][-1])
            if len(lengths[full]) == 1:
                moved = max(1, moved // HELD_OUT)
                lengths["train"], lengths["heldout"] = np.array([total - moved]), np.array([moved])
            else:
                lengths["train"], lengths["heldout"] = lengths[full][:-1], lengths[full][-1:]
            segments["train"], segments["heldout"] = _split_off(segments[full], moved)
            break
    for split in SPLITS:
        np.save(folder / f"{split}_starts.npy", np.cumsum(lengths[split]) - lengths[split])
    return segments


def _split_off(segments: list[Segment], count: int) -> tuple[list[Segment], list[Segment]]:
    """(segments without their last `count` tokens, which are of the last one; these)."""
    *before, last = segments
    border = last.stop - count
    head = msgspec.structs.replace(last, stop=border)
    kept = [*before, head] if border > last.start else before
    return kept, [msgspec.structs.replace(last, start=border)]


def _digest(folder: Path, split: Split, segments: list[Segment], dtype: str) -> str:
    """SHA-256 of starts, tokens and loss of a split, however it is divided into shards."""
    tokens, loss = _open_segments(folder, segments, dtype)
    digest = hashlib.sha256(np.asarray(TokenFile(folder / f"{split}_starts.npy", "run again")).tobytes())
    for ids in (tokens, loss) if loss is not None else (tokens,):
        for start in range(0, len(ids), CHUNK):
            digest.update(ids.read(start, min(start + CHUNK, len(ids))).tobytes())
    return digest.hexdigest()
