"""Compile a function of one's own for hardware that need not be present. Nothing runs."""

import contextlib
import dataclasses
import inspect
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

from tsp_jax.errors import ConfigError
from tsp_jax.hardware.targets import Target, parse_target
from tsp_jax.inspect.abstract import first_mesh, holds_nnx_objects, is_array, join, place_arguments, place_shapes, split
from tsp_jax.inspect.module import Trips
from tsp_jax.inspect.program_report import FullWeight, Report, report
from tsp_jax.inspect.refusals import check_aborts, one_line
from tsp_jax.mesh import format_sizes, parse_sizes

MeshLike = str | Mapping[str, int] | Mesh | AbstractMesh


@dataclasses.dataclass(frozen=True)
class CompiledFunction:
    """A function that was compiled for a target."""

    name: str
    target: Target
    mesh: Mesh | None
    """over the target's devices; None: one device"""
    compiled: jax.stages.Compiled
    compile_s: float
    """seconds of tracing, lowering and compiling"""

    def report(
        self, *, full_weights: Sequence[FullWeight] | None = None, unknown_trips: Trips = 1, record: bool = False
    ) -> Report:
        """Reports memory, communication and simulated time; the arguments are those of `report`."""
        return report(
            self.compiled, target=self.target, mesh_axes=dict(self.mesh.shape) if self.mesh else None,
            full_weights=full_weights, unknown_trips=unknown_trips, record=record,
        )  # fmt: skip

    def as_text(self) -> str:
        """The text of the compiled program."""
        return self.compiled.as_text() or ""


def target_mesh(target: str | Target, axes: str | Mapping[str, int]) -> Mesh:
    """A mesh of Auto axes over all devices of a target, for functions that hold one (in `shard_map`, `NamedSharding`).

    Args:
      target: such as h100:8.
      axes: sizes of the axes, outermost first, such as data=1,tsp=8, or a dict.

    Raises:
      ConfigError: the axes do not fit the target, or its compiler is not installed.
    """
    return _place(axes, _parsed(target))


def compile_for(
    f: Callable[..., Any], *args: Any, target: str | Target, mesh: MeshLike | None = None, in_shardings: Any = None,
    out_shardings: Any = None, donate_argnums: int | Sequence[int] = (),
    compiler_options: Mapping[str, Any] | None = None, **kwargs: Any,
) -> CompiledFunction:  # fmt: skip
    """Compiles ``f(*args, **kwargs)`` for a target, present or not.

    Arrays among the arguments, as values or shapes, are inputs of the program. If `f` is not jitted, everything else in
    them (numbers, strings, functions) is a constant of the program, as under Equinox's ``filter_jit``, and arrays that
    `f` holds itself, as a pytree or by ``functools.partial``, are inputs too. If `f` is jitted, its own jit decides.

    Args:
      f: a function; or what ``jax.jit``, ``flax.nnx.jit`` or ``equinox.filter_jit`` made of one.
      args: of `f`: arrays (JAX's or numpy's), ``jax.ShapeDtypeStruct``, pytrees of them, and whatever else it takes.
      target: such as h100:8.
      mesh: axes over the target's devices: text such as data=1,tsp=8, a dict, or a mesh, of which names, sizes and
        types of axes count; it is also the context's mesh while `f` is traced. None: the mesh of the arguments'
        shardings, else the context's, else one device.
      in_shardings: a ``PartitionSpec`` for all positional arguments, or a tuple with one tree prefix of them for each.
        None, in whole or in part: the sharding that an argument carries, else left to the compiler, as jit does.
      out_shardings: the same for results; None: left to the compiler.
      donate_argnums: positional arguments whose memory results may reuse.
      compiler_options: of XLA; None: its defaults, as where `f` is called.
      kwargs: of `f`.

    Raises:
      ConfigError: `f` cannot be traced, lowered or compiled for the target (in one line, with the cause and the line of
        the user's file); mesh, shardings and target do not fit together; or the target's compiler is not installed.
    """
    target, (f, bound, kwargs) = _parsed(target), _unbound(f, kwargs)
    name = getattr(f, "__name__", type(f).__name__)
    _check_keywords(f, name, (*bound, *args), kwargs, {"target": target, "mesh": mesh, "in_shardings": in_shardings})
    if mesh is None:
        mesh = first_mesh((in_shardings, args, bound, kwargs)) or _context_mesh()
    placed = _place(mesh, target) if mesh is not None else None
    device = _only_device(target) if placed is None else None
    began = time.perf_counter()
    with one_line(name, f, target) as stage:
        inputs = *place_shapes(bound, device, placed), *place_arguments(args, in_shardings, device, placed)
        kwargs = place_shapes(kwargs, device, placed)
        donated = [len(bound) + n for n in ((donate_argnums,) if isinstance(donate_argnums, int) else donate_argnums)]
        with _context(mesh, placed, device, (inputs, kwargs), hasattr(f, "trace")):
            jitted, inputs, kwargs = _jitted(f, name, inputs, kwargs, _over(placed, out_shardings), donated)
            stage.traced = traced = jitted.trace(*inputs, **kwargs)
            stage.verb = "lowered"
            lowered = traced.lower()
            stage.verb, lowered = "compiled", getattr(lowered, "lowered", lowered)
            check_aborts(lowered, target.hardware.platform)
            compiled = lowered.compile(dict(compiler_options or {}))
    return CompiledFunction(name, target, placed, compiled, time.perf_counter() - began)


def _parsed(target: str | Target) -> Target:
    return parse_target(target) if isinstance(target, str) else target


def _place(mesh: MeshLike, target: Target) -> Mesh:
    """A mesh over all devices of a target."""
    devices, axes = target.devices(), parse_sizes(mesh) if isinstance(mesh, str) else mesh
    sizes = dict(axes if isinstance(axes, Mapping) else axes.shape)
    if (needed := math.prod(sizes.values())) != target.num_devices:
        raise ConfigError(
            f"mesh={format_sizes(sizes)} has {needed} devices, target={target} has {target.num_devices}; "
            f"use target={target.hardware.name}:{needed}"
        )
    if isinstance(axes, Mesh) and set(axes.devices.flat) == set(devices):
        return axes
    types = (AxisType.Auto,) * len(sizes) if isinstance(axes, Mapping) else axes.axis_types
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=types, devices=devices)


def _context_mesh() -> AbstractMesh | None:
    """The mesh that `jax.set_mesh` or `use_abstract_mesh` set; None if none is set."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh


def _only_device(target: Target) -> Any:
    if target.num_devices > 1:
        raise ConfigError(
            f"target={target} has {target.num_devices} devices, and no mesh or sharding says what each does; "
            f"use mesh='data={target.num_devices}', for example, or target={target.hardware.name}:1"
        )
    return target.devices()[0]


@contextlib.contextmanager
def _context(mesh: MeshLike | None, placed: Mesh | None, device: Any, inputs: Any, jitted: bool) -> Iterator[None]:
    """Sets the context's mesh while `f` is traced and lowered.

    The mesh is abstract if the sharding of some input says on which devices the program runs: `f` may then compute
    arrays while it is traced (`jax.ensure_compile_time_eval`), which no absent device can. A jit of the user's may need
    the devices for its PartitionSpecs.
    """
    shapes = [leaf for leaf in jax.tree.leaves(inputs) if is_array(leaf)]
    is_placed = any(shape.sharding is not None for shape in shapes)
    if not is_placed or (placed is not None and jitted):
        devices = placed or Mesh(np.array([device]), ("device",), axis_types=(AxisType.Auto,))
        with jax.set_mesh(devices), jax.sharding.use_abstract_mesh(_abstract(mesh, devices)):
            yield
    elif placed is not None:
        with jax.sharding.use_abstract_mesh(_abstract(mesh, placed)):
            yield
    else:
        yield


def _abstract(mesh: MeshLike | None, placed: Mesh) -> AbstractMesh:
    """The mesh that `f` sees: the caller's own, if it is abstract, since `f` may hold it too.

    Types of arrays name Explicit axes, and the mesh of the arguments' shardings with its kind of device.
    """
    if isinstance(mesh, AbstractMesh) and AxisType.Explicit not in mesh.axis_types:
        return mesh
    return placed.abstract_mesh


def _over(mesh: Mesh | None, shardings: Any) -> Any:
    """Shardings of results: the PartitionSpecs among them over a mesh."""
    if mesh is None:
        return shardings
    is_spec = lambda node: isinstance(node, jax.sharding.PartitionSpec)
    place = lambda node: jax.sharding.NamedSharding(mesh, node) if is_spec(node) else node
    return jax.tree.map(place, shardings, is_leaf=is_spec)


def _unbound(f: Any, kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """(f, its bound arguments, keyword arguments), without partials and bound methods: they hide a jitted function."""
    bound: tuple[Any, ...] = ()
    while True:
        if all(hasattr(f, name) for name in ("func", "args", "keywords")):  # of functools, jax or equinox
            f, bound, kwargs = f.func, (*f.args, *bound), {**f.keywords, **kwargs}
        elif inspect.ismethod(f) and _is_jitted(f.__func__):
            f, bound = f.__func__, (f.__self__, *bound)
        else:
            return f, bound, kwargs


def _is_jitted(f: Any) -> bool:
    return hasattr(f, "trace") or hasattr(f, "donate_first")


def _check_keywords(f: Any, name: str, args: Any, kwargs: dict[str, Any], given: dict[str, Any]) -> None:
    """Raises ConfigError if a keyword of `compile_for` may have been meant for `f`."""
    try:
        signature = inspect.signature(f)
        taken = signature.bind_partial(*args, **kwargs).arguments
    except (TypeError, ValueError):  # tracing says what is wrong with the arguments
        return
    for keyword, value in given.items():
        if value is not None and keyword in signature.parameters and keyword not in taken:
            raise ConfigError(f"{name} takes {keyword} too; use functools.partial({name}, {keyword}=...)")


def _jitted(
    f: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out_shardings: Any, donated: Sequence[int]
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """(a jitted function, its arguments, its keyword arguments)."""
    if _is_jitted(f) and (out_shardings is not None or donated):
        raise ConfigError(f"{name} is jitted already; give out_shardings and donate_argnums to its own jit")
    if hasattr(f, "trace"):
        return f, args, kwargs
    if holds_nnx_objects((f, args, kwargs)):
        raise ConfigError(
            f"{name} takes Flax NNX modules, which it may change; use compile_for(nnx.jit({name}), ...), "
            "with modules as its arguments"
        )
    rest_donated = False
    if hasattr(f, "donate_first"):  # equinox.filter_jit: arrays are inputs, as here; shapes are not arrays to it
        rest_donated = f.donate_rest
        donated = [n for n in range(len(args)) if (f.donate_rest if n else f.donate_first)]
        f = f.__wrapped__
    arrays, rest = split((f, kwargs, args))

    def run(f: Any, kwargs: Any, *args: Any) -> Any:
        f, kwargs, args = join((f, kwargs, args), rest)
        return split(f(*args, **kwargs))[0]

    vars(run)["__signature__"], run.__name__ = _signature(f, args), name
    numbers = [*((0, 1) if rest_donated else ()), *(n + 2 for n in donated)]
    return jax.jit(run, out_shardings=out_shardings, donate_argnums=numbers), (*arrays[:2], *arrays[2]), {}


def _signature(f: Any, args: tuple[Any, ...]) -> inspect.Signature:
    """Names of the inputs, which the program's text repeats: those of `f` where it has any."""
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        names = [p.name for p in inspect.signature(f).parameters.values() if p.kind in positional][: len(args)]
    except (TypeError, ValueError):
        names = []
    names += [f"args_{n}" for n in range(len(names), len(args))]
    return inspect.Signature([inspect.Parameter(n, positional[0]) for n in ("self_", "kwargs_", *names)])
