"""Arrays that a program makes, and memory as the compiler reports it."""

import jax
import jax.numpy as jnp
from jax import lax

from tests.builders.hlo import F32, D, text_of
from tsp_jax import inspect


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

    assert (T, V) in {b.shape for b in inspect.list_buffers(made(whole))}
    pieces = inspect.list_buffers(made(chunked))
    assert (T, V) not in {b.shape for b in pieces}
    assert (T, V // chunks) in {b.shape for b in pieces}
    top = inspect.largest_buffers(made(whole), 2)
    assert [b.bytes for b in top] == [T * V * F32, T * V * F32]


def test_buffers_leave_out_other_names_and_what_stays_in_fusions(module):
    found = inspect.list_buffers(module)
    assert not {b.opcode for b in found} & {"tuple", "get-tuple-element", "bitcast", "while", "conditional"}
    assert {b.computation for b in found if b.opcode == "parameter"} == {module.entry.name}
    gathered = [b for b in found if b.opcode == "all-gather"]
    assert [(b.shape, b.dtype, b.bytes) for b in gathered] == [((D, D), "f32", D * D * F32)]
    assert "tsp/mlp/bucket" in gathered[0].scope


def test_compiled_memory_and_aliases():
    f = jax.jit(lambda x, y: (x + 1.0, y @ y), donate_argnums=0)
    program = f.lower(jnp.ones((64, 64)), jnp.ones((32, 32))).compile()
    report = inspect.compiled_memory(program)
    assert report.argument_bytes == (64 * 64 + 32 * 32) * F32
    assert report.alias_bytes == 64 * 64 * F32
    assert report.peak_bytes == report.argument_bytes + report.temp_bytes + report.output_bytes - report.alias_bytes
    assert inspect.parse(text_of(program)).input_output_alias == (((0,), 0, ()),)
