"""Weights and moments of a device, by the closed form."""

import dataclasses

import pytest

from tests.builders.steps import CONFIG
from tsp_jax.cost.training import step_memory
from tsp_jax.layout import LAYOUTS, get_layout

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
    assert step_memory(CONFIG, layout, sizes)["state"] == pytest.approx(12 * matrices / shards)
    narrow = dataclasses.replace(CONFIG, optimizer=dataclasses.replace(CONFIG.optimizer, moments_dtype="bfloat16"))
    assert step_memory(narrow, layout, sizes)["state"] == pytest.approx(8 * matrices / shards)


def test_state_of_padded_rows_is_that_of_as_many_real_ones():
    sizes = {"data": 1, "tsp": 8}
    uneven = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, vocab_size=57, d_ff=59))
    states = (step_memory(config, get_layout("tsp"), sizes)["state"] for config in (CONFIG, uneven))
    assert len(set(states)) == 1
