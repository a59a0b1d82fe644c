"""Wrong input: one line with the field, the value and a value that works; exit code 2; nothing compiled or written."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest

from tests.builders.cli import BAD, SMALL
from tests.builders.runs import small_config, write_config
from tests.builders.tokenizers import characters, save_tokenizer
from tsp_jax.config import Config, StreamConfig
from tsp_jax.errors import REMOVED
from tsp_jax.ops.kernels import KERNELS
from tsp_jax.tools import cli, train
from tsp_jax.training import trainer as loop
from tsp_jax.training.metrics import read_metrics
from tsp_jax.training.step import TrainProgram

ROOT = Path(__file__).parents[2]
TEXT = "for line in text:\n    print(line)\n" * 20


@pytest.fixture
def text(tmp_path):
    """A glob of a few documents."""
    for number in range(8):
        (tmp_path / f"{number}.txt").write_text(TEXT)
    return str(tmp_path / "*.txt")


class Compiled(AssertionError):
    """Raised in place of compiling a program."""


@pytest.fixture
def refuse(text, tmp_path, monkeypatch, capsys):
    """Runs the training script in this process; returns the line that it refuses with."""

    def build(*_):
        raise Compiled

    monkeypatch.setattr(cli, "use_devices", lambda cpu_devices: None)
    monkeypatch.setattr(TrainProgram, "lower_step", build)

    def run(*flags: str) -> str:
        workdir = tmp_path / "run"
        base = ["train.py", "tiny", *SMALL, "--data.files", text, "--data.cache-dir", str(tmp_path / "cache")]
        monkeypatch.setattr(sys, "argv", [*base, "--workdir", str(workdir), *flags])
        with pytest.raises(SystemExit) as stopped:
            train.main()
        assert stopped.value.code == 2
        assert not workdir.exists(), "nothing should be written"
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        return err

    return run


@pytest.mark.parametrize("case", BAD)
def test_bad_flags_are_refused_in_a_line(case, refuse):
    flags, words = BAD[case]
    line = refuse(*flags)
    for word in words:
        assert word in line


def test_empty_files_are_refused(refuse, tmp_path):
    (tmp_path / "empty.md").write_text("")
    assert "*.md' matches files with 0 tokens" in refuse("--data.files", str(tmp_path / "*.md"))


def test_token_ids_outside_the_vocabulary_are_refused(refuse, tmp_path):
    np.save(tmp_path / "ids.npy", np.arange(5000, dtype=np.int32) % 700)
    line = refuse("--data.files", str(tmp_path / "*.npy"))
    assert "699" in line
    assert "model.vocab_size=700" in line


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"text": "a"}\n{"text": ', "rows.jsonl line 2 is no object in JSON"),
        (b'{"text": "\xff"}', "rows.jsonl line 1 is not UTF-8 at byte 10"),
        (b'{"messages": []}', "messages in"),
        (b'{"messages": [{"role": "user", "content": "a"}]}', "rows.jsonl line 1 (TemplateError: no)"),
    ],
)
def test_bad_rows_are_refused(content, words, refuse, tmp_path):
    folder = save_tokenizer(tmp_path / "tokenizer", characters())
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    (tmp_path / "rows.jsonl").write_bytes(content)
    assert words in refuse("--data.files", str(tmp_path / "rows.jsonl"), "--data.tokenizer", str(folder))
    assert not list((tmp_path / "cache").glob("*"))


def test_unwritable_workdir_is_refused(refuse, tmp_path):
    (tmp_path / "file").write_text("")
    line = refuse("--workdir", str(tmp_path / "file" / "run"))
    assert "workdir=" in line
    assert "cannot be written" in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [([], "a configuration comes first"), (["huge"], "configuration huge is unknown"), (["no.py"], "no.py is unknown")],
)
def test_bad_configurations_are_refused(arguments, words):
    with pytest.raises(cli.ConfigError, match=words):
        cli.parse(arguments)


def test_a_file_that_defines_no_configuration_is_refused(tmp_path):
    (tmp_path / "mine.py").write_text("x = 1\n")
    with pytest.raises(cli.ConfigError, match="defines no `config`"):
        cli.parse([str(tmp_path / "mine.py")])


def test_good_flags_reach_the_program(refuse, tmp_path):
    """The cases above are refused for what they name, not for what they share."""
    with pytest.raises(Compiled):
        refuse()


def test_every_field_is_a_flag():
    name, config, _ = cli.parse(["tiny", "--optimizer.b2", "0.9", "--stream.mlp-movement", "ring", "--seed", "5"])
    assert (name, config.optimizer.b2, config.stream.mlp_movement, config.seed) == ("tiny", 0.9, "ring", 5)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.stem)
def test_configurations_load(path):
    assert isinstance(cli.load_config(path.stem), Config)


# ------------------------------------------------------------------------------------------------ as a user types it


def script(*arguments: str, **kwargs) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **kwargs)


def test_script_trains_under_two_dimensional_parallelism(text, tmp_path):
    flags = ["--layout", "tp_sp", "--mesh", "data=2,model=2,seq=2", "--steps", "3", "--workdir", str(tmp_path / "run")]
    flags += ["--data.files", text, "--data.cache-dir", str(tmp_path / "cache"), "--cpu-devices", "8"]
    done = script("tiny", *SMALL, *flags)
    assert done.returncode == 0, done.stderr
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["layout"] == "tp_sp"
    assert "data=2,model=2,seq=2" in done.stdout


def files_but_locks(folder: Path) -> dict[Path, bytes]:
    """Content of every file, without the locks that runs leave behind."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("lock."))
    return {path: path.read_bytes() for path in files}


def test_checkpoint_of_another_model_is_refused_and_kept(tmp_path, monkeypatch, capsys, optax_promotes):
    config = small_config(tmp_path, steps=4)
    loop.train(config, "small")
    before = files_but_locks(tmp_path / "run")
    path = write_config(config, tmp_path / "small.py")
    monkeypatch.setattr(sys, "argv", ["train.py", str(path), "--model.d-ff", "96"])
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        train.main()
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "model.d_ff=96" in error
    assert "model.d_ff=48" in error
    assert files_but_locks(tmp_path / "run") == before


def test_script_refuses_with_exit_code_two(tmp_path):
    done = script("tiny", "--layout", "tsp2", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_movements_are_checked_in_python_too():
    with pytest.raises(cli.ConfigError, match=r"stream\.attention_movement=ring is unknown"):
        StreamConfig(attention_movement="ring")  # pyright: ignore[reportArgumentType]


# ------------------------------------------------------------------------------------------------ what was removed


def exists(setting: str) -> bool:
    """Whether a field, or field=value, is one of today's configuration."""
    field, _, value = setting.partition("=")
    owner, _, name = field.partition(".")
    hints = get_type_hints(get_type_hints(Config)[owner])
    return name in hints and (not value or value in (get_args(hints[name]) or KERNELS))


GONE = [setting for setting in REMOVED if not exists(setting)]


@pytest.mark.parametrize("setting", GONE)
def test_removed_flags_are_refused_with_what_replaces_them(setting, refuse):
    field, _, value = setting.partition("=")
    replacement, explanation = REMOVED[setting]
    flag = f"--{field.replace('_', '-')}"
    for flags in ([flag, value or "4"], [f"{flag}={value or 4}"], [flag.replace("--", "--config."), value or "4"]):
        line = refuse(*flags)
        assert f"{flag}={value} was removed" in line if value else f"{flag} was removed" in line
        assert replacement.replace("_", "-") in line and explanation in line


def test_the_negation_of_a_removed_flag_is_refused(refuse):
    assert "--stream.unroll was removed; leave it out" in refuse("--stream.no-unroll")


FILE = """
from tsp_jax.config import Config, FaultsConfig, StreamConfig
from tsp_jax.tools.cli import load_config
import dataclasses
config = dataclasses.replace(load_config("tiny"), {owner}={part}({name}={value!r}))
"""


@pytest.mark.parametrize("setting", GONE)
def test_removed_fields_of_a_file_are_refused_with_what_replaces_them(setting, tmp_path):
    field, _, value = setting.partition("=")
    owner, _, name = field.partition(".")
    part = get_type_hints(Config)[owner].__name__
    (tmp_path / "old.py").write_text(FILE.format(owner=owner, part=part, name=name, value=value or 4))
    with pytest.raises(cli.ConfigError, match=re.escape(f"{setting} was removed; ")) as refused:
        cli.load_config(str(tmp_path / "old.py"))
    assert all(text in str(refused.value) for text in REMOVED[setting])


def test_a_field_that_never_was_is_refused_in_a_line(tmp_path):
    (tmp_path / "mine.py").write_text(FILE.format(owner="stream", part="StreamConfig", name="buckits", value=4))
    with pytest.raises(cli.ConfigError, match=r"mine\.py: stream\.buckits is not a field of StreamConfig"):
        cli.load_config(str(tmp_path / "mine.py"))


def test_what_replaces_a_removed_setting_exists():
    """Entries of settings that are still there are waiting to be removed; they refuse nothing."""
    for setting in GONE:
        replacement, field = REMOVED[setting][0], setting.partition("=")[0]
        assert not replacement or exists(replacement if "." in replacement else f"{field}={replacement}")
