"""Checks and times the attention kernels on one GPU, tries other tiles, and trains and calibrates for a few seconds.

Each part is a process of its own, so that a crash of a compiler ends one part only. The parts about kernels import
nothing but jax and numpy. Every result is one line of gpu_check.jsonl in the folder of --out, written when it is known.

On a GPU: python benchmarks/gpu_check.py --out OUT              (220 s at most)
On a CPU, interpreted and tiny, to see that it runs: python benchmarks/gpu_check.py --out OUT --interpret

Dims: B batch, T query tokens, S key tokens, K KV heads, G query heads per KV head, N = K G query heads, H head.
"""

import argparse
import functools
import importlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import types
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
BEGAN = time.perf_counter()
PARTS = {"device": 30, "check": 150, "rates": 60, "tiles": 75, "train": 75, "calibrate": 75}
"""part -> most seconds that it may take"""
SHORTEST = 15
"""a part with fewer seconds left is not begun"""


# ------------------------------------------------------------------------------------------------ results


class Results:
    """Results of a part: printed at once, and appended to a file of JSON lines."""

    def __init__(self, folder: Path, part: str):
        self.file, self.part = folder / "gpu_check.jsonl", part

    def add(self, text: str, **facts: Any) -> None:
        """Prints a line and writes it with its facts."""
        say(f"{self.part}: {text}")
        with self.file.open("a") as file:
            print(json.dumps({"part": self.part, "text": text, **facts}), file=file)

    def failed(self, text: str, error: Exception, **facts: Any) -> None:
        """Prints one line about an exception, and writes the end of its traceback."""
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        trace = traceback.format_exc()[-3000:]
        self.add(f"{text}: ERROR {reason[:300]}", **facts, ok=False, error=reason[:3000], traceback=trace)


def say(text: str) -> None:
    """Prints a line with the seconds since the process began."""
    print(f"[{time.perf_counter() - BEGAN:6.1f} s] {text}", flush=True)


# ------------------------------------------------------------------------------------------------ what the parts share


def load(module: str) -> Any:
    """A module of the package. If what the package itself needs is not installed, its `__init__` is not run."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    try:
        return importlib.import_module(module)
    except ImportError:
        for name in [name for name in sys.modules if name.split(".")[0] == "tsp_jax"]:
            del sys.modules[name]
        package = types.ModuleType("tsp_jax")
        package.__path__ = [str(ROOT / "tsp_jax")]
        sys.modules["tsp_jax"] = package
        return importlib.import_module(module)


class Sizes(NamedTuple):
    """Sizes of a check or of a timing."""

    tokens: int
    kv_heads: int
    group: int
    head_dim: int
    dtype: str

    @property
    def products(self) -> float:
        """Operations of one matrix product over the causal half of all pairs of tokens."""
        return 2.0 * self.tokens * self.tokens / 2 * self.head_dim * self.kv_heads * self.group


def arrays(sizes: Sizes, queries: int = 0) -> list[Any]:
    """Random q [1, T, K, G, H], k and v [1, S, K, H], dout like q. `queries`: T, where it is not S."""
    import jax

    heads = sizes.kv_heads, sizes.group, sizes.head_dim
    of_queries, of_keys = (1, queries or sizes.tokens, *heads), (1, sizes.tokens, heads[0], heads[2])
    shapes = of_queries, of_keys, of_keys, of_queries
    return [jax.random.normal(jax.random.key(i), shape).astype(sizes.dtype) for i, shape in enumerate(shapes)]


def natural(tokens: int) -> Any:
    """Tokens of one document in their natural order."""
    import jax.numpy as jnp

    return load("tsp_jax.ops.kernels.mask").Tokens.one_document(jnp.arange(tokens, dtype=jnp.int32)[None])


def attend(kernel: Any, q: Any, k: Any, v: Any, queries: Any, keys: Any, rule: Any = ()) -> tuple[Any, ...]:
    """(out, lse) of a kernel; here and in `attend_backward` alone the kernels' signatures are known."""
    return kernel.attend(q, k, v, queries, keys, scores(rule))


def attend_backward(kernel: Any, q, k, v, queries, keys, out, lse, dout, rule: Any = ()) -> tuple[Any, ...]:
    """(dq, dk, dv) of a kernel."""
    kernels = load("tsp_jax.ops.kernels")
    return kernel.attend_backward(q, k, v, queries, keys, kernels.delta(out, dout), lse, dout, scores(rule))


def scores(rule: Iterable[tuple[str, Any]]) -> Any:
    """The scores with these fields."""
    return load("tsp_jax.ops.kernels.mask").Scores(**dict(rule))


def kernels_here(interpret: bool) -> dict[str, Any]:
    """name -> kernel of each row of the table, for this device."""
    import jax
    import numpy as np

    kernels = load("tsp_jax.ops.kernels")
    arch = kernels.arch_of(jax.sharding.Mesh(np.array(jax.devices()[:1]), ("one",)))
    found = {name: kernel.for_arch(arch) for name, kernel in kernels.KERNELS.items()}
    if interpret:
        found["triton"] = kernels.TritonKernel("interpret")
    return found


def compile_all(calls: Iterable[tuple[str, Callable[..., Any], tuple[Any, ...]]], results: Results) -> dict[str, Any]:
    """name -> compiled call, for each (name, function, arguments) that compiles; the compilers run side by side."""
    import jax

    def compile_one(call: tuple[str, Callable[..., Any], tuple[Any, ...]]) -> tuple[str, Any]:
        name, function, arguments = call
        try:
            return name, jax.jit(function).lower(*arguments).compile()
        except Exception as error:
            results.failed(f"{name} does not compile", error, name=name)
            return name, None

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        done = dict(pool.map(compile_one, calls))
    say(f"{sum(value is not None for value in done.values())} of {len(done)} programs compiled")
    return {name: value for name, value in done.items() if value is not None}


def seconds(call: Callable[[], Any], total: float = 0.1, repeats: int = 5) -> list[float]:
    """Seconds of one call, in each of some repeats; a repeat queues calls for about `total` seconds, then waits."""
    import jax

    jax.block_until_ready(call())
    began = time.perf_counter()
    jax.block_until_ready(call())
    number = max(1, min(100, int(total / (time.perf_counter() - began))))
    found = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready([call() for _ in range(number)][-1])
        found.append((time.perf_counter() - began) / number)
    return found


def rate(results: Results, name: str, flops: float, times: list[float], **facts: Any) -> None:
    """Reports operations/s."""
    median = statistics.median(times)
    low, high = flops / max(times) / 1e12, flops / min(times) / 1e12
    text = f"{name:44} {flops / median / 1e12:8.1f} TFLOP/s ({low:.1f} to {high:.1f}), {median * 1e3:.3f} ms"
    results.add(text, name=name, flops=flops, seconds=times, tflops=flops / median / 1e12, **facts)


# ------------------------------------------------------------------------------------------------ the parts


def device(results: Results, interpret: bool) -> None:
    """Versions and devices."""
    import jax
    import numpy as np

    found = jax.devices()
    versions = {"python": sys.version.split()[0], "jax": jax.__version__}
    for name in ("jaxlib", "flax", "optax", "orbax.checkpoint", "msgspec", "tyro", "rich"):
        try:
            module = importlib.import_module(name)
            versions[name] = getattr(module, "__version__", "present")
        except Exception as error:
            versions[name] = f"absent ({type(error).__name__})"
    facts = [getattr(found[0], "compute_capability", ""), *((found[0].memory_stats() or {}).get("bytes_limit", ""),)]
    results.add(f"{len(found)} x {found[0].device_kind} {facts}, {versions}, numpy {np.__version__}", versions=versions)
    if not interpret:
        asked = ["nvidia-smi", "--query-gpu=name,driver_version,power.limit,clocks.max.sm", "--format=csv,noheader"]
        results.add(subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip())


class Case(NamedTuple):
    """Inputs of one check."""

    name: str
    sizes: Sizes
    queries: Any
    keys: Any
    empty: bool = False
    """whether some query has no key, where the reference would give NaN"""
    rule: tuple[tuple[str, Any], ...] = ()
    """fields of `Scores`"""

    @property
    def key(self) -> str:
        """Cases with the same key share a compiled program."""
        rule = "".join(f" {name} {value}" for name, value in self.rule)
        return f"H {self.sizes.head_dim} T {self.queries.positions.shape[1]} S {self.sizes.tokens}{rule}"


def cases(interpret: bool) -> list[Case]:
    """Heads of each size, packed documents, one zigzag rank's queries, ragged lengths and queries without a key."""
    import jax.numpy as jnp
    import numpy as np

    tokens_of = load("tsp_jax.ops.kernels.mask").Tokens
    total = 64 if interpret else 2048
    positions = np.arange(total)
    ends = np.array([0.17, 0.2, 0.71]) * total
    segments = (positions[:, None] >= ends).sum(axis=1)
    quarter = total // 4
    rank = np.concatenate([positions[:quarter], positions[-quarter:]])
    zigzag = np.concatenate([rank, positions[quarter:-quarter]])
    ragged = positions[: total - 24]

    def tokens(order: np.ndarray, packed: bool) -> Any:
        documents = segments[order] if packed else np.zeros_like(order)
        return tokens_of(*(jnp.asarray(x, jnp.int32)[None] for x in (order, documents)))

    def some(name: str, head_dim: int, dtype: str, order: np.ndarray, keys: np.ndarray, packed: bool, empty=False, **r):
        head_dim, rule = head_dim // 8 if interpret else head_dim, tuple(r.items())
        sizes = Sizes(len(keys), 2, 4, head_dim, dtype)
        return Case(f"{name} H {head_dim} {dtype}", sizes, tokens(order, packed), tokens(keys, packed), empty, rule)

    found = []
    for head_dim, dtype in [(64, "bfloat16"), (128, "bfloat16"), (256, "bfloat16"), (64, "float32"), (128, "float32")]:
        found.append(some("causal", head_dim, dtype, positions, positions, False))
        found.append(some("packed", head_dim, dtype, positions, positions, True))
        found.append(some("zigzag", head_dim, dtype, rank, zigzag, False))
        found.append(some("zigzag packed", head_dim, dtype, rank, zigzag, True))
    found.append(some("ragged", 128, "bfloat16", ragged, ragged, True))
    found.append(some("odd heads", 80, "bfloat16", positions, positions, True))
    every = {"window": total // 5, "softcap": 2.0, "scale": 0.2}
    for name, rule in ("window", {"window": total // 5}), ("softcap", {"softcap": 2.0}), ("all", every):
        found.append(some(f"{name}, zigzag packed", 128, "bfloat16", rank, zigzag, True, **rule))
    found.append(some("encoder", 128, "bfloat16", positions, positions, True, causal=False))
    found.append(some("no keys", 128, "bfloat16", rank, positions[quarter:-quarter], False, empty=True))
    return found


def check(results: Results, interpret: bool) -> None:
    """Each kernel against the reference in float32: out, lse, dq, dk, dv. Compilers are slowest with float32: last."""
    for dtype in ("bfloat16", "float32"):
        check_cases(results, interpret, [case for case in cases(interpret) if case.sizes.dtype == dtype])


def check_cases(results: Results, interpret: bool, found: list[Case]) -> None:
    """`check` of some cases."""
    import jax
    import jax.numpy as jnp

    reference, xla = load("tsp_jax.ops.reference"), load("tsp_jax.ops.kernels").XlaKernel(128, 128)

    def exact(rule, q, k, v, queries, keys, dout):
        tokens = queries.positions, keys.positions, queries.segments, keys.segments
        (out, lse), vjp = jax.vjp(lambda *each: reference.softmax_attention(*each, *tokens, **dict(rule)), q, k, v)
        return out, lse, *vjp((dout, jnp.zeros_like(lse)))

    def both(kernel, rule, q, k, v, queries, keys, dout):
        out, lse = attend(kernel, q, k, v, queries, keys, rule)
        return out, lse, *attend_backward(kernel, q, k, v, queries, keys, out, lse, dout, rule)

    def inputs(case: Case, dtype: str = "") -> tuple[Any, ...]:
        q, k, v, dout = (x.astype(dtype or x.dtype) for x in arrays(case.sizes, case.queries.positions.shape[1]))
        return q, k, v, case.queries, case.keys, dout

    calls = {}
    for case in found:
        key = case.key
        run = functools.partial(both, xla, case.rule) if case.empty else functools.partial(exact, case.rule)
        calls[f"exact {key}"] = (functools.partial(_highest, run), inputs(case, "float32"))
        for name, kernel in kernels_here(interpret).items():
            if reason := kernel.unsupported(case.sizes.head_dim, case.sizes.dtype, scores(case.rule)):
                say(f"{name}, {case.name}: not supported ({reason})")
                continue
            if name != "xla" or case.sizes.head_dim in (16, 128):
                run = functools.partial(both, kernel, case.rule)
                calls[f"{name} {key} {case.sizes.dtype}"] = (run, inputs(case))
    programs = compile_all([(name, *call) for name, call in calls.items()], results)
    for case in found:
        key = case.key
        try:
            desired = programs[f"exact {key}"](*inputs(case, "float32"))
        except Exception as error:
            results.failed(f"reference, {case.name}", error, name=case.name)
            continue
        for name in kernels_here(interpret):
            if program := programs.get(f"{name} {key} {case.sizes.dtype}"):
                try:
                    report(results, name, case, program(*inputs(case)), desired)
                except Exception as error:
                    results.failed(f"{name}, {case.name}", error, kernel=name, name=case.name)


def _highest(function: Callable[..., Any], *arguments: Any) -> Any:
    import jax

    with jax.default_matmul_precision("highest"):
        return function(*arguments)


def report(results: Results, kernel: str, case: Case, actual: Any, desired: Any) -> None:
    """Greatest error over greatest value, and the norm of the error over that of the value, for each array."""
    import numpy as np

    # float32: products may take operands of 10 bits (tf32); bfloat16: operands and results have 8.
    limit = {"float32": 4e-3, "bfloat16": 1.5e-2}[case.sizes.dtype]
    greatest, norms = {}, {}
    for name, ours, theirs in zip(("out", "lse", "dq", "dk", "dv"), actual, desired, strict=True):
        x, y = (np.asarray(each.astype("float32"), np.float64) for each in (ours, theirs))
        if name == "lse":  # a query without keys has -1e30 in both
            x, y = np.maximum(x, -1e4), np.maximum(y, -1e4)
        greatest[name] = float(np.abs(x - y).max() / max(np.abs(y).max(), 1e-30))
        norms[name] = float(np.linalg.norm(x - y) / max(np.linalg.norm(y), 1e-30))
    ok = all(error <= limit for error in norms.values())  # False for NaN
    text = " ".join(f"{name} {greatest[name]:.1e}/{norms[name]:.1e}" for name in norms)
    worst = max(norms, key=lambda name: norms[name])
    text = f"{worst} {greatest[worst]:.1e}/{norms[worst]:.1e} is worst" if ok else text
    results.add(
        f"{'PASS' if ok else 'FAIL'} {kernel}, {case.name}: {text} (max/norm; norm at most {limit:g})",
        ok=ok, kernel=kernel, name=case.name, greatest=greatest, norms=norms,
    )  # fmt: skip


def timed_sizes(interpret: bool) -> list[Sizes]:
    """16 K tokens, 16 query and 4 KV heads."""
    tokens, divisor = (64, 8) if interpret else (16384, 1)
    return [Sizes(tokens, 4, 4, head_dim // divisor, "bfloat16") for head_dim in (128, 64, 256)]


def rates(results: Results, interpret: bool) -> None:
    """Operations/s of the causal half: 2 products forward, 5 backward, whatever a kernel recomputes."""
    import jax

    calls, order = {}, []

    def add(name: str, flops: float, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        calls[name] = (function, arguments)
        order.append((name, flops))

    for sizes in timed_sizes(interpret):
        q, k, v, dout = arrays(sizes)
        tokens, head = natural(sizes.tokens), f"H {sizes.head_dim}"
        flat = q.reshape(1, sizes.tokens, -1, sizes.head_dim), k, v
        direct = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
        for name, kernel in kernels_here(interpret).items():
            if reason := kernel.unsupported(sizes.head_dim, sizes.dtype):
                say(f"{name}, {head}: not supported ({reason})")
                continue
            inputs = q, k, v, tokens, tokens
            out, lse = jax.eval_shape(functools.partial(attend, kernel), *inputs)
            out, lse = dout.astype(out.dtype), jax.random.uniform(jax.random.key(9), lse.shape) + 20.0
            add(f"{name} forward {head}", 2 * sizes.products, functools.partial(attend, kernel), inputs)
            backward = functools.partial(attend_backward, kernel)
            add(f"{name} backward {head}", 5 * sizes.products, backward, (*inputs, out, lse, dout))
        if interpret:
            continue
        add(f"cudnn of jax.nn forward {head}", 2 * sizes.products, direct, flat)

        def both(q, k, v, dout, direct=direct):
            out, vjp = jax.vjp(direct, q, k, v)
            return out, *vjp(dout)

        add(f"cudnn of jax.nn both {head}", 7 * sizes.products, both, (*flat, dout.reshape(flat[0].shape)))
    programs = compile_all([(name, *call) for name, call in calls.items()], results)
    for name, flops in order:
        if name in programs:
            try:
                arguments = calls[name][1]
                rate(results, name, flops, seconds(lambda name=name, a=arguments: programs[name](*a)))
            except Exception as error:
                results.failed(name, error, name=name)


TRIED = {
    128: {
        "forward": [(128, 64, 4, 3), (128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 4, 2), (128, 64, 4, 4)],
        "dq": [(128, 128, 8, 2), (64, 64, 4, 3), (128, 64, 8, 2), (64, 64, 4, 2), (64, 64, 4, 4)],
        "dkv": [(64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 8, 2), (64, 128, 8, 3), (32, 64, 4, 2)],
    },
    64: {
        "forward": [(128, 64, 4, 3), (128, 128, 8, 3), (128, 128, 8, 2), (128, 128, 4, 3), (64, 64, 4, 3)],
        "dq": [(128, 128, 8, 2), (128, 64, 4, 3), (64, 64, 4, 3), (128, 64, 8, 3), (64, 128, 4, 2)],
        "dkv": [(64, 64, 4, 2), (64, 128, 8, 3), (64, 128, 4, 2), (128, 128, 8, 2), (128, 64, 4, 2)],
    },
    256: {
        "forward": [(128, 32, 8, 3), (128, 64, 8, 2), (64, 64, 4, 2), (128, 64, 8, 1), (64, 32, 4, 3)],
        "dq": [(64, 32, 8, 2), (64, 64, 8, 2), (64, 32, 4, 2), (128, 32, 8, 2), (128, 64, 8, 1)],
        "dkv": [(32, 64, 8, 2), (64, 64, 8, 1), (32, 64, 4, 2), (32, 32, 4, 2), (64, 64, 8, 2)],
    },
}
"""heads -> kernel -> (query tokens, key tokens, warps, stages)"""
TRIED_INTERPRETED = {
    16: {"forward": [(8, 8, 4, 1), (16, 8, 4, 1)], "dq": [(8, 8, 4, 1)], "dkv": [(4, 8, 4, 1), (8, 8, 4, 1)]}
}


def tiles(results: Results, interpret: bool) -> None:
    """Other tiles: operations/s of the products that each kernel does, and how far results differ from the first."""
    table = TRIED_INTERPRETED if interpret else TRIED
    for sizes in timed_sizes(interpret):
        if sizes.head_dim in table:
            try_tiles(results, interpret, sizes, table[sizes.head_dim])


def try_tiles(results: Results, interpret: bool, sizes: Sizes, tried: dict[str, list[tuple[int, ...]]]) -> None:
    """`tiles` for heads of one size."""
    import jax
    import numpy as np

    kernels, tables = load("tsp_jax.ops.kernels"), load("tsp_jax.ops.kernels.tiles")
    usual = kernels_here(interpret)["triton"]
    q, k, v, dout = arrays(sizes)
    tokens = natural(sizes.tokens)
    inputs = q, k, v, tokens, tokens
    out, lse = jax.block_until_ready(jax.jit(functools.partial(attend, usual))(*inputs))
    standard = tables.find_tiles(usual.arch, sizes.head_dim, sizes.dtype)
    assert standard is not None
    products = {"forward": 2, "dq": 3, "dkv": 4}
    calls = {}
    for part, shapes in tried.items():
        for shape in shapes:
            kernel = kernels.TritonKernel(usual.arch, standard._replace(**{part: tables.Tile(*shape)}))
            if part == "forward":
                call = (lambda *a, kernel=kernel: attend(kernel, *a)[0]), inputs
            else:  # XLA leaves out the kernel whose results are not asked for
                wanted = slice(0, 1) if part == "dq" else slice(1, 3)
                call = (lambda *a, kernel=kernel, w=wanted: attend_backward(kernel, *a)[w]), (*inputs, out, lse, dout)
            calls[f"H {sizes.head_dim} {part} {shape}"] = (part, *call)
    programs = compile_all([(name, *call[1:]) for name, call in calls.items()], results)
    first: dict[str, Any] = {}
    for name, program in programs.items():
        part, _, arguments = calls[name]
        try:
            made = [np.asarray(x.astype("float32")) for x in jax.tree.leaves(program(*arguments))]
            base = first.setdefault(part, made)
            error = max(float(np.linalg.norm(x - y) / np.linalg.norm(y)) for x, y in zip(made, base, strict=True))
            times = seconds(lambda p=program, a=arguments: p(*a), total=0.05)
            label = f"{name} (differs by {error:.0e})"
            rate(results, label, products[part] * sizes.products, times, tile=name, error=error)
        except Exception as problem:
            results.failed(name, problem, tile=name)


TRAINED = {
    "heads of 128": (
        "--model.d-model 1024 --model.num-heads 8 --model.num-kv-heads 4 --model.head-dim 128 --model.d-ff 4096 "
        "--compute-dtype bfloat16 --seq-len 4096 --batch 4",
        ("auto", "xla"),
    ),
    "tiny": ("", ()),
}
"""name -> (flags for configs/tiny.py, attention kernels)"""


def train(results: Results, interpret: bool) -> None:
    """A short training run with each kernel: the losses must agree."""
    for name, (flags, kernels) in TRAINED.items():
        for kernel in ["auto"] * (name == "tiny") if interpret else kernels:
            with tempfile.TemporaryDirectory() as folder:
                chosen = f"--cpu-devices {int(interpret)} --mesh data=1,tsp=1 --stream.kernel {kernel}"
                steps = 2 if interpret else 20
                short = f"--steps {steps} --eval-every 0 --checkpoint-every {steps} --workdir {folder}/run"
                say(f"training {name}, {kernel}")
                done = run_script("train.py", f"tiny {flags} {chosen} {short}")
                metrics = [file.read_text().splitlines() for file in Path(folder).rglob("*.jsonl")]
                last = [line for lines in metrics for line in lines][-3:]
                tail = done.stdout.strip().splitlines()[-4:] + done.stderr.strip().splitlines()[-12:]
                results.add(
                    f"{name}, {kernel}: exit code {done.returncode}\n  " + "\n  ".join([*last, *tail]),
                    ok=done.returncode == 0, metrics=metrics, stdout=done.stdout[-4000:], stderr=done.stderr[-6000:],
                )  # fmt: skip


def calibrate(results: Results, interpret: bool) -> None:
    """The calibration of this device, quick; its file stands beside the results."""
    out = results.file.with_name("calibration.json")
    done = run_script("calibrate.py", f"--out {out} --quick --cpu-devices {2 * interpret}")
    text = f"exit code {done.returncode}\n{done.stdout[-6000:]}\n{done.stderr[-3000:]}"
    results.add(text, ok=done.returncode == 0)


def run_script(name: str, flags: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    command = [sys.executable, str(ROOT / "scripts" / name), *flags.split()]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": paths})


def main() -> None:
    """Runs the parts one after another."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", default="gpu_check", help="folder for the results")
    parser.add_argument("--parts", default=",".join(PARTS), help="parts to run, separated by commas")
    parser.add_argument("--interpret", action="store_true", help="tiny sizes; Triton's kernels are interpreted")
    parser.add_argument("--one-part", default="", help="run this part in this process")
    parser.add_argument("--seconds", type=float, default=0.0, help="most seconds for each part; 0: see PARTS")
    parser.add_argument("--total", type=float, default=220.0, help="most seconds for all parts, but if interpreted")
    args = parser.parse_args()
    out = Path(args.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    if args.one_part:
        results = Results(out, args.one_part)
        try:
            globals()[args.one_part](results, args.interpret)
        except Exception as error:
            results.failed("the part ended early", error)
            traceback.print_exc()
            sys.exit(1)
        return
    for part in args.parts.split(","):
        limit = args.seconds or PARTS[part] * (10 if args.interpret else 1)
        left = args.total - time.perf_counter() + BEGAN if args.total and not args.interpret else limit
        if left < SHORTEST:
            say(f"-- {part}: not begun, {left:.0f} s are left")
            continue
        command = [sys.executable, __file__, "--out", str(out), "--one-part", part, *["--interpret"][: args.interpret]]
        began = time.perf_counter()
        code = run_group(command, min(limit, left))
        say(f"-- {part}: exit code {code}, {time.perf_counter() - began:.1f} s")


def run_group(command: list[str], limit: float) -> str:
    """The exit code of a command; after `limit` seconds it is killed, with the processes that it started."""
    with subprocess.Popen(command, start_new_session=True) as process:
        try:
            return str(process.wait(limit))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return "none, timed out"


if __name__ == "__main__":
    main()
