"""Training text and its order."""

import dataclasses
from typing import Literal

from tsp_jax.config.checks import check, check_local

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

    def __post_init__(self):
        check("data.", self, positive="prefetch")
        for name in ("files", "cache_dir"):
            check_local(f"data.{name}", getattr(self, name))
