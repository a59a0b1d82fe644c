"""Commands in README and docs/: scripts exist, and flags are understood. A soak test runs those of docs/."""

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.builders.targets import needs_compiler
from tsp_jax.tools import cli

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MODULES = {"inspect_hlo": "inspect"}
"""script -> the module of tsp_jax.tools that it runs, where the names differ"""
TEXTS = (".hlo", ".json")
"""ends of first arguments that another parser reads, in place of a configuration"""

CONFIGS = [path.stem for path in (ROOT / "configs").glob("*.py")]
WITH_CONFIG = [f"scripts/{name}.py" for name in ("train", "plan", "inspect_hlo", "compare")]
"""scripts whose first argument is a configuration"""


class ParsedError(Exception):
    """The command line was understood."""


def commands() -> list[str]:
    """Lines of shell blocks that run a script, without comments, each once."""
    found = []
    for document in DOCUMENTS:
        for block in re.findall(r"```sh\n(.*?)```", document.read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                if match := re.search(r"python (scripts/\w+\.py .*)", line):
                    found.append(match[1])
    return list(dict.fromkeys(found))


def words_of(command: str) -> list[str]:
    """Words of a command, without an ellipsis; `tiny` stands for a folder or file of one's own, which is not here."""
    script, first, *rest = (word for word in shlex.split(command, comments=True) if word != "...")
    if script in WITH_CONFIG and first not in CONFIGS and not first.endswith(TEXTS):
        first = "tiny"
    return [script, first, *rest]


@pytest.mark.parametrize("command", commands())
def test_a_command_of_the_documents_is_understood(command, monkeypatch):
    words = words_of(command)
    script = Path(words[0])
    assert (ROOT / script).exists()
    if script.stem in ("fetch_smollm2", "train_processes") or words[1].endswith(TEXTS):
        pytest.skip("has a parser of its own, which its own tests cover")

    def then_stop(parse):
        def parsed(*args, **kwargs):
            parse(*args, **kwargs)
            raise ParsedError

        return parsed

    for name in ("parse", "first_argument", "first_arguments"):
        monkeypatch.setattr(cli, name, then_stop(getattr(cli, name)))
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(cli, "use_devices", lambda number: None)
    module = importlib.import_module(f"tsp_jax.tools.{MODULES.get(script.stem, script.stem)}")
    with pytest.raises((ParsedError, SystemExit)) as ended:
        module.main()
    assert getattr(ended.value, "code", 0) == 0  # of --help


def test_a_flag_that_is_not_there_is_found(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["scripts/train.py", "tiny", "--no-such-flag", "1"])
    with pytest.raises(SystemExit):
        importlib.import_module("tsp_jax.tools.train").main()
    assert "no-such-flag" in capsys.readouterr().err


@pytest.mark.soak
def test_every_command_of_docs_ends_as_it_says(tmp_path):
    """Half an hour, with the compilers of ROCm and CUDA; its note is kept in benchmarks/."""
    needs_compiler("rocm")
    needs_compiler("cuda")
    script = ROOT / "benchmarks" / "docs_commands.py"
    done = subprocess.run([sys.executable, script, tmp_path / "note.md"], capture_output=True, text=True, timeout=7200)
    assert done.returncode == 0, done.stdout[-4000:]
