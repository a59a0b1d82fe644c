"""Offloaded remat: the numbers of full remat, and what layers keep in the host's memory."""

import dataclasses
import functools
import io

import jax
import numpy as np
import pytest
from rich.console import Console

from tests.builders.arrays import BF16_TOLERANCE, F32_TOLERANCE, assert_trees_near, packed_batch
from tests.builders.targets import needs_compiler
from tsp_jax.config import Config, ModelConfig, OptimizerConfig, StreamConfig
from tsp_jax.hardware.targets import HARDWARE, parse_target
from tsp_jax.inspect.render import show
from tsp_jax.layout import place
from tsp_jax.plan.compile import compile_step
from tsp_jax.training.step import make_program

pytestmark = pytest.mark.usefixtures("optax_promotes")

CONFIG = Config(
    model=ModelConfig(vocab_size=160, d_model=64, num_layers=5, num_heads=8, num_kv_heads=8, head_dim=8, d_ff=160),
    stream=StreamConfig(bucket_mib=0.01, kernel="xla"),
    optimizer=OptimizerConfig(warmup_steps=1),
    steps=3,
    batch=2,
    seq_len=128,
)
RESIDUALS = 5 * 2 * 128 // 8 * 64 * 2
"""bytes of the inputs of all layers on one of eight devices, in bfloat16; of attention's outputs as well"""
LSES = 5 * 2 * 128 // 8 * 8 * 4
"""bytes of attention's log-sum-exps"""
KEPT = {"offload": RESIDUALS, "offload_attention": 2 * RESIDUALS + LSES}


def after_two_steps(config: Config):
    """(moments, losses): moments grow with the gradients, which AdamW's parameters do not."""
    program = make_program(config, place("tsp", data=1, tsp=8))
    shape = (config.accumulate, config.batch // config.accumulate, config.seq_len)
    natural = packed_batch(config.batch, config.seq_len, config.model.vocab_size)
    batch = jax.device_put(jax.tree.map(lambda array: array.reshape(shape), natural), program.batch_sharding)
    state, first = program.step(program.init(), batch)
    state, second = program.step(state, batch)
    return jax.device_get((state.opt_state, (first.loss, second.loss)))


@pytest.mark.parametrize("policy", KEPT)
def test_training_steps_are_those_of_full_remat(policy):
    """Of two micro-batches, whose gradients wait in bfloat16."""
    config = dataclasses.replace(CONFIG, compute_dtype="float32", grad_dtype="bfloat16", accumulate=2)
    (moments, losses), (desired, desired_losses) = (
        after_two_steps(dataclasses.replace(config, remat=remat)) for remat in (policy, "full")
    )
    assert_trees_near(moments, desired, BF16_TOLERANCE)
    np.testing.assert_allclose(losses, desired_losses, rtol=F32_TOLERANCE)


def shown(report) -> str:
    out = Console(width=150, file=io.StringIO())
    show(report, out)
    return out.file.getvalue()


@functools.cache
def on_target(name: str, remat: str):
    config = dataclasses.replace(CONFIG, remat=remat, mesh="data=1,tsp=8")
    return compile_step(config, parse_target(f"{name}:8")).report()


@pytest.mark.parametrize("policy", KEPT)
@pytest.mark.parametrize("name", ["mi300x", "h100", "v5p"])
def test_what_layers_keep_waits_in_the_memory_of_the_host(name, policy):
    """The last layer's arrays are fetched before the loop over layers; the loop's last iteration fetches in vain."""
    needs_compiler(HARDWARE[name].platform)
    offloaded, full = on_target(name, policy), on_target(name, "full")
    assert full.peak.host_bytes == full.timeline.host_s == 0
    # A TPU's layouts pad rows of 64 elements to tiles of 128.
    if name != "v5p":
        assert offloaded.peak.host_bytes == KEPT[policy]
        copies = KEPT[policy] * (2 + 1 / CONFIG.model.num_layers)
        assert offloaded.timeline.host_s == pytest.approx(copies / HARDWARE[name].rates.host.bytes_per_s.typical)
    assert offloaded.peak.host_bytes >= KEPT[policy]
    assert "in the host's memory" in shown(offloaded)
    assert "host" not in shown(full).split("assumed")[0]
    assert offloaded.peak.by_kind["residual"] <= full.peak.by_kind["residual"] - RESIDUALS * 3 / 5


def test_only_offloading_names_the_memory_of_the_host():
    """What is traced for any platform; on the CPU it means nothing, for there is one memory."""

    def traced(remat: str) -> str:
        program = make_program(dataclasses.replace(CONFIG, remat=remat), place("tsp", data=1, tsp=8))
        return str(program.step.trace(program.abstract_state, program.abstract_batch((1, 2, 128))).jaxpr)

    offload = traced("offload")
    assert "bf16<host>[5,2,128,8,8]" in traced("offload_attention")
    assert "bf16<host>[5,2,128,64]" in offload
    assert "bf16[5,2,128,64]" not in offload
    assert "<host>" not in traced("full")
