"""Whatever is asked for, a run either starts or is refused in one line, with nothing compiled and nothing written."""

import contextlib
import dataclasses
import io
import os
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tsp_jax.config import Config
from tsp_jax.errors import REFUSED
from tsp_jax.layout import LAYOUTS
from tsp_jax.tools import cli, train
from tsp_jax.training import trainer as loop

BASE = cli.load_config("tiny")
SIZES = {"d-model": 16, "num-layers": 1, "num-heads": 4, "num-kv-heads": 2, "head-dim": 4, "d-ff": 48}
SMALL = [f"--model.{name}={value}" for name, value in SIZES.items()]
SMALL += ["--seq-len=96", "--batch=4", "--optimizer.warmup-steps=1", "--eval-batches=1"]
NOT_HERE = ("cluster.launcher", "cpu-devices", "data.cache-dir", "data.files", "init-from", "workdir")
"""fields that reach out of the process, or that the test sets itself"""

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "50"))
"""of each test; a longer search: FUZZ_EXAMPLES=3000 pytest tests/tools/test_fuzz.py"""
settings.register_profile(
    "fuzz",
    derandomize="FUZZ_EXAMPLES" not in os.environ,  # the same cases every time, so that anybody can repeat a failure
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
fuzz = settings.get_profile("fuzz")


def flags_of(config: object, owner: str = "") -> dict[str, object]:
    """Every flag of a configuration and its default."""
    flags = {}
    for field in dataclasses.fields(config):  # pyright: ignore[reportArgumentType]
        name, value = owner + field.name.replace("_", "-"), getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            flags |= flags_of(value, f"{name}.")
        elif name not in NOT_HERE:
            flags[name] = value
    return flags


FLAGS = flags_of(BASE)
INTEGERS = st.one_of(st.integers(-2, 12), st.sampled_from([48, 96, 100, 288, 10**6, 2**31 - 1, 2**31, 2**63, 10**30]))
FLOATS = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from([-1.0, 0.0, 1e-30, 0.5, 0.999, 1.0, 1e30]),
)
TYPICAL = ["tsp", "tp", "gather", "ring", "full", "none", "float16", "slurm", "1e3", "None", "-", "--", "é", "0x10", ""]
WORDS = st.one_of(st.sampled_from(TYPICAL), st.text(max_size=8))
EQUALS = st.sampled_from(["=", "=", "=", "", "==", ":"])
AXES = st.sampled_from(["data", "tsp", "model", "seq", "node", "", " ", "tsp "])
MESHES = st.lists(
    st.builds(lambda axis, equals, size: f"{axis}{equals}{size}", AXES, EQUALS, WORDS | INTEGERS),
    max_size=4,
).map(",".join)


DIMS = st.sampled_from(["batch", "sequence", "heads", "mlp", "vocab", "weights", "whole_weights", "ffn", ""])
ROWS = st.builds(
    lambda preset, settings, end: f"{preset}({','.join(settings)}{end}",
    st.sampled_from([*LAYOUTS, "zero", ""]),
    st.lists(st.builds("{}{}{}".format, DIMS, EQUALS, st.lists(AXES, max_size=3).map("+".join) | WORDS), max_size=4),
    st.sampled_from([")", ")", ")", "", "):8"]),
)


@st.composite
def one_flag(draw) -> str:
    """A flag and a value, mostly of its type."""
    name = draw(st.sampled_from(sorted(FLAGS)))
    default = FLAGS[name]
    kind = draw(st.sampled_from(["typed", "typed", "typed", "word"]))
    if name == "layout":
        value = draw(st.sampled_from([*LAYOUTS, "zero"]) | ROWS)
    elif name == "mesh":
        value = draw(MESHES)
    elif kind == "word" or isinstance(default, str):
        value = draw(WORDS)
    elif isinstance(default, bool):
        value = draw(st.booleans())
    else:
        value = draw(INTEGERS if isinstance(default, int) else FLOATS)
    return f"--{name}={value}"


class Compiled(Exception):
    """Raised in place of building a program: the run was accepted."""


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for number in range(8):
        (folder / f"{number}.txt").write_text("for line in text:\n    print(line)\n" * 20)
    return str(folder / "*.txt"), str(folder / "cache")


def outcome(flags: list[str], files: str, cache: str, workdir: Path) -> str:
    """What the training script says to refuse them; "" if it would have started."""
    arguments = ["train.py", "tiny", *SMALL, "--data.files", files, "--data.cache-dir", cache]
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", [*arguments, "--workdir", str(workdir), *flags]),
        mock.patch.object(cli, "use_devices"),
        mock.patch.object(loop, "make_program", side_effect=Compiled),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            train.main()
        except Compiled:
            return ""
        except SystemExit as stopped:
            assert stopped.code == REFUSED, (flags, out.getvalue(), err.getvalue())
    assert out.getvalue() == ""
    line = err.getvalue()
    assert line.startswith("error: ") and line.endswith("\n"), line
    assert len(line.splitlines()) == 1, line
    assert len(line) > len("error: x"), "it should say something"
    assert not workdir.exists(), "nothing should be written"
    return line


@settings(fuzz, max_examples=EXAMPLES)
@given(flags=st.lists(one_flag(), min_size=1, max_size=3))
def test_any_flags_start_a_run_or_are_refused_in_a_line(flags, text, tmp_path_factory):
    outcome(flags, *text, tmp_path_factory.mktemp("fuzz") / "run")


@settings(fuzz, max_examples=EXAMPLES)
@given(mesh=MESHES, layout=st.sampled_from(sorted(LAYOUTS)) | ROWS)
def test_any_mesh_starts_a_run_or_is_refused_in_a_line(mesh, layout, text, tmp_path_factory):
    outcome([f"--layout={layout}", f"--mesh={mesh}"], *text, tmp_path_factory.mktemp("fuzz") / "run")


@st.composite
def a_file(draw) -> tuple[str, bytes]:
    """A name and a content: text, an array of something, or bytes that call themselves an array."""
    kind = draw(st.sampled_from(["text", "array", "torn array", "bytes"]))
    if kind == "text":
        return "data.txt", draw(st.binary(max_size=400))
    if kind == "bytes":
        return "data.npy", draw(st.binary(max_size=200))
    dtype = draw(st.sampled_from(["u1", "i1", "<u2", ">i4", "i8", "u8", "f4", "U3", "?", "c8", "M8[s]"]))
    shape = draw(st.sampled_from([(0,), (1,), (97,), (500,), (5, 20), ()]))
    values = np.random.default_rng(draw(st.integers(0, 99))).integers(-3 if draw(st.booleans()) else 0, 256, shape)
    file = io.BytesIO()
    np.save(file, values.astype(dtype))
    content = file.getvalue()
    return "data.npy", content[: draw(st.integers(0, len(content)))] if kind == "torn array" else content


@settings(fuzz, max_examples=EXAMPLES)
@given(file=a_file())
def test_any_file_starts_a_run_or_is_refused_in_a_line(file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / file[0]).write_bytes(file[1])
    outcome([], str(folder / "data.*"), str(folder / "cache"), folder / "run")


def test_the_fuzz_sees_runs_that_start(text, tmp_path):
    assert outcome([], *text, tmp_path / "run") == ""
    assert isinstance(BASE, Config)
