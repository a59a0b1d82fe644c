"""What all commands share: finding a configuration, parsing flags, and printing an error as one line (exit code 2)."""

import contextlib
import dataclasses
import importlib.util
import io
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_type_hints

import jax
import tyro

from tsp_jax.config import Config
from tsp_jax.errors import REFUSED, ConfigError, RunStopped, printable, removal
from tsp_jax.hardware.devices import MOST_CPU_DEVICES
from tsp_jax.hardware.virtual_devices import use_cpu_devices
from tsp_jax.tools.model_folder import folder_config, is_model
from tsp_jax.tools.streams import guarded_streams
from tsp_jax.training.distributed import join_cluster
from tsp_jax.training.optimizer import Optimizer, check_unused_flags
from tsp_jax.training.saved_run import is_run, read_run

T = TypeVar("T")
_PACKAGE = Path(__file__).resolve().parents[1]
CONFIGS = next(filter(Path.is_dir, [_PACKAGE / "configs", _PACKAGE.parent / "configs"]), _PACKAGE.parent / "configs")
"""folder of configurations: inside an installed package, beside the package in a clone"""
TEXT_ENDINGS = (".hlo", ".txt", ".hlo.gz", ".txt.gz")
"""ends of the names of files that hold the text of a compiled program"""
_HINTS = get_type_hints(Config)
_OWNERS = {_HINTS[name].__name__: name for name in _HINTS if dataclasses.is_dataclass(_HINTS[name])}
"""name of a class that is a part of Config, such as StreamConfig -> the field that holds it, such as stream"""


def main(
    command: Callable[[str, Any, Optimizer], Any],
    options: Callable[[Config], Any] = lambda config: config,
    *,
    about: str,
    text_command: tuple[Callable[[str, Any], Any], Any] | None = None,
    needs_output: bool = True,
) -> None:
    """Parses the command line ``CONFIG [--flag value ...]``, runs ``command(name, options, optimizer)`` and exits.

    Args:
      command: the command's body; an int that it returns is the exit code.
      options: function from the configuration to the dataclass whose fields are the flags.
      about: one sentence for ``--help``.
      text_command: (body, default options) of what runs instead if the first argument is a .hlo or .txt file, or
        one of these with .gz.
      needs_output: if True, the command ends when standard output cannot be written; if False, it goes on without it.
    """
    arguments = sys.argv[1:]
    with errors_in_a_line(needs_output):
        if text_command and arguments and arguments[0].endswith(TEXT_ENDINGS):
            sys.exit(text_command[0](*first_argument(text_command[1], about=about)))
        name, parsed, optimizer = parse(arguments, options, about=about)
        if isinstance(parsed, Config):
            use_devices(parsed.cpu_devices)
            join_cluster(parsed.cluster)
        code = command(name, parsed, optimizer)
        sys.exit(code if isinstance(code, int) else 0)


@contextlib.contextmanager
def errors_in_a_line(needs_output: bool = True) -> Iterator[None]:
    """Context manager: prints a ConfigError or RunStopped as one line and ends the process with the error's exit code.

    `needs_output` is as in `main`.
    """
    with guarded_streams(needs_output):
        try:
            _check_process()
            try:
                yield
            finally:
                sys.stdout.flush()
        except ConfigError as error:
            print(f"error: {printable(str(error))}", file=sys.stderr)
            sys.exit(REFUSED)
        except RunStopped as stop:
            print(f"stopped: {printable(str(stop))}", file=sys.stderr)
            leave(stop.code)
        except Exception:
            if jax.distributed.is_initialized():  # others wait for this process, and its shutdown would wait for them
                traceback.print_exc()
                leave(1, together=False)
            raise


def _check_process() -> None:
    """Raises ConfigError if an argument is not UTF-8, or the clock shows a time that checkpoints cannot hold."""
    if (now := time.time()) < 0:
        raise ConfigError(f"the clock says {time.strftime('%Y-%m-%d', time.gmtime(now))}, before 1970; set it")
    for argument in sys.argv[1:]:
        try:
            argument.encode()
        except UnicodeEncodeError:  # JAX's and Hugging Face's libraries take paths and texts that are UTF-8
            raise ConfigError(f"argument {argument!r:.200} is not UTF-8; use UTF-8, and LC_ALL=C.UTF-8") from None


def leave(code: int, together: bool = True) -> NoReturn:
    """Ends this process at once, even if its threads hang. `together`: all processes end, so none waits for another."""
    if together and jax.distributed.is_initialized():
        with contextlib.suppress(RuntimeError):
            jax.distributed.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def program() -> str:
    """The command as it was typed: tsp-train, or python scripts/train.py."""
    return f"python {sys.argv[0]}" if sys.argv[0].endswith(".py") else Path(sys.argv[0]).stem


def first_argument(default: T, what: str = "file", *, about: str) -> tuple[str, T]:
    """Parses ``ARGUMENT [--flag value ...]``; see `first_arguments`."""
    (argument,), options = first_arguments(default, (what,), about=about)
    return argument, options


def first_arguments(default: T, names: Sequence[str], *, about: str) -> tuple[Sequence[str], T]:
    """Parses ``ARGUMENT ... [--flag value ...]``: returns the arguments, and `default` with the flags applied.

    `default` is a dataclass; `names` are the names of the arguments, for help and errors; `about` is one sentence for
    ``--help``.
    """
    arguments, usage, count = sys.argv[1:], " ".join(name.upper() for name in names), len(names)
    if arguments and arguments[0] in ("-h", "--help"):
        parse_flags(default, [usage, "--help"], about)
    first = arguments[:count]
    if len(first) < count or any(argument.startswith("-") for argument in first):
        come = "comes" if count == 1 else "come"
        raise ConfigError(f"a {' and a '.join(names)} {come} first; use {program()} {usage} [--flag value ...]")
    return first, parse_flags(default, [" ".join(first), *arguments[count:]], about)


def parse(
    arguments: Sequence[str], options: Callable[[Config], Any] = lambda config: config, *, about: str = ""
) -> tuple[str, Any, Optimizer]:
    """Parses ``CONFIG [--flag value ...]``; `options` and `about` are those of `main`.

    Returns:
      (name of the configuration, options with the flags applied, the file's own optimizer or None).
    """
    if not arguments or arguments[0].startswith("-"):
        if arguments and arguments[0] in ("-h", "--help"):
            print(f"usage: {program()} CONFIG [--flag value ...]\n\n{about}\n")
            print(f"CONFIG is {_known()}. {program()} CONFIG --help lists the flags.")
            sys.exit(0)
        raise ConfigError(f"a configuration comes first; use {_known()}")
    config, optimizer = load_config_file(arguments[0])
    parsed = parse_flags(options(config), arguments, about)
    check_unused_flags(optimizer, config.optimizer, getattr(parsed, "config", parsed).optimizer)
    path = Path(arguments[0])
    return path.stem if path.suffix == ".py" else path.resolve().name, parsed, optimizer


def _known() -> str:
    names = ", ".join(sorted(path.stem for path in CONFIGS.glob("*.py")))
    return f"one of {names}, the path of a .py file, or a Hugging Face folder"


def load_config(name: str) -> Config:
    """Loads a configuration as `load_config_file` does; returns only its `config`."""
    return load_config_file(name)[0]


def load_config_file(name: str) -> tuple[Config, Optimizer]:
    """Loads a configuration; returns its `config` and `optimizer`, which is None if it defines none.

    Args:
      name: a name in `CONFIGS`, the path of a .py file, a Hugging Face folder (`folder_config`), or the working
        directory of a run, whose configuration is taken up again.

    Raises:
      ConfigError: the configuration does not exist, defines no `config`, or sets a field that does not exist.
    """
    if is_run(name):
        return dataclasses.replace(read_run(name), plan=""), None  # it has what its plan chose
    if is_model(name):
        return folder_config(name), None
    path = Path(name) if name.endswith(".py") else CONFIGS / f"{name}.py"
    if not path.is_file():
        raise ConfigError(f"configuration {name} is unknown; use {_known()}")
    spec = importlib.util.spec_from_file_location(f"tsp_jax_config_{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except TypeError as error:
        if line := _unknown_field(str(error)):
            raise ConfigError(f"configuration {name}: {line}") from None
        raise
    config = getattr(module, "config", None)
    if not isinstance(config, Config):
        raise ConfigError(f"configuration {name} defines no `config`; use config = tsp_jax.config.Config(...)")
    return config, getattr(module, "optimizer", None)


def _unknown_field(error: str) -> str | None:
    """One line for an error about a field that a configuration sets but that does not exist; None for other errors."""
    found = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", error)
    if not found or found[1] not in {"Config", *_OWNERS}:
        return None
    field = f"{_OWNERS[found[1]]}.{found[2]}" if found[1] in _OWNERS else found[2]
    return removal(field) or f"{field} is not a field of {found[1]}; leave it out"


def parse_flags(default: T, arguments: Sequence[str], about: str = "") -> T:
    """Returns `default`, a dataclass, with the flags in ``arguments[1:]`` applied; every field is a flag."""
    prog, flags = f"{program()} {arguments[0]}", arguments[1:]
    if "--help" in flags or "-h" in flags:
        return tyro.cli(type(default), default=default, args=["--help"], prog=prog, description=about or None)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            return tyro.cli(type(default), default=default, args=list(flags), prog=prog)
    except SystemExit:
        raise ConfigError(_removed_flag(flags) or _one_line(printed.getvalue())) from None


def _removed_flag(flags: Sequence[str]) -> str | None:
    """One line about the first flag that was removed, or whose value was removed; None if there is none."""
    for flag, following in zip(flags, [*flags[1:], ""], strict=True):
        name, equals, value = flag.partition("=")
        field = name.removeprefix("--").removeprefix("config.").replace("-", "_").replace(".no_", ".")
        if line := removal(field, flag=True) or removal(f"{field}={value if equals else following}", flag=True):
            return line
    return None


def _one_line(box: str) -> str:
    """The text of the parser's framed error message in one line, without its frame, headings and hints."""
    words = " ".join(re.sub(r"[\u2500-\u257f]|-{5,}", " ", box).split())
    words = re.split(r"Argument helptext|For full helptext", words)[0]
    headings = r"^(Value error|Invalid choice|Parsing error|Missing argument|Unrecognized options(?= Unrecognized)) "
    return re.sub(headings + r"|Error parsing \w+: ", "", words).strip()


def use_devices(cpu_devices: int) -> None:
    """Sets up `cpu_devices` virtual CPU devices, unless it is 0. Call it before anything uses a device."""
    if cpu_devices > MOST_CPU_DEVICES:
        raise ConfigError(f"cpu_devices={cpu_devices} is too large; use {MOST_CPU_DEVICES} at most")
    if cpu_devices:
        use_cpu_devices(cpu_devices)
