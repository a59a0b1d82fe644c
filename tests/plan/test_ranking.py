"""Which layouts turn within the bands of the rates: constructed rows, with known answers."""

from tsp_jax.hardware.rates import SCENARIOS
from tsp_jax.plan.ranking import turns
from tsp_jax.tools.sweep import Row


def row(layout: str, *steps: float, batch: int = 1, seq_len: int = 64) -> Row:
    """Steps at typical, slow and fast rates, slow links, fast links."""
    scenarios = dict(zip(SCENARIOS, steps, strict=True)) if steps else {}
    return Row(layout=layout, mesh="", seq_len=seq_len, batch=batch, scenario_steps_s=scenarios)


TSP = row("tsp:8", 10, 20, 5, 8, 15)


def test_a_ranking_that_turns_is_named_with_its_figures():
    (line,) = turns([row("tp:8", 11, 30, 4, 9, 16), TSP])
    assert line == (
        "tsp:8 and tp:8 at 64 tokens are a tie within the rates' uncertainty: a sequence takes 10 and 11 s at typical "
        "rates, 5 and 4 s at fast rates"
    )


def test_mixed_rates_may_turn_what_slow_and_fast_ones_do_not():
    (line,) = turns([TSP, row("tp:8", 11, 21, 6, 7, 16)])
    assert line.endswith("8 and 7 s at slow links, fast computation")


def test_overlapping_bands_in_one_order_are_no_tie():
    """From 5 to 20 s and from 6 to 21 s, but never the other way round at the same rates."""
    assert not turns([TSP, row("tp:8", 11, 21, 6, 9, 16)])


def test_equal_steps_do_not_turn():
    assert not turns([TSP, row("fsdp_cp:8", *TSP.scenario_steps_s.values())])


def test_layouts_rank_by_the_time_of_a_sequence():
    (line,) = turns([TSP, row("fsdp", 88, 140, 48, 72, 128, batch=8)])
    assert "10 and 11 s at typical rates, 20 and 17.5 s at slow rates" in line


def test_lengths_and_rows_without_figures_are_not_compared():
    assert not turns([TSP, row("tp:8", 11, 19, 4, 7, 14, seq_len=128), row("sp:8")])
