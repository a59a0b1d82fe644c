"""What every script shares: find a configuration, parse flags, say what is wrong in one line and exit with 2."""

import contextlib
import importlib.util
import io
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import jax
import optax
import tyro

from tsp_jax.config import Config
from tsp_jax.errors import REFUSED, ConfigError, RunStopped
from tsp_jax.hardware.private_jax import hush_absent_plugins
from tsp_jax.training.distributed import join_cluster
from tsp_jax.training.optimizer import check_unused_flags

T = TypeVar("T")
Optimizer = optax.GradientTransformation | None
"""of the user's own, from a configuration file"""
_FOLDERS = [
    parent / "configs" for parent in (Path(__file__).resolve().parents[2], Path(sys.argv[0]).resolve().parents[1])
]
CONFIGS = next(filter(Path.is_dir, _FOLDERS), _FOLDERS[0])
"""beside the package, or, where that is installed elsewhere, beside the scripts"""


def main(
    script: Callable[[str, Any, Optimizer], Any],
    options: Callable[[Config], Any] = lambda config: config,
    text: tuple[Callable[[str, Any], Any], Any] | None = None,
) -> None:
    """Runs ``script(name, options, optimizer)`` on the command line ``CONFIG [--flag value ...]``.

    Args:
      script: what to run; an int that it returns is the exit code.
      options: makes the dataclass whose fields are the flags from the configuration; by default the configuration.
      text: (script, its default options) for where the first argument is no configuration but a .hlo or .txt file.
    """
    arguments = sys.argv[1:]
    hush_absent_plugins()
    with errors_in_a_line():
        if text and arguments and arguments[0].endswith((".hlo", ".txt")):
            sys.exit(text[0](*first_argument(text[1])))
        name, parsed, optimizer = parse(arguments, options)
        if isinstance(parsed, Config):
            use_devices(parsed.cpu_devices)
            join_cluster(parsed.cluster)
        code = script(name, parsed, optimizer)
        sys.exit(code if isinstance(code, int) else 0)


@contextlib.contextmanager
def errors_in_a_line() -> Iterator[None]:
    """Ends the process with the code that belongs to an error: a ConfigError, printed as one line, with 2."""
    try:
        yield
    except ConfigError as error:
        print(f"error: {_printable(str(error))}", file=sys.stderr)
        sys.exit(REFUSED)
    except RunStopped as stop:
        print(f"stopped: {stop}", file=sys.stderr)
        leave(stop.code)
    except Exception:
        if jax.distributed.is_initialized():  # others wait for this process, and its own shutdown would wait for them
            traceback.print_exc()
            leave(1, together=False)
        raise


def leave(code: int, together: bool = True) -> NoReturn:
    """Ends the process now, whatever its other threads hang in.

    Args:
      code: its exit code.
      together: every process leaves now; none will miss this one.
    """
    if together and jax.distributed.is_initialized():
        with contextlib.suppress(RuntimeError):
            jax.distributed.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def first_argument(default: T, what: str = "file") -> tuple[str, T]:
    """(argument, options) from ``ARGUMENT [--flag value ...]``; every field of `default`, a dataclass, is a flag."""
    arguments = sys.argv[1:]
    if arguments and arguments[0] in ("-h", "--help"):
        arguments = [what.upper(), "--help"]
    if not arguments or arguments[0].startswith("-"):
        raise ConfigError(f"a {what} comes first; use {Path(sys.argv[0]).name} {what.upper()} [--flag value ...]")
    return arguments[0], parse_flags(default, arguments[1:], prog=f"{sys.argv[0]} {arguments[0]}")


def parse(
    arguments: Sequence[str], options: Callable[[Config], Any] = lambda config: config
) -> tuple[str, Any, Optimizer]:
    """(name, options, optimizer of the file) from ``CONFIG [--flag value ...]``."""
    known = ", ".join(sorted(path.stem for path in CONFIGS.glob("*.py")))
    if not arguments or arguments[0].startswith("-"):
        if arguments and arguments[0] in ("-h", "--help"):
            print(
                f"usage: {sys.argv[0]} CONFIG [--flag value ...]\nCONFIG: {known}, or a path; CONFIG --help: its flags"
            )
            sys.exit(0)
        raise ConfigError(f"a configuration comes first; use one of {known}, or the path of a .py file")
    config, optimizer = load_config_file(arguments[0])
    parsed = parse_flags(options(config), arguments[1:], prog=f"{sys.argv[0]} {arguments[0]}")
    check_unused_flags(optimizer, config.optimizer, getattr(parsed, "config", parsed).optimizer)
    return Path(arguments[0]).stem, parsed, optimizer


def load_config(name: str) -> Config:
    """`config` of ``configs/NAME.py``, or of a path that ends in .py."""
    return load_config_file(name)[0]


def load_config_file(name: str) -> tuple[Config, Optimizer]:
    """(`config`, `optimizer` or None) of ``configs/NAME.py``, or of a path that ends in .py."""
    path = Path(name) if name.endswith(".py") else CONFIGS / f"{name}.py"
    if not path.is_file():
        known = ", ".join(sorted(path.stem for path in CONFIGS.glob("*.py")))
        raise ConfigError(f"configuration {name} is unknown; use one of {known}, or the path of a .py file")
    spec = importlib.util.spec_from_file_location(f"tsp_jax_config_{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = getattr(module, "config", None)
    if not isinstance(config, Config):
        raise ConfigError(f"configuration {name} defines no `config`; use config = tsp_jax.config.Config(...)")
    return config, getattr(module, "optimizer", None)


def parse_flags(default: T, flags: Sequence[str], prog: str) -> T:
    """`default`, a dataclass, with flags applied; every field is a flag."""
    if "--help" in flags or "-h" in flags:
        return tyro.cli(type(default), default=default, args=["--help"], prog=prog)
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            return tyro.cli(type(default), default=default, args=list(flags), prog=prog)
    except SystemExit:
        raise ConfigError(_one_line(said.getvalue())) from None


def _one_line(box: str) -> str:
    """What a framed message says, without its frame, headings and hints."""
    words = " ".join(re.sub(r"[\u2500-\u257f]|-{5,}", " ", box).split())
    words = re.split(r"Argument helptext|For full helptext", words)[0]
    headings = r"^(Value error|Invalid choice|Parsing error|Missing argument|Unrecognized options(?= Unrecognized)) "
    return re.sub(headings + r"|Error parsing \w+: ", "", words).strip()


def _printable(text: str) -> str:
    """Text with what would break a line, or cannot be printed, escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def use_devices(cpu_devices: int) -> None:
    """Makes so many virtual CPU devices, if any; must come before anything touches a device."""
    if cpu_devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", cpu_devices)
        # On jax 0.12 a CPU program read back from the persistent cache no longer orders its collectives: seen to hang,
        # and to give other numbers.
        jax.config.update("jax_enable_compilation_cache", False)
