"""Which buffers of a compiled program make it differ from the closed form."""

import dataclasses

import pytest

from tests.builders.steps import CONFIG, CPU, train_step
from tsp_jax.inspect import LiveBuffer
from tsp_jax.plan.estimate import estimate
from tsp_jax.plan.explain import differs, explain
from tsp_jax.plan.peak_parts import peak_parts

pytestmark = pytest.mark.usefixtures("optax_promotes")


def explained(config=CONFIG, gaps=0):
    """The closed form of a configuration against the program of CONFIG, with so many bytes that no buffer uses."""
    peak = train_step().report().peak
    return explain(estimate(config, CPU), peak.at, peak_parts(peak, CONFIG), peak.bytes + gaps)


def test_every_buffer_of_the_peak_belongs_to_one_part():
    report, found = train_step().report(), explained()
    assert sum(each.compiled for each in found) == report.peak.bytes
    assert len({each.part for each in found}) == len(found)
    assert [abs(each.compiled - each.closed_form) for each in found] == sorted(
        (abs(each.compiled - each.closed_form) for each in found), reverse=True
    )


def test_memory_that_no_buffer_uses_is_a_part():
    assert "gaps" not in {each.part for each in explained()}
    gaps = explained(gaps=10**9)[0]
    assert (gaps.part, gaps.closed_form, gaps.compiled) == ("gaps", 0.0, 1e9)


def test_a_part_names_its_largest_buffers():
    state = next(each for each in explained() if each.part == "state")
    assert state.compiled == pytest.approx(state.closed_form, rel=0.05), "norms are not in the closed form"
    assert "state: 0.000 GB by the closed form" in str(state) and "state.params" in str(state)


def test_a_form_that_forgets_moments_differs_in_the_state():
    half = dataclasses.replace(CONFIG, optimizer=dataclasses.replace(CONFIG.optimizer, name="lion"))
    state = next(each for each in explained(half) if each.part == "state")
    assert state.compiled > 1.4 * state.closed_form


@pytest.mark.parametrize(("compiled", "expected"), [(1.0, False), (1.04, False), (1.06, True), (0.94, True)])
def test_a_peak_differs_from_five_percent_on(compiled, expected):
    assert differs(compiled, 1.0) == expected


@pytest.mark.parametrize(
    ("scope", "holds", "part"),
    [
        ("experts/mean_trips[4]/while/body/scatter-add", "while/body/btp,btd->pd/dot_general", "weights"),
        ("experts/mean_trips[4]/while/body/scatter-add", "while/body/btp,pd->btd/dot_general", "activations"),
        ("experts/gather/all_gather", "", "weights"),
        ("experts/gather_tokens/all_gather", "", "activations"),
        ("experts/concatenate", "", "weights"),
    ],
)
def test_gradients_and_messages_of_experts_are_weights(scope, holds, part):
    """Also if their first dim happens to be the number of layers."""
    buffer = LiveBuffer(
        bytes=1, shape=(CONFIG.model.num_layers, 8, 32), dtype="f32", kind="transient", holds=holds, source="", name="",
        scope=f"jit(step)/transpose(jvp())/shard_map/tsp/{scope}", opcode="", computation="",
    )  # fmt: skip
    if part == "activations":
        buffer = dataclasses.replace(buffer, shape=(64, 32))
    peak = dataclasses.replace(train_step().report().peak, buffers=(buffer,))
    assert set(peak_parts(peak, CONFIG)) == {part}
