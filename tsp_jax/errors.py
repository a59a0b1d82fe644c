"""Errors that end a command with a one-line message, exit codes (docs/reliability.md), and removed settings."""

import importlib
from typing import Any

REFUSED = 2
"""exit code: the input is wrong"""
PREEMPTED = 75
"""exit code: SIGTERM or SIGINT stopped the run, and nothing is lost: start it again (EX_TEMPFAIL of sysexits.h)"""
HUNG = 76
"""exit code: no step ended within its deadline"""
BAD_NUMBERS = 77
"""exit code: too many steps had a loss or gradient that is not finite"""
NOT_SAVED = 78
"""exit code: a checkpoint could not be saved"""

_BUCKETS = [f"stream.{name}_buckets" for name in ("attention", "exchange", "mlp", "vocab", "token")]
_MOVEMENTS = [f"stream.{op}_movement={gone}" for op in ("attention", "mlp", "vocab") for gone in ("broadcast", "rings")]
REMOVED: dict[str, tuple[str, str]] = {
    "stream.unroll": ("", "loops are always scanned"),
    **dict.fromkeys(_BUCKETS, ("stream.bucket_mib", "the size of a bucket in MiB, from which counts follow")),
    **dict.fromkeys(
        ("stream.tokens", "stream.chunk_tokens"),
        ("stream.bucket_mib", "the size of a bucket bounds chunks of tokens too"),
    ),
    **dict.fromkeys(("stream.query_block", "stream.key_block"), ("", "block sizes belong to the kernel")),
    "stream.kernel=fused": ("triton", ""),
    **dict.fromkeys(_MOVEMENTS, ("gather", "")),
    **dict.fromkeys([f"faults.spike{x}" for x in ("", "_sigmas", "_window")], ("", "a loss spike is always reported")),
}
"""removed field, or removed value as field=value -> (its replacement, or "" if it has none; explanation)"""


class ConfigError(ValueError):
    """Wrong input: the field, its value, and a value that works, in one line."""


class RunStopped(Exception):
    """A training run that ends before its last step, or without its last checkpoint; `code` is the exit code."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


def printable(text: str) -> str:
    """Returns the text, in which line breaks and other unprintable characters are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def removal(setting: str, *, flag: bool = False) -> str | None:
    """Returns a line of advice if a setting was removed, else None.

    `setting`: a field, or field=value; `flag`: name it as a command-line flag.
    """
    if setting not in REMOVED:
        return None
    replacement, explanation = REMOVED[setting]
    field, equals, value = setting.partition("=")
    if flag:
        field = f"--{field.replace('_', '-')}"
        replacement = f"--{replacement.replace('_', '-')}" if "." in replacement else replacement
    advice = f"use {replacement}" if replacement else "leave it out"
    return f"{field}{equals}{value} was removed; {advice}" + (f": {explanation}" if explanation else "")


def import_optional(module: str, extra: str) -> Any:
    """Imports a module of an optional dependency; raises ConfigError if it is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        raise ConfigError(f"{module.partition('.')[0]} is not installed; {install_hint(extra)}") from None


def install_hint(extra: str) -> str:
    """How to install an optional part of the package; the package is on no package index."""
    return f'use pip install ".[{extra}]" in a clone of tsp_jax'
