"""The layout table: which mesh axes shard which logical dimension. Every axis name is defined here.

Let W be the axes that shard a weight's dimension (heads, mlp or vocab) and T the axes that shard tokens, by batch or by
sequence. Axes in both W and T are *folded*: weights move past tokens. Axes in W alone are *tensor* axes: partial
outputs are summed. Keys and values are exchanged over the axes that shard the sequence. Data parallelism, FSDP, TP, SP,
TP+SP, FSDP+CP and TSP are rows of one table.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from tsp_jax.config import Config
from tsp_jax.errors import ConfigError
from tsp_jax.mesh import describe_mesh, format_sizes, make_mesh, parse_sizes, with_auto_axes

AxisNames = tuple[str, ...]
WEIGHT_DIMS = ("heads", "mlp", "vocab")
AXIS_DIMS = ("batch", "sequence", *WEIGHT_DIMS)
"""the logical dimensions that mesh axes may shard"""
MOST_AXES = 16
"""most mesh axes of a layout: a mesh is a NumPy array, and NumPy limits the number of dimensions"""


class Axes(NamedTuple):
    """The mesh axes of each role in one op; an empty tuple if no axis has the role."""

    folded: AxisNames = ()
    """axes that shard both weights and tokens (by batch or by sequence): weights move past tokens"""
    tensor: AxisNames = ()
    """axes that shard weights alone: partial outputs are summed over them"""
    sequence: AxisNames = ()
    """axes that shard the sequence: keys and values are all-gathered over them"""

    @property
    def unfolded_sequence(self) -> AxisNames:
        """Axes that shard the sequence and not the weights."""
        return tuple(name for name in self.sequence if name not in self.folded)

    @property
    def folded_batch(self) -> AxisNames:
        """Folded axes that shard the batch. No keys or values are exchanged over them."""
        return tuple(name for name in self.folded if name not in self.sequence)


def format_axes(axes: Sequence[str]) -> str:
    """Joins axis names as in the text of a layout, such as ``data+tsp``."""
    return "+".join(axes)


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
    experts: AxisNames | None = None
    """the axes of `mlp` that shard whole experts, while others shard the rows of each; None: the folded ones"""

    def __post_init__(self):
        for dim in AXIS_DIMS:
            names, used = getattr(self, dim), tuple(dict.fromkeys(getattr(self, dim)))
            if len(used) < len(names):
                self._refuse(f"{dim}={format_axes(names)} names an axis twice; use {dim}={format_axes(used)}")
        if shared := [name for name in self.batch if name in self.sequence]:
            both = f"batch={format_axes(self.batch)} and sequence={format_axes(self.sequence)}"
            self._refuse(f"{both} share {format_axes(shared)}; use each axis in one of them")
        for dim in WEIGHT_DIMS:
            names, ordered = getattr(self, dim), self.axes(dim).tensor + self.axes(dim).folded
            if names != ordered:
                use = f"use {dim}={format_axes(ordered)}"
                self._refuse(f"{dim}={format_axes(names)} must name tensor axes, then folded ones as tokens do; {use}")
        if self.experts is not None:
            axes = self.axes("mlp")
            if self.experts != axes.folded and (axes.folded or not set(self.experts) <= set(axes.tensor)):
                use = format_axes(axes.folded) if axes.folded else f"axes of mlp={format_axes(self.mlp)}"
                found = format_axes(self.experts) or "none"
                self._refuse(f"experts={found} must be what shards whole experts; use {use}")
        if len(self.axis_names) > MOST_AXES:
            self._refuse(f"it has {len(self.axis_names)} mesh axes; use at most {MOST_AXES}")

    def _refuse(self, why: str) -> NoReturn:
        raise ConfigError(f"layout={self.name}: {why}")

    @property
    def tokens(self) -> AxisNames:
        """The axes that shard tokens: batch, then sequence."""
        return self.batch + self.sequence

    @property
    def expert_axes(self) -> AxisNames:
        """The axes that shard whole experts."""
        return self.axes("mlp").folded if self.experts is None else self.experts

    @property
    def replica_batch(self) -> AxisNames:
        """The batch axes that shard no weights."""
        weight_axes = {*self.heads, *self.mlp, *self.vocab}
        return tuple(name for name in self.batch if name not in weight_axes)

    def axes(self, dim: str) -> Axes:
        """The roles of mesh axes in an op whose weights are sharded along `dim` (heads, mlp or vocab)."""
        names = getattr(self, dim)
        return Axes(
            folded=tuple(name for name in self.tokens if name in names),
            tensor=tuple(name for name in names if name not in self.tokens),
            sequence=self.sequence,
        )

    def spec(self, *dims: str | None) -> PartitionSpec:
        """PartitionSpec of an array with these logical dimensions (None: a dimension that is not sharded)."""
        return PartitionSpec(*((getattr(self, dim) or None) if dim else None for dim in dims))

    def without(self, axes: Sequence[str]) -> "Layout":
        """The same layout without some axes."""
        dims = AXIS_DIMS if self.experts is None else (*AXIS_DIMS, "experts")
        kept = {dim: tuple(name for name in getattr(self, dim) if name not in axes) for dim in dims}
        return dataclasses.replace(self, **kept)

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


_SETTINGS = {**{dim: (dim,) for dim in AXIS_DIMS}, "weights": WEIGHT_DIMS, "whole_weights": ("whole_weights",)}
"""name in the text of a layout -> the fields of Layout that it sets"""
_AXES = re.compile(r"([a-z_]\w*(\s*\+\s*[a-z_]\w*)*)?", re.ASCII | re.IGNORECASE)
_LONGEST_TEXT = 1000


def get_layout(text: str) -> Layout:
    """The layout that a text names: a preset, or a row of your own.

    A row of your own is a preset with other axes for some dimensions, such as ``tsp(weights=data+tsp)``. Dimensions are
    batch, sequence, heads, mlp and vocab; `weights` sets the last three. A dimension without an axis (``sequence=``) is
    not sharded. `whole_weights` is true or false. The name of the layout does not depend on spaces in the text, on the
    order of dimensions or on the order of the axes of weights. A layout whose row equals a preset's is that preset.

    Raises:
      ConfigError: the text is not a layout, or its row contradicts itself.
    """
    if len(text) > _LONGEST_TEXT:
        raise ConfigError(f"layout={text:.40}... has {len(text)} characters; use at most {_LONGEST_TEXT}")
    name, opening, row = (part.strip() for part in text.partition("("))
    if name not in LAYOUTS:
        what = f"layout={text}: preset '{name}'" if opening else f"layout={text}"
        raise ConfigError(f"{what} is unknown; use one of {', '.join(LAYOUTS)}, or a row such as tsp(weights=data+tsp)")
    preset = LAYOUTS[name]
    if not opening:
        return preset
    row, closing, rest = row.partition(")")
    if not closing or rest:
        raise ConfigError(f"layout={text} must end with its only parenthesis; use {name}({row.strip()})")
    fields = {field: getattr(preset, field) for names in _SETTINGS.values() for field in names} | _parse_row(text, row)
    tokens = fields["batch"] + fields["sequence"]
    for dim in WEIGHT_DIMS:  # tensor axes, then folded ones in the order of tokens
        fields[dim] = tuple(sorted(fields[dim], key=lambda axis: tokens.index(axis) if axis in tokens else -1))
    layout = Layout(name=text, **fields)
    if not layout.axis_names:
        raise ConfigError(f"layout={text} has no mesh axis; use batch=data, for example")
    for known in (preset, *reversed(LAYOUTS.values())):  # dp before single, which has the same row and fewer devices
        if dataclasses.replace(layout, name=known.name) == known:
            return known
    return dataclasses.replace(layout, name=_row_name(preset, layout))


def _parse_row(text: str, row: str) -> dict[str, Any]:
    """The fields of Layout that a row such as ``sequence=a+b,weights=b`` sets; errors quote all of `text`."""
    fields: dict[str, Any] = {}
    for item in row.split(",") if row.strip() else ():
        name, equals, value = (part.strip() for part in item.partition("="))
        if name not in _SETTINGS or not equals:
            use = f"{', '.join(AXIS_DIMS)}, weights or whole_weights, such as weights=data+tsp"
            raise ConfigError(f"layout={text}: '{item.strip()}' does not set a dimension; use {use}")
        if twice := [field for field in _SETTINGS[name] if field in fields]:
            both = f"{twice[0]} is set twice (weights sets {', '.join(WEIGHT_DIMS)})"
            raise ConfigError(f"layout={text}: {both}; use each dimension once")
        if name == "whole_weights":
            known, parsed, use = value.lower() in ("true", "false"), value.lower() == "true", "true or false"
        else:
            known, parsed, use = _AXES.fullmatch(value), tuple(re.findall(r"\w+", value)), "axis+axis, such as data+tsp"
        if not known:
            raise ConfigError(f"layout={text}: {name}={value} is not understood; use {use}")
        fields |= dict.fromkeys(_SETTINGS[name], parsed)
    return fields


def _row_name(preset: Layout, layout: Layout) -> str:
    """The canonical text of a row: its preset and the settings that differ from it, in the order of Layout's fields."""
    changed = [dim for dim in AXIS_DIMS if getattr(layout, dim) != getattr(preset, dim)]
    values = {dim: format_axes(getattr(layout, dim)) for dim in changed}
    if layout.heads == layout.mlp == layout.vocab != preset.vocab:
        values = {dim: axes for dim, axes in values.items() if dim not in WEIGHT_DIMS}
        values["weights"] = format_axes(layout.vocab)
    if layout.whole_weights != preset.whole_weights:
        values["whole_weights"] = str(layout.whole_weights).lower()
    return f"{preset.name}({','.join(f'{name}={value}' for name, value in values.items())})"


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
        """NamedSharding of an array with these logical dimensions; see `Layout.spec`."""
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

    If the layout is a row of your own, only batch axes may be left out: otherwise an axis misspelt in the row would
    shard nothing, unnoticed.

    If the text is empty, the devices go to the axes that are not batch axes, or to the batch axes if there are no
    others. A single axis gets all devices. Of several axes, the first and the last share the devices as evenly as
    possible. The layout `single` gets one device.
    """
    if not text:
        return _default_mesh(layout, num_devices)
    example = format_sizes({name: 1 if name in layout.batch else 2 for name in layout.axis_names})
    sizes = parse_sizes(text, example)
    for name in sizes:
        if name not in layout.axis_names:
            known = ", ".join(layout.axis_names)
            raise ConfigError(f"mesh={text}: layout {layout.name} has no axis '{name}', it has {known}; use {example}")
    missing = [name for name in layout.axis_names if name not in (*sizes, *layout.batch)]
    if missing and layout.name not in LAYOUTS:
        use = f"use, for example, --mesh {format_sizes(sizes | dict.fromkeys(missing, 1))}"
        raise ConfigError(f"mesh={text} lacks {', '.join(missing)} of layout {layout.name}; {use}")
    return {name: 1 for name in layout.axis_names if name not in sizes} | sizes


def _default_mesh(layout: Layout, num_devices: int) -> dict[str, int]:
    sizes = dict.fromkeys(layout.axis_names, 1)
    if layout == LAYOUTS["single"]:
        return sizes
    return sizes | spread([name for name in layout.axis_names if name not in layout.batch] or layout.batch, num_devices)


def spread(axes: Sequence[str], num_devices: int) -> dict[str, int]:
    """Axis sizes that use all devices: spread over the first and the last axis, as evenly as possible; 1 for others."""
    if len(axes) < 2:
        return dict.fromkeys(axes, num_devices)
    first = largest_divisor(num_devices, math.isqrt(num_devices))
    return dict.fromkeys(axes, 1) | {axes[0]: first, axes[-1]: num_devices // first}


def num_ranks(axes: AxisNames, sizes: Mapping[str, int]) -> int:
    """Number of ranks of some mesh axes together."""
    return math.prod(sizes[name] for name in axes)


def place(layout: str | Layout, devices: Sequence[Any] | None = None, **sizes: int) -> Placement:
    """Puts a preset, or a layout of your own, on a mesh: ``place("tsp", data=1, tsp=8)``."""
    layout = get_layout(layout) if isinstance(layout, str) else layout
    available = jax.devices() if devices is None else devices
    return Placement(layout, make_mesh(parse_mesh(format_sizes(sizes), layout, len(available)), devices))


@functools.lru_cache(maxsize=4096)
def largest_divisor(value: int, at_most: int) -> int:
    """The largest divisor of `value` that does not exceed `at_most`."""
    small = [d for d in range(1, math.isqrt(value) + 1) if value % d == 0]
    return max(d for d in (*small, *(value // d for d in small)) if d <= at_most)


def check_divides(field: str, value: int, ranks: int, axes: AxisNames, why: str = "") -> None:
    """Raises ConfigError, with the next value that works, if `ranks` does not divide a field's value."""
    if value % ranks:
        use = -(-value // ranks) * ranks
        over = f" over {','.join(axes)}" if axes else ""
        raise ConfigError(f"{field}={value} is not divisible by {ranks}{over}{why}; use {use}")


def check_attention_movement(axes: Axes, movement: str) -> None:
    """Raises ConfigError if attention is to move tokens over folded axes that shard the batch.

    A rank would then treat the tokens of several ranks' sequences as one sequence.
    """
    if movement == "activations" and axes.folded_batch:
        raise ConfigError(
            f"stream.attention_movement=activations cannot move tokens over {','.join(axes.folded_batch)}, which "
            "shards the batch; use stream.attention_movement=gather"
        )


def check_fits(config: Config, layout: Layout, sizes: Mapping[str, int]) -> None:
    """Raises ConfigError, with a value that works, if the tokens of a configuration do not divide over a mesh.

    Sizes of the model need not divide: weights are padded.
    """

    def check(field: str, value: int, axes: AxisNames, times: int, why: str) -> None:
        check_divides(field, value, num_ranks(axes, sizes) * times, axes, why if times > 1 else "")

    check_attention_movement(layout.axes("heads"), config.stream.attention_movement)
    zigzag = config.data.order == "zigzag" and num_ranks(layout.sequence, sizes) > 1
    for phase in config.phases():
        field = "seq_len" if phase.seq_len == config.seq_len else "seq_len_schedule: seq_len"
        check(field, phase.seq_len, layout.sequence, 2 if zigzag else 1, " (two zigzag chunks a rank)")
    check("batch", config.batch, layout.batch, config.accumulate, f" (accumulate={config.accumulate})")
