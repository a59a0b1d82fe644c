"""Standard output and error that are closed, full or of another encoding end no command in a traceback."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from tsp_jax.tools import cli

SCRIPTS = Path(__file__).parents[2] / "scripts"


def run_with(out, monkeypatch, needs_output: bool, *texts: str) -> int:
    """Prints texts with a standard output; returns the exit code."""
    monkeypatch.setattr(sys, "stdout", out)
    with pytest.raises(SystemExit) as stopped, cli.errors_in_a_line(needs_output):
        for text in texts:
            print(text)
        sys.exit(0)
    return stopped.value.code


def full(buffering: int = 1):
    return open("/dev/full", "w", buffering)


def broken_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w", 1)


BROKEN = {
    "full": (full, "No space left on device"),
    "full, seen at the end": (lambda: full(8192), "No space left on device"),
    "a pipe without a reader": (broken_pipe, "Broken pipe"),
    "closed": (lambda: None, "it is closed"),
}


@pytest.mark.parametrize("needs_output", [True, False])
@pytest.mark.parametrize("case", BROKEN)
def test_output_that_cannot_be_written_is_one_line(case, needs_output, monkeypatch, capsys):
    make, reason = BROKEN[case]
    out = make()
    assert run_with(out, monkeypatch, needs_output, "one", "two", "three") == (2 if needs_output else 0)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith(
        ("error: " if needs_output else "warning: ") + f"standard output cannot be written ({reason})"
    )
    if out:
        out.close()  # Python does so at exit


@pytest.mark.parametrize("err", [full, lambda: None], ids=["full", "closed"])
def test_warnings_that_cannot_be_written_end_nothing(err, monkeypatch, tmp_path):
    with open(tmp_path / "out", "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", stream := err())
        with pytest.raises(SystemExit, match="2"), cli.errors_in_a_line():
            print("a warning", file=sys.stderr, flush=True)
            print("a result")
            raise cli.ConfigError("wrong input")
    assert (tmp_path / "out").read_text() == "a result\n", "nothing of standard error is in it"
    if stream:
        stream.close()


def test_what_an_encoding_lacks_is_escaped(monkeypatch, tmp_path):
    with open(tmp_path / "out", "w", encoding="ascii") as out:
        monkeypatch.setattr(sys, "stdout", out)
        with pytest.raises(SystemExit, match="0"), cli.errors_in_a_line():
            print("café \udcc3")
            table = Table("é", title="a · b")
            table.add_row("…")
            Console(width=40).print(table)
            sys.exit(0)
    text = (tmp_path / "out").read_text("ascii")
    assert text.startswith("caf\\xe9 \\udcc3\n")
    assert "a \\xb7 b" in text


def test_a_clock_before_1970_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(time, "time", lambda: -86400.0 * 365)
    with pytest.raises(SystemExit, match="2"), cli.errors_in_a_line():
        raise AssertionError("the command should not begin")
    assert capsys.readouterr().err == "error: the clock says 1969-01-01, before 1970; set it\n"


def test_an_argument_that_is_not_utf8_is_one_line(monkeypatch, capsys):
    """As é arrives under LC_ALL=POSIX PYTHONUTF8=0, or as a name in Latin-1 does."""
    monkeypatch.setattr(sys, "argv", ["train.py", "tiny", "--workdir", "runs/\udce9"])
    with pytest.raises(SystemExit, match="2"), cli.errors_in_a_line():
        raise AssertionError("the command should not begin")
    error = capsys.readouterr().err
    assert error == "error: argument 'runs/\\udce9' is not UTF-8; use UTF-8, and LC_ALL=C.UTF-8\n"


def test_streams_are_as_before_afterwards():
    before = sys.stdout, sys.stderr
    with cli.errors_in_a_line():
        assert sys.stdout is not before[0]
    assert (sys.stdout, sys.stderr) == before


HELP = {"train.py": ["tiny"], "inspect_hlo.py": ["tiny"], "compare.py": ["tiny"], "generate.py": [], "calibrate.py": []}


@pytest.mark.parametrize("script", HELP)
def test_help_into_a_pipe_that_closes_is_one_line(script):
    command = [sys.executable, str(SCRIPTS / script), *HELP[script], "--help"]
    env = os.environ | {"LC_ALL": "POSIX", "PYTHONIOENCODING": "ascii", "COLUMNS": "80"}
    with broken_pipe() as out:
        done = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, text=True, env=env, timeout=300)
    assert "standard output cannot be written (Broken pipe)" in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.returncode == (0 if script == "train.py" else 2)


CLOSED = """
import os, sys
from tsp_jax.tools import cli
with cli.errors_in_a_line(needs_output=False), open("file", "w") as file:
    os.write(1, b"of a library"), os.write(2, b"of a library")
    print("printed"), print("warned", file=sys.stderr)
    assert file.fileno() > 2
"""


def test_files_do_not_take_the_place_of_closed_streams(tmp_path):
    done = subprocess.run(
        ["sh", "-c", '"$0" -c "$1" <&- >&- 2>&-', sys.executable, CLOSED], cwd=tmp_path, timeout=300,
        env=os.environ | {"PYTHONPATH": str(SCRIPTS.parent)},
    )  # fmt: skip
    assert done.returncode == 0
    assert (tmp_path / "file").read_bytes() == b""
