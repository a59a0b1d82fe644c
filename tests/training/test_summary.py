"""The end of a run: its steps are saved, so nothing about summary, table or picture fails it."""

import dataclasses
import io
import json
import os
import shutil
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from tests.builders.fuzz import check_door
from tests.builders.runs import compile_once, numbers, small_config
from tsp_jax.training import pictures, trainer
from tsp_jax.training.distributed import write_atomically
from tsp_jax.training.metrics import MetricsFile
from tsp_jax.training.pictures import plot_losses
from tsp_jax.training.summary import print_summary, read_summary

pytestmark = pytest.mark.usefixtures("optax_promotes")

make_program = compile_once(trainer.make_program)
STEPS = 3


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A complete run."""
    config = small_config(tmp_path_factory.mktemp("whole"), steps=STEPS, eval_every=2)
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, warmup_steps=1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "make_program", make_program)
        trainer.train(config, "whole")
    return config


@pytest.fixture
def again(whole, tmp_path, monkeypatch):
    """Its copy, which `trainer.train` finds complete."""
    monkeypatch.setattr(trainer, "make_program", make_program)
    shutil.copytree(whole.workdir, tmp_path / "run")
    return dataclasses.replace(whole, workdir=str(tmp_path / "run"))


def read(config) -> dict:
    return json.loads((Path(config.workdir) / "summary.json").read_text())


def lines_of(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("warning: ")]


# ------------------------------------------------------------------------------------------------ damaged files


def damaged_summaries(whole) -> dict[str, bytes]:
    good = read(whole)
    return {
        "cut": json.dumps(good).encode()[:50],
        "empty": b"",
        "a list": b"[1]",
        "without a key": json.dumps({key: value for key, value in good.items() if key != "loss"}).encode(),
        "a loss of text": json.dumps(good | {"loss": "low"}).encode(),
        "no UTF-8": b"\xff\xfe",
        "nested deeply": b"[" * 100_000,
    }


@pytest.mark.parametrize(
    "case", ["cut", "empty", "a list", "without a key", "a loss of text", "no UTF-8", "nested deeply"]
)
def test_a_damaged_summary_is_read_as_none_and_said(case, whole, tmp_path):
    (tmp_path / "summary.json").write_bytes(damaged_summaries(whole)[case])
    said = []
    assert read_summary(tmp_path / "summary.json", STEPS, said.append) is None
    assert len(said) == 1
    assert said[0].endswith("; it is made anew") and "summary.json" in said[0] and "\n" not in said[0]


def test_a_damaged_summary_is_made_anew(whole, again, capsys):
    (Path(again.workdir) / "summary.json").write_text("{")
    trainer.train(again, "whole")
    assert read(again) == read(whole)
    assert "made anew" in capsys.readouterr().err


def test_summary_and_metrics_are_made_anew_from_a_checkpoint_alone(whole, again, capsys):
    for name in ("summary.json", "metrics.jsonl"):
        (Path(again.workdir) / name).write_bytes(b"\xff\n")
    found = trainer.train(again, "whole")
    assert found == read(whole) | {"loss": None, "tokens_per_s": None, "tflops_per_device": None}
    assert [line["step"] for line in numbers(Path(again.workdir))] == [STEPS], "its evaluation"
    assert "no line of steps 1-3" in capsys.readouterr().err


def test_the_summary_of_another_step_is_not_shown(whole, tmp_path):
    (tmp_path / "summary.json").write_text(json.dumps(read(whole)))
    assert read_summary(tmp_path / "summary.json", STEPS, print) == read(whole)
    assert read_summary(tmp_path / "summary.json", STEPS + 1, print) is None


def test_a_complete_run_writes_the_lines_that_its_checkpoint_kept(whole, again):
    metrics = Path(again.workdir) / "metrics.jsonl"
    text = metrics.read_text()
    lines = text.splitlines(keepends=True)
    metrics.write_text("".join(lines[:2]))
    (Path(again.workdir) / "checkpoints" / str(STEPS) / "metrics.jsonl").write_text("".join(lines[2:]))
    (Path(again.workdir) / "checkpoints" / str(STEPS) / "manifest.json").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tsp_jax.training.checkpoint.find_damage", lambda *_: None)
        trainer.train(again, "whole")
    assert metrics.read_text() == text


# ------------------------------------------------------------------------------------------------ files in the way


@pytest.mark.parametrize("kind", ["folder", "fifo", "link to /dev/full"])
def test_what_is_in_the_place_of_a_file_ends_no_run(kind, whole, tmp_path, monkeypatch, capsys):
    names = ("config.json", "metrics.jsonl", "loss.png", "eval_positions.png", "summary.json")
    monkeypatch.setattr(trainer, "make_program", make_program)
    config = dataclasses.replace(whole, workdir=str(tmp_path / "run"))
    (tmp_path / "run").mkdir()
    for name in names:
        path = tmp_path / "run" / name
        if kind == "folder":
            path.mkdir()
            (path / "content").write_text("")
        elif kind == "fifo":
            os.mkfifo(path)
        else:
            path.symlink_to("/dev/full")
    trainer.train(config, "whole")
    warnings = lines_of(capsys.readouterr().err)
    assert numbers(tmp_path / "run") == numbers(Path(whole.workdir))
    if kind == "folder":
        assert [sum(name in line for line in warnings) for name in names] == [1] * 5
    else:
        assert len(warnings) == 1, "metrics.jsonl is put aside, the others are replaced"
        assert read(config)["step"] == STEPS


def test_a_full_disk_at_the_end_ends_no_run(whole, tmp_path, monkeypatch, capsys):
    def full(path, content):
        if path.name != "config.json":
            raise OSError(28, "No space left on device")
        write_atomically(path, content)

    monkeypatch.setattr(trainer, "make_program", make_program)
    monkeypatch.setattr("tsp_jax.training.distributed.write_atomically", full)
    monkeypatch.setattr(pictures, "write_atomically", full)
    config = dataclasses.replace(whole, workdir=str(tmp_path / "run"))
    assert trainer.train(config, "whole")["step"] == STEPS
    warnings = lines_of(capsys.readouterr().err)
    assert len(warnings) == 3
    assert all(
        f"{name}.png cannot be drawn" in line for name, line in zip(("loss", "positions"), warnings, strict=False)
    )
    assert "summary.json cannot be written (No space" in warnings[2]


@pytest.mark.parametrize("renamed", [True, False])
def test_a_working_directory_that_vanishes_ends_no_run(renamed, whole, tmp_path, monkeypatch, capsys):
    write, folder = MetricsFile.write, tmp_path / "run"

    def vanish(metrics, line):
        write(metrics, line)
        if line["step"] == 2 and "loss" in line:
            folder.rename(tmp_path / "elsewhere") if renamed else shutil.rmtree(folder)

    monkeypatch.setattr(trainer, "make_program", make_program)
    monkeypatch.setattr(MetricsFile, "write", vanish)
    config = dataclasses.replace(whole, workdir=str(folder))
    trainer.train(config, "whole")
    assert numbers(folder) == numbers(Path(whole.workdir))
    assert read(config)["loss"] == read(whole)["loss"]
    assert "was removed or renamed while training" in capsys.readouterr().err


def test_a_temporary_file_is_not_left_behind(tmp_path):
    (tmp_path / "summary.json").mkdir()
    os.mkfifo(tmp_path / "summary.json.tmp")
    with pytest.raises(OSError, match="directory"):
        write_atomically(tmp_path / "summary.json", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


# ------------------------------------------------------------------------------------------------ table and picture


def show(content: dict) -> str:
    out = io.StringIO()
    print_summary(content, Console(file=out, width=100, force_terminal=True, color_system=None))
    return out.getvalue()


def test_nothing_in_a_summary_is_markup(whole):
    shown = show(read(whole) | {"config": "[bold]a[/]", "layout": "[/red]", "mesh": "\x1b[31m"})
    assert "[bold]a[/], [/red], ?[31m" in shown


def test_nothing_in_a_checkpoint_is_markup(again, monkeypatch, capsys):
    path = Path(again.workdir) / "checkpoints" / str(STEPS) / "meta.json"
    meta = json.loads(path.read_text())
    meta["config"]["seed"] = "[/red]:bug:"
    path.write_text(json.dumps(meta))
    monkeypatch.setattr("tsp_jax.training.checkpoint.find_damage", lambda *_: None)
    trainer.train(again, "whole")
    assert "was [/red]:bug:" in capsys.readouterr().out


def test_numbers_that_no_step_has_are_none(whole):
    shown = show(read(whole) | {"loss": None, "eval_loss": None, "tokens_per_s": None})
    assert shown.count("none") == 4, "nor is there a share of a CPU's peak"


@pytest.mark.parametrize(
    "lines", [[], [{"step": 1, "loss": None}], [{"step": 1, "loss": 2.0}, {"step": 1, "eval_loss": None}]]
)
def test_a_picture_of_little(lines, tmp_path):
    assert plot_losses(lines, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.soak
def test_no_summary_prevents_resuming(whole, tmp_path):
    """A fuzz; a summary of any content is shown, or none."""
    path = tmp_path / "summary.json"

    def show_any(content: bytes) -> None:
        path.write_bytes(content)
        found = read_summary(path, STEPS, lambda text: None)
        if found is not None:
            show(found)

    with_nulls = msgspec.json.encode(read(whole) | {"loss": None, "eval_loss": None})
    check_door(show_any, [(Path(whole.workdir) / "summary.json").read_bytes(), with_nulls], allowed=())
