"""Training text and its order."""

import dataclasses
import re
from typing import Literal

from tsp_jax.config.checks import check, check_local
from tsp_jax.config.mixture import parse_mixture
from tsp_jax.errors import ConfigError

Order = Literal["zigzag", "contiguous"]
TokenOrder = Literal["any", "contiguous", "zigzag"]
InvalidText = Literal["refuse", "replace"]
ChatLoss = Literal["assistant", "all"]
PackingName = Literal["windows", "best-fit"]
LongDocuments = Literal["split", "drop"]


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
    mixture: str = ""
    """several sources instead of `files`, each a name, a glob and a weight, such as
    wiki=corpus/wiki/*.txt:3,code=corpus/**/*.py:1: three of four sequences are of wiki"""
    packing: PackingName = "windows"
    """how documents fill sequences. windows: the documents of a source, concatenated, are cut into sequences. best-fit:
    a sequence holds whole documents, each in the sequence that it fills best, and its tail is padding"""
    long_documents: LongDocuments = "split"
    """what packing=best-fit does with documents longer than a sequence: split them, or drop them"""
    eval: str = ""
    """further held-out sets, each a name and a glob of files, such as books=books/*.txt,code=src/**/*.py; all of their
    documents are held out"""

    def __post_init__(self):
        check("data.", self, positive="prefetch")
        for name in ("files", "tokenizer", "cache_dir"):
            check_local(f"data.{name}", getattr(self, name))
        if self.mixture and self.files:
            raise ConfigError(f"data.files={self.files!r:.200} stands beside data.mixture; use one of them")
        if self.long_documents == "drop" and self.packing == "windows":
            raise ConfigError("data.long_documents=drop needs whole documents; use data.packing=best-fit")
        self.sources()
        self.held_out_sets()

    def sources(self) -> tuple[tuple[str, int, "DataConfig"], ...]:
        """The sources of a mixture: (name, weight, configuration of its files alone). Without one: ("", 1, self)."""
        if not self.mixture:
            return (("", 1, self),)
        return tuple(
            (part.name, part.weight, dataclasses.replace(self, files=part.files, mixture="", eval=""))
            for part in parse_mixture(self.mixture)
        )

    def held_out_sets(self) -> tuple[tuple[str, "DataConfig"], ...]:
        """The sets of `eval`: (name, configuration of its files alone).

        Raises:
          ConfigError: a set has no name or no files, or two have one name.
        """
        sets: dict[str, DataConfig] = {}
        for entry in self.eval.split(",") if self.eval else ():
            name, _, files = (part.strip() for part in entry.partition("="))
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,79}", name) or not files:
                raise ConfigError(f"data.eval={entry!r:.200} is no NAME=FILES; use data.eval=books=books/*.txt")
            if name in sets:
                raise ConfigError(f"data.eval names two sets {name}; use a name for each")
            check_local(f"data.eval: {name}", files)
            sets[name] = dataclasses.replace(self, files=files, mixture="", eval="")
        return tuple(sets.items())
