"""What is read from excerpts of what each compiler writes."""

from tests.builders.hlo import MESH
from tests.builders.hlo_texts import CPU, CUDA, ROCM, TPU
from tsp_jax import inspect


def moved(text):
    found = inspect.list_collectives(inspect.parse(text), MESH)
    return [(c.op, c.axis, c.count, c.bytes, c.is_async) for c in found]


def test_cpu_text():
    module = inspect.parse(CPU)
    assert moved(CPU) == [
        ("all-to-all", "data", 1, 8 * 16 * 4 // 2, False),
        ("all-gather", "tsp", 5, 8 * 16 * 4 * 3, False),
        ("all-reduce", "data", 5, 8 * 16 * 4, False),
    ]
    assert inspect.list_collectives(module)[2].scope == "while/body/psum"  # its own metadata is gone
    (loop,) = [i for i in module.entry.instructions if i.opcode == "while"]
    assert loop.called == {"condition": ("condition",), "body": ("body",)}
    assert (loop.source_file, loop.source_line) == ("f.py", 12)
    assert module.trip_count(loop) == 5
    assert {c.name: n for c, n in module.executions()} == {"main": 1, "body": 5, "condition": 6}
    assert "wrapped_compare_computation" in {c.name for c, _ in module.executions(fusions=True)}


def test_cuda_text():
    n = 256 * 256 * 2
    assert moved(CUDA) == [
        ("all-gather", "tsp", 1, 3 * n, False),
        ("collective-permute", "tsp", 1, n, True),
        ("reduce-scatter", "tsp", 1, 3 * n, True),
        ("all-reduce", "data", 1, n, True),
        ("all-reduce", "data,tsp", 1, 2 * 5 * 4 * 7 // 8, True),
    ]
    made = inspect.list_buffers(inspect.parse(CUDA))
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
    assert module.input_output_alias == (((), 1, ()),)
    names = [b.name for b in inspect.list_buffers(module)]
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
    scopes = {c.op: c.scope for c in inspect.list_collectives(module, MESH)}
    assert scopes["reduce-scatter"] == "while/body/tsp/mlp/gradient/reduce_scatter"
    gather = module.computations["start"].by_name["all-gather.1"]
    assert (gather.source_file, gather.source_line) == ("layer.py", 21)
    spaces = {b.name: b.memory_space for b in inspect.list_buffers(module)}
    assert spaces["copy-start"] == 1
    assert spaces["w"] == 0
