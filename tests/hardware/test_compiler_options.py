"""Options are asked of the compiler that is installed."""

import logging
import subprocess
import sys

import jax
import pytest

from tests.builders.targets import needs_compiler
from tsp_jax.hardware import compiler_options as module
from tsp_jax.hardware.compiler_options import COMPILER_OPTIONS, SUCCESSORS, compiler_options
from tsp_jax.hardware.devices import HARDWARE
from tsp_jax.hardware.targets import parse_target

KNOWN, VALUE = "xla_cpu_enable_fast_math", True


@pytest.fixture
def options_of_cpu(monkeypatch):
    """Sets the table's row of this machine's devices."""

    def set_row(options, successors=SUCCESSORS):
        monkeypatch.setattr(module, "COMPILER_OPTIONS", {"cpu": options})
        monkeypatch.setattr(module, "SUCCESSORS", successors)
        compiler_options.cache_clear()
        return dict(compiler_options(jax.devices()[0]))

    yield set_row
    compiler_options.cache_clear()


def said(caplog):
    """Options that a line names as left out."""
    return {record.args[0] for record in caplog.records if record.name == module.__name__}


@pytest.mark.parametrize(
    ("options", "successors", "found"),
    [
        ({}, {}, {}),
        ({KNOWN: VALUE}, {}, {KNOWN: VALUE}),
        ({"of_old": 1, KNOWN: VALUE, "of_old_too": 2}, {}, {KNOWN: VALUE}),
        ({"of_old": 1}, {"of_old": (KNOWN, VALUE)}, {KNOWN: VALUE}),
        ({"of_old": 1}, {"of_old": ("newer", 1), "newer": (KNOWN, VALUE)}, {KNOWN: VALUE}),
        ({KNOWN: VALUE}, {KNOWN: ("of_old", 1)}, {KNOWN: VALUE}),
    ],
)
def test_what_the_compiler_does_not_know_is_replaced_or_left_out(options_of_cpu, caplog, options, successors, found):
    with caplog.at_level(logging.WARNING, logger=module.__name__):
        assert options_of_cpu(options, successors) == found
    left_out = options.keys() - found.keys() - successors.keys()
    assert said(caplog) == left_out


def test_a_value_that_the_compiler_refuses_is_an_error(options_of_cpu):
    with pytest.raises(jax.errors.JaxRuntimeError, match="nothing"):
        options_of_cpu({KNOWN: "nothing"})


@pytest.mark.parametrize("name", ["mi300x", "h100", "v5p"])
def test_installed_compilers_know_every_option_or_its_successor(name, caplog):
    platform = HARDWARE[name].platform
    needs_compiler(platform)
    compiler_options.cache_clear()
    with caplog.at_level(logging.WARNING, logger=module.__name__):
        found = compiler_options(parse_target(f"{name}:8").devices()[0])
    assert len(found) == len(COMPILER_OPTIONS[platform])
    assert not said(caplog)


def test_two_processes_compile_for_tpu_at_once():
    """libtpu lets one process alone in, unless told that no TPU is there to share."""
    needs_compiler("tpu")
    code = (
        "from tsp_jax.hardware.targets import *; t = parse_target('v5p:8'); use_target(t); t.devices();"
        "print('ready', flush=True); input()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    both = [subprocess.Popen([sys.executable, "-c", code], **pipes) for _ in range(2)]
    assert [process.stdout.readline() for process in both] == ["ready\n"] * 2
    for process in both:
        process.communicate("\n")
        assert process.returncode == 0
