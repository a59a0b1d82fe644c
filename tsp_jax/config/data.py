"""Training text and its order."""

import dataclasses
from typing import Literal

from tsp_jax.config.checks import check, check_local

Order = Literal["zigzag", "contiguous"]
TokenOrder = Literal["any", "contiguous", "zigzag"]
InvalidText = Literal["refuse", "replace"]
ChatLoss = Literal["assistant", "all"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Training text and its order."""

    files: str = ""
    """glob of .jsonl, .parquet, .arrow and .feather files, whose rows are documents, of .npy files of token ids, or of
    text files; text and .jsonl also as .gz and .zst; empty: the Python standard library's sources"""
    tokenizer: str = ""
    """folder with a tokenizer.json, or bytes: a token is a byte of UTF-8; empty: the folder init_from"""
    text_field: str = ""
    """field of rows that holds a text or chat messages; empty: text or messages, whichever there is"""
    loss: ChatLoss = "assistant"
    """tokens of chat messages that the loss counts: those of the assistant's turns, or all"""
    invalid_utf8: InvalidText = "refuse"
    """what is done with text that is not UTF-8: refuse it, or replace each wrong part by U+FFFD"""
    cache_dir: str = ""
    """folder of tokenized text; empty: $XDG_CACHE_HOME/tsp_jax or ~/.cache/tsp_jax"""
    order: Order = "zigzag"
    """how the tokens of a sequence are ordered over ranks: contiguous, or zigzag, which balances causal attention"""
    prefetch: int = 2
    """number of batches that the host prepares ahead"""

    def __post_init__(self):
        check("data.", self, positive="prefetch")
        for name in ("files", "tokenizer", "cache_dir"):
            check_local(f"data.{name}", getattr(self, name))
