"""What --plan chooses for a run, and what a run that is resumed keeps of it."""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import pytest

from tests.builders.runs import small_config
from tsp_jax.config import Config
from tsp_jax.errors import ConfigError
from tsp_jax.hardware.targets import parse_target
from tsp_jax.layout import get_layout, parse_mesh
from tsp_jax.plan.space import Choice
from tsp_jax.tools import cli, compare, planned
from tsp_jax.tools.inspect import StepOptions, inspect_step

pytestmark = pytest.mark.usefixtures("optax_promotes")


@pytest.fixture(autouse=True)
def no_flags(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "tiny"])


@pytest.fixture
def config(tmp_path, monkeypatch) -> Config:
    """A run that a plan is to be made for, by closed forms."""
    monkeypatch.setattr(planned, "COMPILATIONS", 0)
    return small_config(tmp_path, plan="fastest", batch=8, workdir=str(tmp_path / "run"))


def record(config: Config, **changes) -> Config:
    """Writes the configuration of a run to its working directory, as training does."""
    recorded = dataclasses.replace(config, **changes)
    (Path(config.workdir) / "checkpoints").mkdir(parents=True)
    (Path(config.workdir) / "config.json").write_text(json.dumps(dataclasses.asdict(recorded)))
    return recorded


def refuse(*_, **__):
    raise AssertionError("nothing is to be chosen")


def test_without_a_plan_nothing_changes(config, monkeypatch):
    monkeypatch.setattr(planned, "choose", refuse)
    alone = dataclasses.replace(config, plan="")
    assert planned.plan_training(alone, "small") is alone


def test_a_plan_uses_all_devices_and_keeps_the_model_and_the_tokens(config, capsys):
    found = planned.plan_training(config, "small")
    sizes = parse_mesh(found.mesh, get_layout(found.layout), 8)
    assert jax.numpy.prod(jax.numpy.array([*sizes.values()])) == 8
    assert Choice.of(config).apply(found) == config
    assert f"plan=fastest for cpu:8: {found.layout} {found.mesh}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "field", "value"),
    [(["--remat", "full"], "remat", "full"), (["--layout=tp", "--mesh", "model=8"], "layout", "tp")],
)
def test_flags_stay(config, monkeypatch, flags, field, value):
    monkeypatch.setattr(sys, "argv", ["train.py", "tiny", *flags])
    given = dataclasses.replace(config, remat="full") if field == "remat" else config
    if field == "layout":
        given = dataclasses.replace(
            config, layout="tp", mesh="model=8", model=dataclasses.replace(config.model, num_heads=8)
        )
    assert getattr(planned.plan_training(given, "small"), field) == value


def test_finalists_are_compiled(config, monkeypatch, capsys):
    monkeypatch.setattr(planned, "COMPILATIONS", 1)
    monkeypatch.setattr(sys, "argv", ["train.py", "tiny", "--layout", "fsdp"])
    planned.plan_training(dataclasses.replace(config, layout="fsdp", mesh=""), "small")
    assert "(compiled and simulated)" in capsys.readouterr().out


def test_a_resumed_run_keeps_its_choice(config, monkeypatch, capsys):
    recorded = record(config, layout="tp_sp", mesh="data=1,model=2,seq=4", remat="offload")
    monkeypatch.setattr(planned, "choose", refuse)
    assert planned.plan_training(config, "small") == recorded
    assert "as the run in" in capsys.readouterr().out


def test_the_folder_of_a_planned_run_is_the_configuration_that_was_chosen(config):
    """Inspection and comparison of a run do not choose again."""
    recorded = record(config, layout="tp_sp", mesh="data=1,model=2,seq=4")
    assert cli.load_config(config.workdir) == dataclasses.replace(recorded, plan="")


def test_a_flag_changes_the_choice_of_a_resumed_run(config, monkeypatch):
    recorded = record(config, layout="tp_sp", mesh="data=1,model=2,seq=4", remat="offload")
    monkeypatch.setattr(planned, "choose", refuse)
    monkeypatch.setattr(sys, "argv", ["train.py", "tiny", "--remat", "full"])
    found = planned.plan_training(dataclasses.replace(config, remat="full"), "small")
    assert found == dataclasses.replace(recorded, remat="full")


@pytest.mark.parametrize(
    "changes", [{"mesh": "data=1,model=2,seq=2"}, {"seq_len": 192}, {"plan": ""}], ids=["devices", "tokens", "no plan"]
)
def test_a_run_of_another_step_is_planned_anew(config, changes, capsys):
    record(config, **{"layout": "tp_sp", "mesh": "data=1,model=2,seq=4"} | changes)
    planned.plan_training(config, "small")
    assert "as the run in" not in capsys.readouterr().out


def test_several_processes_choose_by_closed_forms_alone(config, monkeypatch, capsys):
    monkeypatch.setattr(planned, "COMPILATIONS", 4)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(planned, "_compile_here", refuse)
    planned.plan_training(config, "small")
    assert "(by closed forms)" in capsys.readouterr().out


def test_devices_of_unknown_rates_are_refused(monkeypatch):
    class Unknown:
        platform, device_kind = "gpu", "NVIDIA H100 PCIe"

    monkeypatch.setattr(jax, "devices", lambda: [Unknown()])
    with pytest.raises(ConfigError, match="rates of NVIDIA H100 PCIe are not known; leave --plan out"):
        planned.present_target()


def test_compare_refuses_a_plan(config):
    with pytest.raises(ConfigError, match="plan=fastest chooses a layout, and compare compares given ones"):
        compare.compare("small", compare.CompareOptions(config=config, target="cpu:8"))


def test_inspect_plans_for_its_target(config, monkeypatch, capsys):
    """The step that is inspected is the one that was chosen."""
    found = dataclasses.replace(config, layout="dp", mesh="data=8")
    seen = []
    monkeypatch.setattr("tsp_jax.tools.inspect.plan_for", lambda config, target, *_: seen.append(str(target)) or found)
    monkeypatch.setattr("tsp_jax.tools.inspect.use_target", lambda target: None)
    assert inspect_step("small", StepOptions(config=config, target="cpu:8")) == 0
    assert seen == ["cpu:8"] and "layout dp on cpu:8 (data=8)" in " ".join(capsys.readouterr().out.split())


def test_a_plan_for_a_target_is_the_planners(config, monkeypatch):
    """Inspection chooses as tsp-plan does: the same arguments, and the flags that are fixed."""
    seen = {}
    monkeypatch.setattr(planned, "choose", lambda *args, **kwargs: seen.update(kwargs) or _choose(*args, **kwargs))
    found = planned.plan_for(config, parse_target("cpu:8"), "small", say=lambda _: None)
    assert seen["minimise"] == "time" and "compilations" not in seen
    assert found.plan == "fastest"


def _choose(config, target, **kwargs):
    from tsp_jax.plan.choose import choose

    return choose(config, target, **kwargs | {"compilations": 0})
