"""Numbers that are not finite change nothing, are counted, and stop the run when there are too many."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.builders.runs import compile_once, small_config
from tsp_jax.config import FaultsConfig, OptimizerConfig
from tsp_jax.errors import BAD_NUMBERS, RunStopped
from tsp_jax.layout import place
from tsp_jax.training import trainer
from tsp_jax.training.checkpoint import Checkpoints, saved_steps
from tsp_jax.training.metrics import MetricsFile, read_metrics
from tsp_jax.training.optimizer import make_optimizer
from tsp_jax.training.safety.finite import SPIKE_WINDOW, NumbersWatch, all_finite, is_skipped, update_if_finite

pytestmark = pytest.mark.usefixtures("optax_promotes")


@pytest.mark.parametrize("loss", [1.0, math.nan, math.inf])
@pytest.mark.parametrize("norm", [1.0, math.nan, math.inf])
def test_an_update_is_taken_only_if_loss_and_norm_are_finite(loss, norm):
    old = {"w": jnp.zeros(3), "count": jnp.int32(7)}
    new = {"w": jnp.full(3, norm), "count": jnp.int32(8)}
    result = update_if_finite(jnp.float32(loss), jnp.float32(norm), new, old)
    finite = math.isfinite(loss) and math.isfinite(norm)
    assert (np.asarray(result["w"]) == (1.0 if finite else 0.0)).all()
    assert result["count"] == 8, "counts follow the steps"
    assert is_skipped({"loss": loss, "grad_norm": norm}) is not finite


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_number_that_is_not_finite_is_seen(value):
    state = {"a": jnp.ones((4, 5)), "b": jnp.ones(3, jnp.bfloat16), "n": jnp.int32(3)}
    assert all_finite(state)
    assert not all_finite(state | {"a": state["a"].at[2, 3].set(value)})
    assert not all_finite(state | {"b": state["b"].at[1].set(value)})


def test_the_guard_keeps_no_second_copy():
    """The choice between new and old is made in what the step donates.

    The CPU's compiler makes half of the parameters' choices in a buffer of their own; that of MI300X makes none.
    """
    optimizer = make_optimizer(OptimizerConfig(), 200)
    params = {name: jnp.ones((128, 256)) for name in ("one", "two", "three", "four", "five", "six")}

    def held_bytes(guard) -> int:
        def update(params, opt_state, grads):
            updates, new_opt_state = optimizer.update(grads, opt_state, params)
            new = optax.apply_updates(params, updates), new_opt_state
            return guard(jnp.float32(1), optax.tree.norm(grads), new, (params, opt_state))

        lowered = jax.jit(update, donate_argnums=(0, 1)).lower(params, optimizer.init(params), params)
        memory = lowered.compile().memory_analysis()
        return memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes

    guarded, bare = held_bytes(update_if_finite), held_bytes(lambda loss, norm, new, old: new)
    assert guarded - bare <= 3.01 * params["one"].nbytes


# ------------------------------------------------------------------------------------------------ on the host


def line(step: int, loss: float, grad_norm: float = 1.0) -> dict:
    return {"step": step, "loss": loss, "grad_norm": grad_norm}


def test_skipped_steps_in_a_row_stop_and_a_good_one_between_does_not():
    said = []
    watch = NumbersWatch(3, [], said.append)
    for step, loss in enumerate([math.nan, math.nan, 1.0, math.inf, math.nan], start=1):
        watch.see(line(step, loss))
    assert len(said) == 4
    with pytest.raises(RunStopped, match=r"3 steps in a row.*step 6") as stopped:
        watch.see(line(6, 2.0, math.nan))
    assert stopped.value.code == BAD_NUMBERS


def test_a_resumed_run_goes_on_counting():
    said = []
    watch = NumbersWatch(3, [line(1, 1.0), line(2, None), line(3, None)], said.append)
    assert said == []
    with pytest.raises(RunStopped, match="3 steps in a row"):
        watch.see(line(4, math.nan))


@pytest.mark.parametrize(("sigmas", "reports"), [(5.9, 0), (10.0, 1)])
def test_a_spike_is_reported(sigmas, reports):
    losses = 2.0 + 0.1 * np.random.default_rng(0).normal(size=SPIKE_WINDOW)
    spike = float(np.mean(losses) + sigmas * np.std(losses))
    said = []
    resumed = NumbersWatch(10, map(line, range(1, SPIKE_WINDOW + 1), losses), said.append)
    watch = NumbersWatch(10, [], said.append)
    for step, loss in enumerate(losses, start=1):
        watch.see(line(step, loss))
    assert said == []
    for each in (watch, resumed):
        each.see(line(SPIKE_WINDOW + 1, spike))
    assert len(said) == 2 * reports
    assert all(text.startswith(f"loss spike at step {SPIKE_WINDOW + 1}: ") for text in said)


def test_nothing_is_a_spike_before_the_window_is_full():
    said = []
    watch = NumbersWatch(10, map(line, range(1, SPIKE_WINDOW), [2.0] * (SPIKE_WINDOW - 1)), said.append)
    watch.see(line(SPIKE_WINDOW, 100.0))
    assert said == []


def test_numbers_that_are_not_finite_are_null_in_the_metrics(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl", 0)
    metrics.write(line(1, math.nan, math.inf))
    metrics.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"step": 1, "loss": None, "grad_norm": None}


# ------------------------------------------------------------------------------------------------ in a whole run


compiled_once = compile_once(trainer.make_program)


def with_scale(state, scale):
    return state._replace(params={**state.params, "final_norm": {"scale": scale}})


class Faulty:
    """A compiled step that does something else in some steps."""

    def __init__(self, step, steps, fault):
        self.step, self.steps, self.fault = step, steps, fault

    def lower(self, *abstract):
        self.compiled = self.step.lower(*abstract).compile()
        return self

    def compile(self, options=None):
        return self

    def __call__(self, state, batch):
        return (self.fault if int(state.step) in self.steps else Faulty.none)(self.compiled, state, batch)

    def __getattr__(self, name):
        return getattr(self.compiled, name)

    @staticmethod
    def none(step, state, batch):
        return step(state, batch)

    @staticmethod
    def not_finite(step, state, batch):
        """One parameter is NaN for a step, so that loss and gradients are."""
        scale = jnp.copy(state.params["final_norm"]["scale"])
        new, metrics = step(with_scale(state, scale * jnp.nan), batch)
        return with_scale(new, scale), metrics

    @staticmethod
    def overflow(step, state, batch):
        """An update overflows, where loss and gradient are finite."""
        new, metrics = step(state, batch)
        return with_scale(new, new.params["final_norm"]["scale"] * jnp.inf), metrics


def break_steps(monkeypatch, steps, fault) -> None:
    def make(config, placement, optimizer=None):
        program = compiled_once(config, placement, optimizer)
        return dataclasses.replace(program, step=Faulty(program.step, steps, fault))

    monkeypatch.setattr(trainer, "make_program", make)
    monkeypatch.setattr(trainer, "plot_losses", lambda lines, path: True)


def test_a_run_skips_bad_steps_counts_them_and_learns_on(tmp_path, monkeypatch, capsys):
    break_steps(monkeypatch, range(5, 7), Faulty.not_finite)
    summary = trainer.train(small_config(tmp_path), "bad")
    lines = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in lines if is_skipped(line)] == [6, 7]
    assert summary["skipped_steps"] == 2
    assert lines[-1]["loss"] < 0.9 * lines[0]["loss"]
    assert "step 6 is skipped" in capsys.readouterr().err


def test_too_many_bad_steps_stop_the_run_and_no_checkpoint_has_them(tmp_path, monkeypatch):
    break_steps(monkeypatch, range(5, 20), Faulty.not_finite)
    config = small_config(tmp_path, checkpoint_every=1, keep_checkpoints=30, faults=FaultsConfig(skip_limit=4))
    with pytest.raises(RunStopped, match=r"4 steps in a row.*step 9"):
        trainer.train(config, "bad")
    checkpoints = Checkpoints(
        tmp_path / "run" / "checkpoints", compiled_once(config, place("single", data=1)), config, ""
    )
    assert max(saved_steps(checkpoints.folder)) >= 5
    for step in saved_steps(checkpoints.folder):
        assert all_finite(checkpoints.restore(step))


def test_a_state_that_is_not_finite_is_not_saved(tmp_path, monkeypatch):
    break_steps(monkeypatch, [1], Faulty.overflow)
    with pytest.raises(RunStopped, match="the state of step 2 is not finite") as stopped:
        trainer.train(small_config(tmp_path, checkpoint_every=1), "bad")
    assert stopped.value.code == BAD_NUMBERS
    assert saved_steps(tmp_path / "run" / "checkpoints") == [1]
