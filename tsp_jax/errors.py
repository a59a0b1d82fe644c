"""Errors that end a command in one line, exit codes (docs/reliability.md), and what replaces removed settings."""

REFUSED = 2
"""wrong input"""
PREEMPTED = 75
"""stopped by SIGTERM or SIGINT with nothing lost: start it again (EX_TEMPFAIL of sysexits.h)"""
HUNG = 76
"""no step ended within its deadline"""
BAD_NUMBERS = 77
"""too many steps with a loss or gradient that is not finite"""
NOT_SAVED = 78
"""a checkpoint could not be saved"""

_BUCKET = ("stream.bucket_mib", "the size of a bucket in MiB, from which counts follow")
REMOVED: dict[str, tuple[str, str]] = {
    "stream.unroll": ("", "loops are always scanned"),
    "stream.attention_buckets": _BUCKET,
    "stream.exchange_buckets": _BUCKET,
    "stream.mlp_buckets": _BUCKET,
    "stream.vocab_buckets": _BUCKET,
    "stream.token_buckets": _BUCKET,
    "stream.tokens": ("stream.chunk_tokens", ""),
    "stream.query_block": ("", "block sizes belong to the kernel"),
    "stream.key_block": ("", "block sizes belong to the kernel"),
    "stream.kernel=fused": ("triton", ""),
    "stream.attention_movement=broadcast": ("gather", ""),
    "stream.attention_movement=rings": ("gather", ""),
    "stream.mlp_movement=broadcast": ("gather", ""),
    "stream.mlp_movement=rings": ("gather", ""),
    "stream.vocab_movement=broadcast": ("gather", ""),
    "stream.vocab_movement=rings": ("gather", ""),
    "faults.spike": ("", "a loss spike is always reported"),
    "faults.spike_sigmas": ("", "a loss spike is always reported"),
    "faults.spike_window": ("", "a loss spike is always reported"),
}
"""field, or field=value, of earlier versions -> (what replaces it, or "" if nothing does; explanation)"""


class ConfigError(ValueError):
    """Wrong input: the field, its value, and a value that works, in one line."""


class RunStopped(Exception):
    """A training run that ends before its last step, or without its last checkpoint.

    Args:
      message: one line: the reason, and what to do.
      code: exit code of the command.
    """

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


def removal(setting: str, *, flag: bool = False) -> str | None:
    """A line about a setting that was removed: what replaces it, or why nothing does.

    Args:
      setting: field, or field=value.
      flag: write fields as flags (``--stream.bucket-mib``).

    Returns:
      The line, or None if the setting was not removed.
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


def install_hint(extra: str) -> str:
    """How to install an optional part of the package, which is on no index."""
    return f'use pip install ".[{extra}]" in a clone of tsp_jax'
