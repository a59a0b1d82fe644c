"""Checks that all configurations share."""

import math
import numbers
import re
from typing import Literal, get_args, get_origin, get_type_hints

from tsp_jax.errors import ConfigError, removal

LARGEST = 2**31 - 1
"""the largest integer accepted: indices have 32 bits"""
FLOAT32 = (2.0**-126, 2.0**128)
"""(smallest normal float32, a bound above every finite float32). Programs flush smaller values than the first to 0."""
_TYPES = {bool: bool, int: numbers.Integral, float: numbers.Real, str: str}
MOST_BYTES = 5 * 10**15
"""more than any target holds: the largest, 16,384 MI355X, has 4.7e15 bytes of memory"""


def check(owner: str, config: object, positive: str = "", not_negative: str = "") -> None:
    """Raises ConfigError if a Literal field has an unknown value, or a number is infinite, NaN or out of bounds.

    The command line checks Literal types already; this also covers configurations written in Python.
    """
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if type(None) in get_args(hint):
            if value is None:
                continue
            hint = get_args(hint)[0]
        if line := removal(f"{owner}{name}={value}"):
            raise ConfigError(line)
        if get_origin(hint) is Literal and value not in get_args(hint):
            raise ConfigError(f"{owner}{name}={value} is unknown; use one of {', '.join(get_args(hint))}")
        if hint in _TYPES and not isinstance(value, _TYPES[hint]):
            raise ConfigError(f"{owner}{name}={value!r:.80} is a {type(value).__name__}; use a {hint.__name__}")
        if isinstance(value, float) and not abs(value) < FLOAT32[1]:
            raise ConfigError(f"{owner}{name}={value} is not finite{' in float32' * math.isfinite(value)}; use 1.0")
        if isinstance(value, int) and value > LARGEST:
            raise ConfigError(f"{owner}{name}={value} is too large; use {LARGEST} at most")
    for name in positive.split():
        value = getattr(config, name)
        if value is not None and not value >= FLOAT32[0]:
            use = 1 if isinstance(value, int) else 1.0
            raise ConfigError(f"{owner}{name}={value} must be positive{' in float32' * (value > 0)}; use {use}")
    for name in not_negative.split():
        value = getattr(config, name)
        if value is not None and value < 0:
            raise ConfigError(f"{owner}{name}={value} must not be negative; use 0")


def check_bytes(what: str, nbytes: int, owner: str, config: object, fields: str) -> None:
    """Raises ConfigError if no target has `nbytes` of memory.

    `fields`: the fields that set this size. The error names the largest of them.
    """
    if nbytes > MOST_BYTES:
        name = max(fields.split(), key=lambda name: getattr(config, name))
        too_many = f"{what} of {nbytes:.2e} bytes, more than any target holds"
        raise ConfigError(f"{owner}{name}={getattr(config, name)} makes {too_many}; use a smaller {owner}{name}")


def check_local(name: str, path: str) -> None:
    """Raises ConfigError if a path is a URL, such as gs://bucket/run, which Python's own functions do not open."""
    scheme, separator, rest = path.partition("://")
    if separator and re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", scheme):
        local = f"/{rest.lstrip('/')}" if scheme == "file" else f"a folder where {scheme}:// is mounted"
        raise ConfigError(f"{name}={path} is not on a file system; use {local}")
