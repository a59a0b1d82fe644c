"""tsp-inspect and tsp-compare as a user types them: results in files, wrong input in one line."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from tsp_jax.tools import compare, inspect

SCRIPTS = Path(__file__).parents[2] / "scripts"
SMALL = ["tiny", "--target", "cpu:8", "--seq-len", "64", "--batch", "1", "--model.num-layers", "1"]


def run(script: str, flags: str, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPTS / script), *flags.split()]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=300)


def write_hardware(path: Path, bytes_per_s: float, base: str = "cpu") -> None:
    content = {"format": 1, "name": "node", "base": base, "date": "2026-11-26", "memory": {"bytes_per_s": bytes_per_s}}
    path.write_text(json.dumps(content))


def test_inspect_script(tmp_path):
    flags = "--layout tsp --mesh data=1,tsp=8 --json out.json --dump-hlo out.hlo --trace out.json.gz --step forward"
    first = run("inspect_hlo.py", f"{' '.join(SMALL)} {flags} --expect peak<=1GB", tmp_path)
    assert first.returncode == 0, first.stderr
    assert "Memory of one device" in first.stdout and "assumed:" in first.stdout
    assert json.loads((tmp_path / "out.json").read_text())["mesh"] == {"data": 1, "tsp": 8}
    assert (tmp_path / "out.json.gz").stat().st_size > 1000
    write_hardware(tmp_path / "node.json", 1e3)
    flags = "--hardware node.json --expect peak<=1KB,no-sync-collective --json again.json"
    again = run("inspect_hlo.py", f"out.hlo {flags}", tmp_path)  # the target is the file's
    assert again.returncode == 1, again.stderr
    assert "broken: peak<=1KB" in again.stdout and "broken: no-sync-collective" in again.stdout
    assert "rates of node.json: measured on node, 1 x cpu, 2026-11-26" in again.stdout
    steps = [json.loads((tmp_path / name).read_text())["timeline"]["step_s"] for name in ("out.json", "again.json")]
    assert steps[1] > 1000 * steps[0]


def test_compare_script(tmp_path):
    write_hardware(tmp_path / "node.json", 1e3)
    flags = "--target cpu:8 --seq-lens 64 --layouts tp_sp:2x4 --step forward --model.num-layers 1 --hardware node.json"
    done = run("compare.py", f"tiny {flags} --json o.json --csv o.csv --png o.png", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "rates of node.json: measured on node" in done.stdout
    (row,) = json.loads((tmp_path / "o.json").read_text())["rows"]
    assert row["step_low_s"] == row["step_s"] == row["step_high_s"] == row["scenario_steps_s"]["slow rates"]
    assert {"o.json", "o.csv", "o.png"} <= {path.name for path in tmp_path.iterdir()}
    assert "tp_sp:2x4" in done.stdout


WRONG = {
    "target": (inspect, [*SMALL, "--target", "mi400x:8"], "target=mi400x:8 is unknown"),
    "layout": (inspect, [*SMALL, "--layout", "tps"], "layout=tps is unknown"),
    "mesh": (inspect, [*SMALL, "--mesh", "data=1,tsp=4"], "use --target cpu:4"),
    "expect": (inspect, [*SMALL, "--expect", "peak<=1kilo"], "expect=peak<=1kilo"),
    "folder": (inspect, [*SMALL, "--json", "no/such/out.json"], "json=no/such/out.json cannot be written"),
    "not HLO": (inspect, ["novel.txt"], "HloModule"),
    "truncated": (inspect, ["cut.hlo"], "ends early"),
    "absent": (inspect, ["absent.hlo"], "does not exist"),
    "no hardware file": (inspect, [*SMALL, "--hardware", "no.json"], "no.json does not exist"),
    "hardware file": (inspect, [*SMALL, "--hardware", "bad.json"], "bad.json: memory.bytes_per_s=-1"),
    "text and file": (inspect, ["cut.hlo", "--hardware", "bad.json"], "bad.json: memory.bytes_per_s=-1"),
    "base": (
        compare,
        ["tiny", "--target", "cpu:8", "--hardware", "h100.json"],
        "h100.json has base h100, target=cpu:8",
    ),
    "compare": (compare, ["tiny", "--target", "cpu:8", "--layouts", "tsp:8,bogus:8"], "layout=bogus is unknown"),
    "lengths": (compare, ["tiny", "--target", "cpu:8", "--seq-lens", "16k"], "seq_lens=16k"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_line(case, tmp_path, monkeypatch, capsys):
    text = jax.jit(lambda x: x + 1.0).lower(1.0).compile().as_text()
    (tmp_path / "cut.hlo").write_text(text[: len(text) // 2])
    (tmp_path / "novel.txt").write_text("It was a dark and stormy night.")
    write_hardware(tmp_path / "bad.json", -1)
    write_hardware(tmp_path / "h100.json", 3e12, base="h100")
    command, arguments, message = WRONG[case]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "use_target", lambda target: None)  # the devices of this process are in use
    monkeypatch.setattr(sys, "argv", ["tsp-command", *arguments])
    with pytest.raises(SystemExit, match="2"):
        command.main()
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: ") and message in error
