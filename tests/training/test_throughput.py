"""TFLOP/s and share of peak: by hand, of the device that runs, and of each step of a run."""

import time
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from tests.builders.runs import small_config
from tests.builders.steps import CONFIG
from tsp_jax.cost.flops import model_flops
from tsp_jax.hardware.devices import HARDWARE, data_sheet
from tsp_jax.training import loop
from tsp_jax.training.evaluation import evaluate
from tsp_jax.training.metrics import read_metrics
from tsp_jax.training.schedule import CompiledSteps
from tsp_jax.training.throughput import Throughput
from tsp_jax.training.trainer import train

KINDS = {
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
    "AMD Instinct MI300X": "mi300x",
    "AMD Instinct MI325X": "mi325x",
    "gfx942": "mi300x",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v5 lite": "v5e",
    "TPU v6 lite": "v6e",
    "TPU7x": "v7x",
}
OTHERS = ["NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA H200 NVL", "NVIDIA GH200 480GB", "NVIDIA GB200", "TPU v4"]
"""devices of other rates, some with a known name in theirs"""


def device(kind: str):
    return SimpleNamespace(platform="tpu" if kind.startswith("TPU") else "gpu", device_kind=kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_device_has_the_data_sheet_of_its_kind(kind):
    assert data_sheet(device(kind)) is HARDWARE[KINDS[kind]]


@pytest.mark.parametrize("kind", OTHERS)
def test_a_device_of_another_kind_has_none(kind):
    assert data_sheet(device(kind)) is None


def test_rates_are_per_device_and_of_its_peak():
    speed = Throughput(CONFIG.model, 8, HARDWARE["h100"])
    found = speed.of(tokens=128, seq_len=64, seconds=0.5)
    flops = model_flops(CONFIG.model, 128, 64)
    assert found == pytest.approx(
        {"tokens_per_s": 256, "tflops_per_device": flops / 4 / 1e12, "mfu": flops / 4 / 989e12}
    )
    assert "989 TFLOP/s in bfloat16 (NVIDIA H100 SXM data sheet)" in str(speed)


def test_a_cpu_has_no_share_and_the_run_says_so():
    speed = Throughput(CONFIG.model, 8, data_sheet(jax.devices()[0]))
    assert speed.hardware is None
    assert speed.of(64, 64, 1.0)["mfu"] is None
    assert "no share of peak" in str(speed)


def test_the_first_step_does_not_take_the_time_of_the_evaluation_before_it(monkeypatch, tmp_path, optax_promotes):
    """A resumed run evaluates first if its last step was stopped before it could."""
    train(small_config(tmp_path, steps=2, eval_every=2), "small")
    run = tmp_path / "run"
    kept = [line for line in (run / "metrics.jsonl").read_text().splitlines() if "eval_loss" not in line]
    (run / "metrics.jsonl").write_text("".join(f"{line}\n" for line in kept))

    def slow(*args):
        time.sleep(2)
        return evaluate(*args)

    monkeypatch.setattr(loop, "evaluate", slow)
    train(small_config(tmp_path, steps=3, eval_every=2), "small")
    (line,) = (line for line in read_metrics(run / "metrics.jsonl") if line["step"] == 3 and "loss" in line)
    assert line["tokens"] / line["tokens_per_s"] < 2


def test_a_step_has_its_own_time_where_dispatching_waits_for_the_device(monkeypatch, tmp_path, optax_promotes):
    """As on virtual CPU devices; the time of the last step was that of nothing."""
    step = CompiledSteps.__call__

    def waits(self, state, batch):
        time.sleep(0.3)
        return jax.block_until_ready(step(self, state, batch))

    monkeypatch.setattr(CompiledSteps, "__call__", waits)
    config = small_config(tmp_path, steps=3)
    train(config, "small")
    lines = [line for line in read_metrics(Path(config.workdir) / "metrics.jsonl") if "loss" in line]
    assert len(lines) == 3 and min(line["tokens"] / line["tokens_per_s"] for line in lines) > 0.2
