"""Rows of compiled steps: worker processes, what ends them, and the folder of rows."""

import dataclasses
import os
import re
import signal
from pathlib import Path

import pytest

import tsp_jax
from tests.builders.plans import compiled_row
from tests.builders.steps import CONFIG, CPU, train_step
from tsp_jax.hardware.targets import parse_target
from tsp_jax.plan import worker
from tsp_jax.plan.compiled import USED, Compilers, Job, Refused
from tsp_jax.plan.worker import Worker, row_of

PACKAGE = Path(tsp_jax.__file__).parent
pytestmark = pytest.mark.usefixtures("optax_promotes")
SMALL = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, num_layers=1))
WRONG = dataclasses.replace(SMALL, mesh="data=1,tsp=4")


@pytest.fixture
def answers(monkeypatch):
    """What workers answer, or raise, without a process."""
    following = []

    def ask(self, job):
        found = following.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(Worker, "ask", ask)
    return following


def compile_jobs(cache, *configs, **options):
    with Compilers(CPU, workers=1, cache=cache, **options) as compilers:
        return compilers([Job(config) for config in configs])


def test_rows_of_processes_are_those_of_this_process_and_stay_on_disk(tmp_path, monkeypatch):
    said = []
    with Compilers(CPU, cache=tmp_path, progress=lambda job, found, kept: said.append(kept)) as compilers:
        first = compilers([Job(CONFIG), Job(WRONG), Job(SMALL, "decode")])
    expected = row_of(train_step())
    row = dataclasses.asdict(first[0])
    for field in ("peak_bytes", "step_s", "received_bytes", "by_kind", "kernel"):
        assert row[field] == pytest.approx(expected[field], rel=0.02) if field != "kernel" else expected[field]
    assert isinstance(first[1], Refused) and "use --target cpu:4" in first[1].why
    assert first[2].step_s < first[0].step_s
    monkeypatch.setattr(Worker, "_start", lambda self: pytest.fail("a process was started"))
    with Compilers(CPU, cache=tmp_path, progress=lambda job, found, kept: said.append(kept)) as compilers:
        assert compilers([Job(CONFIG), Job(WRONG), Job(SMALL, "decode")]) == first
    assert said == [False] * 3 + [True] * 3


def test_a_process_that_is_killed_costs_one_row(tmp_path):
    with Compilers(CPU, workers=1, cache=tmp_path) as compilers:
        (only,) = compilers._workers
        only._start()
        os.kill(only._process.pid, signal.SIGKILL)
        only._process.wait()
        (first,) = compilers([Job(SMALL)])
        (second,) = compilers([Job(SMALL)])
    assert isinstance(first, Refused) and first.why.startswith("the compiler's process was ended by signal 9")
    assert second.step_s > 0


def test_a_compilation_that_takes_too_long_is_given_up(tmp_path):
    (row,) = compile_jobs(tmp_path, SMALL, timeout_s=0.2)
    assert row == Refused("not compiled within 0.2 s")
    assert not list(tmp_path.iterdir())


def test_a_process_says_what_ended_it(monkeypatch, tmp_path):
    monkeypatch.setattr(worker, "_MODULE", "tsp_jax.no_such_module")
    (row,) = compile_jobs(tmp_path, SMALL)
    assert "ended with exit code 1" in row.why and "no_such_module" in row.why


def answer(step_s: float) -> dict:
    """What a worker answers for a step that compiles."""
    return {"row": dataclasses.asdict(compiled_row(step_s, 1e9))}


def test_what_kills_a_process_is_tried_again(tmp_path, answers):
    answers += [worker.Died("killed"), answer(2.0)]
    assert compile_jobs(tmp_path, SMALL) == [Refused("killed")]
    assert compile_jobs(tmp_path, SMALL)[0].step_s == 2.0


@pytest.mark.parametrize("content", ["", "{", "[]", '{"row": {"step_s": 1}}', '{"row": 3}', "{}"])
def test_a_broken_row_is_compiled_again(tmp_path, answers, content):
    answers += [answer(1.0), answer(2.0)]
    compile_jobs(tmp_path, SMALL)
    (entry,) = tmp_path.iterdir()
    entry.write_text(content)
    assert compile_jobs(tmp_path, SMALL)[0].step_s == 2.0


def test_a_folder_that_cannot_be_written_only_costs_time(tmp_path, answers):
    answers += [answer(1.0), answer(2.0)]
    (tmp_path / "file").write_text("")
    assert [compile_jobs(tmp_path / "file" / "plan", SMALL)[0].step_s for _ in range(2)] == [1.0, 2.0]


def test_a_row_depends_on_every_closed_form_that_a_program_uses():
    """Others may change without compiling anything again."""
    pattern = re.compile(r"tsp_jax\.cost\.(\w+)|from tsp_jax\.cost import (\w+)")
    files = [f for room in ("ops", "nn", "models", "training", "inference") for f in (PACKAGE / room).rglob("*.py")]
    found = {name for file in files for pair in pattern.findall(file.read_text()) for name in pair if name}
    assert found and {f"cost/{name}.py" for name in found} <= {*USED}


SAME = {"workdir": "elsewhere", "seed": 3, "eval_every": 7, "log": "tensorboard"}
CHANGES = {"remat": "none", "seq_len": 128, "mesh": "data=2,tsp=4", "steps": 5, "z_loss": 0.1}


@pytest.mark.parametrize(("field", "value"), [*SAME.items(), *CHANGES.items()])
def test_a_row_is_kept_for_what_it_depends_on(tmp_path, answers, field, value):
    answers += [answer(1.0), answer(2.0)]
    batched = dataclasses.replace(SMALL, batch=2)
    steps = [compile_jobs(tmp_path, c)[0].step_s for c in (batched, dataclasses.replace(batched, **{field: value}))]
    assert steps == ([1.0, 1.0] if field in SAME else [1.0, 2.0])


def test_a_row_is_kept_for_its_target_and_rates(tmp_path, answers):
    rates = parse_target("h100:8").hardware.rates
    faster = dataclasses.replace(CPU, hardware=dataclasses.replace(CPU.hardware, rates=rates))
    answers += [answer(1.0), answer(2.0), answer(3.0)]
    found = []
    for target in (CPU, faster, parse_target("cpu:4")):
        with Compilers(target, workers=1, cache=tmp_path) as compilers:
            found.append(compilers([Job(SMALL)])[0].step_s)
    assert found == [1.0, 2.0, 3.0]
