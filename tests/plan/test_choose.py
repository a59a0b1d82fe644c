"""Plans made with compilers that are functions: what is chosen, said and written."""

import dataclasses
import json

import optax
import pytest

from tests.builders.plans import compiled_row
from tests.builders.steps import CONFIG, CPU
from tsp_jax.config import ExpertsConfig
from tsp_jax.errors import ConfigError
from tsp_jax.hardware.rates import SCENARIOS
from tsp_jax.hardware.targets import parse_target
from tsp_jax.plan.advice import is_tsp
from tsp_jax.plan.choose import choose
from tsp_jax.plan.compiled import Refused
from tsp_jax.plan.estimate import estimate
from tsp_jax.plan.space import Choice

FIXED = frozenset({"remat", "stream.bucket_mib"})
STEPS = {"tsp": 3.0, "fsdp_cp": 2.0, "tp": 4.0, "sp": 5.0, "tp_sp": 6.0}


def compile_by(steps, **changes):
    """A compiler whose steps take what `steps` says of their layout."""

    def compile(jobs):
        return [compiled_row(steps.get(job.config.layout, 9.0), 1e6, **changes) for job in jobs]

    return compile


def plan_with(steps, config=CONFIG, **options):
    return choose(config, CPU, fixed=FIXED, compile=compile_by(steps), name="small", **options)


def test_the_fastest_compiled_step_is_chosen():
    plan = plan_with(STEPS)
    assert plan.chosen.choice.layout == "fsdp_cp" and plan.chosen.compiled.step_s == 2.0
    config = plan.config()
    assert (config.layout, config.mesh, config.cpu_devices) == ("fsdp_cp", "data=1,tsp=8", 8)
    assert dataclasses.replace(config, layout="tsp", mesh=CONFIG.mesh, cpu_devices=0) == CONFIG


def test_a_plan_says_why_and_that_tsp_is_not_the_fastest():
    lines = plan_with(STEPS).why
    assert lines[0].startswith("do not use TSP here: its best, tsp data=1,tsp=8, takes 3 s")
    assert "fsdp_cp data=1,tsp=8 takes 2 s" in lines[1] and "less computation (2 and 3 s)" in lines[1]
    assert not any("do not use TSP" in line for line in plan_with(STEPS | {"tsp": 1.0}).why)


def test_a_ranking_that_turns_is_a_tie():
    slow = dict.fromkeys(SCENARIOS, 2.5)

    def compile(jobs):
        other = {"scenario_steps_s": slow | {"fast rates": 0.5}}
        return [
            compiled_row(3.0, 1e6, **(other if job.config.layout == "tp" else {}))
            if job.config.layout != "fsdp_cp" else compiled_row(2.0, 1e6) for job in jobs
        ]  # fmt: skip

    (line,) = choose(CONFIG, CPU, fixed=FIXED, compile=compile).ties
    assert "fsdp_cp data=1,tsp=8 and tp data=1,model=8 at 64 tokens are a tie" in line


def test_json_has_what_a_page_draws():
    plan = plan_with(STEPS)
    content = json.loads(json.dumps(plan.to_json()))
    assert {*content} >= {"model", "target", "seq_len", "batch", "budget", "candidates", "best", "front", "longest"}
    best = content["candidates"][content["best"]]
    assert best["config"]["layout"] == "fsdp_cp" and best["on_front"] and best["compiled"]["step_s"] == 2.0
    assert content["front"] == [k for k, c in enumerate(content["candidates"]) if c["on_front"]]
    assert {"tsp", "tp", "sp"} <= {*content["longest"]}


def test_a_peak_far_from_its_closed_form_names_the_buffers():
    def compile(jobs):
        forms = [estimate(job.config, CPU).memory for job in jobs]
        rows = []
        for form in forms:
            parts = {name: [nbytes, ""] for name, nbytes in form.items()} | {"weights": [1e6, "f32[8] of mlp/gather"]}
            rows.append(compiled_row(2.0, sum(nbytes for nbytes, _ in parts.values()), parts=parts))
        return rows

    plan = choose(CONFIG, CPU, fixed=FIXED, compile=compile)
    (part,) = plan.differences(plan.chosen)
    assert part.part == "weights" and "1.000 GB" not in str(part) and "0.001 compiled" in str(part)
    content = plan.to_json()["candidates"]
    assert content[plan.best]["differences"][0]["buffers"] == "f32[8] of mlp/gather"
    assert not content[-1]["differences"], "it is not compiled"


def test_without_compilations_closed_forms_decide():
    plan = choose(CONFIG, CPU, fixed=FIXED, compilations=0, compile=lambda jobs: pytest.fail("compiled"))
    assert plan.chosen.compiled is None
    assert plan.chosen.estimate.step_s == min(c.estimate.step_s for c in plan.candidates)


def test_mixtures_of_experts_are_planned():
    """On every layout that divides the tokens, and with as many parameters as ranks hold at least."""
    model = dataclasses.replace(CONFIG.model, d_ff=512, experts=ExpertsConfig(number=20, per_token=2, shared=1))
    plan = choose(dataclasses.replace(CONFIG, model=model), parse_target("mi300x:8"), compilations=0)
    assert {"tsp", "tp", "sp", "fsdp_cp", "tp_sp"} <= {c.choice.layout for c in plan.search.candidates}
    assert min(c.peak_bytes for c in plan.search.candidates) > 3 * 4 * model.num_params / 8


SHORT = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, head_dim=128), compute_dtype="bfloat16")


@pytest.mark.parametrize(
    ("kernel", "fixed", "searched"),
    [("auto", FIXED, {"auto", "triton"}), ("auto", FIXED | {"stream.kernel"}, {"auto"}), ("cudnn", FIXED, {"cudnn"})],
)
def test_kernels_with_rates_are_searched_unless_one_is_asked_for(kernel, fixed, searched):
    config = dataclasses.replace(SHORT, stream=dataclasses.replace(SHORT.stream, kernel=kernel))
    plan = choose(config, parse_target("h100:8"), fixed=fixed, compilations=0)
    assert {c.choice.kernel for c in plan.search.candidates} == searched
    (line,) = [line for line in plan.why if line.startswith("attention kernel ")]
    assert line.endswith(("with triton", "with cudnn"))


def test_the_only_kernel_with_rates_is_said_to_be_it():
    lines = choose(SHORT, parse_target("mi300x:8"), fixed=FIXED, compilations=0).why
    assert any(line.startswith("attention kernel triton: no other one with rates") for line in lines)


def test_least_memory_has_the_least_peak():
    plan = choose(CONFIG, CPU, compilations=0, minimise="memory")
    assert plan.best == plan.front[-1]
    assert plan.chosen.peak_bytes == min(c.peak_bytes for c in plan.candidates)


def test_a_choice_that_rounds_more_is_said_to():
    (note,) = choose(CONFIG, CPU, fixed=FIXED, compilations=0, minimise="memory", narrow=True).notes
    assert note.startswith("optimizer.moments_dtype=bfloat16") and "changes the numbers of training" in note
    assert not choose(CONFIG, CPU, fixed=FIXED, compilations=0, minimise="memory").notes


def test_lengths_at_which_tsp_is_slower_are_named():
    """One long sequence a step, or many short ones: then FSDP needs no exchange of keys and values."""
    config = dataclasses.replace(CONFIG, seq_len=8192)
    lines = choose(config, CPU, fixed=FIXED, compilations=0).why
    assert any("by closed forms, with 8,192 tokens a step" in line for line in lines)


@pytest.mark.parametrize(
    ("layout", "mesh", "expected"),
    [
        ("tsp", "data=1,tsp=8", True), ("tsp", "data=8,tsp=1", False), ("fsdp_cp", "data=1,tsp=8", False),
        ("tsp(sequence=node+tsp)", "data=1,node=2,tsp=4", True), ("fsdp", "data=8", False),
        ("tsp(weights=data+tsp)", "data=2,tsp=4", True), ("tp_sp", "data=1,seq=2,model=4", False),
    ],
)  # fmt: skip
def test_what_counts_as_tsp(layout, mesh, expected):
    assert is_tsp(dataclasses.replace(Choice.of(CONFIG), layout=layout, mesh=mesh)) == expected


REFUSED = {
    "memory of 0": ({"memory": 0.0}, "memory=0 must be above 0"),
    "memory above 1": ({"memory": 1.5}, "memory=1.5 must be above 0"),
    "memory that is no number": ({"memory": float("nan")}, "memory=nan"),
    "a field that is not chosen": ({"fixed": frozenset({"seq_len"})}, "fixed=seq_len is not chosen by a plan"),
    "an optimizer of one's own": ({"optimizer": optax.sgd(0.1)}, "optimizer is a transformation of its own"),
    "too little memory": ({"memory": 1e-9}, "fits on no layout"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_come_before_a_compilation(case):
    options, words = REFUSED[case]
    with pytest.raises(ConfigError, match=words) as error:
        choose(CONFIG, CPU, compile=lambda jobs: pytest.fail("compiled"), **options)
    assert "use" in str(error.value)


def test_finalists_that_do_not_compile_are_refused_with_a_reason():
    with pytest.raises(ConfigError, match=r"no finalist compiles.*out of registers"):
        choose(CONFIG, CPU, fixed=FIXED, compile=lambda jobs: [Refused("out of registers")] * len(jobs))


def test_finalists_that_compile_to_more_than_fits_are_refused():
    with pytest.raises(ConfigError, match=r"does not fit: .* use more --compilations, a larger --memory"):
        choose(CONFIG, CPU, fixed=FIXED, compile=lambda jobs: [compiled_row(1.0, 1e12) for _ in jobs])
