"""Training text and its order."""

import dataclasses
import re
from typing import Literal

from tsp_jax.config.checks import check, check_local
from tsp_jax.errors import ConfigError

Order = Literal["zigzag", "contiguous"]
TokenOrder = Literal["any", "contiguous", "zigzag"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Training text and its order."""

    files: str = ""
    """glob of text files, or of .npy files of token ids; empty: the Python standard library's sources"""
    cache_dir: str = ""
    """folder of tokenized text; empty: $XDG_CACHE_HOME/tsp_jax or ~/.cache/tsp_jax"""
    order: Order = "zigzag"
    """how the tokens of a sequence are ordered over ranks: contiguous, or zigzag, which balances causal attention"""
    prefetch: int = 2
    """number of batches that the host prepares ahead"""
    eval: str = ""
    """further held-out sets, each a name and a glob of files, such as books=books/*.txt,code=src/**/*.py; all of their
    documents are held out"""

    def __post_init__(self):
        check("data.", self, positive="prefetch")
        for name in ("files", "cache_dir"):
            check_local(f"data.{name}", getattr(self, name))
        self.held_out_sets()

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
            sets[name] = dataclasses.replace(self, files=files, eval="")
        return tuple(sets.items())
