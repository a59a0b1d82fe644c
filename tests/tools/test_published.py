"""Published runs: reading their file, and the configuration nearest to each."""

import csv
from pathlib import Path

import pytest

from tsp_jax.errors import ConfigError
from tsp_jax.tools.published import COLUMNS, NotRebuilt, measured_seconds, mesh_sizes, read_runs, rebuild

SMALL = Path(__file__).parents[1] / "data" / "measured_small.csv"


def rows() -> list[dict[str, str]]:
    with SMALL.open(newline="") as file:
        return list(csv.DictReader(file))


def write(folder: Path, *changed: dict[str, str]) -> Path:
    """A file of T3 with some fields changed, one row for each change."""
    path, base = folder / "runs.csv", next(row for row in rows() if row["id"] == "T3")
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(base | change for change in changed)
    return path


def only(folder: Path, **change: str):
    (run,) = read_runs(write(folder, change))
    return run


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seq_len": "1M"}, r"row T3: seq_len=1M is no whole number above 0; use 1048576, or not stated"),
        ({"seq_len": ""}, r"row T3: seq_len is missing; use 1048576, or not stated"),
        ({"heads": "-16"}, r"row T3: heads=-16 is no whole number above 0; use 4096, or not stated"),
        ({"devices": "many"}, r"row T3: devices=many does not begin with a whole number; use 64"),
        ({"mesh": "context8 x fsdp1"}, r"row T3: mesh=context8 x fsdp1 has 8 devices, the row has 64; use context64"),
        ({"mesh": "all of them"}, r"row T3: mesh=all of them names no axis with its size; use context64 x fsdp1"),
        ({"hardware": "abacus"}, r"row T3: hardware=abacus names no known device; use one of TPU v5p, "),
        ({"step_s": "fast"}, r"row T3: step_s=fast does not begin with a number above 0; use 90.30, or nothing"),
        ({"step_s": "0"}, r"row T3: step_s=0 does not begin with a number above 0"),
        ({"peak_memory_gb": "nan"}, r"row T3: peak_memory_gb=nan does not begin with a number"),
        ({"source": ""}, r"row T3: source is missing; use the address"),
        ({"date": "lately"}, r"row T3: date=lately is no date; use 2026-10"),
        ({"id": ""}, r"row on line 2: id is missing; use T3"),
    ],
)
def test_a_field_that_is_missing_or_malformed_is_one_line(tmp_path, change, message):
    with pytest.raises(ConfigError, match=message) as error:
        read_runs(write(tmp_path, change))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "lacks column id; use the columns id,hardware"),
        ("id,devices\nT3,64\n", "lacks column hardware"),
        (",".join(COLUMNS) + "\nT3,TPU v5p,64\n", "row T3 has 3 fields; use 27, as in the first line"),
    ],
)
def test_a_file_that_is_no_table_of_runs_is_one_line(tmp_path, text, message):
    (tmp_path / "runs.csv").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_runs(tmp_path / "runs.csv")


def test_an_id_stands_once(tmp_path):
    with pytest.raises(ConfigError, match="id=T3 stands twice"):
        read_runs(write(tmp_path, {}, {}))


@pytest.mark.parametrize(
    ("name", "target", "layout", "mesh", "remats"),
    [
        ("T3", "v5p:64", "fsdp_cp", "data=1,tsp=64", ("offload_attention",)),
        ("H10", "h100:8", "fsdp_cp", "data=1,tsp=8", ("offload",)),
        ("A3", "mi355x:8", "fsdp", "data=8", ("none", "save_attention", "full")),
    ],
)
def test_runs_are_rebuilt(name, target, layout, mesh, remats):
    rebuilt = rebuild(next(run for run in read_runs(SMALL) if run.id == name))
    config = rebuilt.config
    assert (rebuilt.target, config.layout, config.mesh, rebuilt.remats) == (target, layout, mesh, remats)


@pytest.mark.parametrize(
    ("mesh", "devices", "framework", "layout", "sizes"),
    [
        ("context4 x fsdp16", "64", "MaxText", "fsdp_cp(weights=data+tsp)", "data=16,tsp=4"),
        ("fsdp16 x tensor4", "64", "MaxText", "tp(weights=model+data)", "data=16,model=4"),
        ("dp2 x fsdp128", "256", "MaxText", "fsdp(batch=pod+data)", "pod=2,data=128"),
        ("cp2 x dp4", "8", "NeMo/Megatron-Core", "sp", "data=4,seq=2"),
        ("cp8 a2a", "8", "Megatron-Core", "sp", "data=1,seq=8"),
        ("zero3 x8", "8", "DeepSpeed", "fsdp", "data=8"),
    ],
)
def test_meshes_have_a_nearest_layout(tmp_path, mesh, devices, framework, layout, sizes):
    run = only(tmp_path, mesh=mesh, devices=devices, framework=framework, global_batch="1024")
    assert (rebuild(run).config.layout, rebuild(run).config.mesh) == (layout, sizes)


@pytest.mark.parametrize(
    ("said", "policy"),
    [
        ("full", "full"), ("full + offload", "offload"), ("custom(context=remat;layer input=offload)", "offload"),
        ("custom(context=offload;layer input=offload)", "offload_attention"), ("selective", "save_attention"),
        ("save_dot_except_mlpwi", "none"), ("minimal", "none"), ("none stated", "none"),
    ],
)  # fmt: skip
def test_remat_has_a_nearest_policy(tmp_path, said, policy):
    assert rebuild(only(tmp_path, remat=said)).remats == (policy,)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"compute_dtype": "float8 linear"}, "products in float8 linear: this package has no float8"),
        ({"mesh": "pp64"}, "pipeline parallelism"),
        ({"mesh": "see recipe"}, r"mesh not published \(see recipe\)"),
        ({"seq_len": "not stated"}, "seq_len not published"),
        ({"layers": "", "vocab": ""}, "layers, vocab not published"),
        ({"global_batch": "", "per_device_batch": "micro 1"}, "sequences per step not published"),
        ({"step_s": "", "tokens_per_s_device": "", "flop_convention": "unclear"}, "no TFLOP/s by a known convention"),
        ({"remat": "half of it"}, "no remat policy is near half of it"),
    ],
)
def test_what_cannot_be_rebuilt_says_why(tmp_path, change, reason):
    with pytest.raises(NotRebuilt, match=reason):
        rebuild(only(tmp_path, **change))


@pytest.mark.parametrize(
    ("change", "seconds", "source"),
    [
        ({"step_s": "90.30 (95.73 second run)"}, 90.3, "step"),
        ({"step_s": "", "tokens_per_s_device": "320"}, 2 * 1048576 / 64 / 320, "tokens/s"),
        ({"step_s": "", "tokens_per_s_device": "5 (320 compiled)"}, 2 * 1048576 / 64 / 320, "tokens/s"),
        # MaxText reports 315.6 TFLOP/s for 90.30 s.
        ({"step_s": "", "tokens_per_s_device": "", "tflops_device_published": "315.6"}, 90.3, "TFLOP/s"),
    ],
)
def test_a_step_comes_from_what_is_published(tmp_path, change, seconds, source):
    found, where = measured_seconds(only(tmp_path, **change))
    assert found == pytest.approx(seconds, rel=0.003)
    assert where == source


def test_other_runs_of_the_same_program_are_kept_and_predictions_are_not(tmp_path):
    assert only(tmp_path, step_s="90.30 (95.73 second run)").step_s == (90.3, 95.73)
    assert only(tmp_path, step_s="11.302 (predicted 10.516)").step_s == (11.302,)


def test_gibibytes_become_gigabytes(tmp_path):
    assert only(tmp_path, peak_memory_gb="10 GiB").peak_gb == pytest.approx(10.73741824)
    assert only(tmp_path, peak_memory_gb="10").peak_gb == 10


def test_words_in_parentheses_are_no_axes():
    assert mesh_sizes("cp8 (+fsdp8 same ranks)") == {"cp": 8}
