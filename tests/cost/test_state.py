"""Weights and moments of a device, by the closed form."""

import dataclasses
import math

import jax
import pytest

from tests.builders.arrays import LAYOUT_CASES
from tests.builders.steps import CONFIG
from tsp_jax.config import LoraConfig
from tsp_jax.cost.memory import step_memory
from tsp_jax.layout import LAYOUTS, get_layout, place
from tsp_jax.training.step import make_program

pytestmark = pytest.mark.usefixtures("optax_promotes")


@pytest.mark.parametrize("name", LAYOUTS)
def test_state_of_the_closed_form(name):
    """Weights and moments of the layout's shard, to the byte: what the compiled program takes as arguments."""
    layout = get_layout(name)
    own = [axis for axis in layout.axis_names if axis not in layout.batch]
    if name in ("dp", "fsdp"):
        own = list(layout.batch)
    sizes = dict.fromkeys(layout.axis_names, 1) | dict(zip(own, {0: (), 1: (8,), 2: (2, 4)}[len(own)], strict=True))
    shards = {"single": 1, "dp": 1, "sp": 1, "tp_sp": sizes.get("model")}.get(name, 8)
    matrices = CONFIG.model.num_params - 32 * (2 * CONFIG.model.num_layers + 1)
    config = dataclasses.replace(CONFIG, batch=8)
    assert step_memory(config, layout, sizes)["state"] == pytest.approx(12 * matrices / shards)
    narrow = dataclasses.replace(config, optimizer=dataclasses.replace(CONFIG.optimizer, moments_dtype="bfloat16"))
    assert step_memory(narrow, layout, sizes)["state"] == pytest.approx(8 * matrices / shards)


@pytest.mark.parametrize(
    ("case", "lora"),
    [
        ("tsp8", LoraConfig(rank=4, base_dtype="bfloat16")),
        ("tp8", LoraConfig(rank=4, targets=("q", "k", "down"))),
        ("tp2_sp4", LoraConfig(rank=4)),
    ],
)
def test_state_with_adapters_of_the_closed_form(case, lora):
    """Frozen weights in their dtype, adapters and their moments: what a step takes as arguments, without norms."""
    layout, sizes = LAYOUT_CASES[case]
    config = dataclasses.replace(CONFIG, lora=lora)
    program = make_program(config, place(layout, **sizes))

    def nbytes(path, array) -> int:
        small = array.ndim == 0 or "scale" in jax.tree_util.keystr(path)
        return 0 if small else math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize

    held = sum(nbytes(*leaf) for leaf in jax.tree_util.tree_leaves_with_path(program.abstract_state))
    formula = step_memory(config, layout, dict.fromkeys(layout.axis_names, 1) | sizes)
    assert formula["state"] == held
    full = step_memory(CONFIG, layout, dict.fromkeys(layout.axis_names, 1) | sizes)
    assert held < full["state"]
    assert formula["gradients"] < full["gradients"]


def test_state_of_padded_rows_is_that_of_as_many_real_ones():
    sizes = {"data": 1, "tsp": 8}
    uneven = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, vocab_size=57, d_ff=59))
    states = (step_memory(config, get_layout("tsp"), sizes)["state"] for config in (CONFIG, uneven))
    assert len(set(states)) == 1
