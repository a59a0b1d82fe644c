"""The parser: instructions, shapes, and text that is incomplete or no HLO."""

import pytest

from tests.builders.hlo import entry, text_of
from tests.builders.hlo_texts import CPU, CUDA, ROCM, TPU
from tsp_jax import inspect
from tsp_jax.errors import ConfigError
from tsp_jax.inspect import Shape
from tsp_jax.inspect.parser import parse_aliases


def test_instructions_know_scope_and_source(module):
    (gather,) = [i for i, _ in module.walk() if i.opcode == "all-gather"]
    assert gather.op_name.endswith("tsp/mlp/bucket/all_gather")
    assert gather.source_file.endswith("conftest.py")
    assert gather.source_line > 0
    assert module.computations[gather.computation].by_name[gather.name] is gather
    assert module.entry.root.is_root


def test_schedule_runs_operands_before_users(module):
    for computation in module.computations.values():
        done = set()
        for i in computation.instructions:
            assert done.issuperset(i.operands)
            done.add(i.name)


def test_cut_text_is_one_clear_line(program):
    text = text_of(program).rstrip()
    for end in range(0, len(text), 211):
        with pytest.raises(ConfigError) as error:
            inspect.parse(text[:end])
        assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="pass all of"):
        inspect.parse(text[:-1])


@pytest.mark.parametrize("text", ["", "module @jit_f {\n}", "ENTRY %main {"])
def test_other_text_is_refused(text):
    with pytest.raises(ConfigError, match=r"pass compiled.as_text\(\)"):
        inspect.parse(text)


@pytest.mark.parametrize(
    "line",
    [
        '  ROOT %x = f32[] add(%a, %b), metadata={op_name="jit(f)/add}',
        "  ROOT %x = f32[] add(%a, %b)), channel_id=1",
        "  ROOT %x = f32[] add(%a, %b), metadata={{",
        "  ROOT %x = f32 add(%a, %b)",
        "  ROOT %x = f32[a,b] add(%a, %b)",
        "  ROOT %x = (f32[2]{0} add(%a, %b)",
        "  what is this",
    ],
)
def test_broken_lines_are_refused(line):
    with pytest.raises(ConfigError):
        entry(line)


def test_a_computation_that_is_missing_is_named():
    module = entry("  %p = f32[] parameter(0)\n  ROOT %x = f32[] call(%p), to_apply=%gone")
    with pytest.raises(ConfigError, match="computation gone"):
        list(module.walk())


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("f32[2,3]{1,0}", 24),
        ("bf16[2,3]{1,0:T(8,128)(2,1)S(1)}", 12),
        ("pred[7]{0}", 7),
        ("s4[7]{0:E(4)}", 4),
        ("u4[7]{0}", 7),
        ("f8e4m3fn[5]{0}", 5),
        ("f8e5m2fnuz[5]{0}", 5),
        ("c64[2]{0}", 16),
        ("token[]", 0),
        ("opaque[]", 0),
        ("s32[]{:T(128)}", 4),
        ("f32[<=8,2]{1,0}", 64),
        ("f24x9[2]{0}", 6),
        ("()", 0),
        ("(f32[2]{0}, (bf16[4]{0}, /*index=2*/u32[]), token[])", 20),
    ],
)
def test_bytes_of_shapes(shape, size):
    (i,) = entry(f"  ROOT %x = {shape} never-heard-of(), new_attribute={{a=[1,2], b=(3)}}").entry.instructions
    assert inspect.nbytes(i.shape) == size
    assert i.attributes["new_attribute"] == "{a=[1,2], b=(3)}"


def test_a_dtype_without_a_width_is_named():
    (i,) = entry("  ROOT %x = odd[3]{0} never-heard-of()").entry.instructions
    with pytest.raises(ConfigError, match="dtype=odd"):
        inspect.nbytes(i.shape)


def test_aliases():
    text = "{ {1}: (1, {}, may-alias), {2,0}: (2, {0}, must-alias) }"
    assert parse_aliases(text) == (((1,), 1, ()), ((2, 0), 2, (0,)))


def test_shapes_nest():
    (i,) = entry("  ROOT %x = ((f32[2]{0}), bf16[]) custom-call()").entry.instructions
    assert i.shape == ((Shape("f32", (2,)),), Shape("bf16", ()))
    assert [leaf.dtype for leaf in inspect.leaves(i.shape)] == ["f32", "bf16"]


@pytest.mark.parametrize("text", [CPU, CUDA, ROCM, TPU])
def test_every_cut_of_every_text_is_refused(text):
    for end in range(len(text.rstrip())):
        with pytest.raises(ConfigError):
            module = inspect.parse(text[:end])
            list(module.walk(fusions=True))
