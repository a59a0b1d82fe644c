"""A configuration as Python source, as in `configs/`, and as flags of a command."""

import dataclasses
import shlex
from typing import Any

from tsp_jax.config import Config


def config_source(config: Config, about: str) -> str:
    """The text of a configuration file: `about` as its docstring, and every field that is not at its default."""
    names = ", ".join(sorted(_classes(config)))
    return f'"""{about}"""\n\nfrom tsp_jax.config import {names}\n\nconfig = {_source(config, "")}\n'


def config_flags(config: Config, base: Config) -> str:
    """The flags that make `config` of `base`, quoted for a shell."""
    return " ".join(_flags(config, base, ""))


def _changed(config: Any) -> dict[str, Any]:
    """Field -> value where it is not the default."""
    fields = ((field, getattr(config, field.name)) for field in dataclasses.fields(config))
    return {field.name: value for field, value in fields if value != field.default}


def _classes(config: Any) -> set[str]:
    inner = (value for value in _changed(config).values() if dataclasses.is_dataclass(value))
    return {type(config).__name__}.union(*map(_classes, inner))


def _source(value: Any, indent: str) -> str:
    if not dataclasses.is_dataclass(value):
        return repr(value)
    inner = indent + "    "
    lines = [f"{inner}{name}={_source(each, inner)},\n" for name, each in _changed(value).items()]
    return f"{type(value).__name__}(\n{''.join(lines)}{indent})" if lines else f"{type(value).__name__}()"


def _flags(config: Any, base: Any, owner: str) -> list[str]:
    found = []
    for field in dataclasses.fields(config):
        value, before = getattr(config, field.name), getattr(base, field.name)
        if value == before:
            continue
        name = field.name.replace("_", "-")
        if dataclasses.is_dataclass(value):
            found += _flags(value, before, f"{owner}{name}.")
        elif isinstance(value, bool):
            found.append(f"--{owner}{name}" if value else f"--{owner}no-{name}")
        elif isinstance(value, tuple):
            found.append(" ".join([f"--{owner}{name}", *map(shlex.quote, map(str, value))]))
        else:
            found.append(f"--{owner}{name} {shlex.quote(str(value))}")
    return found
