"""The reader of compiled programs: real programs of the CPU compiler, and excerpts of what each compiler writes."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from tsp_jax import inspect
from tsp_jax.errors import ConfigError
from tsp_jax.inspect import Shape

MESH = {"data": 2, "tsp": 4}
F32 = 4
LAYERS, BUCKETS, D = 3, 5, 8


def compiled(f, in_specs, out_specs, *shapes, axes=None, dtype=jnp.float32, **jit_options):
    axes = axes or MESH
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(jax.sharding.AxisType.Auto,) * len(axes))
    mapped = jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    return jax.jit(mapped, **jit_options).lower(*arguments).compile()


def text_of(program):
    text = program.as_text()
    assert text
    return text


def ring(x, axis="tsp", size=4):
    return lax.ppermute(x, axis, [(k, (k + 1) % size) for k in range(size)])


def nested(x, w):
    """Each of LAYERS layers gathers BUCKETS buckets, then sends, reduces in a branch, scatters."""

    def bucket(total, w_dD):
        with jax.named_scope("tsp/mlp/bucket"):
            return jnp.tanh(total @ lax.all_gather(w_dD, "tsp", axis=0, tiled=True)), None

    def layer(x, w):
        y, _ = lax.scan(bucket, x, w)
        y = ring(y)
        y = lax.cond(y[0, 0] > 0, lambda y: lax.psum(y, "data"), lambda y: 2 * y, y)
        with jax.named_scope("tsp/mlp/gradient"):
            g = lax.psum_scatter(jnp.concatenate([y, -y, 3 * y, y * y]), "tsp", tiled=True)
        return x + g, None

    return lax.scan(layer, x, w)[0]


@pytest.fixture(scope="module")
def program():
    shapes = (16, D), (LAYERS, BUCKETS, D, D)
    specs = (P("data"), P(None, None, "tsp"))
    return compiled(nested, specs, P("data"), *shapes)


@pytest.fixture(scope="module")
def module(program):
    return inspect.parse(text_of(program))


# Programs of the CPU compiler


def test_counts_and_bytes_of_nested_scans(module):
    found = {c.op: c for c in inspect.collectives(module, MESH)}
    assert len(found) == len(inspect.collectives(module, MESH)) == 4
    x = 8 * D * F32  # one device's [8, D]
    expected = {
        "all-gather": ("tsp", 4, LAYERS * BUCKETS, 3 * (D // 4) * D * F32),
        "collective-permute": ("tsp", 4, LAYERS, x),
        "all-reduce": ("data", 2, LAYERS, 2 * x // 2),
        "reduce-scatter": ("tsp", 4, LAYERS, 4 * x * 3 // 4),
    }
    assert {c.op: (c.axis, c.group_size, c.count, c.bytes) for c in found.values()} == expected
    assert all(c.dtype == "f32" and not c.is_async and c.elements * F32 == c.bytes for c in found.values())
    assert "tsp/mlp/bucket/all_gather" in found["all-gather"].scope
    assert "tsp/mlp/gradient" in found["reduce-scatter"].scope
    totals = inspect.summary(found.values())
    assert totals["all-gather", "tsp"].bytes == LAYERS * BUCKETS * 3 * (D // 4) * D * F32
    assert totals["all-gather", "tsp"].count == 15
    assert [t.bytes for t in totals.values()] == sorted((t.bytes for t in totals.values()), reverse=True)


def test_trips_follow_from_the_condition_alone(module, program):
    stripped = re.sub(r'"known_trip_count":\{"n":"\d+"\}', '"other":{}', text_of(program))
    assert stripped != text_of(program)
    again = inspect.parse(stripped)
    assert inspect.collectives(again, MESH) == inspect.collectives(module, MESH)
    assert inspect.collectives(module, MESH)


@pytest.mark.parametrize(
    ("start", "go_on", "move", "trips"),
    [
        (2, lambda i: i < 17, lambda i: i + 3, 5),
        (2, lambda i: i <= 17, lambda i: i + 3, 6),
        (20, lambda i: i > 3, lambda i: i - 4, 5),
        (20, lambda i: i >= 4, lambda i: i - 4, 5),
        (0, lambda i: i != 12, lambda i: i + 2, 6),
        (0, lambda i: lax.gt(jnp.int32(9), i), lambda i: 1 + i, 9),
    ],
)
def test_trips_of_plain_loops(start, go_on, move, trips):
    def f(x):
        loop = lax.while_loop(lambda c: go_on(c[0]), lambda c: (move(c[0]), ring(c[1])), (jnp.int32(start), x))
        return loop[1]

    text = text_of(compiled(f, P("tsp"), P("tsp"), (16, D)))
    for variant in (text, re.sub(r'"known_trip_count":\{"n":"\d+"\}', '"other":{}', text)):
        (c,) = inspect.collectives(inspect.parse(variant), MESH)
        assert c.count == trips


def test_loops_that_data_end_use_the_callers_number():
    def f(x):
        return lax.while_loop(lambda y: lax.pmax(jnp.sum(y), "data") < 9.0, lambda y: lax.psum(y, "tsp"), x)

    module = inspect.parse(compiled(f, P("data"), P("data"), (16, D)).as_text())
    (loop,) = [i for i, _ in module.walk() if i.opcode == "while"]
    assert module.trip_count(loop) is None
    for unknown, trips in ((1, 1), (7, 7), (lambda i: 4 if i is loop else 0, 4)):
        counts = {c.axis: c.count for c in inspect.collectives(module, MESH, unknown_trips=unknown)}
        assert counts == {"tsp": trips, "data": trips + 1}  # the condition is asked once more


@pytest.mark.parametrize("axes", [{"data": 2, "tsp": 4}, {"tsp": 4, "data": 2}, {"a": 2, "data": 2, "tsp": 2}])
def test_axes_by_name_whatever_the_order_of_the_mesh(axes):
    size = axes["tsp"]

    def f(x):
        y = lax.psum(jnp.sin(ring(x, size=size)), ("data", "tsp"))
        y = lax.all_to_all(y, "tsp", 0, 1, tiled=True)
        return lax.all_gather(jnp.cos(y), "data", axis=0, tiled=True)

    module = inspect.parse(compiled(f, P(), P(), (8, D), axes=axes).as_text())
    assert module.num_partitions == 8
    found = {c.op: c for c in inspect.collectives(module, axes)}
    both = ",".join(axis for axis in axes if axis != "a")
    assert {op: c.axis for op, c in found.items()} == {
        "collective-permute": "tsp",
        "all-reduce": both,
        "all-to-all": "tsp",
        "all-gather": "data",
    }
    n, group = 8 * D * F32, axes["data"] * size
    assert found["all-to-all"].bytes == n * (size - 1) // size
    assert found["all-reduce"].bytes == 2 * n * (group - 1) // group
    assert all(c.axis == "?" and c.bytes == found[c.op].bytes for c in inspect.collectives(module))


def test_several_arrays_in_one_collective_are_one():
    def f(x, y):
        return lax.psum((jnp.sin(x), jnp.cos(y)), "tsp")

    program = compiled(f, P("data"), P("data"), (16, D), (32, D))
    found = inspect.collectives(inspect.parse(text_of(program)), MESH)
    assert sum(c.total_bytes for c in found) == 2 * 3 * (8 + 16) * D * F32 // 4
    assert len(found) == 1


def test_cpu_widens_bfloat16_so_elements_are_what_to_compare():
    def f(x):
        return lax.all_gather(jnp.tanh(x), "tsp", axis=0, tiled=True)

    wide, narrow = (
        inspect.collectives(inspect.parse(compiled(f, P("tsp"), P(), (16, D), dtype=dtype).as_text()), MESH)[0]
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    assert wide.elements == narrow.elements == 3 * 4 * D


def test_buffers_show_whether_logits_are_made():
    T, V, chunks = 16, 48, 4

    def whole(x, w):
        return jnp.sum(jax.nn.logsumexp(x @ w.T, axis=-1))

    def chunked(x, w):
        def chunk(total, w_vD):
            return total + jnp.exp(x @ w_vD.T).sum(-1), None

        return jnp.log(lax.scan(chunk, jnp.zeros(T), w.reshape(chunks, -1, D))[0]).sum()

    def made(f):
        program = jax.jit(f).lower(jnp.ones((T, D)), jnp.ones((V, D))).compile()
        return inspect.parse(text_of(program))

    assert (T, V) in {b.shape for b in inspect.buffers(made(whole))}
    pieces = inspect.buffers(made(chunked))
    assert (T, V) not in {b.shape for b in pieces}
    assert (T, V // chunks) in {b.shape for b in pieces}
    top = inspect.largest(made(whole), 2)
    assert [b.bytes for b in top] == [T * V * F32, T * V * F32]


def test_buffers_leave_out_other_names_and_what_stays_in_fusions(module):
    found = inspect.buffers(module)
    assert not {b.opcode for b in found} & {"tuple", "get-tuple-element", "bitcast", "while", "conditional"}
    assert {b.computation for b in found if b.opcode == "parameter"} == {module.entry.name}
    gathered = [b for b in found if b.opcode == "all-gather"]
    assert [(b.shape, b.dtype, b.bytes) for b in gathered] == [((D, D), "f32", D * D * F32)]
    assert "tsp/mlp/bucket" in gathered[0].scope


def test_memory_report_and_aliases():
    f = jax.jit(lambda x, y: (x + 1.0, y @ y), donate_argnums=0)
    program = f.lower(jnp.ones((64, 64)), jnp.ones((32, 32))).compile()
    report = inspect.memory_report(program)
    assert report.argument_bytes == (64 * 64 + 32 * 32) * F32
    assert report.alias_bytes == 64 * 64 * F32
    assert report.peak_bytes == report.argument_bytes + report.temp_bytes + report.output_bytes - report.alias_bytes
    assert inspect.parse(text_of(program)).input_output_alias == (((0,), 0, ()),)


def test_instructions_know_scope_and_source(module):
    (gather,) = [i for i, _ in module.walk() if i.opcode == "all-gather"]
    assert gather.op_name.endswith("tsp/mlp/bucket/all_gather")
    assert gather.source_file.endswith("test_inspect_hlo.py")
    assert gather.source_line > 0
    assert module.computations[gather.computation].by_name[gather.name] is gather
    assert module.entry.root.is_root


def test_schedule_runs_operands_before_users(module):
    for computation in module.computations.values():
        done = set()
        for i in computation.instructions:
            assert done.issuperset(i.operands)
            done.add(i.name)


# Broken text


def test_cut_text_is_one_clear_line(program):
    text = text_of(program).rstrip()
    for end in range(0, len(text), 211):
        with pytest.raises(ConfigError) as error:
            inspect.parse(text[:end])
        assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="uncut"):
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


def test_a_mesh_of_another_size_is_refused(module):
    with pytest.raises(ConfigError, match=r"mesh tsp=4 has 4 devices, the program 8"):
        inspect.collectives(module, {"tsp": 4})


# Shapes and groups


def entry(lines, header="num_partitions=8"):
    return inspect.parse(f"HloModule test, is_scheduled=true, {header}\n\nENTRY %main () -> f32[] {{\n{lines}\n}}\n")


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


def test_shapes_nest():
    (i,) = entry("  ROOT %x = ((f32[2]{0}), bf16[]) custom-call()").entry.instructions
    assert i.shape == ((Shape("f32", (2,)),), Shape("bf16", ()))
    assert [leaf.dtype for leaf in inspect.leaves(i.shape)] == ["f32", "bf16"]


def spellings(axes, over):
    """Groups over some axes of a mesh in HLO's three spellings."""
    ids = np.arange(np.prod(list(axes.values()))).reshape(*axes.values())
    names = list(axes)
    order = [k for k, a in enumerate(names) if a not in over] + [k for k, a in enumerate(names) if a in over]
    size = int(np.prod([axes[a] for a in over]))
    groups = ids.transpose(order).reshape(-1, size)
    dims, permutation = (",".join(map(str, values)) for values in (axes.values(), order))
    yield "{" + ",".join("{" + ",".join(map(str, g)) + "}" for g in groups) + "}"
    yield f"[{len(groups)},{size}]<=[{dims}]T({permutation})"
    mesh = ",".join(f"'{a}'={n}" for a, n in axes.items())
    yield f"mesh[{mesh}] {{{','.join(repr(a) for a in over)}}}"


@pytest.mark.parametrize("axes", [{"data": 2, "tsp": 4}, {"x": 2, "y": 3, "z": 4}, {"x": 4, "one": 1, "y": 2}])
def test_axes_of_groups_in_every_spelling(axes):
    devices = int(np.prod(list(axes.values())))
    wide = [a for a in axes if axes[a] > 1]
    for n in range(1, len(wide) + 1):
        for over in itertools.combinations(wide, n):
            for text in spellings(axes, over):
                line = (
                    f"  %p = f32[12]{{0}} parameter(0)\n  ROOT %g = f32[12]{{0}} all-to-all(%p), replica_groups={text}"
                )
                (c,) = inspect.collectives(entry(line, f"num_partitions={devices}"), axes)
                size = int(np.prod([axes[a] for a in over]))
                assert (c.axis, c.group_size, c.bytes) == (",".join(over), size, 48 * (size - 1) // size), text


@pytest.mark.parametrize(
    ("text", "axis", "size"),
    [
        ("{}", "data,tsp", 8),
        ("[2,4]<=[8]", "tsp", 4),
        ("[4,2]<=[2,4]T(1,0)", "data", 2),
        ("{{0,1},{2,3},{4,5},{6,7}}", "?", 2),
        ("{{0,1,2},{3,4,5,6,7}}", "?", 5),
        ("mesh['a'=8] {'a':(2)4}", "tsp", 4),
        ("mesh[a=8] {a:(1)2}", "data", 2),
        ("mesh['a'=1,'b'=2,'c'=4], device_ids=([4,2]T(1,0)) {'b'}", "?", 2),
        ("mesh['a'=1,'b'=4,'c'=2], device_ids=([2,4]T(1,0)) {'c'}", "data", 2),
        ("mesh['a'=4,'b'=2], device_ids=(0,4,1,5,2,6,3,7) {'a'}", "tsp", 4),
        ("a spelling of next year", "?", 1),
    ],
)
def test_other_groups(text, axis, size):
    line = f"  %p = f32[8]{{0}} parameter(0)\n  ROOT %g = f32[8]{{0}} all-reduce(%p), replica_groups={text}"
    (c,) = inspect.collectives(entry(line), MESH)
    assert (c.axis, c.group_size) == (axis, size)
    assert inspect.replica_groups("[4,2]<=[2,4]T(1,0)", 8) == [(0, 4), (1, 5), (2, 6), (3, 7)]
    ordered = "mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}"
    assert inspect.replica_groups(ordered, 8) == [(0, 1), (2, 3), (4, 5), (6, 7)]


# What each compiler writes: excerpts, shortened

CPU = """HloModule jit_f, is_scheduled=true, num_partitions=8

%region_2.1 (a.1: f32[], b.1: f32[]) -> f32[] {
  %a.1 = f32[] parameter(0), metadata={op_name="while/body/psum"}
  %b.1 = f32[] parameter(1)
  ROOT %add.1 = f32[] add(%a.1, %b.1)
}

%body (param: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %param = (s32[], f32[8,16]{1,0}) parameter(0)
  %one = s32[] constant(1)
  %n = s32[] get-tuple-element(%param), index=0
  %x = f32[8,16]{1,0} get-tuple-element(%param), index=1
  %all_gather.3 = f32[8,64]{0,1} all-gather(%x), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={1}, \
use_global_device_ids=true, metadata={op_name="jit(f)/while/body/tsp/mlp/bucket/all_gather" stack_frame_id=46}
  %psum.2 = f32[8,16]{1,0} all-reduce(%x), channel_id=1, replica_groups={{0,4},{1,5},{2,6},{3,7}}, \
use_global_device_ids=true, to_apply=%region_2.1
  %next = s32[] add(%n, %one)
  ROOT %tuple.1 = (s32[], f32[8,16]{1,0}) tuple(%next, %psum.2)
}

%wrapped_compare_computation (p.0: s32[], p.1: s32[]) -> pred[] {
  %p.0 = s32[] parameter(0)
  %p.1 = s32[] parameter(1)
  ROOT %lt.6 = pred[] compare(%p.0, %p.1), direction=LT
}

%condition (param.1: (s32[], f32[8,16])) -> pred[] {
  %param.1 = (s32[], f32[8,16]{1,0}) parameter(0)
  %limit = s32[] constant(5)
  %m = s32[] get-tuple-element(%param.1), index=0
  ROOT %wrapped_compare = pred[] fusion(%m, %limit), kind=kLoop, calls=%wrapped_compare_computation
}

ENTRY %main (x.1: f32[8,16]) -> f32[8,16] {
  %x.1 = f32[8,16]{1,0} parameter(0), sharding={devices=[2,4]<=[8]}, metadata={op_name="x"}
  %zero = s32[] constant(0)
  %copy.1 = s32[] copy(%zero)
  %tuple.2 = (s32[], f32[8,16]{1,0}) tuple(%copy.1, %x.1)
  %while.1 = (s32[], f32[8,16]{1,0}) while(%tuple.2), condition=%condition, body=%body, \
metadata={op_name="jit(f)/while" source_file="f.py" source_line=12}, backend_config={"known_init_step":{"init":"0"}}
  %y = f32[8,16]{1,0} get-tuple-element(%while.1), index=1
  %c = f32[2,2]{1,0} constant({ { 1, 2 }, { 3, 4 } })
  %s.0 = f32[4,16]{1,0} slice(%y), slice={[0:4], [0:16]}
  %s.1 = f32[4,16]{1,0} slice(%y), slice={[4:8], [0:16]}
  %all-to-all = (f32[4,16]{1,0}, f32[4,16]{1,0}) all-to-all(%s.0, %s.1), replica_groups={{0,4},{1,5},{2,6},{3,7}}
  ROOT %z = f32[4,16]{1,0} get-tuple-element(%all-to-all), index=1
}
"""

GPU_CONFIG = '"operation_queue_id":"0","collective_backend_config":{"is_sync":%s,"is_pipelined":false}'

CUDA = """HloModule jit_f, is_scheduled=true, num_partitions=8, \
frontend_attributes={fingerprint_before_lhs="044cd40710e2bfe01def99d1cf9564c1"}

%region_6.6 (a: bf16[], b: bf16[]) -> bf16[] {
  %a = bf16[] parameter(0)
  %b = bf16[] parameter(1)
  ROOT %add = bf16[] add(%a, %b)
}

ENTRY %main (x: bf16[256,256], y: bf16[1024,256], p: f32[], q: f32[4]) -> (bf16[256,256]) {
  %x = bf16[256,256]{1,0} parameter(0), metadata={op_name="x" scheduling_name="x"}
  %y = bf16[1024,256]{1,0} parameter(1)
  %p = f32[] parameter(2)
  %q = f32[4]{0} parameter(3)
  %all-gather-start = (bf16[256,256]{1,0}, bf16[256,1024]{1,0}) all-gather-start(%x), channel_id=1, \
replica_groups=[2,4]<=[8], dimensions={1}, use_global_device_ids=true, \
frontend_attributes={trivially_pipelineable=""}, \
metadata={op_name="jit(f)/tsp/mlp/bucket/all_gather" scheduling_name="all-gather-start"}, backend_config={SYNC}
  %all-gather-done = bf16[256,1024]{1,0} all-gather-done(%all-gather-start), metadata={op_name="jit(f)/all_gather"}
  %collective-permute-start = (bf16[256,256]{1,0}, bf16[256,256]{1,0}) collective-permute-start(%x), channel_id=1, \
source_target_pairs={{0,1},{1,2},{2,3},{3,0},{4,5},{5,6},{6,7},{7,4}}, backend_config={ASYNC}
  %reduce-scatter-start = ((bf16[1024,256]{1,0}), bf16[256,256]{1,0}) reduce-scatter-start(%y), channel_id=1, \
replica_groups={{0,1,2,3},{4,5,6,7}}, use_global_device_ids=true, dimensions={0}, to_apply=%region_6.6, \
backend_config={ASYNC}
  %collective-permute-done = bf16[256,256]{1,0} collective-permute-done(%collective-permute-start)
  %reduce-scatter-done = bf16[256,256]{1,0} reduce-scatter-done(%reduce-scatter-start)
  %all-reduce-start = bf16[256,256]{1,0} all-reduce-start(%reduce-scatter-done), channel_id=1, \
replica_groups={{0,4},{1,5},{2,6},{3,7}}, to_apply=%region_6.6, backend_config={ASYNC}
  %all-reduce-done = bf16[256,256]{1,0} all-reduce-done(%all-reduce-start), backend_config={SYNC}
  %all-reduce-start.1 = (f32[], f32[4]{0}) all-reduce-start(%p, %q), replica_groups={{0,1,2,3,4,5,6,7}}, \
to_apply=%region_6.6, backend_config={ASYNC}
  %all-reduce-done.1 = (f32[], f32[4]{0}) all-reduce-done(%all-reduce-start.1)
  %gemm = (bf16[256,1024]{1,0}, s8[4096]{0}) custom-call(%x, %all-gather-done), custom_call_target="__cublas$gemm"
  ROOT %tuple = (bf16[256,256]{1,0}) tuple(%all-reduce-done)
}
""".replace("{SYNC}", "{" + GPU_CONFIG % "true" + "}").replace("{ASYNC}", "{" + GPU_CONFIG % "false" + "}")

# The generic async-start is XLA's long spelling of what this compiler writes as reduce-scatter-start.
ROCM = """HloModule jit_step, is_scheduled=true, input_output_alias={ {1}: (1, {}, may-alias), {2,0}: (2, {0}, \
must-alias) }, num_partitions=8

%region_1 (a: bf16[], b: bf16[]) -> bf16[] {
  %a = bf16[] parameter(0)
  %b = bf16[] parameter(1)
  ROOT %add = bf16[] add(%a, %b)
}

%async_wrapped (p: bf16[2048,2048]) -> bf16[512,2048] {
  %p = bf16[2048,2048]{1,0} parameter(0)
  ROOT %reduce-scatter.7 = bf16[512,2048]{1,0} reduce-scatter(%p), channel_id=2, replica_groups=[2,4]<=[8], \
dimensions={0}, to_apply=%region_1, metadata={op_name="jit(step)/tsp/mlp/gradient/reduce_scatter"}
}, execution_thread="parallel"

ENTRY %main (x: bf16[512,2048], y: bf16[512,2048], z: bf16[2048,2048]) -> bf16[512,2048] {
  %x = bf16[512,2048]{1,0} parameter(0)
  %y = bf16[512,2048]{1,0} parameter(1)
  %z = bf16[2048,2048]{1,0} parameter(2)
  %all-gather-start.1 = ((bf16[512,2048]{1,0}, bf16[512,2048]{1,0}), (bf16[2048,2048]{1,0}, \
/*index=1*/bf16[2048,2048]{1,0})) all-gather-start(%x, %y), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, \
dimensions={0}, use_global_device_ids=true, backend_config={"collective_backend_config":{"is_sync":false}}
  %pallas_call.3 = f32[32,128]{1,0} custom-call(%x), custom_call_target="__gpu$xla.gpu.triton", \
operand_layout_constraints={bf16[512,2048]{1,0}}, metadata={op_name="jit(step)/tsp/attention/pallas_call"}, \
backend_config={debug = false, grid_x = 4 : i32, ir = "ML\\EFR\\0D{\\03(\\22G[\\13 \\\\", num_stages = 3 : i32}
  %async-start = ((bf16[2048,2048]{1,0}), bf16[512,2048]{1,0}, u32[]) async-start(%z), \
async_execution_thread="parallel", calls=%async_wrapped
  %all-gather-done.1 = (bf16[2048,2048]{1,0}, bf16[2048,2048]{1,0}) all-gather-done(%all-gather-start.1)
  ROOT %async-done = bf16[512,2048]{1,0} async-done(%async-start), async_execution_thread="parallel", \
calls=%async_wrapped
}
"""

TPU = """HloModule jit_step, is_scheduled=true, num_partitions=8, frontend_attributes={arg_memory_spaces="0;0"}

FileNames
1 "layer.py"

FunctionNames
1 "step"

FileLocations
1 {file_name_id=1 function_name_id=1 line=21 end_line=21 column=2 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}

%region_12 (a: bf16[], b: bf16[]) -> bf16[] {
  %a = bf16[]{:T(256)} parameter(0), metadata={op_name="while/body/tsp/mlp/gradient/reduce_scatter"}
  %b = bf16[]{:T(256)} parameter(1)
  ROOT %add.69 = bf16[]{:T(256)} add(%a, %b)
}

%all-reduce-scatter (input: bf16[2048,2048]) -> bf16[528,2048] {
  %input = bf16[2048,2048]{1,0:T(8,128)(2,1)} parameter(0)
  %zero = bf16[] constant(0)
  %pad.2 = bf16[2112,2048]{1,0:T(8,128)(2,1)} pad(%input, %zero), padding=0_64x0_0
  %all-reduce.5 = bf16[2112,2048]{1,0:T(8,128)(2,1)} all-reduce(%pad.2), channel_id=7, \
replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%region_12, \
frontend_attributes={from-cross-replica-sharding="true"}, backend_config={"barrier_config":{"id":"1"}}
  %table = u32[8]{0:T(128)} constant({0, 1, 2, 3, 0, 1, 2, 3})
  %id = u32[] partition-id()
  ROOT %slice = bf16[528,2048]{1,0:T(8,128)(2,1)} dynamic-slice(%all-reduce.5, %id, %id), \
dynamic_slice_sizes={528,2048}
}

%start (p: bf16[512,2048]) -> (bf16[512,2048], bf16[2048,2048], u32[]) {
  %p = bf16[512,2048]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.1 = bf16[2048,2048]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=8, \
replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, frontend_attributes={chain_id="5"}, \
metadata={op_name="jit(step)/tsp/mlp/bucket/all_gather" stack_frame_id=1}
  ROOT %custom-call.1 = (bf16[512,2048]{1,0:T(8,128)(2,1)}, bf16[2048,2048]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) \
custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion (q: bf16[512,2048], r: bf16[2048,2048], x.1: bf16[8,2048]) -> (bf16[8,2048], bf16[2048,2048]) {
  %q = bf16[512,2048]{1,0:T(8,128)(2,1)} parameter(0)
  %r = bf16[2048,2048]{1,0:T(8,128)(2,1)} parameter(1)
  %x.1 = bf16[8,2048]{1,0:T(8,128)(2,1)S(1)} parameter(2)
  %convolution.1 = bf16[8,2048]{1,0:T(8,128)(2,1)} convolution(%x.1, %r), dim_labels=bf_io->bf
  %all-gather.2 = bf16[2048,2048]{1,0:T(8,128)(2,1)} all-gather(%q), channel_id=8, \
replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, frontend_attributes={chain_id="5"}
  ROOT %tuple.1 = (bf16[8,2048]{1,0:T(8,128)(2,1)}, bf16[2048,2048]{1,0:T(8,128)(2,1)}) \
tuple(%convolution.1, %all-gather.2)
}

%done (s: bf16[512,2048]) -> bf16[2048,2048] {
  %s = bf16[512,2048]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.3 = bf16[2048,2048]{1,0:T(8,128)(2,1)} all-gather(%s), channel_id=8, \
replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, frontend_attributes={chain_id="5"}
  ROOT %custom-call.3 = bf16[2048,2048]{1,0:T(8,128)(2,1)} custom-call(%s, %all-gather.3), \
custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (w: bf16[512,2048], v: bf16[2048,2048], x: bf16[8,2048]) -> bf16[48,2048] {
  %w = bf16[512,2048]{1,0:T(8,128)(2,1)} parameter(0)
  %v = bf16[2048,2048]{1,0:T(8,128)(2,1)} parameter(1)
  %x = bf16[8,2048]{1,0:T(8,128)(2,1)} parameter(2)
  %copy-start = (bf16[8,2048]{1,0:T(8,128)(2,1)S(1)}, bf16[8,2048]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%x)
  %async-collective-start = (bf16[512,2048]{1,0:T(8,128)(2,1)}, bf16[2048,2048]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) \
fusion(%w), kind=kCustom, output_to_operand_aliasing={{0}: (0, {})}, calls=%start
  %g.0 = bf16[512,2048]{1,0:T(8,128)(2,1)} get-tuple-element(%async-collective-start), index=0
  %g.1 = bf16[2048,2048]{1,0:T(8,128)(2,1)} get-tuple-element(%async-collective-start), index=1
  %copy-done = bf16[8,2048]{1,0:T(8,128)(2,1)S(1)} copy-done(%copy-start)
  %fusion.1 = (bf16[8,2048]{1,0:T(8,128)(2,1)}, bf16[2048,2048]{1,0:T(8,128)(2,1)}) fusion(%g.0, %g.1, %copy-done), \
kind=kOutput, calls=%async_collective_fusion
  %async-collective-done = bf16[2048,2048]{1,0:T(8,128)(2,1)} fusion(%g.0), kind=kCustom, calls=%done
  %fusion.82 = bf16[528,2048]{1,0:T(8,128)(2,1)} fusion(%v), kind=kCustom, calls=%all-reduce-scatter, \
backend_config={"collective_algorithm_config":{"emitter":"SingleInputAllReduceScatterFusion",\
"debug":"\\n{2 2} id \\"1\\" {"}}
  %slice.2 = bf16[48,2048]{1,0:T(8,128)(2,1)} slice(%fusion.82), slice={[480:528], [0:2048]}
  %collective-permute-start = (bf16[48,2048]{1,0:T(8,128)(2,1)}, bf16[48,2048]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}, \
u32[]{:S(2)}) collective-permute-start(%slice.2), channel_id=1, \
source_target_pairs={{0,1},{1,2},{2,3},{4,5},{5,6},{6,7}}
  ROOT %collective-permute-done = bf16[48,2048]{1,0:T(8,128)(2,1)} collective-permute-done(%collective-permute-start)
}
"""


def moved(text):
    found = inspect.collectives(inspect.parse(text), MESH)
    return [(c.op, c.axis, c.count, c.bytes, c.is_async) for c in found]


def test_cpu_text():
    module = inspect.parse(CPU)
    assert moved(CPU) == [
        ("all-to-all", "data", 1, 8 * 16 * 4 // 2, False),
        ("all-gather", "tsp", 5, 8 * 16 * 4 * 3, False),
        ("all-reduce", "data", 5, 8 * 16 * 4, False),
    ]
    assert inspect.collectives(module)[2].scope == "while/body/psum"  # its own metadata is gone
    (loop,) = [i for i in module.entry.instructions if i.opcode == "while"]
    assert loop.called == {"condition": ("condition",), "body": ("body",)}
    assert (loop.source_file, loop.source_line) == ("f.py", 12)
    assert module.trip_count(loop) == 5
    assert {c.name: n for c, n in module.executions()} == {"main": 1, "body": 5, "condition": 6}
    assert "wrapped_compare_computation" in {c.name for c, _ in module.executions(fusions=True)}


@pytest.mark.parametrize(
    ("old", "new", "trips"),
    [
        ("compare(%p.0, %p.1), direction=LT", "compare(%p.1, %p.0), direction=GT", 5),
        ("direction=LT", "direction=LE", 6),
        ("direction=LT", "direction=NE", 5),
        ("direction=LT", "direction=GT", None),
        ("constant(5)", "constant(-2)", 0),
        ("constant(1)", "constant(2)", 3),
        ("add(%n, %one)", "subtract(%n, %one)", None),
        ("add(%n, %one)", "multiply(%n, %one)", None),
        ("copy(%zero)", "never-heard-of(%zero)", None),
        ("  %limit = s32[] constant(5)", "  %limit = s32[] get-tuple-element(%param.1), index=1", None),
    ],
)
def test_trips_of_edited_text(old, new, trips):
    assert old in CPU
    module = inspect.parse(CPU.replace(old, new))
    assert module.trip_count(module.entry.by_name["while.1"]) == trips


def test_a_limit_carried_by_the_loop():
    text = CPU.replace("(s32[], f32[8,16]{1,0})", "(s32[], f32[8,16]{1,0}, s32[])")
    text = text.replace("tuple(%copy.1, %x.1)", "tuple(%copy.1, %x.1, %seven)")
    text = text.replace("  %copy.1 =", "  %seven = s32[] constant(7)\n  %copy.1 =")
    text = text.replace("limit = s32[] constant(5)", "limit = s32[] get-tuple-element(%param.1), index=2")
    kept = text.replace("tuple(%next, %psum.2)", "tuple(%next, %psum.2, %l)")
    kept = kept.replace("  %next =", "  %l = s32[] get-tuple-element(%param), index=2\n  %next =")
    changed = text.replace("tuple(%next, %psum.2)", "tuple(%next, %psum.2, %next)")
    for text, trips in ((kept, 7), (changed, None)):
        module = inspect.parse(text)
        assert module.trip_count(module.entry.by_name["while.1"]) == trips


def test_cuda_text():
    n = 256 * 256 * 2
    assert moved(CUDA) == [
        ("all-gather", "tsp", 1, 3 * n, False),
        ("collective-permute", "tsp", 1, n, True),
        ("reduce-scatter", "tsp", 1, 3 * n, True),
        ("all-reduce", "data", 1, n, True),
        ("all-reduce", "data,tsp", 1, 2 * 5 * 4 * 7 // 8, True),
    ]
    made = inspect.buffers(inspect.parse(CUDA))
    assert [b.shape for b in made if b.dtype == "f32"] == [(), (4,), (), (4,)]
    assert {b.name: b.shape for b in made if b.dtype == "bf16"} == {
        "x": (256, 256),
        "y": (1024, 256),
        "all-gather-start": (256, 1024),
        "collective-permute-start": (256, 256),
        "reduce-scatter-start": (256, 256),
        "all-reduce-start": (256, 256),
        "gemm": (256, 1024),
    }


def test_rocm_text():
    n = 512 * 2048 * 2
    assert moved(ROCM) == [("all-gather", "tsp", 1, 2 * 3 * n, True), ("reduce-scatter", "tsp", 1, 3 * n, True)]
    module = inspect.parse(ROCM)
    assert module.input_output_alias == (((1,), 1, ()), ((2, 0), 2, (0,)))
    names = [b.name for b in inspect.buffers(module)]
    assert names == ["x", "y", "z", *["all-gather-start.1"] * 2, "pallas_call.3", "reduce-scatter.7"]
    kernel = module.entry.by_name["pallas_call.3"]
    assert kernel.attributes["custom_call_target"] == '"__gpu$xla.gpu.triton"'
    assert kernel.backend_config.endswith("num_stages = 3 : i32}")


def test_tpu_text():
    assert sorted(moved(TPU)) == [
        ("all-gather", "tsp", 1, 3 * 512 * 2048 * 2, True),  # once, though three fusions hold it
        ("collective-permute", "tsp", 1, 48 * 2048 * 2, True),
        ("reduce-scatter", "tsp", 1, 3 * 528 * 2048 * 2, False),  # an all-reduce of which a slice is kept
    ]
    module = inspect.parse(TPU)
    scopes = {c.op: c.scope for c in inspect.collectives(module, MESH)}
    assert scopes["reduce-scatter"] == "while/body/tsp/mlp/gradient/reduce_scatter"
    gather = module.computations["start"].by_name["all-gather.1"]
    assert (gather.source_file, gather.source_line) == ("layer.py", 21)
    spaces = {b.name: b.memory_space for b in inspect.buffers(module)}
    assert spaces["copy-start"] == 1
    assert spaces["w"] == 0


@pytest.mark.parametrize("text", [CPU, CUDA, ROCM, TPU])
def test_every_cut_of_every_text_is_refused(text):
    for end in range(len(text.rstrip())):
        with pytest.raises(ConfigError):
            module = inspect.parse(text[:end])
            list(module.walk(fusions=True))
