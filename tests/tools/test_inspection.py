"""Compiling steps for targets, reports, contracts, comparisons, and the scripts that show them."""

import csv
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from tests.builders.arrays import place_case
from tests.builders.targets import installed
from tsp_jax import inspect
from tsp_jax.config import Config, ModelConfig, OptimizerConfig, StreamConfig
from tsp_jax.cost.serving import cache_bytes, decode_traffic
from tsp_jax.cost.training import step_memory
from tsp_jax.errors import ConfigError
from tsp_jax.hardware.targets import parse_target, use_target
from tsp_jax.inspect.expect import broken, parse_expectations
from tsp_jax.layout import LAYOUTS, get_layout
from tsp_jax.tools.cli import load_config
from tsp_jax.tools.compile import compile_step, place_on
from tsp_jax.tools.sweep import Row, compare_layouts, configure, parse_layout, write_csv, write_json

pytestmark = pytest.mark.usefixtures("optax_promotes")

ROOT = Path(__file__).parents[2]
CPU = parse_target("cpu:8")
CONFIG = Config(
    model=ModelConfig(vocab_size=64, d_model=32, num_layers=2, num_heads=8, num_kv_heads=8, head_dim=8, d_ff=64),
    stream=StreamConfig(
        attention_movement="gather",
        mlp_movement="gather",
        bucket_mib=0.0045,
        query_block=16,
        key_block=16,
    ),
    optimizer=OptimizerConfig(warmup_steps=1),
    layout="tsp",
    mesh="data=1,tsp=8",
    steps=2,
    batch=1,
    seq_len=64,
    compute_dtype="float32",
    workdir="unused",
)
JSON_FIELDS = {"argument_bytes", "output_bytes", "alias_bytes", "temp_bytes", "peak_bytes"}
COLLECTIVE_FIELDS = {"op", "axis", "scope", "count", "bytes", "is_async", "hidden_fraction"}
TIMELINE_FIELDS = {"step_s", "compute_s", "comm_s", "exposed_comm_s", "flops"}
FACTS = {"target", "num_devices", "layout", "mesh", "seq_len", "batch", "num_params", "compile_s"}


@pytest.fixture(scope="module")
def step():
    return compile_step(CONFIG, CPU)


@pytest.fixture(scope="module")
def found(step):
    return step.report()


# ------------------------------------------------------------------------------------------------ reports


def test_json_holds_what_other_tools_read(step, found):
    facts, report = step.facts(), found.to_json()
    assert set(facts) >= FACTS
    assert set(report["memory"]) >= JSON_FIELDS
    assert all(set(c) >= COLLECTIVE_FIELDS for c in report["collectives"])
    assert set(report["timeline"]) >= TIMELINE_FIELDS
    json.dumps({**facts, **report})


def test_memory_adds_up(found):
    memory = found.to_json()["memory"]
    total = memory["argument_bytes"] + memory["temp_bytes"] + memory["output_bytes"] - memory["alias_bytes"]
    assert memory["peak_bytes"] == total == found.peak_bytes


def test_blocking_collectives_are_exposed(found):
    """The CPU compiler writes collectives that cannot overlap."""
    assert found.timeline.comm_s > 0
    assert found.timeline.exposed_comm_s == pytest.approx(found.timeline.comm_s)
    assert found.exposed_fraction == pytest.approx(1.0)


def test_forward_is_less_than_training(found):
    forward = compile_step(CONFIG, CPU, "forward").report()
    assert 0 < forward.timeline.flops < found.timeline.flops / 3
    assert forward.peak_bytes < found.peak_bytes


def test_decode_moves_activations(found):
    """One token a sequence: nothing like the weights."""
    decode = compile_step(CONFIG, CPU, "decode").report()
    moved = sum(c.total_bytes for c in decode.collectives)
    assert 0 < moved < sum(c.total_bytes for c in found.collectives) / 20


def test_a_chunk_of_a_prompt_holds_less_and_fetches_what_came_before():
    config = dataclasses.replace(CONFIG, seq_len=128)
    whole, chunk = (compile_step(config, CPU, "prefill", size).report() for size in (0, 32))

    def exchanged(found):
        scopes = ("attention", "gather_sequence")
        return sum(c.total_bytes for c in found.collectives if all(scope in c.scope for scope in scopes))

    assert chunk.memory.temp_bytes < whole.memory.temp_bytes
    # Four chunks visit one to four pages, each a quarter of all keys and values.
    assert exchanged(chunk) == pytest.approx(exchanged(whole) * (1 + 2 + 3 + 4) / 4 / 4)


@pytest.mark.soak
@pytest.mark.skipif(not installed("rocm"), reason="no compiler for MI300X")
@pytest.mark.parametrize(("kv_heads", "most"), [(32, 96e9), (8, 40e9)])
def test_a_million_tokens_are_served_from_one_node(kv_heads, most):
    """Prefilled at once, with the paper's model; less in chunks; and a decoded token moves what its form says."""
    config, target = load_config("llama_7b"), parse_target("mi300x:8")
    model = dataclasses.replace(config.model, num_kv_heads=kv_heads)
    config = dataclasses.replace(config, model=model, seq_len=1 << 20, mesh="data=1,tsp=8")
    use_target(target)
    whole, chunk, decode = (
        compile_step(config, target, step, size).report()
        for step, size in (("prefill", 0), ("prefill", 1 << 17), ("decode", 0))
    )
    sizes = {"data": 1, "tsp": 8}
    cache = cache_bytes(config, get_layout("tsp"), sizes)
    assert cache < min(decode.peak_bytes, chunk.peak_bytes)
    assert max(decode.peak_bytes, chunk.peak_bytes) < whole.peak_bytes <= most
    moved = sum(sum(kinds.values()) for kinds in decode_traffic(config, get_layout("tsp"), sizes).values())
    assert sum(c.total_bytes for c in decode.collectives) == pytest.approx(moved, rel=0.01)


@pytest.mark.parametrize(("step", "tokens"), [("decode", 2), ("prefill", 2 * 64)])
def test_tokens_a_second_are_those_of_the_step(step, tokens):
    (row,) = compare_layouts(CONFIG, CPU, ["tsp:8"], [64], batch=2, step=step)
    assert row.tokens_per_s == pytest.approx(tokens / row.step_s)


@pytest.mark.parametrize(
    ("step", "chunk", "message"),
    [
        ("decode", 16, "chunk=16 means nothing to step=decode; use --step prefill"),
        ("prefill", 128, "chunk=128 must be part of seq_len=64"),
        ("prefill", 20, "chunk=20 is not divisible by 8 over tsp; use 24"),
    ],
)
def test_wrong_chunks(step, chunk, message):
    with pytest.raises(ConfigError, match=message):
        compile_step(CONFIG, CPU, step, chunk)


def test_users_own_function():
    placement = place_case("tsp8")

    def gathered(x):
        return placement.shard_map(
            lambda x: jax.lax.all_gather(x, "tsp", tiled=True).sum(axis=0), PartitionSpec("tsp"), PartitionSpec("tsp")
        )(x)

    x = jax.ShapeDtypeStruct((64, 128), jnp.float32, sharding=jax.NamedSharding(placement.mesh, PartitionSpec("tsp")))
    report = inspect.report(jax.jit(gathered).lower(x))
    assert report.mesh == dict(placement.mesh.shape)
    assert [(c.op, c.axis, c.bytes) for c in report.collectives] == [("all-gather", "tsp", 7 * 8 * 128 * 4)]
    assert report.hardware.name == "cpu"
    assert broken(report, parse_expectations("no-full-weight"))


def test_text_alone(step, found):
    report = inspect.report(step.compiled.as_text(), target="cpu", mesh_axes={"data": 1, "tsp": 8})
    assert report.memory is None
    assert report.peak_bytes == found.peak.bytes
    assert report.timeline.step_s == found.timeline.step_s
    assert report.to_json()["collectives"] == found.to_json()["collectives"]


def test_text_without_a_target_has_no_timeline(step):
    report = inspect.report(step.compiled.as_text())
    assert report.timeline is None and report.to_json()["timeline"] is None
    with pytest.raises(ConfigError, match="target"):
        broken(report, parse_expectations("exposed<=0.5"))


# ------------------------------------------------------------------------------------------------ contracts


@pytest.mark.parametrize("name", ["peak", "temp", "received", "exposed", "step", "exposed-time"])
def test_bounds(found, name):
    unit = "ms" if name in ("step", "exposed-time") else ""
    assert not broken(found, parse_expectations(f"{name}<=1e18{unit}"))
    (line,) = broken(found, parse_expectations(f"{name}<=0{unit}"))
    assert line.startswith(f"{name}<=0{unit}: is ")


def test_broken_lines_name_the_culprit(found):
    peak, exposed = broken(found, parse_expectations("peak<=1KB,exposed<=10%"))
    assert "tsp_jax" in peak and "f32[" in peak
    assert "tsp/" in exposed


def test_units(found):
    assert not broken(found, parse_expectations(f"peak<={found.peak_bytes / 1e3}KB"))
    assert broken(found, parse_expectations(f"peak<={found.peak_bytes / 1e3 * 0.99}kB"))
    assert parse_expectations("exposed<=10%")[0].bound == pytest.approx(0.1)


def test_full_weight_in_one_message(found):
    """One bucket is the whole weight: attention has one here, the MLP four."""
    (line,) = broken(found, parse_expectations("no-full-weight"))
    assert "tsp/attention" in line


@pytest.mark.parametrize(("layout", "holds"), [("tsp", True), ("fsdp_cp", False)])
def test_full_weight_by_layout(layout, holds):
    heads = dataclasses.replace(CONFIG.model, num_layers=1, num_heads=16, num_kv_heads=16)
    config = dataclasses.replace(CONFIG, model=heads, layout=layout)
    report = compile_step(config, CPU, "forward").report()
    assert bool(broken(report, parse_expectations("no-full-weight"))) != holds


def test_blocking_collective(found):
    (line,) = broken(found, parse_expectations("no-sync-collective"))
    assert "tsp/" in line


@pytest.mark.parametrize(
    "text", ["peak", "peak<24GB", "peak<=24parsecs", "exposed<=3GB", "speed<=1", "peak<=", "no-half-weight", "step<=3"]
)
def test_wrong_contracts(text):
    with pytest.raises(ConfigError, match="use one of"):
        parse_expectations(text)


# ------------------------------------------------------------------------------------------------ targets and meshes


def test_mesh_and_target_disagree():
    with pytest.raises(ConfigError, match=r"mesh=data=1,tsp=4 has 4 devices, target=cpu:8 has 8; use --target cpu:4"):
        place_on(dataclasses.replace(CONFIG, mesh="data=1,tsp=4"), CPU)


def test_unknown_step():
    with pytest.raises(ConfigError, match="use one of train, forward"):
        compile_step(CONFIG, CPU, "backward")  # pyright: ignore[reportArgumentType]


# ------------------------------------------------------------------------------------------------ comparison


def test_layouts_take_their_own_axes():
    assert parse_layout("tp_sp:2x4", 8)[1] == {"data": 1, "model": 2, "seq": 4}
    assert parse_layout("tsp:8", 1024)[1] == {"data": 128, "tsp": 8}
    assert parse_layout("single", 4)[1] == {"data": 4}


@pytest.mark.parametrize("text", ["tsp", "tsp:3", "tsp:2x4", "tp_sp:8", "tsp:0", "tsp:x", "bogus:8", "tsp:16"])
def test_wrong_layouts(text):
    with pytest.raises(ConfigError, match="use"):
        parse_layout(text, 8)


def test_batch_is_a_number_of_sequences_a_replica():
    config = configure(CONFIG, "tsp:4", 64, 3, 8)
    assert (config.batch, config.mesh) == (6, "data=2,tsp=4")


@pytest.fixture(scope="module")
def rows():
    return compare_layouts(CONFIG, CPU, ["tsp:8", "tp:8"], [64])


def test_rows(rows):
    assert [row.layout for row in rows] == ["tsp:8", "tp:8"]
    assert all(row.fits and row.peak_bytes and row.step_s and row.largest_seq_len for row in rows)
    assert rows[0].received_bytes != rows[1].received_bytes


def test_nothing_compiles_if_one_layout_is_wrong():
    lines = []
    with pytest.raises(ConfigError):
        compare_layouts(CONFIG, CPU, ["tsp:8", "tp_sp:4x4"], [64], progress=lines.append)
    assert not lines


def test_what_does_not_fit_is_a_row(step, monkeypatch):
    monkeypatch.setattr("tsp_jax.tools.sweep.compile_step", lambda *_: step)
    small = dataclasses.replace(CPU, hardware=dataclasses.replace(CPU.hardware, memory_bytes=1e5))
    (row,) = compare_layouts(CONFIG, small, ["tsp:8"], [64])
    assert not row.fits and "does not fit" in row.note and row.peak_bytes
    assert row.largest_batch == 0


def test_what_does_not_compile_is_a_row(monkeypatch):
    def refuse(*_):
        raise RuntimeError("RESOURCE_EXHAUSTED: too large\nand more")

    monkeypatch.setattr("tsp_jax.tools.sweep.compile_step", refuse)
    (row,) = compare_layouts(CONFIG, CPU, ["tsp:8"], [64])
    assert not row.fits and row.note == "does not compile: RESOURCE_EXHAUSTED: too large"


def test_files(rows, tmp_path):
    write_csv(rows, tmp_path / "rows.csv")
    write_json(rows, {"target": "cpu:8"}, tmp_path / "rows.json")
    with (tmp_path / "rows.csv").open() as file:
        lines = list(csv.DictReader(file))
    read = json.loads((tmp_path / "rows.json").read_text())
    assert [int(line["peak_bytes"]) for line in lines] == [row["peak_bytes"] for row in read["rows"]]


def test_chart(rows, tmp_path):
    pytest.importorskip("matplotlib")
    from tsp_jax.tools.chart import draw

    with_paper = [dataclasses.replace(rows[0], paper_peak_gb="85-140"), rows[1]]
    failed = Row(layout="sp:8", mesh="", seq_len=64, batch=1, fits=False, note="does not compile")
    draw([*with_paper, failed], CPU, tmp_path / "rows.png")
    assert (tmp_path / "rows.png").read_bytes().startswith(b"\x89PNG")


# ------------------------------------------------------------------------------------------------ closed form of memory


@pytest.mark.parametrize("name", LAYOUTS)
def test_state_of_the_closed_form(name):
    """Weights and moments of the layout's shard, to the byte: what the compiled program takes as arguments."""
    layout = get_layout(name)
    own = [axis for axis in layout.axis_names if axis not in layout.batch]
    sizes = dict.fromkeys(layout.axis_names, 1) | dict(zip(own, {0: (), 1: (8,), 2: (2, 4)}[len(own)], strict=True))
    shards = {"single": 1, "sp": 1, "tp_sp": sizes.get("model")}.get(name, 8)
    matrices = CONFIG.model.num_params - 32 * (2 * CONFIG.model.num_layers + 1)
    assert step_memory(CONFIG, layout, sizes)["state"] == pytest.approx(12 * matrices / shards)
    narrow = dataclasses.replace(CONFIG, optimizer=dataclasses.replace(CONFIG.optimizer, moments_dtype="bfloat16"))
    assert step_memory(narrow, layout, sizes)["state"] == pytest.approx(8 * matrices / shards)


# ------------------------------------------------------------------------------------------------ scripts


def run(*arguments, cwd):
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=300)


INSPECT, COMPARE = ROOT / "scripts/inspect_hlo.py", ROOT / "scripts/compare.py"
SMALL = ["--target", "cpu:8", "--seq-len", "64", "--batch", "1", "--model.num-layers", "1"]


def test_inspect_script(tmp_path):
    files = ["--json", "out.json", "--dump-hlo", "out.hlo", "--trace", "out.json.gz"]
    mesh = ["--layout", "tsp", "--mesh", "data=1,tsp=8"]
    first = run(INSPECT, "tiny", *SMALL, *mesh, *files, "--step", "forward", "--expect", "peak<=1GB", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "Memory of one device" in first.stdout and "assumed:" in first.stdout
    assert json.loads((tmp_path / "out.json").read_text())["mesh"] == {"data": 1, "tsp": 8}
    assert (tmp_path / "out.json.gz").stat().st_size > 1000
    again = run(INSPECT, "out.hlo", "--target", "cpu:8", "--expect", "peak<=1KB,no-sync-collective", cwd=tmp_path)
    assert again.returncode == 1, again.stderr
    assert "broken: peak<=1KB" in again.stdout and "broken: no-sync-collective" in again.stdout


def test_compare_script(tmp_path):
    flags = (
        "--target cpu:8 --seq-lens 64 --layouts tp_sp:2x4 --step forward --model.num-layers 1 --json o.json --csv o.csv"
    )
    done = run(COMPARE, "tiny", *flags.split(), "--png", "o.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {"o.json", "o.csv", "o.png"} <= {path.name for path in tmp_path.iterdir()}
    assert "tp_sp:2x4" in done.stdout


TINY = [INSPECT, "tiny", *SMALL]
WRONG = {
    "target": ([*TINY, "--target", "mi400x:8"], "target=mi400x:8 is unknown"),
    "layout": ([*TINY, "--layout", "tps"], "layout=tps is unknown"),
    "mesh": ([*TINY, "--mesh", "data=1,tsp=4"], "use --target cpu:4"),
    "expect": ([*TINY, "--expect", "peak<=1kilo"], "expect=peak<=1kilo"),
    "folder": ([*TINY, "--json", "no/such/out.json"], "json=no/such/out.json cannot be written"),
    "not HLO": ([INSPECT, "novel.txt"], "HloModule"),
    "truncated": ([INSPECT, "cut.hlo"], "ends early"),
    "absent": ([INSPECT, "absent.hlo"], "cannot be read"),
    "compare": ([COMPARE, "tiny", "--target", "cpu:8", "--layouts", "tsp:8,bogus:8"], "layout=bogus is unknown"),
    "lengths": ([COMPARE, "tiny", "--target", "cpu:8", "--seq-lens", "16k"], "seq_lens=16k"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_line(case, tmp_path, step):
    text = step.compiled.as_text()
    (tmp_path / "cut.hlo").write_text(text[: len(text) // 2])
    (tmp_path / "novel.txt").write_text("It was a dark and stormy night.")
    arguments, said = WRONG[case]
    done = run(*arguments, cwd=tmp_path)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2, done.stderr
    assert len(lines) == 1 and lines[0].startswith("error: ") and said in lines[0]
