"""Serving: which layout, mesh and prefill chunk suit a context and a number of sequences.

Closed forms choose the finalists, compiled steps decide. A prompt takes context / chunk prefill steps, then every new
token of all sequences one decode step; what is least is the time of all of them.
"""

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

from tsp_jax.config import Config, DType, ModelConfig
from tsp_jax.cost.expert_passes import ExpertPasses
from tsp_jax.cost.flops import step_flops
from tsp_jax.cost.op_passes import Product
from tsp_jax.cost.serving import decode_bytes, decode_products, decode_traffic, serving_memory
from tsp_jax.cost.step import ITEMSIZE, Step
from tsp_jax.cost.traffic import FLOAT32
from tsp_jax.cost.training import step_traffic
from tsp_jax.errors import ConfigError
from tsp_jax.hardware.rates import Work
from tsp_jax.hardware.targets import Target
from tsp_jax.layout import Layout, get_layout, num_ranks
from tsp_jax.mesh import format_sizes, parse_sizes
from tsp_jax.plan.budget import usable_bytes
from tsp_jax.plan.compiled import Compile, Compiled, Compilers, Job
from tsp_jax.plan.estimate import with_expert_kernel
from tsp_jax.plan.space import Choice, choices

CHUNKS = (512, 2048, 8192, 32768)
"""tokens of a prompt that one prefill step may take"""
_COLLECTIVES = 4
"""of a layer in decode: heads, merges, and sums of attention and of the MLP"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Serving:
    """One way to serve. Bytes are per device; seconds are simulated."""

    layout: str
    mesh: str
    chunk: int
    """tokens of a prompt that one prefill step takes"""
    prefill_s: float
    """of the whole context of all sequences"""
    decode_s: float
    """of one token of every sequence"""
    peak_bytes: float
    is_compiled: bool = False

    def seconds(self, new_tokens: int) -> float:
        """Of a context and so many new tokens of every sequence."""
        return self.prefill_s + new_tokens * self.decode_s


def choose_serving(
    model: ModelConfig, context: int, batch: int, target: Target, *, new_tokens: int = 256, dtype: DType = "bfloat16",
    memory: float = 0.9, fixed: frozenset[str] = frozenset(), layout: str = "tsp", mesh: str = "",
    finalists: int = 3, workers: int = 2, compile: Compile | None = None,
) -> list[Serving]:  # fmt: skip
    """The ways to serve that fit, the fastest first: at most `finalists`, compiled.

    Args:
      model: sizes.
      context: tokens of the KV cache of a sequence; prompts are taken to fill it.
      batch: sequences at a time, over all devices.
      target: devices, present or not.
      new_tokens: tokens to generate for each sequence.
      dtype: of weights, activations and cache.
      memory: share of a device's memory that a program may fill.
      fixed: layout or mesh, if they stay as given.
      layout, mesh: what is given.
      finalists: ways to compile; 0: closed forms alone decide, and all ways are returned.
      workers: processes that compile.
      compile: None: in processes of their own.

    Raises:
      ConfigError: nothing fits, or the tokens divide over no layout.
    """
    limit = usable_bytes(target.hardware, memory).usable_bytes
    base = Config(model=model, layout=layout, mesh=mesh, steps=1, batch=batch, seq_len=context, compute_dtype=dtype)
    kept = fixed | {"remat", "stream.bucket_mib", "accumulate", "optimizer.zero1"}
    found = [
        way for choice in choices(base, target.num_devices, kept) for chunk in _chunks(context)
        if (way := _closed_form(base, choice, chunk, target))
    ]  # fmt: skip
    if not found:
        raise ConfigError(f"layout={layout} serves on no mesh of target={target}; use another layout")
    fitting = sorted((w for w in found if w.peak_bytes <= limit), key=lambda way: way.seconds(new_tokens))
    if not fitting:
        least = min(found, key=lambda way: way.peak_bytes)
        raise ConfigError(
            f"target={target}: {batch} x {context} tokens fit on no layout: the least is {least.peak_bytes / 1e9:.1f} "
            f"GB a device ({least.layout} {least.mesh}), a device may fill {limit / 1e9:.1f} GB; use more devices, or "
            "a shorter context"
        )
    if not finalists:
        return fitting
    with contextlib.ExitStack() as stack:
        compile = compile or stack.enter_context(Compilers(target, workers=workers))
        compiled = _compile(base, _best_of_places(fitting)[:finalists], compile)
    done = sorted((way for way in compiled if way.peak_bytes <= limit), key=lambda way: way.seconds(new_tokens))
    if not done:
        raise ConfigError(f"target={target}: no finalist for serving compiles and fits; use more devices")
    return done


def _chunks(context: int) -> list[int]:
    return [chunk for chunk in CHUNKS if chunk < context and context % chunk == 0] or [context]


def _closed_form(base: Config, choice: Choice, chunk: int, target: Target) -> Serving | None:
    """None if the layout cannot serve chunks of this size."""
    layout, sizes = get_layout(choice.layout), parse_sizes(choice.mesh)
    layout = layout.without([name for name, size in sizes.items() if size == 1])
    folded = [name for name in layout.batch if name not in layout.replica_batch]
    serves = layout.batch == (*layout.replica_batch, *folded) and all(name in layout.heads for name in folded)
    if chunk % (2 * num_ranks(layout.sequence, sizes)) or not serves:  # see `decode_placement`
        return None
    base = with_expert_kernel(dataclasses.replace(base, layout=choice.layout), target.hardware, sizes)
    prefill, decode = (serving_memory(base, layout, sizes, chunk=tokens) for tokens in (chunk, 0))
    moved_s = decode_bytes(base, layout, sizes) / target.hardware.rates.memory.bytes_per_s.typical
    experts_s = base.model.num_layers * _seconds(base, decode_products(base, layout, sizes), target)
    return Serving(
        layout=choice.layout, mesh=format_sizes(sizes), chunk=chunk,
        prefill_s=_prefill(base, layout, sizes, chunk, target),
        decode_s=moved_s + experts_s + _decode_links(base, layout, sizes, target),
        peak_bytes=max(sum(prefill.values()), sum(decode.values())),
    )  # fmt: skip


def _decode_links(base: Config, layout: Layout, sizes: dict[str, int], target: Target) -> float:
    received = sum(sum(kinds.values()) for kinds in decode_traffic(base, layout, sizes).values())
    if not received:
        return 0.0
    row = _links(layout, sizes, target)
    return base.model.num_layers * _COLLECTIVES * row.fixed_s.typical + received / row.bytes_per_s.typical


def _links(layout: Layout, sizes: dict[str, int], target: Target) -> Any:
    """Rates of the links that the ranks of weights and sequences share."""
    ranks = num_ranks(tuple(dict.fromkeys((*layout.heads, *layout.sequence))), sizes)
    rates = target.hardware.rates
    return rates.between_nodes if ranks > target.hardware.node_size else rates.collective("all-gather")


def _prefill(base: Config, layout: Layout, sizes: dict[str, int], chunk: int, target: Target) -> float:
    """Computation, or what moves past folded axes in every chunk if that takes longer, and tensor axes' sums.

    Keys and values of earlier chunks, which later ones fetch again, are not counted.
    """
    compute, rate = _compute(base, layout, sizes, chunk, target), _links(layout, sizes, target).bytes_per_s.typical
    traffic = step_traffic(dataclasses.replace(base, seq_len=chunk), layout, sizes, forward=True)
    kinds = [kinds for op, kinds in traffic.items() if op != "loss"]
    summed = sum(each.get("tensor_sums", 0.0) for each in kinds)
    moved = sum(sum(each.values()) for each in kinds) - summed
    return max(compute, base.seq_len / chunk * moved / rate) + base.seq_len / chunk * summed / rate


def _compute(base: Config, layout: Layout, sizes: dict[str, int], chunk: int, target: Target) -> float:
    """All operations at the best rate, but those of experts in tiles, which are small where chunks are."""
    flops, rates = step_flops(base, forward=True), target.hardware.rates
    del flops["loss"]  # prefill makes logits of one token a sequence
    if not base.model.experts.number:
        return sum(flops.values()) / target.num_devices / rates.best_flops.typical
    passes = ExpertPasses(Step(dataclasses.replace(base, seq_len=chunk), layout, sizes))
    _, part = passes.forward()
    experts = _seconds(base, part.products, target) + part.bytes / rates.memory.bytes_per_s.typical
    rest = sum(flops.values()) - flops["mlp"] * passes.routed
    return base.model.num_layers * base.seq_len / chunk * experts + rest / target.num_devices / rates.best_flops.typical


def _seconds(base: Config, products: Sequence[Product], target: Target) -> float:
    """Of products at the rates of their shapes, or of their operands and results in main memory if these are slower."""
    rates, dtype, total = target.hardware.rates, base.compute_dtype, 0.0
    for m, n, k, times, _, kernel in products:
        nbytes = (m * k + k * n) * ITEMSIZE[dtype] + m * n * FLOAT32
        multiplied = rates.seconds(Work(2 * m * n * k, (m, n, k), dtype, kernel=kernel), "typical")
        total += times * max(multiplied, nbytes / rates.memory.bytes_per_s.typical)
    return total


def _best_of_places(ways: Sequence[Serving]) -> list[Serving]:
    found: dict[tuple[str, str], Serving] = {}
    for way in ways:
        found.setdefault((way.layout, way.mesh), way)
    return list(found.values())


def _compile(base: Config, ways: Sequence[Serving], compile: Compile) -> list[Serving]:
    """The ways with compiled figures; those that do not compile are left out."""
    configs = [dataclasses.replace(base, layout=way.layout, mesh=way.mesh) for way in ways]
    jobs = [Job(config, "prefill", way.chunk) for config, way in zip(configs, ways, strict=True)]
    rows = compile([*jobs, *(Job(config, "decode") for config in configs)])
    pairs = zip(ways, rows[: len(ways)], rows[len(ways) :], strict=True)
    return [
        dataclasses.replace(
            way, prefill_s=base.seq_len / way.chunk * prefill.step_s, decode_s=decode.step_s,
            peak_bytes=max(prefill.peak_bytes, decode.peak_bytes), is_compiled=True,
        )
        for way, prefill, decode in pairs if isinstance(prefill, Compiled) and isinstance(decode, Compiled)
    ]  # fmt: skip
