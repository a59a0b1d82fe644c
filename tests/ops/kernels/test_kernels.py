"""The table of kernels: each one against the plain mathematics, and which one is chosen."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, AxisType

from tests.builders.arrays import BF16_TOLERANCE, F32_TOLERANCE, assert_trees_near
from tests.builders.attention import (
    RULES,
    Case,
    H,
    S,
    allowed_pairs,
    jitted_run,
    poison,
    random_tokens,
    run_reference,
    run_reference_where,
)
from tsp_jax.errors import ConfigError
from tsp_jax.ops.kernels import (
    ABSENT,
    KERNELS,
    CudnnKernel,
    TpuKernel,
    TritonKernel,
    XlaKernel,
    arch_of,
    choose_kernel,
    describe_kernel,
    tpu_tiles,
)
from tsp_jax.ops.kernels.chunk_pairs import XlaPairKernel
from tsp_jax.ops.kernels.mask import MASKED, Scores, Tokens
from tsp_jax.ops.kernels.tiles import Tile, Tiles

SMALL = {
    "cudnn": XlaPairKernel((XlaKernel(4, 6),), chunk=6),  # what it makes of chunks; cuDNN itself needs a GPU
    "triton": TritonKernel("interpret"),
    "tpu": TpuKernel("interpret"),
    "xla": XlaKernel(4, 6),
}
"""name -> the kernel with blocks so small that a short sequence has many, on any machine"""
SMALLER = {
    "triton": TritonKernel("interpret", Tiles(*(Tile(2, 2, 1, 1),) * 3)),
    "tpu": TpuKernel("interpret", tpu_tiles.Tiles(*(tpu_tiles.Tile(6, 6, 3),) * 3)),
    "xla": XlaKernel(6, 6),
}
"""with blocks that divide a zigzag chunk of 6 tokens"""
CASES = {
    "plain": Case(),
    "one head": Case(kv_heads=1, group=1),
    "one group": Case(kv_heads=1, group=5),
    "packed": Case(packed=True),
    "zigzag, first of 4": Case(ranks=4, rank=0),
    "zigzag, packed, third of 4": Case(ranks=4, rank=2, packed=True),
    "zigzag, last of 2": Case(ranks=2, rank=1, batch=1),
}

every_kernel = pytest.mark.parametrize("kernel", SMALL.values(), ids=SMALL)


def test_every_kernel_is_tested():
    assert set(SMALL) == set(KERNELS)
    assert not set(ABSENT) & set(KERNELS)


@every_kernel
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_values_and_gradients_equal_the_reference(case, kernel):
    actual = jitted_run(kernel, *case.arrays(), *case.tokens())
    assert_trees_near(actual, run_reference(*case.arrays(), *case.tokens()), F32_TOLERANCE)


@every_kernel
@pytest.mark.parametrize("scores", RULES.values(), ids=RULES)
def test_windows_soft_caps_and_scales_equal_the_reference(scores, kernel):
    case = CASES["zigzag, packed, third of 4"]
    actual = jitted_run(kernel, *case.arrays(), *case.tokens(), scores)
    assert_trees_near(actual, run_reference(*case.arrays(), *case.tokens(), scores), F32_TOLERANCE)


def test_the_reference_is_what_jax_computes():
    q, k, v, dout = Case().arrays()
    desired = jax.nn.dot_product_attention(jnp.asarray(q.reshape(*q.shape[:2], -1, H)), k, v, is_causal=True)
    out, *_ = run_reference(q, k, v, dout, *Case().tokens())
    assert_trees_near(out.reshape(desired.shape), desired, F32_TOLERANCE)


@every_kernel
@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**32 - 1), num_segments=st.integers(1, 4))
def test_any_order_and_any_segments(kernel, seed, num_segments):
    """Nothing but positions and segments counts, not the order of tokens."""
    case = Case()
    queries, keys = random_tokens(seed, num_segments, case.batch)
    out, lse, grads = jitted_run(kernel, *case.arrays(), queries, keys)
    has_key = allowed_pairs(queries, keys).any(axis=2)
    np.testing.assert_array_equal((np.asarray(lse) > MASKED / 2).all(axis=(2, 3)), has_key)
    assert_trees_near((out, grads), run_reference_where(has_key, *case.arrays(), queries, keys), F32_TOLERANCE)


@every_kernel
def test_a_query_without_keys_has_no_output_and_no_gradient(kernel):
    case = Case(packed=True)
    queries, alone = case.lonely_queries()
    out, lse, (dq, *others) = jax.device_get(jitted_run(kernel, *case.arrays(), queries, case.tokens()[1]))
    assert not out[alone].any()
    assert not dq[alone].any()
    assert (lse[alone] == np.float32(MASKED)).all()
    assert all(np.isfinite(array).all() for array in (dq, *others))


@every_kernel
def test_bfloat16_is_near_float32(kernel):
    case = Case(packed=True)
    half = tuple(jnp.asarray(array, jnp.bfloat16) for array in case.arrays())
    actual = jitted_run(kernel, *half, *case.tokens())
    assert [x.dtype for x in jax.tree.leaves(actual)] == [jnp.bfloat16, jnp.float32, *(jnp.bfloat16,) * 3]
    desired = run_reference(*(array.astype(jnp.float32) for array in half), *case.tokens())
    assert_trees_near(actual, desired, BF16_TOLERANCE)


# ------------------------------------------------------------------------------------------------ skipped work


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("kernel", SMALLER.values(), ids=SMALLER)
def test_keys_after_every_query_are_not_visited(kernel, rank):
    """A zigzag chunk of 6 tokens is whole blocks; keys that are not numbers in skipped blocks change nothing."""
    case = Case(ranks=4, rank=rank)
    queries, keys = case.tokens()
    later = keys.positions[0] > queries.positions.max()
    assert later.any()
    q, k, v, dout = case.arrays()
    clean = jax.device_get(jitted_run(kernel, q, k, v, dout, queries, keys))
    poisoned = jax.device_get(jitted_run(kernel, q, poison(k, later), poison(v, later), dout, queries, keys))
    chex.assert_trees_all_equal(poisoned, clean)
    assert not clean[2][1][:, later].any()


@pytest.mark.parametrize("kernel", SMALLER.values(), ids=SMALLER)
def test_queries_before_every_key_are_not_visited_backward(kernel):
    case = Case()
    queries, _ = case.tokens()
    q, k, v, dout = case.arrays()
    late, early = slice(S // 2, None), np.arange(S) < S // 2
    keys = Tokens(*(array[:, late] for array in queries))
    k, v = k[:, late], v[:, late]
    clean = jitted_run(kernel, q, k, v, dout, queries, keys)
    poisoned = jitted_run(kernel, poison(q, early), k, v, poison(dout, early), queries, keys)
    chex.assert_trees_all_equal(poisoned[2], clean[2])


# ------------------------------------------------------------------------------------------------ choice


def abstract_mesh(kind: str, platform: str) -> AbstractMesh:
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=None, platform=platform)
    return AbstractMesh((2,), ("tsp",), axis_types=(AxisType.Auto,), abstract_device=device)


@pytest.mark.parametrize(
    ("kind", "platform", "arch"),
    [
        ("AMD Instinct MI300X", "gpu", "gfx942"),
        ("AMD Instinct MI355X", "gpu", "gfx950"),
        ("gfx942", "gpu", "gfx942"),
        ("NVIDIA H100 80GB HBM3", "gpu", "sm_90"),
        ("NVIDIA A100", "gpu", ""),
        ("TPU v5", "tpu", "tpu_v5p"),
        ("TPU v5p", "tpu", "tpu_v5p"),
        ("TPU v5 lite", "tpu", "tpu_v5e"),
        ("TPU v6 lite", "tpu", "tpu_v6e"),
        ("TPU7x", "tpu", "tpu_v7x"),
        ("TPU v4", "tpu", "tpu"),
        ("cpu", "cpu", "cpu"),
    ],
)
def test_devices_are_known_by_kind(kind, platform, arch):
    assert arch_of(abstract_mesh(kind, platform)) == arch


def test_a_mesh_without_devices_has_no_arch():
    assert arch_of(AbstractMesh((2,), ("tsp",), axis_types=(AxisType.Auto,))) == ""


GPU, TPU, CPU = abstract_mesh("gfx942", "gpu"), abstract_mesh("TPU v5p", "tpu"), abstract_mesh("cpu", "cpu")
H100 = abstract_mesh("NVIDIA H100 80GB HBM3", "gpu")
OLD_TPU = abstract_mesh("TPU v4", "tpu")


@pytest.mark.parametrize(
    ("name", "mesh", "head_dim", "dtype", "kernel"),
    [
        ("auto", GPU, 128, "bfloat16", TritonKernel("gfx942")),
        ("triton", GPU, 128, "bfloat16", TritonKernel("gfx942")),
        ("xla", GPU, 128, "bfloat16", XlaKernel(512, 512)),
        ("auto", GPU, 256, "float32", XlaKernel(512, 512)),
        ("auto", H100, 128, "bfloat16", CudnnKernel.for_arch("sm_90")),
        ("auto", H100, 128, "float32", TritonKernel("sm_90")),
        ("triton", H100, 128, "bfloat16", TritonKernel("sm_90")),
        ("auto", CPU, 128, "bfloat16", XlaKernel(256, 256)),
        ("auto", TPU, 128, "bfloat16", TpuKernel("tpu_v5p")),
        ("auto", TPU, 512, "bfloat16", XlaKernel(1024, 1024)),
        ("auto", OLD_TPU, 128, "bfloat16", XlaKernel(1024, 1024)),
    ],
)
def test_choice(name, mesh, head_dim, dtype, kernel):
    assert choose_kernel(name, mesh, head_dim, dtype) == kernel


TOO_WIDE = "triton: heads have 256 float32; they may have at most 512 bytes, of float32 or bfloat16"
HALF_ONLY = "cudnn: computes in bfloat16 or float16, not in float32"


@pytest.mark.parametrize(
    ("name", "mesh", "head_dim", "dtype", "text"),
    [
        ("auto", GPU, 128, "float32", "triton"),
        ("triton", GPU, 128, "float32", "triton"),
        ("xla", GPU, 256, "float32", "xla"),
        ("auto", CPU, 128, "float32", "xla"),
        ("auto", TPU, 128, "float32", "tpu"),
        ("auto", GPU, 256, "float32", f"xla ({TOO_WIDE})"),
        ("auto", H100, 256, "float32", f"xla ({HALF_ONLY}; {TOO_WIDE})"),
        ("auto", H100, 128, "bfloat16", "cudnn (triton for documents that cross chunks)"),
        ("cudnn", H100, 256, "bfloat16", "cudnn (triton for documents that cross chunks)"),
        ("cudnn", H100, 128, "float16", "cudnn (xla for documents that cross chunks)"),
        ("auto", H100, 128, "float32", f"triton ({HALF_ONLY})"),
    ],
)
def test_description_says_why_kernels_before_it_cannot_run_and_which_others_may(name, mesh, head_dim, dtype, text):
    assert describe_kernel(name, mesh, head_dim, dtype) == text


@pytest.mark.parametrize(
    ("arch", "head_dim", "scores", "words"),
    [
        ("sm_90", 264, Scores(), "heads have 264 dims; on sm_90 they must have a multiple of 8, at most 256"),
        ("sm_90", 20, Scores(), "heads have 20 dims"),
        ("sm_80", 256, Scores(), "on sm_80 they must have a multiple of 8, at most 128"),
        ("sm_75", 128, Scores(), "runs on NVIDIA GPUs from sm_80 on, not on sm_75"),
        ("", 128, Scores(), "not on unknown devices"),
        ("sm_90", 128, Scores(window=4096), "causal attention without window and soft cap only"),
        ("sm_90", 128, Scores(softcap=50.0), "causal attention without window and soft cap only"),
        ("sm_90", 128, Scores(causal=False), "causal attention without window and soft cap only"),
    ],
)
def test_what_cudnn_cannot_compute(arch, head_dim, scores, words):
    assert words in CudnnKernel.for_arch(arch).unsupported(head_dim, "bfloat16", scores)


def test_cudnn_takes_any_scale():
    assert not CudnnKernel.for_arch("sm_90").unsupported(128, "bfloat16", Scores(scale=0.2))


@pytest.mark.parametrize(
    ("name", "mesh", "head_dim", "words"),
    [
        ("triton", CPU, 128, "stream.kernel=triton: runs on gfx942, .*, not on cpu; use stream.kernel=xla"),
        ("triton", GPU, 256, "stream.kernel=triton: heads have 256 float32; they may have at most 512 bytes"),
        ("cudnn", GPU, 128, "stream.kernel=cudnn: runs on NVIDIA GPUs .*, not on gfx942; use stream.kernel=xla"),
        ("aiter", GPU, 128, "stream.kernel=aiter: .* jax_aiter, .*; use stream.kernel=triton"),
        ("tpu", GPU, 128, "stream.kernel=tpu: runs on tpu_v5p, .*, not on gfx942; use stream.kernel=xla"),
        (
            "tpu",
            TPU,
            512,
            "stream.kernel=tpu: heads have 512 float32; they may have at most 256 of bfloat16 or float32",
        ),
        ("fused", GPU, 128, "stream.kernel=fused is unknown; use one of auto, cudnn, triton, tpu, xla"),
    ],
)
def test_refusals(name, mesh, head_dim, words):
    with pytest.raises(ConfigError, match=words):
        choose_kernel(name, mesh, head_dim, jnp.float32)
