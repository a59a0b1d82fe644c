"""tsp-inspect A B as a user types it: what differs, contracts, and wrong input in one line."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from tests.builders.fuzz import check_door
from tests.builders.hlo import gather, kernel, lines
from tsp_jax.errors import ConfigError
from tsp_jax.inspect.diff import diff
from tsp_jax.inspect.render_diff import show_diff
from tsp_jax.tools import difference, inspect

HEADER = "HloModule test, is_scheduled=true, num_partitions=8"
START, DONE = gather("g", 56)
SCRIPT = Path(__file__).parents[2] / "scripts" / "inspect_hlo.py"
STEP = ["tiny", "--target", "cpu:8", "--seq-len", "64", "--batch", "1", "--model.num-layers", "1", "--step", "forward"]


def write(name: str, *instructions: str, header: str = HEADER) -> None:
    Path(name).write_text(f"{header}\n\nENTRY %main () -> () {{\n{lines(*instructions)}\n}}\n")


@pytest.fixture(autouse=True)
def programs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("a.hlo", START, DONE, kernel("k", 800_000_000))
    write("b.hlo", START, kernel("renamed", 800_000_000), DONE)
    write("early.hlo", START, DONE, header="HloModule test, num_partitions=8")
    Path("list.json").write_text("[]")
    Path("other.json").write_text('{"rows": []}')


def run(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["tsp-inspect", *arguments])
    with pytest.raises(SystemExit) as stop:
        inspect.main()
    return int(stop.value.code or 0)


def test_two_texts(monkeypatch, capsys):
    flags = ["--target", "h100:8", "--mesh", "tsp=8", "--json", "out.json"]
    assert run(monkeypatch, "a.hlo", "b.hlo", *flags) == 0
    found = json.loads(Path("out.json").read_text())
    assert found["a"] == {"program": "a.hlo of h100:8", "target": "h100:8"}
    assert found["holds"] and found["totals"]["exposed_comm_s"]["after"] < found["totals"]["exposed_comm_s"]["before"]
    (row,) = found["collectives"]
    assert (row["key"][:2], row["state"]) == (["all-gather", "tsp"], "changed")
    assert "B's step is shorter at all rates" in capsys.readouterr().out
    assert run(monkeypatch, "b.hlo", "a.hlo", "--target", "h100:8", "--expect", "step<=1.02x,received<=1x") == 1
    out = capsys.readouterr().out
    assert "broken: step<=1.02x: from" in out and "broken: received" not in out


def test_a_report_and_a_text(monkeypatch, capsys):
    assert run(monkeypatch, "a.hlo", "--target", "h100:8", "--json", "a.json") == 0
    capsys.readouterr()
    assert run(monkeypatch, "a.json", "a.hlo", "--target", "h100:8") == 0
    assert "no difference" in capsys.readouterr().out
    assert run(monkeypatch, "a.json", "b.hlo") == 0
    assert "B: time is not known without a target" in capsys.readouterr().out
    assert run(monkeypatch, "a.json", "a.hlo", "--target", "h200:8") == 2
    assert run(monkeypatch, "a.json", "a.hlo", "--target", "h200:8", "--across-targets") == 0


def test_a_report_and_a_configuration(tmp_path):
    """In processes of their own, because virtual devices are set up once."""

    def inspected(*arguments: str) -> str:
        command = [sys.executable, str(SCRIPT), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    inspected(*STEP, "--json", "step.json")
    assert "no difference" in inspected("step.json", *STEP)


WRONG = {
    "absent": (["a.hlo", "c.hlo"], "c.hlo does not exist"),
    "absent report": (["c.json", "a.hlo"], "c.json does not exist"),
    "targets": (["h200.json", "a.hlo", "--target", "h100:8"], "A is of h200:8 and B of h100:8"),
    "no times": (["a.hlo", "early.hlo", "--target", "h100:8"], "early.hlo has no timeline: its text lacks"),
    "no times in a report": (["a.hlo", "untimed.json", "--target", "h100:8"], "untimed.json has no timeline"),
    "no object": (["list.json", "a.hlo"], "list.json"),
    "no report": (["other.json", "a.hlo"], "other.json has no missing; use a report"),
    "earlier report": (["old.json", "a.hlo"], "old.json: "),
    "trace": (["a.hlo", "b.hlo", "--trace", "t.json"], "trace means nothing to two programs"),
    "contract": (["a.hlo", "b.hlo", "--expect", "peak<=24GB"], "expect=peak<=24GB is no contract of two programs"),
    "contract without times": (["a.hlo", "b.hlo", "--expect", "step<=1x"], "step is not known of both programs"),
    "folder": (["a.hlo", "b.hlo", "--json", "no/such.json"], "json=no/such.json cannot be written"),
    "configuration": (["a.hlo", "unknown_configuration"], "configuration unknown_configuration is unknown"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_line(case, monkeypatch, capsys):
    report = inspect.report_text("a.hlo", "h200:8", "", inspect.Outputs())[0].to_json()
    Path("h200.json").write_text(json.dumps({"target": "h200:8", **report}))
    Path("untimed.json").write_text(json.dumps({"target": "", **report, "timeline": None}))
    Path("old.json").write_text(json.dumps({**report, "timeline": {"step_s": 1.0}}))
    arguments, words = WRONG[case]
    assert run(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and error.startswith("error: ")


def test_fuzz_of_a_report():
    """A damaged report is read and compared, or refused in one line."""
    report = inspect.report_text("a.hlo", "h200:8", "tsp=8", inspect.Outputs())[0].to_json()
    content, file = json.dumps({"target": "h200:8", **report}).encode(), Path("damaged.json")
    out = Console(file=io.StringIO())

    def compare(damaged: bytes) -> None:
        file.write_bytes(damaged)
        show_diff(diff(report, difference.read_report(str(file)).report), ("a", "b"), out)

    check_door(compare, [content], (ConfigError,), count=200)
