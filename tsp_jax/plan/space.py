"""What a planner chooses of a configuration, and every choice that a number of devices allows.

The model, the tokens of a step and its numbers stay as they are: a choice changes where arrays are, what is recomputed,
and what moves when. `narrow` adds choices that round more, and are told apart for it.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from tsp_jax.config import Config
from tsp_jax.config.model import DType
from tsp_jax.config.run import Remat
from tsp_jax.errors import ConfigError
from tsp_jax.layout import AXIS_DIMS, Layout, check_fits, get_layout, num_ranks, parse_mesh
from tsp_jax.mesh import format_sizes

ROWS = (
    "single", "dp", "fsdp", "tsp", "tp", "sp", "fsdp_cp", "tp_sp",
    "fsdp(whole_weights=true)",  # ZeRO-3
    "fsdp(batch=node+data)",  # FSDP inside, replicas outside
    "tsp(weights=data+tsp)", "fsdp_cp(weights=data+tsp)", "tp(weights=model+data)", "sp(weights=data)",
    "tp_sp(weights=model+data)",
    "tsp(sequence=node+tsp)",  # two levels: weights folded inside, tokens over all
)  # fmt: skip
"""layouts that are searched: the rows of the layout table, presets first. Rows that become equal on a mesh, where an
axis has size 1, count as the first of them"""
REMATS: tuple[Remat, ...] = ("none", "full", "save_attention", "offload", "offload_attention")
BUCKETS_MIB = (16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0)
FIELDS = {
    "layout": "layout", "mesh": "mesh", "remat": "remat", "accumulate": "accumulate",
    "bucket_mib": "stream.bucket_mib", "zero1": "optimizer.zero1", "moments_dtype": "optimizer.moments_dtype",
    "grad_dtype": "grad_dtype", "kernel": "stream.kernel",
}  # fmt: skip
"""field of `Choice` -> field of `Config`"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """What is chosen of a configuration; fields as in `Config`."""

    layout: str
    mesh: str
    remat: Remat
    accumulate: int
    bucket_mib: float
    zero1: bool
    moments_dtype: DType
    grad_dtype: DType
    kernel: str

    @classmethod
    def of(cls, config: Config) -> "Choice":
        """What a configuration has."""
        return cls(**{name: _get(config, path) for name, path in FIELDS.items()})

    def apply(self, config: Config) -> Config:
        """Returns the configuration with this choice."""
        own: dict[str, Any] = {}
        parts: dict[str, dict[str, Any]] = {}
        for name, path in FIELDS.items():
            part, dot, field = path.rpartition(".")
            (parts.setdefault(part, {}) if dot else own)[field] = getattr(self, name)
        changed = {part: dataclasses.replace(getattr(config, part), **fields) for part, fields in parts.items()}
        return dataclasses.replace(config, **own, **changed)

    @property
    def where(self) -> str:
        """Layout and mesh, such as ``tsp data=1,tsp=8``."""
        return f"{self.layout} {self.mesh}"

    def text(self) -> str:
        """One line, such as ``tsp data=1,tsp=8, save_attention, buckets of 64 MiB``."""
        parts = [self.where, self.remat, f"buckets of {self.bucket_mib:g} MiB"]
        parts += [f"{self.accumulate} micro-batches"] * (self.accumulate > 1) + ["zero1"] * self.zero1
        parts += [f"kernel {self.kernel}"] * (self.kernel != "auto")
        parts += [f"moments in {self.moments_dtype}"] * (self.moments_dtype != "float32")
        return ", ".join(parts)

    def distance(self, other: "Choice") -> int:
        """How unlike two choices are: 0 equal, 1 in what moves when, 2 in what is kept too, 3 in where arrays are."""
        if (self.layout, self.mesh) != (other.layout, other.mesh):
            return 3
        return 2 if self.remat != other.remat else int(self != other)


def _get(config: Config, path: str) -> Any:
    for name in path.split("."):
        config = getattr(config, name)
    return config


def choices(
    config: Config, num_devices: int, fixed: frozenset[str] = frozenset(), narrow: bool = False
) -> list[Choice]:
    """Every choice for a number of devices.

    Args:
      config: the model, the tokens of a step, and the values of `fixed` fields.
      num_devices: all of them are used.
      fixed: fields of `Config` that stay as they are, such as stream.bucket_mib.
      narrow: also search bfloat16 moments and gradients, which change the numbers of training.

    Raises:
      ConfigError: fixed fields contradict each other or the devices, or no layout divides the tokens.
    """
    places = _places(config, num_devices, fixed)
    own = Choice.of(config)
    buckets = sorted({*BUCKETS_MIB, own.bucket_mib})
    found = []
    for layout, sizes in places:
        batch = config.batch // num_ranks(layout.batch, sizes)
        options: dict[str, Sequence[Any]] = {
            "remat": REMATS,
            "bucket_mib": buckets,
            "accumulate": _micro_batches(batch),
            "zero1": (False, True) if _has_copies(config, layout, sizes) else (False,),
            "moments_dtype": _dtypes(own.moments_dtype, narrow and config.optimizer.name in ("adamw", "muon")),
            "grad_dtype": _dtypes(own.grad_dtype, narrow),
            "kernel": (own.kernel,),
        }
        options |= {name: (getattr(own, name),) for name in options if FIELDS[name] in fixed}
        place = {"layout": layout.name, "mesh": format_sizes(sizes)}
        for values in itertools.product(*options.values()):
            choice = Choice(**place, **dict(zip(options, values, strict=True)))
            if batch % choice.accumulate == 0:
                found.append(choice)
    if not found:  # only a fixed number of micro-batches is left
        raise ConfigError(
            f"batch={config.batch} is not divisible by accumulate={config.accumulate} on any layout; use accumulate=1"
        )
    return found


def _dtypes(own: DType, narrow: bool) -> tuple[DType, ...]:
    return ("float32", "bfloat16") if narrow and own == "float32" else (own,)


def _micro_batches(batch: int) -> list[int]:
    """Numbers of micro-batches: powers of two that divide the sequences of a rank, and all of them."""
    return sorted({n for n in (1, 2, 4, 8, 16, 32, 64, 128, batch) if n <= batch and batch % n == 0})


def _has_copies(config: Config, layout: Layout, sizes: dict[str, int]) -> bool:
    """Whether ZeRO-1 has an effect: several ranks of the batch hold the same weights."""
    copies = tuple(name for name in layout.batch if name not in layout.heads)
    return config.optimizer.name != "adafactor" and num_ranks(copies, sizes) > 1


def _places(config: Config, num_devices: int, fixed: frozenset[str]) -> list[tuple[Layout, dict[str, int]]]:
    """Layouts with the sizes of their axes, each row of the table once."""
    names = [config.layout] if "layout" in fixed else ROWS
    found: dict[Any, tuple[Layout, dict[str, int]]] = {}
    refusals: dict[str, ConfigError] = {}
    for layout in map(get_layout, names):
        try:
            several = [parse_mesh(config.mesh, layout, num_devices)] if "mesh" in fixed else meshes(layout, num_devices)
            several = [sizes for sizes in several if _uses_all(layout, sizes, num_devices, config.mesh)]
        except ConfigError as error:
            refusals.setdefault(layout.name, error)
            continue
        for sizes in several:
            try:
                check_fits(config, layout, sizes)
            except ConfigError as error:
                refusals.setdefault(layout.name, error)
                continue
            found.setdefault(_row(layout, sizes), (layout, sizes))
    if not found:
        own = get_layout(config.layout).name
        raise refusals.get(own) or next(iter(refusals.values()))
    return list(found.values())


def _uses_all(layout: Layout, sizes: dict[str, int], num_devices: int, mesh: str) -> bool:
    used = num_ranks(layout.axis_names, sizes)
    if used != num_devices:
        why = f"mesh={mesh or format_sizes(sizes)} of layout {layout.name} has {used} devices, the target {num_devices}"
        raise ConfigError(f"{why}; use a mesh of {num_devices}, or leave it out")
    return True


def meshes(layout: Layout, num_devices: int) -> Iterator[dict[str, int]]:
    """Every way to share all devices among the axes of a layout, outermost first."""
    if layout.name == "single":
        if num_devices > 1:
            raise ConfigError(f"layout=single has one device, the target {num_devices}; use another layout")
        yield dict.fromkeys(layout.axis_names, 1)
        return
    *outer, last = layout.axis_names
    divisors = [n for n in range(1, num_devices + 1) if num_devices % n == 0]
    for sizes in itertools.product(divisors, repeat=len(outer)):
        used = 1
        for size in sizes:
            used *= size
        if num_devices % used == 0:
            yield dict(zip((*outer, last), (*sizes, num_devices // used), strict=True))


def _row(layout: Layout, sizes: dict[str, int]) -> tuple[Any, ...]:
    """What a layout does on a mesh, whatever its axes are called."""
    used = layout.without([name for name, size in sizes.items() if size == 1])
    axes = [(tuple(name in getattr(used, dim) for dim in AXIS_DIMS), sizes[name]) for name in used.axis_names]
    folded = any(used.axes(dim).folded for dim in ("heads", "mlp", "vocab"))
    return (*axes, used.whole_weights and folded)
