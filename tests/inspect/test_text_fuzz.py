"""Mutated texts of programs: each is read or refused in one line, quickly and in little memory."""

import functools
import io

import jax
import jax.numpy as jnp
import pytest

from tests.builders.fuzz import check_door
from tests.builders.hlo import MESH, text_of
from tests.builders.hlo_texts import CPU, CUDA, ROCM, TPU
from tsp_jax import inspect
from tsp_jax.errors import ConfigError
from tsp_jax.inspect import render
from tsp_jax.inspect.expect import broken, parse_expectations


def read(content: bytes, target: str = "", record: bool = True) -> None:
    """All that the command computes and prints of a text."""
    text = content.decode("utf-8", "replace")
    axes = MESH if "num_partitions=8" in text else None
    found = inspect.report(text, target=target or None, mesh_axes=axes, record=record)
    found.to_json()
    inspect.largest_buffers(found.module)
    out = render.console()
    out.file = io.StringIO()
    render.show(found, out)
    if found.module.is_scheduled:
        broken(found, parse_expectations("peak<=1GB,no-sync-collective"))


@pytest.mark.soak
@pytest.mark.parametrize(
    ("text", "target"),
    [(CPU, "cpu"), (CUDA, "h100"), (ROCM, "mi300x"), (TPU, "v5p"), (CPU, "")],
    ids=["cpu", "cuda", "rocm", "tpu", "none"],
)
def test_texts_of_every_compiler(text, target):
    check_door(functools.partial(read, target=target), [text.encode()], (ConfigError,))


@pytest.mark.soak
def test_a_program_that_jax_compiled(program):
    check_door(functools.partial(read, target="cpu"), [text_of(program).encode()], (ConfigError,))


@pytest.mark.soak
def test_a_program_before_compilation():
    lowered = jax.jit(lambda x: jnp.tanh(x @ x).sum()).lower(jnp.ones((8, 8)))
    text = lowered.compiler_ir("hlo").as_hlo_text()  # pyright: ignore[reportOptionalMemberAccess]
    check_door(functools.partial(read, target="cpu"), [text.encode()], (ConfigError,))
