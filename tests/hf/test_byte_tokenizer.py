"""Bytes as tokens: text and back, whole and one token at a time."""

import pytest

from tsp_jax.errors import ConfigError
from tsp_jax.hf.byte_tokenizer import ByteTokenizer


def test_bytes_round_trip():
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode("naïve → 文")
    assert ids == list("naïve → 文".encode())
    assert tokenizer.decode(ids) == "naïve → 文"


def test_decode_leaves_out_what_is_no_byte():
    assert ByteTokenizer().decode([104, 256, 105, -1, 70_000, 33]) == "hi!"
    assert ByteTokenizer().decode([104, 0xFF]) == "h\N{REPLACEMENT CHARACTER}"


def test_a_character_is_shown_when_its_last_byte_arrives():
    decoder = ByteTokenizer().decoder()
    shown = [decoder.step(token) for token in [*"a文".encode(), 300, 0xE6]]
    assert shown == ["a", "", "", "文", "", ""]
    assert decoder.finish() == "\N{REPLACEMENT CHARACTER}"


def test_bytes_have_no_chat_template():
    with pytest.raises(ConfigError, match="use the prompt alone"):
        ByteTokenizer().chat("hello")
