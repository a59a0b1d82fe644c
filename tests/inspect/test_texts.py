"""Texts of programs in the forms that XLA and other tools dump: read, or refused in one line that names them."""

import gzip
import re

import pytest

from tests.builders.hlo import entry, lines, module_of
from tests.builders.hlo_texts import CPU, CUDA, TPU
from tsp_jax import inspect
from tsp_jax.errors import ConfigError
from tsp_jax.inspect.texts import read_program
from tsp_jax.inspect.unknown import unknown_figures


def figures(text):
    found = inspect.report(text).to_json()
    for collective in found["collectives"]:
        del collective["scope"], collective["label"]
    return found["memory"] and found["memory"]["peak_bytes"], found["flops"], found["collectives"]


def reordered(text):
    """ENTRY before the computations that it calls."""
    header, *computations = text.strip().split("\n\n")
    return "\n\n".join([header, computations[-1], *computations[:-1]]) + "\n"


FORMS = {
    "without sigils": lambda text: text.replace("%", ""),
    "without parameters of computations": lambda text: re.sub(r"(?m)^(\S.*?) \(.*\) -> .* \{$", r"\1 {", text),
    "without metadata": lambda text: re.sub(r", metadata=\{[^}]*\}", "", text),
    "without layouts": lambda text: re.sub(r"(\w\[[\d,]*\])\{[\d,]*\}", r"\1", text),
    "ENTRY first": reordered,
    "line ends of Windows": lambda text: text.replace("\n", "\r\n"),
    "a byte order mark": lambda text: "\ufeff" + text,
    "comments before it": lambda text: "// RUN: tool %s\n/* two\nlines */\n\n" + text,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("text", [CPU, CUDA], ids=["cpu", "cuda"])
def test_forms_of_one_program_say_the_same(text, form):
    changed = FORMS[form](text)
    assert changed != text
    assert figures(changed) == figures(text)


def test_operands_may_have_types():
    bare = entry("  %p = f32[4,8]{1,0} parameter(0)\n  ROOT %x = f32[4,8]{1,0} add(%p, %p)")
    typed = entry("  %p = f32[4,8]{1,0} parameter(0)\n  ROOT %x = f32[4,8]{1,0} add(f32[4,8]{1,0} %p, f32[4,8] %p)")
    assert bare == typed


def test_quoted_backend_config_is_read():
    text = CPU.replace(
        'backend_config={"known_init_step":{"init":"0"}}', r'backend_config="{\"known_trip_count\":{\"n\":\"9\"}}"'
    )
    module = inspect.parse(text)
    assert module.trip_count(module.entry.by_name["while.1"]) == 9


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("module @jit_f attributes {mhlo.num_partitions = 8 : i32} {", "StableHLO"),
        ("#loc = loc(unknown)\nmodule {", "StableHLO"),
        ("{ lambda ; a:f32[3]. let b = sin a in (b,) }", "a jaxpr"),
        ("BufferAssignment:\nallocation 0: size 4", "buffer assignment"),
        ('hlo_module {\n  name: "jit_f"', "protobuf"),
        ("digraph G {", "a drawing"),
        ("; ModuleID = '__compute_module'", "LLVM IR"),
        ("IR {\n  %0 = f32[] xla::device_data()", "PyTorch/XLA"),
        ('{"memory": null}', "JSON"),
        ("%add (a: f32[], b: f32[]) -> f32[] {", "part of a program"),
        ("I0000 compiling\n" + CPU, "begins in line 2"),
        (CPU + "\n" + CUDA, r"more than one HloModule \(2: jit_f, jit_f\)"),
        ("HloModule m\n\nENTRY main {\n  ROOT tmp_1 = f32[] call(), to_apply=\n  {\n}\n}", "canonical"),
        ("HloModule m\n\nENTRY %main () -> f32[] {\n  ROOT %p = parameter(0)\n}\n", "lacks the shape of the result"),
        ("what is this", "starts with"),
    ],
)  # fmt: skip
def test_other_dumps_are_refused_by_name(text, kind):
    with pytest.raises(ConfigError, match=kind) as error:
        inspect.parse(text)
    assert "\n" not in str(error.value) and ";" in str(error.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (gzip.compress(CPU.encode())[:-40], "not a complete gzip file"),
        (b"\x1f\x8b", "not a complete gzip file"),
        (b"\n\x05jit_f\x12\x04main\x00\xff\xfe", "a binary file"),
        (b"HloModule \xff", "no UTF-8 text"),
    ],
)
def test_damaged_files_are_refused(tmp_path, content, reason):
    (tmp_path / "p.hlo").write_bytes(content)
    with pytest.raises(ConfigError, match=reason):
        read_program(tmp_path / "p.hlo")


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_files_may_be_zipped(tmp_path, pack):
    (tmp_path / "p.hlo").write_bytes(pack(CPU.encode()))
    assert read_program(tmp_path / "p.hlo") == CPU


def unknown(*instructions, computations=(), header="num_partitions=8", **options):
    module = module_of(lines(*instructions), *computations, header=header)
    return unknown_figures(module, inspect.list_collectives(module), **options)


def test_a_program_that_tells_all_has_nothing_unknown():
    assert unknown("%y = f32[8]{0} tanh(f32[8]{0} %p.y)") == {}


@pytest.mark.parametrize("target", ["__cudnn$convForward", "tpu_custom_call", "__gpu$xla.gpu.triton", "te_fused_attn"])
def test_kernels_that_the_text_does_not_describe_are_said(target):
    found = unknown(f'%y = f32[8]{{0}} custom-call(f32[8]{{0}} %p.y), custom_call_target="{target}"')
    assert list(found) == ["flops"] and target in found["flops"]


@pytest.mark.parametrize(
    "target", ["Sharding", "PrepareAsyncCallStart", "SPMDFullToShardShape", "xla.sdy.FuncResultSharding"]
)
def test_calls_without_products_are_not(target):
    assert not unknown(f'%y = f32[8]{{0}} custom-call(f32[8]{{0}} %p.y), custom_call_target="{target}"')


@pytest.mark.parametrize(("trips", "words"), [(1, "run 1 times"), (7, "run 7 times"), (lambda i: 2, "the caller says")])
def test_loops_without_a_count_are_said(trips, words):
    state = "(s32[], f32[])"
    body = f"%body (b: {state}) -> {state} {{\n  ROOT %b = {state} parameter(0)\n}}\n"
    condition = f"%cond (c: {state}) -> pred[] {{\n  %c = {state} parameter(0)\n  ROOT %go = pred[] custom-call(%c), "
    condition += 'custom_call_target="Sharding"\n}\n'
    loop = f"%w = {state} while({state} %p.w), condition=%cond, body=%body"
    found = unknown(loop, computations=(condition, body), unknown_trips=trips)
    assert list(found) == ["trips"] and words in found["trips"] and found["trips"].endswith(": w")


def test_dynamic_dims_are_said():
    assert list(unknown("%y = f32[<=8]{0} tanh(f32[8]{0} %p.y)")) == ["sizes"]
    assert "sizes" not in inspect.report(CPU).unknown  # devices=[2,4]<=[8] is a sharding


def test_a_collective_over_all_devices_of_an_unknown_number_is_said():
    reduce = "%y = f32[8]{0} all-reduce(f32[8]{0} %p.y), replica_groups={}, to_apply=%add"
    assert "num_partitions=N" in unknown(reduce, header="replica_count=1")["communication"]
    assert unknown(reduce, header="replica_count=2") == {}


def test_the_report_holds_what_is_unknown():
    text = TPU.replace("is_scheduled=true, ", "")
    assert inspect.report(text).to_json()["unknown"] == inspect.report(text).unknown
    assert "peak" in inspect.report(text).unknown
    assert "peak" not in inspect.report(TPU).unknown
