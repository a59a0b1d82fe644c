"""Predictions beside published runs: pricing attention, errors, explanations, and the command."""

import dataclasses
import gzip
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.builders.targets import needs_compiler
from tsp_jax.config import Config, ModelConfig, StreamConfig
from tsp_jax.errors import ConfigError
from tsp_jax.hardware.targets import parse_target
from tsp_jax.inspect import parse, simulate
from tsp_jax.ops.kernels import KERNELS
from tsp_jax.plan.compile import compile_step
from tsp_jax.tools.priced import causal_flops, priced_kernel
from tsp_jax.tools.published import measured_seconds, read_runs, rebuild, run_flops
from tsp_jax.tools.validate import Comparison, Options, explain, grown, markdown, summary, validate

ROOT = Path(__file__).parents[2]
SMALL = ROOT / "tests" / "data" / "measured_small.csv"
RUNS = {run.id: run for run in read_runs(SMALL)}


def row(name: str, error: float | None, remat: str = "save_attention", **fields) -> Comparison:
    values = {"step_s": 1 + error, "low_s": 0.9, "high_s": 2.0, "measured_s": 1.0} if error is not None else {}
    return Comparison(
        id=name, hardware="64 x TPU v5p", program="", source="", date="", error=error, remat=remat, **values | fields
    )


# ------------------------------------------------------------------------------------------------ priced attention


def attention_flops(kernel: str, target: str, remat: str = "save_attention") -> dict[str, float]:
    """Direction -> operations that a compiled training step declares for attention."""
    model = ModelConfig(
        vocab_size=512, d_model=256, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=64, d_ff=512
    )  # fmt: skip
    config = Config(
        model=model, steps=1, batch=2, seq_len=4096, layout="fsdp_cp", mesh="data=2,tsp=4", remat=remat,
        stream=StreamConfig(kernel=kernel),
    )  # fmt: skip
    timeline = compile_step(config, parse_target(target)).report().timeline
    assert timeline is not None
    found = {"forward": 0.0, "backward": 0.0}
    for total in timeline.kernels:
        if kind := re.search(r"mean_flops\[attention_(\w+)", total.task.scope):
            found[kind[1]] += total.count * total.task.flops
    return found


@pytest.mark.usefixtures("optax_promotes")
@pytest.mark.parametrize(("platform", "target"), [("rocm", "mi300x:8"), ("cuda", "h100:8"), ("tpu", "v5p:8")])
def test_a_compiled_step_declares_the_products_of_the_published_kernel(platform, target):
    needs_compiler(platform)
    with priced_kernel("aiter", 5) as name:
        found = attention_flops(name, target)
    whole = {direction: 2 * causal_flops(n, 2, 4096, 4096, 4, 64) for direction, n in (("forward", 2), ("backward", 5))}
    assert found == {direction: pytest.approx(flops / 8, rel=1e-6) for direction, flops in whole.items()}


@pytest.mark.usefixtures("optax_promotes")
@pytest.mark.parametrize(("platform", "target"), [("rocm", "mi300x:8"), ("cuda", "h100:8")])
def test_priced_attention_is_what_a_kernel_of_this_package_computes_but_for_its_tiles(platform, target):
    needs_compiler(platform)
    with priced_kernel("triton", 7) as name:
        priced = attention_flops(name, target, remat="full")
    tiled = attention_flops("triton", target, remat="full")
    assert all(1.0 < tiled[direction] / priced[direction] < 1.15 for direction in priced)


BOUNDS = {"T3": 0.08, "H10": 0.04}
"""row -> largest error of time at which its stored program may be simulated"""


@pytest.mark.parametrize("name", BOUNDS)
def test_errors_of_stored_programs_do_not_grow(name):
    """Programs as jax 0.10.2 compiled them: what the rates and the simulation make of them."""
    text = gzip.decompress((SMALL.parent / f"{name}.hlo.gz").read_bytes()).decode()
    step_s = simulate(parse(text), parse_target(rebuild(RUNS[name]).target).hardware).step_s
    assert step_s == pytest.approx(measured_seconds(RUNS[name])[0], rel=BOUNDS[name])


@pytest.mark.parametrize(("platform", "name"), [("tpu", "T3"), ("rocm", "A5")])
def test_errors_of_rebuilt_runs_do_not_grow(platform, name):
    needs_compiler(platform)
    lines = []
    options = Options(rows=name, baseline=str(ROOT / "benchmarks" / "validation.json"), tolerance=0.03)
    assert validate(str(SMALL), options, lines.append) == 0, lines


def test_the_stand_in_is_in_the_table_of_kernels_only_while_it_is_needed():
    with priced_kernel("tpu", 5) as name:
        assert name in KERNELS
    assert name not in KERNELS


# ------------------------------------------------------------------------------------------------ explanations


def several(*rows: Comparison) -> tuple[list[Comparison], dict]:
    """Rows of one program of different lengths."""
    base = RUNS["T3"]
    return list(rows), {r.id: dataclasses.replace(base, id=r.id, seq_len=2 ** (20 + n)) for n, r in enumerate(rows)}


def test_recomputed_attention_is_explained_by_another_run_that_recomputes_it():
    rows, runs = several(row("keeps", 0.0), row("a", -0.4, "full"), row("b", -0.4, "offload"))
    found = {r.id: r.explanation for r in explain(rows, runs)}
    assert "by b over keeps: with this factor the error is +0.0%" in found["a"]
    assert "by a over keeps" in found["b"]
    assert not found["keeps"]


@pytest.mark.parametrize(
    ("said", "remat", "executed", "explained"),
    [
        ("not stated", "full", 1.4, True),  # (1.5 - 0.1) / 1.4 of the measured step without recomputation and waits
        ("minimal", "none", 1.4, True),
        ("not stated", "full", 1.0, False),  # nothing is recomputed
        ("full", "full", 1.4, False),  # the run recomputes as much
    ],
)
def test_a_run_may_keep_what_the_program_recomputes(said, remat, executed, explained):
    run = dataclasses.replace(RUNS["T3"], remat=said)
    flops = executed * run_flops(run) / run.devices
    (found,) = explain([row("T3", 0.5, remat, low_s=1.45, exposed_comm_s=0.1, flops=flops)], {"T3": run})
    assert bool(found.explanation) == explained
    if explained:
        assert "executes 1.40 x the model's own products and waits 0.1 s" in found.explanation
        assert "without both the error is +0.0% (-3.6% at" in found.explanation


@pytest.mark.parametrize(
    "rows",
    [
        [row("a", -0.4, "full"), row("b", -0.4, "full")],  # nothing that keeps attention
        [row("keeps", 0.0), row("a", -0.4, "full")],  # no other that recomputes it
        [row("keeps", 0.0), row("a", -0.4, "full"), row("b", 0.3, "full")],  # the other says nothing of the kind
        [row("keeps", 0.0), row("a", -0.4), row("b", -0.4, "full")],  # nothing is recomputed
    ],
)
def test_without_support_nothing_is_explained(rows):
    assert not any(r.explanation for r in explain(*several(*rows)) if r.id == "a")


# ------------------------------------------------------------------------------------------------ results


def test_grown_errors_are_named():
    baseline = {"rows": [{"id": "T3", "error": 0.05, "memory_error": None}, {"id": "T5", "error": -0.05}]}
    assert not grown([row("T3", -0.06), row("T5", 0.06)], baseline, 0.02)
    assert grown([row("T3", -0.08), row("T5", 0.0)], baseline, 0.02) == ["T3: error was +5.0%, is -8.0%"]
    (line,) = grown([row("T5", None, reason="no compiler")], baseline, 0.02)
    assert line == "T5: error was -5.0%, now there is none: no compiler"


def test_medians_are_of_absolute_errors():
    lines = summary([row("a", 0.1), row("b", -0.3), row("c", 0.2), row("d", None)])
    assert lines[0] == "all: 3 rows, median absolute error of time 20.0%, largest 30.0%"
    assert lines[1].startswith("TPU v5p: 3 rows")


def test_the_note_has_a_line_for_each_row_and_each_reason():
    text = markdown([row("a", 0.1), row("b", None, reason="products in fp8")], "runs.csv")
    assert "| a |" in text and "+10.0%" in text
    assert "- b (64 x TPU v5p): products in fp8." in text


def test_rows_that_are_not_there_are_refused():
    with pytest.raises(ConfigError, match=r"rows=T3,T99: .* has no row T99; use some of T3,T5"):
        validate(str(SMALL), Options(rows="T3,T99"))


def test_the_command_refuses_a_malformed_file_in_one_line(tmp_path):
    file = tmp_path / "runs.csv"
    file.write_text(SMALL.read_text().replace("1048576,2,", "1048576,two,", 1))
    command = [sys.executable, str(ROOT / "benchmarks" / "validate.py"), str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"error: {file} row T3: global_batch=two is no whole number above 0; use 2, or not stated\n"


def test_rows_that_cannot_be_rebuilt_need_no_compiler(tmp_path):
    lines = []
    out = tmp_path / "out.json"
    assert validate(str(SMALL), Options(rows="H6,A6", json=str(out)), lines.append) == 0
    assert [r["reason"][:20] for r in json.loads(out.read_text())["rows"]] == [
        "products in float8 l",
        "seq_len not publishe",
    ]
