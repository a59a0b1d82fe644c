"""Attention by pairs of chunks: which pairs there are, when another kernel computes them, and what backward needs."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.builders.arrays import BF16_TOLERANCE, F32_TOLERANCE, assert_trees_near, normal
from tests.builders.attention import Case, S, jitted_run, random_tokens, run, run_reference, sharded_run
from tests.builders.targets import needs_compiler
from tsp_jax.hardware.targets import HARDWARE, Target
from tsp_jax.ops.kernels import CudnnKernel, XlaKernel, delta
from tsp_jax.ops.kernels.chunk_pairs import PairLists, XlaPairKernel
from tsp_jax.ops.kernels.cudnn import _outputs
from tsp_jax.ops.kernels.kernel import Kernel
from tsp_jax.ops.kernels.mask import Tokens
from tsp_jax.training.data import sequence_order

RANKS = [(1, 0), (2, 0), (2, 1), (4, 0), (4, 1), (4, 2), (4, 3)]
every_rank = pytest.mark.parametrize(("ranks", "rank"), RANKS)


@dataclasses.dataclass(frozen=True)
class Forbidden(XlaKernel):
    """Computes NaN, so that a test sees which kernel ran."""

    def attend(self, q_BTKGH, *rest):
        return q_BTKGH * jnp.nan, q_BTKGH[..., 0].astype(jnp.float32) * jnp.nan

    def attend_backward(self, q_BTKGH, k_BSKH, v_BSKH, *rest):
        return q_BTKGH * jnp.nan, k_BSKH * jnp.nan, v_BSKH * jnp.nan


@dataclasses.dataclass(frozen=True)
class OnlyPairs(XlaPairKernel):
    """Attention by pairs of chunks, and NaN for other tokens."""

    @property
    def _xla(self) -> Kernel:
        return XlaKernel(4, 6)


def only_pairs(ranks: int) -> OnlyPairs:
    return OnlyPairs((Forbidden(),)).within(S // ranks)


def lists_of(case: Case, by_key: bool = False) -> tuple[PairLists, bool]:
    queries, keys = (Tokens(*map(jnp.asarray, tokens)) for tokens in case.tokens())
    lists, decomposes = PairLists.of(queries, keys, S // case.ranks // 2, by_key)
    return lists, bool(decomposes)


@every_rank
@pytest.mark.parametrize("by_key", [False, True])
def test_every_zigzag_rank_has_2r_minus_1_whole_pairs_and_two_diagonal_ones(ranks, rank, by_key):
    lists, decomposes = lists_of(Case(ranks=ranks, rank=rank), by_key)
    whole, visited = int(lists.whole_n.sum()), int(lists.visited_n.sum())
    assert (decomposes, whole, visited - whole) == (True, 2 * ranks - 1, 2)
    assert (lists.mean_whole * lists.num, lists.mean_diagonal * lists.num) == (2 * ranks - 1, 2)


@pytest.mark.parametrize(
    ("ranks", "rank", "kv_heads", "group"), [*((*each, 3, 2) for each in RANKS), (4, 1, 1, 5), (2, 1, 2, 1)]
)
def test_pairs_equal_the_reference(ranks, rank, kv_heads, group):
    case = Case(kv_heads, group, ranks=ranks, rank=rank)
    actual = jitted_run(only_pairs(ranks), *case.arrays(), *case.tokens())
    assert_trees_near(actual, run_reference(*case.arrays(), *case.tokens()), F32_TOLERANCE)


@pytest.mark.parametrize(("ranks", "rank"), [(2, 1), (4, 0), (4, 2)])
def test_contiguous_ranks_have_pairs_too(ranks, rank):
    case = Case(ranks=ranks)
    positions = np.broadcast_to(np.arange(S, dtype=np.int32), (case.batch, S))
    keys = Tokens.one_document(jnp.asarray(positions))
    queries = Tokens(*(array[:, rank * S // ranks :][:, : S // ranks] for array in keys))
    actual = jitted_run(only_pairs(ranks), *case.arrays(), queries, keys)
    assert_trees_near(actual, run_reference(*case.arrays(), queries, keys), F32_TOLERANCE)


def test_all_ranks_tokens_at_once_are_pairs_of_zigzag_chunks():
    """As with stationary weights, where `within` is called for one rank's tokens and then for all."""
    case, ranks = Case(), 4
    keys = Case(ranks=ranks).tokens()[1]
    kernel = only_pairs(ranks).within(S)
    assert kernel.chunk == S // ranks // 2
    actual = jitted_run(kernel, *case.arrays(), keys, keys)
    assert_trees_near(actual, run_reference(*case.arrays(), keys, keys), F32_TOLERANCE)


def test_documents_of_whole_chunks_are_pairs():
    """The documents are chunks 0 and 1, and the rest, whose positions start anew."""
    case = Case(ranks=2, rank=1)
    keys = case.tokens()[1]
    later = keys.positions >= S // 2
    keys = Tokens(np.where(later, keys.positions - S // 2, keys.positions), later.astype(np.int32))
    queries = Tokens(*(array[:, S // 2 :] for array in keys))
    actual = jitted_run(only_pairs(2), *case.arrays(), queries, keys)
    assert_trees_near(actual, run_reference(*case.arrays(), queries, keys), F32_TOLERANCE)


def test_bfloat16_pairs_are_near_float32():
    case = Case(ranks=4, rank=1)
    half = tuple(jnp.asarray(array, jnp.bfloat16) for array in case.arrays())
    desired = run_reference(*(array.astype(jnp.float32) for array in half), *case.tokens())
    assert_trees_near(jitted_run(only_pairs(4), *half, *case.tokens()), desired, BF16_TOLERANCE)


def test_pairs_in_a_sharded_program():
    case = Case(batch=1)
    order = sequence_order(S, 4, "zigzag")
    q, k, v, dout = (array[:, order] for array in case.arrays())
    tokens = Tokens(*(array[:, order] for array in case.tokens()[0]))
    mesh = jax.make_mesh((4,), ("tsp",), axis_types=(AxisType.Auto,))
    actual = jax.jit(sharded_run(mesh, only_pairs(4)))(q, k, v, dout, *tokens, *tokens)
    assert_trees_near(actual, run_reference(q, k, v, dout, tokens, tokens), F32_TOLERANCE)


# ------------------------------------------------------------------------------------------------ other tokens


def swapped(case: Case) -> tuple[Tokens, Tokens]:
    """Tokens of one document, with two neighbours of the keys in each other's place."""
    queries, (positions, segments) = case.tokens()
    positions = positions.copy()
    positions[:, [2, 3]] = positions[:, [3, 2]]
    return queries, Tokens(positions, segments)


def rows_differ(case: Case) -> tuple[Tokens, Tokens]:
    """The second row of the batch has another document in its last chunk; each row alone has pairs."""
    queries, keys = case.tokens()
    changed = (
        Tokens(t.positions, (t.positions >= S - S // 8) * np.array([[0], [1]], np.int32)) for t in (queries, keys)
    )
    return tuple(changed)


OTHERS = {
    "packed": Case(ranks=4, rank=2, packed=True).tokens,
    "packed, one row": Case(ranks=4, rank=2, packed=True, batch=1).tokens,
    "packed, one rank and row": Case(ranks=1, packed=True, batch=1).tokens,
    "random order": lambda: random_tokens(3, 1, 2),
    "two keys in each other's place": lambda: swapped(Case(ranks=4, rank=0)),
    "rows of different kinds": lambda: rows_differ(Case(ranks=4, rank=0)),
    "queries that are padding": lambda: Case(ranks=4, rank=0).tokens(),
}


@pytest.mark.parametrize("tokens", OTHERS.values(), ids=OTHERS)
def test_other_tokens_are_left_to_the_other_kernel(tokens):
    queries, keys = tokens()
    if tokens is OTHERS["queries that are padding"]:
        queries = queries._replace(positions=np.where(queries.positions == 1, -(2**31) + 1, queries.positions))
    ranks = S // queries.positions.shape[1]
    case = Case(ranks=ranks, batch=len(queries.positions))
    out, lse, grads = jitted_run(only_pairs(ranks), *case.arrays(), queries, keys)
    assert all(np.isnan(array).all() for array in (out, lse, *grads))
    kernel = XlaPairKernel((XlaKernel(4, 6),)).within(S // ranks)
    actual = jitted_run(kernel, *case.arrays(), queries, keys)
    assert_trees_near(actual, jitted_run(XlaKernel(4, 6), *case.arrays(), queries, keys), F32_TOLERANCE)


def test_lengths_that_are_no_whole_chunks_are_left_to_the_other_kernel():
    case = Case()
    kernel = XlaPairKernel((XlaKernel(4, 6),), chunk=7)
    actual = jitted_run(kernel, *case.arrays(), *case.tokens())
    assert_trees_near(actual, run_reference(*case.arrays(), *case.tokens()), F32_TOLERANCE)


@pytest.mark.parametrize(("tokens", "chunk"), [(48, 24), (12, 6), (7, 7), (2, 1)])
def test_a_chunk_is_half_of_the_tokens_unless_they_are_odd(tokens, chunk):
    assert XlaPairKernel().within(tokens).chunk == chunk


# ------------------------------------------------------------------------------------------------ cuDNN


def test_outputs_for_cudnn_have_the_same_delta():
    out, dout = normal(0, 2, 6, 3, 2, 16), normal(1, 2, 6, 3, 2, 16)
    dout[0, 0], dout[0, 1] = 0.0, 1e-30
    desired = delta(out, dout)
    np.testing.assert_allclose(delta(_outputs(desired, dout), dout), desired, rtol=1e-5, atol=1e-36)


def test_outputs_for_cudnn_in_bfloat16_have_nearly_the_same_delta():
    out, dout = (jnp.asarray(normal(seed, 1, 64, 2, 2, 128), jnp.bfloat16) for seed in (0, 1))
    desired = delta(out, dout)
    error = delta(_outputs(desired, dout), dout) - desired
    assert jnp.abs(error).max() < 2**-8 * jnp.abs(desired).max()


@pytest.mark.parametrize("ranks", [1, 4])
def test_cudnn_calls_declare_what_they_compute(ranks):
    """Of C^2 pairs of tokens a diagonal pair computes half."""
    case, chunk = Case(ranks=ranks), S // ranks // 2
    kernel = CudnnKernel.for_arch("sm_90").within(S // ranks)
    kernel = dataclasses.replace(kernel, others=(XlaKernel(4, 6),))  # Triton's needs a device, present or abstract
    arrays = [jnp.asarray(array[..., :8], jnp.bfloat16) for array in case.arrays()]
    text = lowered_text(kernel, *arrays, *case.tokens())
    found = re.findall(r"mean_flops\[attention_(\w+)\.cudnn\.h8=(\d+)\]", text)
    whole = 2 * case.batch * case.kv_heads * case.group * chunk**2 * 8
    wanted = {("forward", 2 * whole), ("forward", whole), ("backward", 5 * whole), ("backward", 5 * whole // 2)}
    assert {(direction, int(flops)) for direction, flops in found} == wanted
    trips = set(re.findall(r"mean_trips\[([^\]]*)\]", text))
    assert {f"{(2 * ranks - 1) / 2:g}", "1", f"{(2 * ranks - 1) / (2 * ranks):g}", f"{1 / ranks:g}"} <= trips


def test_cudnn_compiles_for_an_absent_gpu_in_a_sharded_program():
    """Both passes of both kinds of pairs, and three Triton kernels for other tokens; no scores in memory."""
    needs_compiler("cuda")
    mesh = Mesh(np.array(Target(HARDWARE["h100"], 8).devices()), ("tsp",), axis_types=(AxisType.Auto,))

    def like(*shape, dtype="bfloat16"):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P()))

    tokens = (like(1, 4096, dtype="int32"),) * 4
    arrays = like(1, 4096, 1, 4, 128), like(1, 4096, 1, 128), like(1, 4096, 1, 128), like(1, 4096, 1, 4, 128)
    program = jax.jit(sharded_run(mesh, CudnnKernel.for_arch("sm_90").within(512))).lower(*arrays, *tokens).compile()
    text = program.as_text()
    assert text.count('custom_call_target="__cudnn$fmhaSoftmax"') == 2
    assert text.count('custom_call_target="__cudnn$fmhaSoftmaxBackward"') == 2
    assert text.count('custom_call_target="__gpu$xla.gpu.triton"') == 3
    assert text.count("likely_branch[1]/cond") >= 2


def lowered_text(kernel: Kernel, *arguments) -> str:
    """StableHLO for NVIDIA GPUs, which need not be present."""
    traced = jax.jit(functools.partial(run, kernel)).trace(*arguments)
    return traced.lower(lowering_platforms=("cuda",)).as_text(debug_info=True)
