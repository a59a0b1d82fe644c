"""tsp-calibrate: the measured file, what is refused before anything is measured, and the measuring loop and fit."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import pytest

from tsp_jax.errors import ConfigError
from tsp_jax.files import Finite, read_json
from tsp_jax.hardware import measure
from tsp_jax.hardware.measure import fit_collective, fit_line, repeated
from tsp_jax.inspect import list_collectives, parse
from tsp_jax.ops.kernels import XlaKernel
from tsp_jax.ops.kernels.mask import Tokens
from tsp_jax.tools import calibrate

SCRIPT = Path(__file__).parents[2] / "scripts" / "calibrate.py"
Rate = Annotated[float, msgspec.Meta(gt=0, le=1e30)]


class _Strict(msgspec.Struct, forbid_unknown_fields=True):
    pass


class _Product(_Strict):
    m: int
    n: int
    k: int
    dtype: str
    flops_per_s: Rate
    low: Rate
    high: Rate


class _Memory(_Strict):
    bytes_per_s: Rate
    low: Rate
    high: Rate


class _Point(_Strict):
    received_bytes: Rate
    seconds: Rate


class _Collective(_Strict):
    fixed_s: Finite
    bytes_per_s: Rate
    low: Rate
    high: Rate
    points: list[_Point]


class _Attention(_Strict):
    kernel: str
    direction: Literal["forward", "backward"]
    head_dim: int
    flops_per_s: Rate
    low: Rate
    high: Rate


class _Host(_Strict):
    to_host_bytes_per_s: Rate
    from_host_bytes_per_s: Rate


class _File(_Strict):
    """The schema of the file, in full: a key that is missing, new or out of range fails."""

    format: Literal[1]
    name: str
    base: str
    device_kind: str
    num_devices: int
    date: str
    versions: dict[str, str]
    products: list[_Product]
    memory: _Memory
    attention: list[_Attention]
    collectives: dict[str, _Collective] | msgspec.UnsetType = msgspec.UNSET
    host: _Host | msgspec.UnsetType = msgspec.UNSET


def test_the_script_measures_virtual_devices(tmp_path):
    command = [sys.executable, str(SCRIPT), "--out", "node.json", "--quick", "--cpu-devices", "2"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stderr
    file = read_json(tmp_path / "node.json", _File)
    assert (file.name, file.base, file.num_devices, file.versions["jax"]) == ("node", "cpu", 2, jax.__version__)
    assert isinstance(file.collectives, dict) and list(file.collectives) == list(measure.RECEIVED)
    assert {(row.kernel, row.direction) for row in file.attention} == {("xla", "forward"), ("xla", "backward")}
    rows = [*file.products, *file.attention, *file.collectives.values(), file.memory]
    assert all(row.low <= getattr(row, "flops_per_s", getattr(row, "bytes_per_s", 0)) <= row.high for row in rows)
    assert "attention backward, xla, heads of 128" in done.stdout


def test_one_device_has_no_collectives(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    monkeypatch.setattr(measure, "QUICK_PRODUCTS", 1)
    monkeypatch.setattr(calibrate, "measure_attention", lambda *_: {})
    options = calibrate.CalibrateOptions(out=str(tmp_path / "a.b.json"), quick=True, kernels="xla", base="h100")
    facts = calibrate.calibrate(options)
    assert "collectives" not in facts and (facts["name"], facts["base"]) == ("a.b", "h100")
    assert json.loads((tmp_path / "a.b.json").read_text()) == facts


REFUSED = {
    "no file": ([], "out='' is empty; use tsp-calibrate --out my-node.json"),
    "folder": (["--out", "no/such/out.json"], "out=no/such/out.json cannot be written"),
    "base": (["--out", "a.json", "--base", "a100"], "base=a100 is unknown; use one of cpu, mi300x"),
    "kernel": (["--out", "a.json", "--kernels", "xla,flash"], "kernels=xla,flash: 'flash' is unknown; use auto"),
    "kernel elsewhere": (["--out", "a.json", "--kernels", "triton"], "kernels=triton: triton runs on gfx942"),
    "devices": (["--out", "a.json", "--cpu-devices", "-1"], "cpu_devices=-1 must not be negative; use 0"),
    "name": (["--out", "a.json", "--name", "n" * 101], "has 101 characters; use --name with at most 100"),
    "flag": (["--out", "a.json", "--quik"], "--quik"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_flags_are_one_line_before_measuring(case, tmp_path, monkeypatch, capsys):
    flags, message = REFUSED[case]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(calibrate, "measure_node", lambda *_: pytest.fail("measured"))
    monkeypatch.setattr(sys, "argv", ["tsp-calibrate", *flags])
    with pytest.raises(SystemExit, match="2"):
        calibrate.main()
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: ") and message in error
    assert not list(tmp_path.iterdir())


def test_unknown_devices_need_a_base():
    class Device:
        platform, device_kind = "gpu", "NVIDIA A100"

    with pytest.raises(ConfigError, match="NVIDIA A100 is of no known kind; use --base with one of cpu, mi300x"):
        calibrate.find_base("", Device())
    assert calibrate.find_base("h100", Device()) == "h100"


SIZES = [2.0**power for power in range(16, 29, 2)]


def test_fit_finds_the_line():
    line = fit_line(SIZES, [3e-5 + size / 355e9 for size in SIZES])
    np.testing.assert_allclose(line, (3e-5, 355e9), rtol=1e-6)


def test_fit_weighs_relative_errors():
    """The largest size takes 10 % longer; by absolute errors it alone would count, and the fixed time be far off."""
    seconds = [3e-5 + size / 355e9 for size in SIZES]
    seconds[-1] *= 1.1
    np.testing.assert_allclose(fit_line(SIZES, seconds), (3e-5, 355e9), rtol=0.07)


@pytest.mark.parametrize(
    "seconds", [[1.0, 3.0], [2.0, 1.0], [2.0]], ids=["negative fixed time", "falling", "one point"]
)
def test_fit_never_has_a_negative_term(seconds):
    """The rate of least ``sum((bytes / rate / seconds - 1)^2)``."""
    bytes_ = [1.0, 2.0][: len(seconds)]
    x = np.array(bytes_) / np.array(seconds)
    line = fit_line(bytes_, seconds)
    assert line.fixed_s == 0
    np.testing.assert_allclose(line.bytes_per_s, (x**2).sum() / x.sum())


def test_a_collectives_band_holds_its_rate():
    points = [(size, [1e-5 + size / rate for rate in (1e9, 2e9, 4e9)]) for size in SIZES]
    facts = fit_collective(points)
    assert 1e9 < facts["low"] < facts["bytes_per_s"] < facts["high"] < 4e9
    np.testing.assert_allclose((facts["bytes_per_s"], facts["fixed_s"]), (2e9, 1e-5), rtol=1e-6)
    assert facts["points"][0] == {"received_bytes": SIZES[0], "seconds": 1e-5 + SIZES[0] / 2e9}


@pytest.mark.parametrize("chain", [1, 2])
def test_a_chain_calls_so_often(chain):
    assert jax.jit(repeated(lambda x, y: x + y, 6, chain))(jnp.float32([0.0]), jnp.float32([2.0])) == 12


def test_each_call_needs_the_one_before():
    """The result counts the calls: the last element of each result is the first of the next x."""
    x = jnp.zeros(3, jnp.float32)
    assert jax.jit(repeated(lambda x: jnp.repeat(x[:1] + 1, 2), 6))(x).tolist() == [6, 6]


def test_two_calls_in_a_loop_stay_two_kernels():
    """XLA makes one kernel of two elementwise calls in an iteration, which would look twice as fast."""
    text = jax.jit(repeated(lambda x, y: x * y, 6, 1)).lower(jnp.ones(8), jnp.float32([2])).compile().as_text()
    assert text is not None and text.count(" multiply(") == 1


def test_operations_are_those_of_visited_tiles():
    """Blocks of 4 in 16 tokens: 10 of 16 pairs are visited, by 2 products forward and 5 backward."""
    kernel, place = XlaKernel(4, 4), Tokens.one_document(jnp.arange(16, dtype=jnp.int32)[None])
    q, k = jnp.ones((1, 16, 2, 3, 8)), jnp.ones((1, 16, 2, 8))
    row = jnp.ones((1, 16, 2, 3))
    product = 2 * 10 * 4 * 4 * 8 * 2 * 3
    forward = calibrate.executed_flops(lambda *a: calibrate.attend(kernel, *a), (q, k, k, place))
    backward = calibrate.executed_flops(lambda *a: calibrate.attend_backward(kernel, *a), (q, k, k, place, row, row, q))
    assert (forward, backward) == (2 * product, 5 * product)


@pytest.mark.parametrize("op", measure.RECEIVED)
def test_received_bytes_are_those_of_the_compiled_program(op):
    ranks, elements = 4, 64
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:ranks]), ("all",))
    spec = jax.sharding.PartitionSpec("all")
    call = jax.shard_map(measure._call_of(op, ranks), mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    own = elements // ranks if op == "all-gather" else elements
    text = jax.jit(call).lower(jnp.ones(own * ranks)).compile().as_text()
    (found,) = list_collectives(parse(text))
    assert (found.op, found.bytes) == (op, measure.RECEIVED[op](4 * elements, ranks))
