"""compile_for: any function, any form of arguments, for hardware that is not there; what cannot be done is refused."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.builders.hlo import F32
from tests.builders.targets import needs_compiler
from tsp_jax.errors import ConfigError
from tsp_jax.hardware.devices import HARDWARE
from tsp_jax.inspect import compile_for, report, target_mesh

N, D, F = 64, 32, 128
X, W = jax.ShapeDtypeStruct((N, D), jnp.float32), jax.ShapeDtypeStruct((D, F), jnp.float32)
AXES = "data=4,tsp=2"
ABSENT = {"rocm": "mi300x", "cuda": "h100", "tpu": "v5p"}


def product(x, w):
    return x @ w


def scaled(params, x, *, scale=1.0, activation="relu"):
    return getattr(jax.nn, activation)(x @ params["w"]) * scale


def forms():
    """Name -> arguments that mean the same product on one device."""
    x, w = np.ones((N, D), np.float32), np.ones((D, F), np.float32)
    return {
        "shapes": (X, W), "arrays": (jnp.asarray(x), jnp.asarray(w)), "numpy": (x, w), "mixed": (X, jnp.asarray(w)),
        "float64 of numpy": (x.astype(np.float64), w),
        "committed": (jax.device_put(x, jax.devices()[3]), W),
    }  # fmt: skip


@pytest.mark.parametrize("form", forms())
def test_arguments_may_be_arrays_or_shapes(form):
    done = compile_for(product, *forms()[form], target="cpu:1")
    found = done.report()
    assert found.flops == 2 * N * D * F
    assert found.memory and found.memory.argument_bytes == (N * D + D * F) * F32
    assert found.memory.output_bytes == N * F * F32
    assert (done.name, found.module.num_devices, found.hardware) == ("product", 1, HARDWARE["cpu"])
    assert "HloModule jit_product" in done.as_text() and set(done.as_text().split()) >= {"%x.1", "%w.1"}


@pytest.mark.parametrize("mesh", [AXES, {"data": 4, "tsp": 2}, AbstractMesh((4, 2), ("data", "tsp")), "present"])
def test_a_mesh_may_be_text_a_dict_or_a_mesh(mesh):
    mesh = target_mesh("cpu:8", AXES) if mesh == "present" else mesh
    done = compile_for(product, X, W, target="cpu:8", mesh=mesh, in_shardings=(P("data"), P(None, "tsp")))
    found = done.report()
    assert found.mesh == {"data": 4, "tsp": 2} and found.module.num_devices == 8
    assert found.flops == 2 * N * D * F / 8 and not found.collectives
    assert found.memory and found.memory.argument_bytes == (N * D // 4 + D * F // 2) * F32
    assert [each.elements for each in found.full_weights] == [N * D, D * F]


def test_a_contraction_over_shards_is_summed():
    shardings = P(None, "tsp"), P("tsp")
    done = compile_for(product, X, W, target="cpu:8", mesh=AXES, in_shardings=shardings, out_shardings=P())
    (reduced,) = done.report().collectives
    assert (reduced.op, reduced.axis, reduced.bytes) == ("all-reduce", "tsp", N * F * F32)


def test_shardings_may_come_with_the_arguments():
    """Of a mesh that exists, of one that does not, and with memory on the host left out."""
    mesh = target_mesh("cpu:8", AXES)
    x = jax.device_put(np.ones((N, D), np.float32), NamedSharding(mesh, P("data")))
    w = jax.ShapeDtypeStruct(W.shape, W.dtype, sharding=NamedSharding(AbstractMesh((4, 2), ("data", "tsp")), P()))
    found = compile_for(product, x, w, target="cpu:8").report()
    assert found.mesh == {"data": 4, "tsp": 2}
    assert found.memory and found.memory.argument_bytes == (N * D // 4 + D * F) * F32


def test_static_leaves_are_constants_and_keywords_reach_the_function():
    params = {"w": W, "name": "up", "layers": 3, "activation": jax.nn.relu, "absent": None}
    specs = {"w": P(None, "tsp"), "name": None, "layers": None, "activation": None, "absent": None}
    done = compile_for(
        scaled, params, X, scale=2.0, activation="gelu", target="cpu:8", mesh=AXES, in_shardings=(specs, P("data"))
    )
    found = done.report()
    names = re.findall(r'parameter\(\d\).*op_name="([^"]*)"', done.as_text())
    assert {name.replace("\\", "") for name in names} == {"params['w']", "x"}
    assert found.flops == 2 * N * D * F / 8
    assert "tanh" in done.as_text()


def test_results_that_are_no_arrays_are_left_out():
    done = compile_for(lambda x: {"y": x + 1, "name": "text", "f": jax.nn.relu}, X, target="cpu:1")
    assert done.report().memory.output_bytes == N * D * F32  # pyright: ignore[reportOptionalMemberAccess]


@pytest.mark.parametrize("way", ["plain", "jitted"])
def test_donated_memory_is_used_again(way):
    """F of X's type takes X's place."""
    f = lambda x: x + 1
    donated = {"plain": (f, {"donate_argnums": 0}), "jitted": (jax.jit(f, donate_argnums=0), {})}
    f, options = donated[way]
    memory = compile_for(f, X, target="cpu:1", **options).report().memory
    assert memory and memory.alias_bytes == N * D * F32 == memory.peak_bytes


class Model:
    layers = 3

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
    def step(self, x):
        return x * self.layers


@pytest.mark.parametrize(
    "call",
    [
        (jax.jit(lambda x, n: x * n, static_argnums=1, donate_argnums=0), X, 3),
        (functools.partial(jax.jit(lambda n, x: x * n, static_argnums=0, donate_argnums=1), 3), X),
        (Model().step, X),
    ],
)
def test_a_jitted_function_keeps_its_own_options(call):
    memory = compile_for(*call, target="cpu:1").report().memory
    assert memory and memory.alias_bytes == N * D * F32


def test_a_jitted_function_may_name_axes_of_the_mesh():
    f = jax.jit(product, in_shardings=(P("data"), P()), out_shardings=P("data"))
    found = compile_for(f, X, W, target="cpu:8", mesh=AXES).report()
    assert found.flops == 2 * N * D * F / 4


@pytest.mark.parametrize("kind", ["target", "abstract", "context"])
def test_a_function_may_hold_a_mesh(kind):
    abstract = AbstractMesh((8,), ("tsp",), axis_types=(AxisType.Auto,))
    mesh = {"target": target_mesh("cpu:8", "tsp=8"), "abstract": abstract, "context": None}[kind]
    f = jax.shard_map(lambda x: jax.lax.psum(x, "tsp"), mesh=mesh, in_specs=P("tsp"), out_specs=P())
    (found,) = compile_for(f, X, target="cpu:8", mesh="tsp=8" if mesh is None else mesh).report().collectives
    assert (found.op, found.axis) == ("all-reduce", "tsp")


def test_the_mesh_of_the_context_is_taken():
    f = lambda x: jax.lax.with_sharding_constraint(2 * x, P("tsp"))
    with jax.set_mesh(target_mesh("cpu:8", "tsp=8")):
        assert compile_for(f, X, target="cpu:8").report().mesh == {"tsp": 8}


def test_arrays_that_a_function_binds_are_inputs_and_those_it_captures_are_memory():
    w = jnp.asarray(np.random.default_rng(0).normal(size=(512, 1024)), jnp.float32)
    x = jax.ShapeDtypeStruct((8, 512), jnp.float32)
    bound = compile_for(functools.partial(lambda w, x: x @ w, w), x, target="cpu:1").report().memory
    captured = compile_for(lambda x: x @ w, x, target="cpu:1").report().memory
    assert bound and captured
    assert (bound.argument_bytes - 8 * 512 * F32, bound.constant_bytes) == (w.nbytes, 0)
    assert (captured.argument_bytes, captured.constant_bytes) == (8 * 512 * F32, w.nbytes)
    assert captured.peak_bytes >= w.nbytes


def test_keys_and_programs_without_arguments():
    sample = lambda key: jax.random.normal(key, (N, D))
    for call in ((sample, jax.random.key(0)), (functools.partial(sample, jax.random.key(0)),), (lambda: jnp.ones(N),)):
        assert compile_for(*call, target="cpu:8", mesh="data=8").report().module.num_devices == 8
    assert compile_for(lambda: jnp.ones(N), target="cpu:1").report().module.num_devices == 1


def test_x64_is_the_callers():
    x = np.ones((N, D))
    with jax.enable_x64(True):
        memory = compile_for(lambda x: x + 1, x, target="cpu:1").report().memory
    assert memory and memory.argument_bytes == N * D * 8


class Linear(nnx.Module):
    def __init__(self, rngs):
        self.w, self.calls = nnx.Param(jnp.ones((D, F))), nnx.Variable(jnp.zeros((D, F)))

    def __call__(self, x):
        self.calls[...] += 1.0
        return x @ self.w[...]


def test_modules_of_flax_change_under_its_jit_and_are_refused_without():
    model = nnx.eval_shape(lambda: Linear(nnx.Rngs(0)))
    call = lambda model, x: model(x)
    memory = compile_for(nnx.jit(call), model, X, target="cpu:8", mesh=AXES).report().memory
    assert memory and memory.output_bytes >= (N * F + D * F) * F32  # the changed variable is a result
    with pytest.raises(ConfigError, match=r"<lambda> takes Flax NNX modules.*compile_for\(nnx.jit"):
        compile_for(call, model, X, target="cpu:1")


def branches(x):
    if x.sum() > 0:
        return x
    return -x


def misfits(x):
    return x @ jnp.ones((3, 3))


CPU_MESH = {"target": "cpu:8", "mesh": AXES}
REFUSED = {
    "target=cpu:8 has 8 devices, and no mesh .* use mesh='data=8'": lambda: compile_for(product, X, W, target="cpu:8"),
    "mesh=tsp=2 has 2 devices, target=cpu:8 has 8; use target=cpu:2":
        lambda: compile_for(product, X, W, target="cpu:8", mesh="tsp=2"),
    "target=h100 does not say how many": lambda: compile_for(product, X, W, target="h100"),
    r"P\('model',?\) names axis 'model'; the mesh has data, tsp":
        lambda: compile_for(product, X, W, **CPU_MESH, in_shardings=P("model")),
    "in_shardings: 'data' is no sharding": lambda: compile_for(product, X, W, **CPU_MESH, in_shardings=("data", None)),
    "in_shardings is no tree prefix of the 2 positional":
        lambda: compile_for(product, X, W, **CPU_MESH, in_shardings=(P(), P(), P())),
    "in_shardings=.* needs a mesh": lambda: compile_for(product, X, W, target="cpu:1", in_shardings=P()),
    r"branches cannot be traced for cpu:1: TracerBoolConversionError.*test_compile_for.py:\d+\); pass the value":
        lambda: compile_for(branches, X, target="cpu:1"),
    r"misfits cannot be traced for cpu:1: TypeError: dot_general .*\(at .*test_compile_for.py:\d+\)":
        lambda: compile_for(misfits, X, target="cpu:1"),
    "product cannot be traced for cpu:1: TypeError: .*missing": lambda: compile_for(product, X, target="cpu:1"),
    "cannot be compiled for cpu:1: .*No such compile option: 'xla_nonsense'":
        lambda: compile_for(product, X, W, target="cpu:1", compiler_options={"xla_nonsense": 1}),
    r"<lambda> takes target too; use functools.partial\(":
        lambda: compile_for(lambda x, target=None: x, X, target="cpu:1"),
    "<lambda> is jitted already; give out_shardings":
        lambda: compile_for(jax.jit(lambda x: x), X, target="cpu:1", donate_argnums=0),
    "it holds a mesh of other devices; make it with inspect.target_mesh":
        lambda: compile_for(
            jax.jit(lambda x: x, in_shardings=NamedSharding(jax.make_mesh((2,), ("tsp",)), P("tsp"))), X, **CPU_MESH
        ),
}  # fmt: skip


@pytest.mark.parametrize("line", REFUSED)
def test_what_cannot_be_compiled_is_refused_in_one_line(line):
    with pytest.raises(ConfigError, match=line) as error:
        REFUSED[line]()
    assert "\n" not in str(error.value)


def test_a_jit_inside_that_names_axes_needs_one_around_it():
    inner = lambda x: jax.jit(lambda x: x + 1, in_shardings=P("data"))(x)
    with pytest.raises(ConfigError, match="jit the function itself too"):
        compile_for(inner, X, **CPU_MESH, in_shardings=P("data"))
    assert compile_for(jax.jit(inner), X, **CPU_MESH, in_shardings=P("data")).report().mesh


def test_a_keyword_of_the_same_name_goes_with_a_partial():
    f = lambda x, target: x + target
    assert compile_for(functools.partial(f, target=jnp.ones((N, D))), X, target="cpu:1").report().flops == 0


@pytest.mark.parametrize("program", [product, jax.jit(product), jax.jit(product).trace(X, W)])
def test_report_says_what_compiles_a_function(program):
    with pytest.raises(ConfigError, match=r"is not compiled; use inspect.compile_for\(f") as error:
        report(program)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("platform", ABSENT)
@pytest.mark.parametrize("count", [1, 8])
def test_functions_compile_for_hardware_that_is_absent(platform, count):
    needs_compiler(platform)
    target = f"{ABSENT[platform]}:{count}"
    options = {"mesh": AXES, "in_shardings": (P("data"), P(None, "tsp"))} if count > 1 else {}
    found = compile_for(product, X, W, target=target, **options).report()
    assert found.hardware == HARDWARE[ABSENT[platform]]
    assert found.flops == 2 * N * D * F / count
    nbytes = (N * D // 4 + D * F // 2) * F32 if count > 1 else (N * D + D * F) * F32
    assert found.memory and found.memory.argument_bytes >= nbytes
    assert platform == "tpu" or found.memory.argument_bytes == nbytes, "a TPU pads them to whole tiles"
    assert found.timeline and found.timeline.step_s > 0
    with pytest.raises(ConfigError, match="the program was compiled for"):
        report(compile_for(product, X, W, target=target, **options).compiled, target="cpu")


@pytest.mark.parametrize("platform", ["rocm", "cuda"])
def test_calls_of_python_are_refused_for_absent_gpus_with_their_line(platform):
    needs_compiler(platform)

    def prints(x):
        jax.debug.print("{}", x[0, 0])
        return x

    with pytest.raises(ConfigError, match=r"lowered for .*test_compile_for.py:\d+\); it calls Python"):
        compile_for(prints, X, target=f"{ABSENT[platform]}:1")


@pytest.mark.parametrize("platform", ABSENT)
def test_arrays_may_be_computed_while_a_sharded_function_is_traced(platform):
    """The target's own devices cannot compute them."""
    needs_compiler(platform)

    def shifted(x):
        with jax.ensure_compile_time_eval():
            number = int(jnp.arange(4).sum())
        return jax.lax.with_sharding_constraint(x + number, P("data"))

    target = f"{ABSENT[platform]}:8"
    assert compile_for(shifted, X, target=target, mesh=AXES, in_shardings=P("data")).report().memory
    with pytest.raises(ConfigError, match=r"no attribute 'local_devices'.*; it computes an array while it is traced"):
        compile_for(shifted, X, target=target, mesh=AXES)


@pytest.mark.parametrize("platform", ABSENT)
@pytest.mark.parametrize("f", [jnp.linalg.eigh, jnp.linalg.svd, jnp.linalg.qr, jnp.linalg.inv])
def test_linear_algebra_compiles(platform, f):
    needs_compiler(platform)
    square = jax.ShapeDtypeStruct((D, D), jnp.float32)
    assert compile_for(f, square, target=f"{ABSENT[platform]}:1").report().memory


@pytest.mark.parametrize("platform", ABSENT)
@pytest.mark.parametrize("turned", ["forward", "input", "kernel"])
def test_convolutions_of_libraries_are_counted(platform, turned):
    """Without padding, whose zeros a library multiplies too; a TPU's compiler may choose another window."""
    needs_compiler(platform)
    x, w = jax.ShapeDtypeStruct((4, 10, 10, 64), jnp.float32), jax.ShapeDtypeStruct((3, 3, 64, 128), jnp.float32)
    convolve = lambda x, w: jax.lax.conv_general_dilated(
        x, w, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    y = jax.eval_shape(convolve, x, w)
    pull = {
        "forward": lambda x, w, y: convolve(x, w),
        "input": lambda x, w, y: jax.vjp(lambda x: convolve(x, w), x)[1](y),
        "kernel": lambda x, w, y: jax.vjp(lambda w: convolve(x, w), w)[1](y),
    }[turned]
    if platform == "rocm" and jax.__version_info__ >= (0, 12):
        with pytest.raises(ConfigError, match=r"has convolutions, at which .* ends the process; use jax 0.10"):
            compile_for(pull, x, w, y, target="mi300x:1")
        return
    done = compile_for(pull, x, w, y, target=f"{ABSENT[platform]}:1")
    assert done.report().flops == 2 * y.size * 3 * 3 * 64
    assert platform == "tpu" or re.search(r"__cudnn\$conv", done.as_text())
