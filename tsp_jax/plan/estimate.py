"""Memory and time of a training step by closed forms, without a compiler: to rank configurations, and to say what wins.

Memory is `tsp_jax.cost.memory.memory_moments`. Time is that of the passes of `tsp_jax.cost.passes`, at the rates, links
and rules of `tsp_jax.inspect.timeline` for a compiled program:

- A product takes the longer of its operations at the rate of its shape, and of its operands' and result's bytes. An
  attention kernel takes its products for the pairs that may attend, all other work its bytes in main memory.
- A collective takes `tsp_jax.hardware.links.collective_seconds`, each message with its fixed cost.
- `tsp_jax.plan.queues` says what overlaps. On TPU the compiler lets computation wait for every collective, and makes a
  reduce-scatter an all-reduce.
"""

import contextlib
import dataclasses
import functools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from jax.sharding import AbstractDevice, AbstractMesh

from tsp_jax.config import Config
from tsp_jax.cost.flops import muon_products
from tsp_jax.cost.memory import memory_moments
from tsp_jax.cost.op_passes import Attend, Message, Pass
from tsp_jax.cost.passes import Block, step_passes
from tsp_jax.cost.step import ITEMSIZE, Step
from tsp_jax.cost.traffic import FLOAT32
from tsp_jax.errors import ConfigError
from tsp_jax.hardware.devices import Hardware
from tsp_jax.hardware.links import collective_seconds
from tsp_jax.hardware.rates import SCENARIOS, Band, Direction, Level, Scenario, Work
from tsp_jax.hardware.targets import Target
from tsp_jax.layout import AxisNames, get_layout, num_ranks
from tsp_jax.ops.grouped import choose_grouped
from tsp_jax.ops.kernels import KERNELS, choose_kernel
from tsp_jax.ops.kernels.mask import Scores
from tsp_jax.plan.compile import mesh_on
from tsp_jax.plan.queues import Timed, run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """A training step of a configuration on one device of a target."""

    config: Config
    moments: Mapping[str, Mapping[str, float]]
    """moment -> part -> bytes that a device holds then; see `memory_moments`"""
    scenarios: Mapping[str, Mapping[str, float]]
    """name in `SCENARIOS` -> term -> seconds. The terms add up to the step: products, attention, elementwise work,
    optimizer, contention, and exposed communication by kind"""
    received_bytes: float
    """by a device in a step"""

    @property
    def memory(self) -> Mapping[str, float]:
        """Part -> bytes at the moment that needs most; see `tsp_jax.cost.memory.Parts`."""
        return max(self.moments.values(), key=lambda parts: sum(parts.values()))

    @property
    def seconds(self) -> Mapping[str, float]:
        """Term -> seconds at typical rates."""
        return self.scenarios["typical rates"]

    @property
    def peak_bytes(self) -> float:
        """Peak memory."""
        return sum(self.memory.values())

    @property
    def step_s(self) -> float:
        """Seconds of a step at typical rates."""
        return sum(self.seconds.values())

    @property
    def band(self) -> Band:
        """Seconds of a step: the shortest, the typical and the longest of all scenarios."""
        steps = [sum(terms.values()) for terms in self.scenarios.values()]
        return Band(min(steps), self.step_s, max(steps))


def estimate(config: Config, target: Target, scenarios: Iterable[str] = tuple(SCENARIOS)) -> Estimate:
    """Closed-form memory and time of a training step; compiles nothing, and needs no device.

    Args:
      config: model, layout, mesh and what moves when.
      target: devices, with their rates.
      scenarios: names in `SCENARIOS`, typical rates among them, of which there are times.

    Raises:
      ConfigError: the layout or the mesh does not fit the target, or no kernel computes these heads.
    """
    layout, sizes = mesh_on(config, target)
    layout = layout.without([name for name, size in sizes.items() if size == 1])
    blocks = step_passes(with_expert_kernel(config, target.hardware, sizes), layout, sizes)
    moments = memory_moments(as_stored(config, target.hardware, sizes), layout, sizes)
    received = sum(block.times * m.bytes for block in blocks for part in block.passes for m in part.messages)
    after = moments["embed"]  # the update reads and writes weights and moments, and reads gradients
    update = 2 * after["state"] + after["gradients"]
    priced = _Priced(config, target.hardware, sizes)
    return Estimate(
        config=config, moments=moments, received_bytes=config.accumulate * received,
        scenarios={name: priced.terms(blocks, update, SCENARIOS[name]) for name in scenarios},
    )  # fmt: skip


def as_stored(config: Config, hardware: Hardware, sizes: Mapping[str, int]) -> Config:
    """The configuration whose arrays have the sizes that devices store, by the kernel of experts that they run.

    TPUs pad the last dim of an array, D, to 128 lanes.
    """
    known, lanes = with_expert_kernel(config, hardware, sizes), 128 if hardware.platform == "tpu" else 1
    width = -(-config.model.d_model // lanes) * lanes
    return dataclasses.replace(known, model=dataclasses.replace(known.model, d_model=width))


class _Priced:
    """Seconds of passes of a configuration."""

    def __init__(self, config: Config, hardware: Hardware, sizes: Mapping[str, int]):
        self.config, self.hardware, self.prices = config, hardware, _prices(hardware)
        self.mesh = tuple(sizes.items())
        self.kernel, self.backward_products = kernel_of(config, hardware)
        shards = num_ranks(get_layout(config.layout).heads, sizes)
        self.muon = muon_products(config.model, shards) if config.optimizer.name == "muon" else []

    def terms(self, blocks: tuple[Block, ...], update_bytes: float, scenario: Scenario) -> dict[str, float]:
        """Term -> seconds of a step."""
        rates, total = self.hardware.rates, defaultdict[str, float](float)
        shares = (share.cost(scenario.links) for share in (rates.contention.compute, rates.contention.links))
        contention = next(shares), next(shares)
        for block in blocks:
            timed = [self._timed(part, scenario) for part in block.passes]
            for name, seconds in run(timed, contention, waits=self.hardware.platform == "tpu").items():
                total[name] += block.times * self.config.accumulate * seconds
        total["optimizer"] = update_bytes / rates.memory.bytes_per_s.rate(scenario.compute)
        for m, n, k, times in self.muon:
            work = Work(2 * m * n * k, (m, n, k), "float32")
            total["optimizer"] += times * self.prices.work(work, scenario.compute)
        return dict(total)

    def _timed(self, part: Pass, scenario: Scenario) -> Timed:
        level = scenario.compute
        bandwidth = self.hardware.rates.memory.bytes_per_s.rate(level)
        products, attention, beside, nbytes = 0.0, 0.0, 0.0, part.bytes
        if self.hardware.platform == "cuda":
            nbytes += part.fusible
        for m, n, k, times, dtype, kernel in part.products:
            dtype = dtype or self.config.compute_dtype
            arrays = (m * k + k * n) * ITEMSIZE[dtype] + m * n * FLOAT32
            seconds = self.prices.work(Work(2 * m * n * k, (m, n, k), dtype, kernel=kernel), level)
            products += times * max(seconds, arrays / bandwidth)
            if k == part.chunk:
                beside += times * seconds
        if part.attend:
            direction: Direction = "backward" if part.attend.backward else "forward"
            flops = 2 * part.attend.pairs * (self.backward_products if part.attend.backward else 2)
            head_dim = self.config.model.head_dim
            work = Work(flops, None, self.config.compute_dtype, direction, self.kernel, head_dim)
            attention = self.prices.work(work, level)
            nbytes += _pair_bytes(self.kernel, part.attend)
        compute = {"products": products, "attention": attention, "elementwise": nbytes / bandwidth}
        fetched, sent, summed = (
            self._messages(messages, scenario.links) for messages in (part.fetched, part.sent, part.summed)
        )
        kinds = {message.kind for message in part.fetched}
        early = 1.0 - ("activations" in kinds)
        if part.attend and not part.attend.backward:
            early = 0.5
        awaited = any(message.kind != "key_value_grads" for message in part.sent)
        return Timed(part.buckets, compute, fetched, sent, summed, early, awaited, beside)

    def _messages(self, messages: Sequence[Message], level: Level) -> dict[str, float]:
        """Kind of traffic -> seconds."""
        found = defaultdict[str, float](float)
        for m in messages:
            name, nbytes = m.collective, m.bytes / m.number
            if self.hardware.platform == "tpu" and name == "reduce-scatter":  # the compiler makes it an all-reduce
                name, nbytes = "all-reduce", 2 * nbytes
            each = self.prices.collective(name, nbytes, self.mesh, m.axes, level)
            found[m.kind] += m.number * each
        return found


def _pair_bytes(kernel: str, attend: Attend) -> float:
    """Elementwise work of cuDNN's kernel, which attends to pairs of zigzag chunks and merges their results in float32.

    A query chunk attends to 2 R + 1 of 2 R pairs of chunks of R ranks, in the mean. Bytes were counted in programs for
    H100 (jax 0.10.2), as those of `tsp_jax.cost.passes`.
    """
    if kernel != "cudnn":
        return 0.0
    return attend.elements * (2 * attend.ranks + 1) / 2 * (80 if attend.backward else 26)


class _Prices:
    """Seconds of products and collectives on a kind of device, each computed once."""

    def __init__(self, hardware: Hardware):
        self.work = functools.lru_cache(100_000)(hardware.rates.seconds)
        self._hardware, self._known = hardware, {}

    def collective(
        self, name: str, nbytes: float, mesh: tuple[tuple[str, int], ...], axes: AxisNames, level: Level
    ) -> float:
        """Seconds of one collective over some axes of a mesh whose devices are numbered in row-major order."""
        key = name, nbytes, mesh, axes, level
        if key not in self._known:
            groups = _groups(mesh, axes)
            if name == "collective-permute":
                groups = tuple(zip(groups[-1], groups[-1][1:] + groups[-1][:1], strict=True))
            self._known[key] = collective_seconds(self._hardware, name, nbytes, groups, level)
        return self._known[key]


_prices = functools.lru_cache(16)(_Prices)


def _groups(mesh: tuple[tuple[str, int], ...], axes: AxisNames) -> tuple[tuple[int, ...], ...]:
    """The groups of the first and of the last device: with whole nodes, all groups are like them."""
    sizes = dict(mesh)
    strides, stride = {}, 1
    for name, size in reversed(mesh):
        strides[name] = stride
        stride *= size
    members = [0]
    for name in axes:
        members = [place + index * strides[name] for place in members for index in range(sizes[name])]
    last = max(members)
    return tuple(members), tuple(stride - 1 - last + member for member in members)


@functools.lru_cache(maxsize=100)
def _mesh(hardware: Hardware) -> AbstractMesh:
    """Of one such device."""
    kind = hardware.jax_kind or hardware.description.rpartition('device_description_str: "')[2].strip().rstrip('"')
    platform = {"rocm": "gpu", "cuda": "gpu"}.get(hardware.platform, hardware.platform)
    device = AbstractDevice(device_kind=kind, num_cores=None, platform=platform)
    return AbstractMesh((1,), ("device",), abstract_device=device)


def with_expert_kernel(config: Config, hardware: Hardware, sizes: Mapping[str, int]) -> Config:
    """The configuration with the kernel of experts that these devices would run on a mesh of these sizes.

    Raises:
      ConfigError: the devices do not run the kernel that is asked for.
    """
    if not config.model.experts.number:
        return config
    rows = Step(config, get_layout(config.layout), sizes).experts.shard_rows
    asked, width = config.stream.expert_kernel, config.model.d_model
    chosen = choose_grouped(asked, _mesh(hardware), width, rows, config.compute_dtype)
    return dataclasses.replace(config, stream=dataclasses.replace(config.stream, expert_kernel=chosen.name))


@functools.lru_cache(maxsize=1000)
def _chosen(name: str, hardware: Hardware, head_dim: int, dtype: str, scores: Scores) -> tuple[str, int]:
    kernel = choose_kernel(name, _mesh(hardware), head_dim, dtype, scores)
    return next(each for each in KERNELS if type(kernel) is KERNELS[each]), kernel.backward_products


def rival_kernels(config: Config, hardware: Hardware) -> list[str]:
    """Attention kernels that these devices may run too, beside the one that `auto` takes.

    Only kernels with rates of their own: others are priced at another kernel's rate, which says nothing about them.
    """
    known = {row.kernel for row in hardware.rates.attention} - {kernel_of(config, hardware)[0]}
    found = []
    for name in KERNELS:
        if name in known:
            with contextlib.suppress(ConfigError):  # it does not run on these devices, or not with these heads
                kernel_of(dataclasses.replace(config, stream=dataclasses.replace(config.stream, kernel=name)), hardware)
                found.append(name)
    return found


def kernel_of(config: Config, hardware: Hardware) -> tuple[str, int]:
    """(name of the attention kernel that these devices would run, products of its backward for each pair)."""
    model = config.model
    return _chosen(config.stream.kernel, hardware, model.head_dim, config.compute_dtype, Scores.of(model))
