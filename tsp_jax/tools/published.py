"""Published training runs: rows of a file of measurements, and the configuration of this package nearest to each.

A file is CSV with the columns `COLUMNS`. What a publication does not say is an empty field, or words such as
``not stated`` or ``see recipe``; such a row cannot be rebuilt, and `rebuild` says why. Anything else that is not
understood is an error of the file.
"""

import csv
import dataclasses
import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from tsp_jax.config import Config, ModelConfig, OptimizerConfig, Remat, StreamConfig
from tsp_jax.cost.flops import model_flops
from tsp_jax.errors import ConfigError
from tsp_jax.files import read_text
from tsp_jax.hardware.devices import HARDWARE
from tsp_jax.mesh import format_sizes
from tsp_jax.tools.priced import NAME

SIZES = ("layers", "d_model", "heads", "kv_heads", "head_dim", "d_ff", "vocab")
_STATED = (
    "id",
    "hardware",
    "framework",
    "model",
    "devices",
    "seq_len",
    "mesh",
    "remat",
    "compute_dtype",
    "source",
    "date",
)
COLUMNS = (
    "id", "hardware", "devices", "framework", "model", *SIZES, "seq_len", "global_batch", "per_device_batch", "mesh",
    "remat", "compute_dtype", "state_dtype", "attention", "step_s", "tokens_per_s_device", "tflops_device_published",
    "flop_convention", "peak_memory_gb", "source", "date",
)  # fmt: skip
_UNKNOWN = re.compile(r"(not (re)?stated|see\b.*|unclear.*|unknown|)", re.IGNORECASE)
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
GIB = 1.073741824
MOST_BYTES = 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One published run. A size of None was not published."""

    id: str
    hardware: str
    devices: int
    framework: str
    model: str
    sizes: dict[str, int | None]
    """by the names in `SIZES`"""
    seq_len: int | None
    global_batch: int | None
    """sequences of a step, over all devices"""
    per_device_batch: str
    mesh: str
    remat: str
    compute_dtype: str
    state_dtype: str
    attention: str
    step_s: tuple[float, ...]
    """seconds of a step; the first is the figure, others are other runs of the same program"""
    tokens_per_s: float | None
    """per device"""
    tflops: float | None
    """per device, by `flop_convention`"""
    flop_convention: str
    peak_gb: float | None
    source: str
    date: str


def read_runs(path: str | Path) -> list[Run]:
    """Reads a file of measurements.

    Raises:
      ConfigError: one line with the file, the row's id, the field, its value and what would work.
    """
    rows = list(csv.reader(io.StringIO(read_text(path, MOST_BYTES, "use a CSV file of published runs"))))
    if missing := [name for name in COLUMNS if not rows or name not in rows[0]]:
        raise ConfigError(f"{path} lacks column {missing[0]}; use the columns {','.join(COLUMNS)}")
    runs: dict[str, Run] = {}
    for number, values in enumerate(rows[1:], start=2):
        if not values:
            continue
        name = values[rows[0].index("id")] if len(values) > rows[0].index("id") else ""
        where = f"{path} row {name or f'on line {number}'}"
        if len(values) != len(rows[0]):
            raise ConfigError(f"{where} has {len(values)} fields; use {len(rows[0])}, as in the first line")
        run = _run(_Fields(where, dict(zip(rows[0], (value.strip() for value in values), strict=True))))
        if run.id in runs:
            raise ConfigError(f"{where}: id={run.id} stands twice; use an id of its own")
        runs[run.id] = run
    return list(runs.values())


class _Fields:
    """The fields of a row, and errors about them."""

    def __init__(self, where: str, values: dict[str, str]):
        self.where, self.values = where, values

    def refuse(self, name: str, why: str, use: str) -> ConfigError:
        value = self.values[name]
        return ConfigError(f"{self.where}: {name}={value:.80} {why}; use {use}" if value else
                           f"{self.where}: {name} is missing; use {use}")  # fmt: skip

    def size(self, name: str, example: int) -> int | None:
        """A whole number; None if it was not published."""
        if _UNKNOWN.fullmatch(text := self.values[name]):
            return None
        if not re.fullmatch(r"[1-9]\d{0,11}", text):
            raise self.refuse(name, "is no whole number above 0", f"{example}, or not stated")
        return int(text)

    def numbers(self, name: str, example: str) -> tuple[float, ...]:
        """The numbers of a text that begins with one, all above 0; none if it was not published."""
        if _UNKNOWN.fullmatch(text := self.values[name]):
            return ()
        found = tuple(float(number) for number in _NUMBER.findall(text))
        if not _NUMBER.match(text) or min(found) <= 0:
            raise self.refuse(name, "does not begin with a number above 0", f"{example}, or nothing")
        return found


_EXAMPLES = {
    "id": "T3", "hardware": "TPU v5p", "framework": "MaxText", "model": "llama3.1-8b", "devices": "64",
    "seq_len": "1048576, or not stated", "mesh": "context64 x fsdp1, or not stated", "remat": "full, or not stated",
    "compute_dtype": "bf16", "source": "the address of the publication", "date": "2026-10",
}  # fmt: skip


def _run(fields: _Fields) -> Run:
    values = fields.values
    for name in _STATED:
        if not values[name]:
            raise fields.refuse(name, "", _EXAMPLES[name])
    devices = re.match(r"[1-9]\d{0,5}\b", values["devices"])
    if not devices:
        raise fields.refuse("devices", "does not begin with a whole number", "64")
    if not hardware_name(values["hardware"]):
        raise fields.refuse("hardware", "names no known device", f"one of {', '.join(_KINDS)}")
    if not re.match(r"\d{4}(-\d\d){0,2}$", values["date"]):
        raise fields.refuse("date", "is no date", "2026-10")
    tokens = fields.numbers("tokens_per_s_device", "362.9")
    compiled = re.search(r"(\d+(?:\.\d+)?) compiled", values["tokens_per_s_device"])
    tflops = fields.numbers("tflops_device_published", "315.6")
    peak = fields.numbers("peak_memory_gb", "56.2")
    steps = fields.numbers("step_s", "90.30")
    is_share = re.match(r"[\d.]+%", values["tflops_device_published"])
    also = re.search(r"\((?!predicted)", values["step_s"])
    run = Run(
        **{name: values[name] for name in _TEXTS},
        devices=int(devices[0]), sizes={name: fields.size(name, 4096) for name in SIZES},
        seq_len=fields.size("seq_len", 1048576), global_batch=fields.size("global_batch", 2),
        step_s=steps if also else steps[:1], tflops=tflops[0] if tflops and not is_share else None,
        tokens_per_s=float(compiled[1]) if compiled else tokens[0] if tokens else None,
        peak_gb=peak[0] * (GIB if "GiB" in values["peak_memory_gb"] else 1.0) if peak else None,
    )  # fmt: skip
    if not _UNKNOWN.fullmatch(run.mesh):
        if not (sizes := mesh_sizes(run.mesh)):
            raise fields.refuse("mesh", "names no axis with its size", _EXAMPLES["mesh"])
        if (product := math.prod(sizes.values())) != run.devices:
            raise fields.refuse("mesh", f"has {product} devices, the row has {run.devices}", _EXAMPLES["mesh"])
    return run


_TEXTS = (
    "id", "hardware", "framework", "model", "per_device_batch", "mesh", "remat", "compute_dtype", "state_dtype",
    "attention", "flop_convention", "source", "date",
)  # fmt: skip
_KINDS = {
    "TPU v5p": "v5p", "TPU v7x": "v7x", "TPU v6e": "v6e", "TPU v5e": "v5e", "H100": "h100", "H200": "h200",
    "B200": "b200", "MI300X": "mi300x", "MI325X": "mi325x", "MI355X": "mi355x", "gfx950": "mi355x", "gfx942": "mi300x",
}  # fmt: skip
"""words of a row's hardware -> its name among the targets"""


def hardware_name(text: str) -> str:
    """The target's name in a row's hardware; empty if there is none."""
    return next((name for words, name in _KINDS.items() if words in text), "")


def mesh_sizes(text: str) -> dict[str, int]:
    """Axis -> size of a text such as ``context64 x fsdp1``; what stands in parentheses does not count."""
    plain = re.sub(r"\(.*?\)", "", text).replace("zero3 x", "zero")
    return {axis: int(size) for axis, size in re.findall(r"\b([a-z]+)([1-9]\d*)\b", plain)}


# ------------------------------------------------------------------------------------------------ measured


def measured_seconds(run: Run) -> tuple[float | None, str]:
    """(seconds of a step, where the number comes from); (None, why there is none)."""
    if run.step_s:
        return run.step_s[0], "step"
    tokens = total_tokens(run)
    if tokens is None:
        return None, "its batch or length is not published, so tokens/s give no step"
    if run.tokens_per_s:
        return tokens / run.devices / run.tokens_per_s, "tokens/s"
    if run.tflops and run.flop_convention.startswith(("full attention", "causal half")):
        whole_square = run.flop_convention.startswith("full")
        return run_flops(run, whole_square) / run.devices / (run.tflops * 1e12), "TFLOP/s"
    return None, "no time, and no TFLOP/s by a known convention"


def run_flops(run: Run, whole_square: bool = False) -> float:
    """`model_flops` of a published run's step."""
    return model_flops(model_of(run), total_tokens(run) or 0, run.seq_len or 1, whole_square=whole_square)


def total_tokens(run: Run) -> int | None:
    """Tokens of a step over all devices; None if not published."""
    batch = batch_of(run)[0]
    return batch * run.seq_len if batch and run.seq_len else None


def batch_of(run: Run) -> tuple[int | None, int]:
    """(sequences of a step, or None; micro-batches)."""
    said = run.per_device_batch
    accumulate = re.search(r"accumulate (\d+)|micro-batches (\d+)", said)
    times = int(accumulate[1] or accumulate[2]) if accumulate else 1
    if run.global_batch:
        micro = re.match(r"micro (\d+)$", said)
        sizes = mesh_sizes(run.mesh)
        ranks = run.devices // math.prod(size for axis, size in sizes.items() if axis not in _BATCH_AXES)
        return run.global_batch, max(1, run.global_batch // (int(micro[1]) * ranks)) if micro else times
    if accumulate:
        return times, times
    if re.fullmatch(r"\d+", said):
        return int(said) * run.devices, 1
    return None, 1


# ------------------------------------------------------------------------------------------------ rebuilt


class NotRebuilt(Exception):
    """Why no program of this package is near enough to a published run."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rebuilt:
    """The program of this package nearest to a published run."""

    run: Run
    target: str
    """such as v5p:64"""
    config: Config
    remats: tuple[Remat, ...]
    """remat policies; of several, the first whose peak memory fits counts"""
    kernel: str
    """published attention kernel, by the names of `tsp_jax.hardware.rates`"""
    backward_products: int
    """that its backward pass executes for each pair of query and key"""
    remarks: tuple[str, ...]
    """how the program differs from the published one"""


_BATCH_AXES = ("fsdp", "dp", "zero")
_CONTEXT_AXES = ("context", "cp")


def model_of(run: Run) -> ModelConfig:
    """The model of a run; raises NotRebuilt if a size was not published."""
    if unknown := [name for name, size in run.sizes.items() if size is None]:
        raise NotRebuilt(f"{', '.join(unknown)} not published")
    sizes = {name: size or 0 for name, size in run.sizes.items()}
    return ModelConfig(
        vocab_size=sizes["vocab"], d_model=sizes["d_model"], num_layers=sizes["layers"], num_heads=sizes["heads"],
        num_kv_heads=sizes["kv_heads"], head_dim=sizes["head_dim"], d_ff=sizes["d_ff"],
        qk_norm="qwen3" in run.model, tie_embeddings=run.model in ("qwen3-0.6b", "qwen3-1.7b", "qwen3-4b"),
    )  # fmt: skip


def rebuild(run: Run) -> Rebuilt:
    """The configuration nearest to a published run.

    Raises:
      NotRebuilt: a size, the mesh, the batch or the figure is not published, or no layout or dtype comes near.
    """
    if re.search("fp8|float8", run.compute_dtype):
        raise NotRebuilt(
            f"products in {run.compute_dtype}: this package has no float8, and bfloat16 is another program"
        )
    model = model_of(run)
    if run.seq_len is None:
        raise NotRebuilt("seq_len not published")
    layout, sizes, remarks = _layout(run)
    batch, accumulate = batch_of(run)
    if batch is None:
        raise NotRebuilt(f"sequences per step not published (per_device_batch: {run.per_device_batch or 'none'})")
    if measured_seconds(run)[0] is None:
        raise NotRebuilt(measured_seconds(run)[1])
    if layout == "sp" and accumulate > 1:
        raise NotRebuilt(
            f"gradients accumulated over {accumulate} micro-batches on each device and reduced once: here each "
            "micro-batch reduces them"
        )
    remats, remat_remarks = _remats(run)
    kernel, products, kernel_remarks = _kernel(run)
    config = Config(
        model=model, stream=StreamConfig(kernel=NAME), optimizer=OptimizerConfig(zero1=layout == "sp"), layout=layout,
        mesh=format_sizes(sizes), steps=1, batch=batch, seq_len=run.seq_len, accumulate=accumulate, remat=remats[0],
    )  # fmt: skip
    return Rebuilt(
        run=run, target=f"{hardware_name(run.hardware)}:{run.devices}", config=config, remats=remats, kernel=kernel,
        backward_products=products, remarks=(*remarks, *remat_remarks, *kernel_remarks, *_other_remarks(run)),
    )  # fmt: skip


def _layout(run: Run) -> tuple[str, dict[str, int], Sequence[str]]:
    """(layout, mesh, remarks) nearest to a run's mesh."""
    if _UNKNOWN.fullmatch(run.mesh):
        raise NotRebuilt(f"mesh not published ({run.mesh})")
    sizes = mesh_sizes(run.mesh)
    if "pp" in sizes:
        raise NotRebuilt("pipeline parallelism: this package has no pipeline layout")
    context = math.prod(size for axis, size in sizes.items() if axis in _CONTEXT_AXES)
    shards, replicas = sizes.get("fsdp", sizes.get("zero", 1)), sizes.get("dp", 1)
    ring = ["attention all-gathers keys and values by buckets of heads, the run passes them around a ring"]
    if "a2a" in run.mesh:
        ring = ["attention all-gathers keys and values, the run exchanges heads (all-to-all)"]
    if tensor := sizes.get("tensor"):
        return "tp(weights=model+data)", {"data": shards, "model": tensor}, ["weights stream by buckets"]
    if context == 1:
        layout = "fsdp(batch=pod+data)" if replicas > 1 else "fsdp"
        pods = {"pod": replicas} if replicas > 1 else {}
        return layout, pods | {"data": shards}, ["weights stream by buckets"]
    if re.search("Megatron|NeMo", run.framework):
        here = "weights are replicated, moments sharded over data alone; the run shards its optimizer over all"
        return "sp", {"data": replicas, "seq": context}, [here, *ring]
    if shards > 1:
        return "fsdp_cp(weights=data+tsp)", {"data": shards, "tsp": context}, ring
    return "fsdp_cp", {"data": 1, "tsp": context}, ring


def remat_is_published(run: Run) -> bool:
    """Whether a run says what it recomputes."""
    return not _UNKNOWN.fullmatch(run.remat)


def _remats(run: Run) -> tuple[tuple[Remat, ...], Sequence[str]]:
    """(policies, remarks) nearest to a run's."""
    said = run.remat.lower()
    if said == "none stated":
        return ("none",), ["no recomputation is stated; MLPs recompute gate and up"]
    if not remat_is_published(run):
        return ("none", "save_attention", "full"), [f"remat is not published ({run.remat}): the first policy that fits"]
    if said.startswith("full") and "offload" in said:
        return ("offload",), ()
    if said.startswith("full"):
        return ("full",), ()
    if "context=remat" in said:
        return ("offload" if "layer input=offload" in said else "full",), ()
    if said.startswith(("custom(context", "context")):
        if "offload" in said and "offload_attention" in get_args(Remat):
            return ("offload_attention",), ()  # pyright: ignore[reportReturnType]
        moved = ["what the run keeps in the host's memory stays on the device"] if "offload" in said else []
        return ("save_attention",), moved
    if said.startswith(("save_dot", "minimal")):
        return ("none",), ["none keeps all products but gate and up"]
    if said.startswith("selective"):
        return ("save_attention",), ["the run keeps every other product too"]
    raise NotRebuilt(f"no remat policy is near {run.remat}")


def _kernel(run: Run) -> tuple[str, int, Sequence[str]]:
    """(kernel, products of its backward for each pair, remarks)."""
    said = run.attention.lower()
    if re.search("splash|flash|tokamax", said) and run.hardware.startswith("TPU"):
        return "tpu", 5, ()  # tokamax 0.0.10 has one fused backward kernel alone
    if "cudnn" in said:
        return "cudnn", 5, ()
    if re.search(r"\bck\b|aiter|te-ck", said):
        return "aiter", 5, ()
    known = {"rocm": "aiter", "cuda": "triton", "tpu": "tpu"}[HARDWARE[hardware_name(run.hardware)].platform]
    return known, 5, [f"attention kernel: {run.attention or 'not stated'}, priced as {known}"]


def _other_remarks(run: Run) -> Sequence[str]:
    remarks = []
    if "500W" in run.hardware:
        remarks.append("the card is limited to 500 W, rates are of 700 W")
    if "host" in run.state_dtype or "optimizer" in run.remat:
        remarks.append("the run keeps its optimizer's state on the host, here it is on the device")
    return remarks
