"""Training a small mixture of experts: it learns, says what its routers do, resumes bitwise."""

import dataclasses
import math
import shutil

import numpy as np
import pytest

from tests.builders.runs import compile_once, small_config
from tsp_jax.config import ExpertsConfig, ModelConfig, StreamConfig
from tsp_jax.layout import place
from tsp_jax.ops.kernels.mask import PADDING
from tsp_jax.training import trainer
from tsp_jax.training.data import IGNORE, Batch
from tsp_jax.training.metrics import read_metrics
from tsp_jax.training.step import make_program
from tsp_jax.training.trainer import train

pytestmark = pytest.mark.usefixtures("optax_promotes")
LAYERS, E, STEPS = 2, 6, 8
EXPERTS = ExpertsConfig(number=E, per_token=2, balance_loss=0.01, z_loss=1e-3, bias_rate=0.01)
MODEL = ModelConfig(
    vocab_size=264, d_model=24, num_layers=LAYERS, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=20, experts=EXPERTS
)


def test_learns_says_what_routers_do_and_resumes_bitwise(tmp_path, monkeypatch):
    """On eight devices, in two micro-batches, with full remat and gradients in bfloat16."""
    monkeypatch.setattr(trainer, "make_program", compile_once(trainer.make_program))
    config = small_config(
        tmp_path, model=MODEL, layout="tsp", mesh="tsp=8", steps=STEPS, stream=StreamConfig(bucket_mib=0.005),
        accumulate=2, remat="full", grad_dtype="bfloat16", checkpoint_every=4,
    )  # fmt: skip
    train(config)
    run = tmp_path / "run"
    lines = [line for line in read_metrics(run / "metrics.jsonl") if "loss" in line]
    assert len(lines) == STEPS
    assert lines[-1]["loss"] < lines[0]["loss"] - 1
    for line in lines:
        assert 0.9 < line["router_balance"] < E
        assert line["router_z"] > 0
        assert len(line["expert_entropy"]) == LAYERS
        assert 0 < min(line["expert_entropy"]) <= max(line["expert_entropy"]) <= math.log(E) + 1e-5
        assert 0 <= min(line["expert_share_least"]) <= 1 <= max(line["expert_share_most"]) <= E / 2 + 1e-5
    shutil.rmtree(run / "checkpoints" / str(STEPS))
    train(config)
    again = [line for line in read_metrics(run / "metrics.jsonl") if "loss" in line]
    names = ("step", "loss", "grad_norm", "router_balance", "router_z", "expert_entropy")
    assert [[line[name] for name in names] for line in again] == [[line[name] for name in names] for line in lines]


def test_a_bias_of_each_expert_follows_its_load(tmp_path):
    """It changes as the shares of each step say, whatever the optimizer decays; a favoured expert gets fewer tokens."""
    rule = ExpertsConfig(number=E, per_token=2, scores="sigmoid", bias_rate=0.5)
    program = make_program(
        small_config(tmp_path, model=dataclasses.replace(MODEL, experts=rule)), place("single", data=1)
    )
    state = program.init()
    bias = np.zeros((LAYERS, E), np.float32)
    bias[:, 1] = 2.0
    state.params["layers"]["mlp"]["selection_bias"] += bias
    ids = np.random.default_rng(0).integers(0, 255, (1, 4, 96)).astype(np.int32)
    positions = np.broadcast_to(np.arange(96, dtype=np.int32), ids.shape)
    batch = Batch(ids, np.roll(ids, -1, axis=-1), positions, np.zeros_like(ids))
    favoured = []
    for _ in range(6):
        state, metrics = program.step(state, batch)
        shares = np.asarray(metrics.router.shares_E)
        bias += np.float32(0.5) * np.sign(1 / E - shares)
        favoured.append(shares[:, 1].max())
    np.testing.assert_allclose(state.params["layers"]["mlp"]["selection_bias"], bias, atol=1e-6)
    assert favoured[0] == 0.5  # it is one of the two experts of every token
    assert favoured[-1] < 0.4


def test_routers_do_not_count_padding(tmp_path):
    """Documents attend to themselves alone, so what is in the padding changes nothing."""
    program = make_program(small_config(tmp_path, model=MODEL), place("single", data=1))
    ids = np.random.default_rng(0).integers(0, 255, (1, 4, 96)).astype(np.int32)
    positions = np.broadcast_to(np.arange(96, dtype=np.int32), ids.shape)
    real = positions < np.array([30, 96, 70, 1])[:, None]
    found = []
    for filling in (0, 7):
        labels = np.where(real, np.roll(ids, -1, axis=-1), IGNORE)
        segments = np.where(real, 1, PADDING).astype(np.int32)
        batch = Batch(np.where(real, ids, filling).astype(np.int32), labels, positions, segments)
        found.append(program.step(program.init(), batch)[1])
    for name in ("balance", "z", "shares_E"):
        np.testing.assert_allclose(*(getattr(metrics.router, name) for metrics in found), rtol=1e-5)
    np.testing.assert_allclose(found[0].router.shares_E.sum(axis=-1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(found[0].grad_norm, found[1].grad_norm, rtol=1e-4)
