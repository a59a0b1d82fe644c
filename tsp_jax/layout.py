"""The layout table: which mesh axes shard which logical dimension. Every axis name is defined here.

Let W be the axes that shard a weight's dimension (heads, mlp or vocab) and T the axes that shard tokens, by batch or by
sequence. Axes in both W and T are *folded*: weights move past tokens. Axes in W alone are *tensor* axes: partial
outputs are summed. Keys and values are exchanged over the axes that shard the sequence. Data parallelism, FSDP, TP, SP,
TP+SP, FSDP+CP and TSP are rows of one table.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from tsp_jax.config import Config
from tsp_jax.errors import ConfigError
from tsp_jax.mesh import describe_mesh, format_sizes, make_mesh, parse_sizes, with_auto_axes

AxisNames = tuple[str, ...]
WEIGHT_DIMS = ("heads", "mlp", "vocab")


class Axes(NamedTuple):
    """The mesh axes of each role in one op; an empty tuple if no axis has the role."""

    folded: AxisNames = ()
    """shard both weights and tokens, by batch or by sequence: weights move past tokens"""
    tensor: AxisNames = ()
    """shard weights alone: partial outputs are summed"""
    sequence: AxisNames = ()
    """shard the sequence: keys and values are all-gathered over them"""

    @property
    def unfolded_sequence(self) -> AxisNames:
        """Axes that shard the sequence and not the weights."""
        return tuple(name for name in self.sequence if name not in self.folded)

    @property
    def folded_batch(self) -> AxisNames:
        """Folded axes that shard the batch, so that no keys and values are exchanged over them."""
        return tuple(name for name in self.folded if name not in self.sequence)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """A row of the layout table: logical dimension -> mesh axis names."""

    name: str
    batch: AxisNames = ("data",)
    sequence: AxisNames = ()
    heads: AxisNames = ()
    mlp: AxisNames = ()
    vocab: AxisNames = ()
    whole_weights: bool = False
    """all-gather each op's weights at once instead of bucket by bucket (ZeRO-3 / FSDP over the context axis)"""

    def __post_init__(self):
        if len(set(self.tokens)) < len(self.tokens):
            raise ConfigError(f"layout {self.name}: batch={self.batch} and sequence={self.sequence} share an axis")
        for dim in WEIGHT_DIMS:
            names = getattr(self, dim)
            if len(set(names)) < len(names):
                raise ConfigError(f"layout {self.name}: {dim}={names} names an axis twice; use each once")
            axes = self.axes(dim)
            if names != axes.tensor + axes.folded:
                raise ConfigError(
                    f"layout {self.name}: {dim}={names} must name tensor axes before folded ones; "
                    f"use {axes.tensor + axes.folded}"
                )

    @property
    def tokens(self) -> AxisNames:
        """The axes that shard tokens: batch, then sequence."""
        return self.batch + self.sequence

    @property
    def replica_batch(self) -> AxisNames:
        """The batch axes that shard no weights."""
        weight_axes = {*self.heads, *self.mlp, *self.vocab}
        return tuple(name for name in self.batch if name not in weight_axes)

    def axes(self, dim: str) -> Axes:
        """The roles of mesh axes in an op whose weights are sharded along `dim` (heads, mlp or vocab)."""
        names = getattr(self, dim)
        return Axes(
            folded=tuple(name for name in names if name in self.tokens),
            tensor=tuple(name for name in names if name not in self.tokens),
            sequence=self.sequence,
        )

    def spec(self, *dims: str | None) -> PartitionSpec:
        """PartitionSpec of an array whose dimensions are these logical ones (None: not sharded)."""
        return PartitionSpec(*((getattr(self, dim) or None) if dim else None for dim in dims))

    def without(self, axes: Sequence[str]) -> "Layout":
        """The same layout without some axes."""
        dims = ("batch", "sequence", *WEIGHT_DIMS)
        return dataclasses.replace(self, **{dim: tuple(a for a in getattr(self, dim) if a not in axes) for dim in dims})

    @property
    def axis_names(self) -> AxisNames:
        """Every mesh axis of the layout, batch first."""
        return tuple(dict.fromkeys((*self.tokens, *self.heads, *self.mlp, *self.vocab)))


def _preset(name: str, weights: AxisNames = (), sequence: AxisNames = (), whole_weights: bool = False) -> Layout:
    return Layout(name=name, sequence=sequence, heads=weights, mlp=weights, vocab=weights, whole_weights=whole_weights)


_PRESETS = (
    _preset("single"),
    _preset("dp"),
    _preset("fsdp", weights=("data",)),
    _preset("tp", weights=("model",)),
    _preset("sp", sequence=("seq",)),
    _preset("tp_sp", weights=("model",), sequence=("seq",)),
    _preset("tsp", weights=("tsp",), sequence=("tsp",)),
    _preset("fsdp_cp", weights=("tsp",), sequence=("tsp",), whole_weights=True),
)
LAYOUTS = {layout.name: layout for layout in _PRESETS}


def get_layout(name: str) -> Layout:
    """The preset of that name, or ConfigError."""
    if name not in LAYOUTS:
        raise ConfigError(f"layout={name} is unknown; use one of {', '.join(LAYOUTS)}")
    return LAYOUTS[name]


@dataclasses.dataclass(frozen=True)
class Placement:
    """A layout on a mesh: sizes and shardings of arrays, and `shard_map` for per-device functions."""

    layout: Layout
    mesh: Mesh | AbstractMesh

    def __post_init__(self):
        missing = set(self.layout.axis_names) - set(self.mesh.axis_names)
        if missing:
            raise ConfigError(
                f"mesh={dict(self.mesh.shape)} lacks {', '.join(sorted(missing))} of layout {self.layout.name}; "
                f"use a mesh with {', '.join(self.layout.axis_names)}"
            )
        object.__setattr__(self, "mesh", with_auto_axes(self.mesh))
        # An axis of size 1 shards nothing, but would still cost trivial collectives.
        object.__setattr__(self, "layout", self.layout.without([n for n, size in self.mesh.shape.items() if size == 1]))

    def size(self, dim: str) -> int:
        """Number of shards of a logical dimension."""
        return num_ranks(getattr(self.layout, dim), self.mesh.shape)

    def sharding(self, *dims: str | None) -> NamedSharding:
        """NamedSharding of an array whose dimensions are these logical ones."""
        return NamedSharding(self.mesh, self.layout.spec(*dims))

    def shard_map(self, fn, in_specs, out_specs):
        """`jax.shard_map` of `fn` over the mesh: it runs once per device, on that device's shards."""
        self.check_context()
        return jax.shard_map(fn, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs)

    def check_context(self) -> None:
        """Raises ConfigError if a context mesh is set (`jax.set_mesh`) that is not this placement's."""
        context = jax.sharding.get_abstract_mesh()
        if not context.empty and context != self.mesh.abstract_mesh:
            raise ConfigError(
                f"the context mesh is {describe_mesh(context)}, that of the placement {describe_mesh(self.mesh)}; "
                "use jax.set_mesh(placement.mesh), or set none, and call layers outside of jax.shard_map"
            )


def parse_mesh(text: str, layout: Layout, num_devices: int) -> dict[str, int]:
    """Parses axis sizes such as ``data=1,tsp=8``; axes of the layout that are not named get size 1.

    An empty text puts all devices on the layout's own axis or, if it has two, evenly over both if possible; batch axes
    get devices only if there is no other axis. `single` gets one device.
    """
    if not text:
        return _default_mesh(layout, num_devices)
    example = format_sizes({name: 1 if name in layout.batch else 2 for name in layout.axis_names})
    sizes = parse_sizes(text, example)
    for name in sizes:
        if name not in layout.axis_names:
            known = ", ".join(layout.axis_names)
            raise ConfigError(f"mesh={text}: layout {layout.name} has no axis '{name}', it has {known}; use {example}")
    return {name: 1 for name in layout.axis_names if name not in sizes} | sizes


def _default_mesh(layout: Layout, num_devices: int) -> dict[str, int]:
    sizes = dict.fromkeys(layout.axis_names, 1)
    if layout == LAYOUTS["single"]:
        return sizes
    own = [name for name in layout.axis_names if name not in layout.batch] or list(layout.batch)
    if len(own) < 2:
        return sizes | dict.fromkeys(own, num_devices)
    first = largest_divisor(num_devices, math.isqrt(num_devices))
    return sizes | {own[0]: first, own[-1]: num_devices // first}


def num_ranks(axes: AxisNames, sizes: Mapping[str, int]) -> int:
    """Number of ranks of some mesh axes together."""
    return math.prod(sizes[name] for name in axes)


def place(layout: str | Layout, devices: Sequence[Any] | None = None, **sizes: int) -> Placement:
    """A preset, or a layout of your own, on a mesh: ``place("tsp", data=1, tsp=8)``."""
    layout = get_layout(layout) if isinstance(layout, str) else layout
    available = jax.devices() if devices is None else devices
    return Placement(layout, make_mesh(parse_mesh(format_sizes(sizes), layout, len(available)), devices))


def largest_divisor(value: int, at_most: int) -> int:
    """The largest divisor of `value` that does not exceed `at_most`."""
    return next(d for d in range(min(value, at_most), 0, -1) if value % d == 0)


def check_divides(field: str, value: int, ranks: int, axes: AxisNames, why: str = "") -> None:
    """Raises ConfigError, with the next value that works, if `ranks` does not divide a field's value."""
    if value % ranks:
        use = -(-value // ranks) * ranks
        over = f" over {','.join(axes)}" if axes else ""
        raise ConfigError(f"{field}={value} is not divisible by {ranks}{over}{why}; use {use}")


def check_attention_movement(axes: Axes, movement: str) -> None:
    """Raises ConfigError if attention is to move tokens over folded axes that shard the batch.

    Otherwise a rank would treat the tokens of several ranks' sequences as one sequence.
    """
    if movement == "activations" and axes.folded_batch:
        raise ConfigError(
            f"stream.attention_movement=activations cannot move tokens over {','.join(axes.folded_batch)}, which "
            "shards the batch; use stream.attention_movement=gather"
        )


def check_fits(config: Config, layout: Layout, sizes: Mapping[str, int]) -> None:
    """Raises ConfigError, with a value that works, if the sizes of a configuration do not divide over a mesh."""

    def check(field: str, value: int, axes: AxisNames, times: int, why: str) -> None:
        check_divides(field, value, num_ranks(axes, sizes) * times, axes, why if times > 1 else "")

    check_attention_movement(layout.axes("heads"), config.stream.attention_movement)
    zigzag = config.data.order == "zigzag" and num_ranks(layout.sequence, sizes) > 1
    check("seq_len", config.seq_len, layout.sequence, 2 if zigzag else 1, " (two zigzag chunks a rank)")
    check("model.d_ff", config.model.d_ff, layout.mlp, 1, "")
    check("model.vocab_size", config.model.vocab_size, layout.vocab, 1, "")
    check("batch", config.batch, layout.batch, config.accumulate, f" (accumulate={config.accumulate})")
