"""Small tokenizers, as folders of a tokenizer.json hold them."""

import json
import string
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

SPECIAL = ["<unk>", "<s>", "</s>"]
LETTERS = [*string.ascii_letters, *string.digits, *" .,?!\n\u00e9"]


def characters() -> Tokenizer:
    """One token for each character."""
    vocab = {token: number for number, token in enumerate([*SPECIAL, *LETTERS])}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    made.decoder = decoders.Fuse()
    made.add_special_tokens(SPECIAL)
    return made


def byte_level() -> Tokenizer:
    """One token for each byte, as in GPT-2."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made


def byte_fallback() -> Tokenizer:
    """Letters, and bytes for every other character, as in Llama 2."""
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "\u2581Hello", *string.ascii_letters]
    vocab = {token: number for number, token in enumerate(tokens)}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    made.add_special_tokens(SPECIAL)
    return made


def metaspace() -> Tokenizer:
    """Unigram pieces with a mark in place of a space, as in T5."""
    pieces = [*SPECIAL, "\u2581", "\u2581Hello", *string.ascii_letters]
    made = Tokenizer(models.Unigram([(piece, -float(number)) for number, piece in enumerate(pieces)], unk_id=0))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    made.add_special_tokens(SPECIAL)
    return made


def word_piece() -> Tokenizer:
    """Words and their continuations, as in BERT."""
    words = [*SPECIAL, "hello", "do", "##ing", ".", "n't", *string.ascii_lowercase]
    made = Tokenizer(models.WordPiece({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece(cleanup=False)
    made.add_special_tokens(SPECIAL)
    return made


KINDS = {made.__name__: made for made in (characters, byte_level, byte_fallback, metaspace, word_piece)}


def save_tokenizer(folder: Path, made: Tokenizer, files: dict[str, Any] | None = None, **changes: Any) -> Path:
    """Writes tokenizer.json, with some of its entries changed, and other JSON files by name; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(json.loads(made.to_str()) | changes))
    for name, content in (files or {}).items():
        (folder / name).write_text(json.dumps(content))
    return folder
