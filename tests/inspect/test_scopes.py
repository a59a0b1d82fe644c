"""Readable scopes, and the time of kernels summed by them."""

import pytest

from tests.builders.hlo import kernel, lines, loop, simulated
from tsp_jax.inspect.scopes import readable_scope


@pytest.mark.parametrize(
    ("op_name", "callers", "label"),
    [
        ("jit(step)/jvp()/while/body/closed_call/shard_map/tsp/mlp/gather/all_gather", (), "forward tsp/mlp/gather"),
        ("jit(step)/transpose(jvp())/while/body/shard_map/tsp/mlp/btd,pd->btp/dot_general", (), "backward tsp/mlp"),
        ("jit(s)/transpose(jvp())/while/body/checkpoint/rematted_computation/tsp/mlp/mul", (), "recompute tsp/mlp"),
        ("jit(step)/tsp/a/b/c/d/e/add", (), "tsp/a/b/c"),
        ("jit(step)/transpose(jvp())/tsp/(attention/scatter/x:mlp/scatter/x)", (), "backward tsp/attention/scatter"),
        ("jit(step)/jvp()/tsp/mlp/reshape;tsp/mlp/gather/squeeze", (), "forward tsp/mlp"),
        ("jit(f)/jvp()/tsp/attention/while/body/eval_jaxpr/while/body/eval_jaxpr/le", (), "forward tsp/attention"),
        ("jit(step)/jvp()/tsp/attention/likely_branch[1]/cond/branch_1_fun/mul", (), "forward tsp/attention"),
        ("jit(step)/optimizer/add", (), "optimizer"),
        ("jit(step)/add", (), "other"),
        ("", (), "other"),
        (
            "jit(step)/jvp()/tsp/mlp/add",
            ("jit(step)/transpose(jvp())/rematted_computation/while",),
            "recompute tsp/mlp",
        ),
        ("jit(step)/transpose(jvp())/rematted_computation/tsp/mlp/add", ("jit(step)/jvp()/while",), "forward tsp/mlp"),
    ],
)
def test_scopes_are_readable(op_name, callers, label):
    assert readable_scope(op_name, callers) == label


def test_compute_is_summed_by_scope():
    named = ', metadata={op_name="jit(f)/tsp/mlp/copy"}'
    body = lines(kernel("k", 16, named), kernel("l", 8))
    instruction, bodies = loop("w", body, 3, op_name="jit(f)/tsp/loss/while")
    result = simulated(lines(instruction, kernel("m", 80)), bodies)
    assert result.by_scope == {"other": 80, "tsp/mlp": 48, "tsp/loss": 24}
