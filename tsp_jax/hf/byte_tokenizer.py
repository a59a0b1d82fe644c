"""The tokenizer of models whose tokens are bytes, with the interface of `tsp_jax.hf.tokenizer.Tokenizer`."""

import codecs
from collections.abc import Sequence
from typing import Any, NoReturn

from tsp_jax.errors import ConfigError


class ByteTokenizer:
    """Encodes text as its UTF-8 bytes: a token id is a byte."""

    vocab_size = 256

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Returns the bytes of a text. A character that UTF-8 cannot encode (a lone surrogate) becomes ``?``."""
        return list(text.encode(errors="replace"))

    def decode(self, tokens: Sequence[int]) -> str:
        """Returns the text of bytes. Ids above 255, which a model with a larger vocabulary can sample, are left out."""
        return bytes(int(token) for token in tokens if 0 <= token < self.vocab_size).decode(errors="replace")

    def decoder(self) -> "ByteDecoder":
        """Returns a decoder that takes one token at a time."""
        return ByteDecoder()

    def chat(self, messages: Any, **arguments: Any) -> NoReturn:
        """Raises ConfigError: bytes have no chat template."""
        raise ConfigError("tokenizer=bytes has no chat template; use the prompt alone, without --chat")


class ByteDecoder:
    """Converts bytes to text, one at a time; bytes are held back until they form a character."""

    def __init__(self):
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def step(self, token: int) -> str:
        """Returns the text that a token completes, which may be empty."""
        return self._decoder.decode(bytes([token])) if 0 <= token < ByteTokenizer.vocab_size else ""

    def finish(self) -> str:
        """Returns the text held back after the last token."""
        return self._decoder.decode(b"", final=True)
