"""Training a small mixture of experts: it learns, says what its routers do, resumes bitwise."""

import math
import shutil

import pytest

from tests.builders.runs import compile_once, small_config
from tsp_jax.config import ExpertsConfig, ModelConfig, StreamConfig
from tsp_jax.training import trainer
from tsp_jax.training.metrics import read_metrics
from tsp_jax.training.trainer import train

pytestmark = pytest.mark.usefixtures("optax_promotes")
LAYERS, E, STEPS = 2, 6, 8
EXPERTS = ExpertsConfig(number=E, per_token=2, balance_loss=0.01, z_loss=1e-3)


def test_learns_says_what_routers_do_and_resumes_bitwise(tmp_path, monkeypatch):
    """On eight devices, in two micro-batches, with full remat and gradients in bfloat16."""
    monkeypatch.setattr(trainer, "make_program", compile_once(trainer.make_program))
    model = ModelConfig(
        vocab_size=264, d_model=24, num_layers=LAYERS, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=20, experts=EXPERTS
    )
    config = small_config(
        tmp_path, model=model, layout="tsp", mesh="tsp=8", steps=STEPS, stream=StreamConfig(bucket_mib=0.005),
        accumulate=2, remat="full", grad_dtype="bfloat16", checkpoint_every=4,
    )  # fmt: skip
    train(config)
    run = tmp_path / "run"
    lines = [line for line in read_metrics(run / "metrics.jsonl") if "loss" in line]
    assert len(lines) == STEPS
    assert lines[-1]["loss"] < lines[0]["loss"] - 1
    for line in lines:
        assert 1 - 1e-2 < line["router_balance"] < E
        assert line["router_z"] > 0
        assert len(line["expert_entropy"]) == LAYERS
        assert 0 < min(line["expert_entropy"]) <= max(line["expert_entropy"]) <= math.log(E) + 1e-5
        assert 0 <= min(line["expert_share_least"]) <= 1 <= max(line["expert_share_most"]) <= E / 2 + 1e-5
    shutil.rmtree(run / "checkpoints" / str(STEPS))
    train(config)
    again = [line for line in read_metrics(run / "metrics.jsonl") if "loss" in line]
    names = ("step", "loss", "grad_norm", "router_balance", "router_z", "expert_entropy")
    assert [[line[name] for name in names] for line in again] == [[line[name] for name in names] for line in lines]
