"""Why a function cannot be compiled, in one line: the cause, the line of the user's file, and what would help."""

import contextlib
import dataclasses
import inspect
import re
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from tsp_jax.errors import ConfigError

_PACKAGE = str(Path(__file__).resolve().parents[1])
_LIBRARIES = (*{sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")}, "site-packages", _PACKAGE)
_JAX = re.compile(r"[/\\]jax(lib)?[/\\]")
_LONGEST = 400
_CALLBACKS = ("debug_print", "debug_callback", "io_callback", "pure_callback")
_HINTS = (
    (
        r"Unknown backend: '?gpu",
        "it calls Python (jax.debug.print, pure_callback, io_callback), which cannot be lowered for an absent GPU; "
        "leave these calls out",
    ),
    (
        r"incompatible devices|should match the mesh passed|mesh.* should match",
        "it holds a mesh of other devices; make it with inspect.target_mesh, and pass it as mesh too",
    ),
    (r"requires a non-empty mesh", "a jit inside it names PartitionSpecs; jit the function itself too"),
    (
        r"no attribute 'local_devices'",
        "it computes an array while it is traced (jax.ensure_compile_time_eval), and the target cannot run; "
        "compute it outside",
    ),
    (r"^(Tracer|Concretization)", "pass the value as a Python number, or mark it static in the function's own jit"),
    (
        r"Couldn't find output tile sizes",
        "the compiler found no tiles for a Triton product; use compiler_options={'xla_gpu_enable_triton_gemm': False}",
    ),
    (r"No FFI handler registered", "the target's compiler here lacks this operation; compute it another way"),
)
"""pattern in the error -> what it means, and what helps"""
_ABORTS = {"rocm": ("stablehlo.convolution", (0, 12), "convolutions")}
"""platform -> (an operation, the first jax whose compiler ends the process at it, its name): XLA for ROCm casts a call
of MIOpen to a fusion (a failed check in hlo_casting_utils.h), which no exception tells"""


@dataclasses.dataclass
class Stage:
    """How far compilation has come."""

    verb: str = "traced"
    traced: Any = None
    """jax.stages.Traced, once there is one"""


@contextlib.contextmanager
def one_line(name: str, f: Any, target: Any) -> Iterator[Stage]:
    """Context manager: raises what goes wrong while `f` is compiled for a target as a ConfigError of one line."""
    stage = Stage()
    try:
        yield stage
    except ConfigError:
        raise
    except Exception as error:
        cause = _cause(error)
        hint = next((f"; {hint}" for pattern, hint in _HINTS if re.search(pattern, cause)), "")
        where = _where(error, stage.traced, cause) or _definition(f)
        at = f" (at {where})" if where else ""
        raise ConfigError(f"{name} cannot be {stage.verb} for {target}: {cause}{at}{hint}") from error


def check_aborts(lowered: Any, platform: str) -> None:
    """Raises ConfigError if the compiler of a platform is known to end the process at a lowered program."""
    operation, first, name = _ABORTS.get(platform, ("", (), ""))
    if operation and jax.__version_info__ >= first and operation in lowered.as_text():
        raise ConfigError(
            f"the program has {name}, at which jax {jax.__version__}'s compiler for {platform} ends the process; "
            "use jax 0.10, or another target"
        )


def _cause(error: Exception) -> str:
    """The first line of an error."""
    text = next(iter(str(error).strip().splitlines()), "").strip()
    return f"{type(error).__name__}: {text if len(text) <= _LONGEST else text[:_LONGEST] + ' ...'}"


def _where(error: Exception, traced: Any, cause: str) -> str:
    """File and line to blame: of the traceback, else of the operation that the error names."""
    frames = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    if found := _blamed(frames):
        return found
    names = _CALLBACKS if "Unknown backend" in cause else re.findall(r"primitive '?(\w+)", cause)
    equation = _equation(getattr(getattr(traced, "traced", traced), "jaxpr", None), names)
    source = getattr(getattr(equation, "source_info", None), "traceback", None)
    return _blamed([(frame.file_name, frame.line_num) for frame in reversed(source.frames)]) if source else ""


def _blamed(frames: list[tuple[str, int | None]]) -> str:
    """The innermost frame of the user, else of a library other than JAX; `frames` are outermost first."""
    foreign = [(file, line) for file, line in frames if not _JAX.search(file) and not file.startswith(("<", _PACKAGE))]
    own = [(file, line) for file, line in foreign if not any(library in file for library in _LIBRARIES)]
    standard = sysconfig.get_path("stdlib")
    others = [(file, line) for file, line in foreign if "site-packages" in file or not file.startswith(standard)]
    file, line = next(iter([*own[::-1], *others[::-1]]), ("", 0))
    return f"{file}:{line}" if file else ""


def _definition(f: Any) -> str:
    code = getattr(inspect.unwrap(f) if callable(f) else f, "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code else ""


def _equation(jaxpr: Any, names: Any) -> Any:
    """The first equation of a jaxpr, or of one inside it, whose primitive has one of the names; None without."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    for equation in getattr(jaxpr, "eqns", ()):
        if equation.primitive.name in names:
            return equation
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                if (hasattr(inner, "eqns") or hasattr(inner, "jaxpr")) and (found := _equation(inner, names)):
                    return found
    return None
