"""Peak memory read from text: hand-written modules with a known peak, and a program compiled here."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from tsp_jax import inspect
from tsp_jax.inspect import find_peak

K = 1024 * 4  # bytes of f32[1024]


def module(entry, *others, header=""):
    """A scheduled module; $ stands for f32[1024]{0}."""
    bodies = [*others, "ENTRY %main () -> f32[] {" + entry + "}"]
    text = f"HloModule m, is_scheduled=true{header}\n\n" + "\n\n".join(body.strip() for body in bodies) + "\n"
    return inspect.parse(text.replace("$", "f32[1024]{0}"))


def names(found):
    return sorted(buffer.name for buffer in found.buffers if buffer.bytes >= K)


def loop(init, body, state, *, count=3):
    """Text of a condition and a body, and the while that runs them."""
    condition = f"""
%condition (c: {state}) -> pred[] {{
  %c = {state} parameter(0)
  %n.c = s32[] get-tuple-element(%c), index=0
  %limit = s32[] constant({count})
  ROOT %less = pred[] compare(%n.c, %limit), direction=LT
}}"""
    text = f"%body (b: {state}) -> {state} {{\n  %b = {state} parameter(0)\n{body}}}"
    call = f"  %while = {state} while({init}), condition=%condition, body=%body\n"
    return condition, text, call


# ------------------------------------------------------------------------------------------------ straight line


LINE = """
  %x = $ parameter(0)
  %a = $ custom-call(%x), custom_call_target="f"
  %b = $ custom-call(%a), custom_call_target="f"
  %c = $ custom-call(%b), custom_call_target="f"
  ROOT %d = $ custom-call(%c), custom_call_target="f"
"""


def test_straight_line():
    found = find_peak(module(LINE))
    assert found.bytes == 3 * K  # the parameter, an operand, a result
    assert found.at == "b"
    assert names(found) == ["a", "b", "x"]


def test_a_late_reader_keeps_a_buffer():
    assert find_peak(module(LINE.replace("custom-call(%c)", "custom-call(%c, %a)"))).bytes == 4 * K


def test_elementwise_work_reuses_a_dying_operand():
    text = LINE.replace("%b = $ custom-call(%a)", "%b = $ negate(%a)").replace(
        "%c = $ custom-call", "%c = $ exponential"
    )
    assert find_peak(module(text)).bytes == 3 * K  # at a's maker there are only two, at d's three
    text = text.replace("ROOT %d = $ custom-call(%c)", "ROOT %d = $ tanh(%c)")
    assert find_peak(module(text)).bytes == 2 * K
    assert find_peak(module(text.replace("tanh(%c)", "add(%c, %a)"))).bytes == 3 * K  # a is read later: not overwritten


def test_parameters_are_not_reused():
    assert find_peak(module("\n  %x = $ parameter(0)\n  ROOT %y = $ negate(%x)\n")).bytes == 2 * K


@pytest.mark.parametrize(("inner", "expected"), [("negate(%p)", 2), ("reverse(%p), dimensions={0}", 3)])
def test_fusions_reuse_only_what_they_read_in_order(inner, expected):
    fused = f"%fused (p: $) -> $ {{\n  %p = $ parameter(0)\n  ROOT %r = $ {inner}\n}}"
    entry = """
  %x = $ parameter(0)
  %a = $ custom-call(%x), custom_call_target="f"
  ROOT %b = $ fusion(%a), kind=kLoop, calls=%fused
"""
    assert find_peak(module(entry, fused)).bytes == expected * K


def test_views_are_no_buffers():
    entry = """
  %x = $ parameter(0)
  %a = $ custom-call(%x), custom_call_target="f"
  %t = ($, $) tuple(%a, %x)
  %o = ($, $) opt-barrier(%t)
  %g = $ get-tuple-element(%o), index=0
  %v = f32[32,32]{1,0} bitcast(%g)
  ROOT %w = f32[32,32]{1,0} custom-call(%v), custom_call_target="f"
"""
    found = find_peak(module(entry))
    assert found.bytes == 3 * K
    assert found.at == "w"  # the view keeps what it shows alive


BARE = "%d = f32[8,1024]{1,0} dynamic-update-slice(%a, %r, %i, %i)"
FUSED = "%d = f32[8,1024]{1,0} fusion(%a, %r, %i), kind=kLoop, calls=%fused"


@pytest.mark.parametrize("write", [BARE, FUSED])
@pytest.mark.parametrize(("reader", "stacks"), [("%d", 1), ("%d, %a", 2)])
def test_slices_are_written_in_place_unless_the_old_array_is_read_later(write, reader, stacks):
    fused = """
%fused (p: f32[8,1024], q: f32[1,1024], k: s32[]) -> f32[8,1024] {
  %p = f32[8,1024]{1,0} parameter(0)
  %q = f32[1,1024]{1,0} parameter(1)
  %k = s32[] parameter(2)
  %old = f32[1,1024]{1,0} dynamic-slice(%p, %k, %k), dynamic_slice_sizes={1,1024}
  %sum = f32[1,1024]{1,0} add(%old, %q)
  ROOT %u = f32[8,1024]{1,0} dynamic-update-slice(%p, %sum, %k, %k)
}"""
    entry = f"""
  %x = $ parameter(0)
  %i = s32[] constant(0)
  %a = f32[8,1024]{{1,0}} custom-call(%x), custom_call_target="f"
  %r = f32[1,1024]{{1,0}} bitcast(%x)
  {write}
  ROOT %y = f32[] custom-call({reader}), custom_call_target="f"
"""
    assert find_peak(module(entry, fused)).bytes == pytest.approx((1 + 8 * stacks) * K, abs=64)


def test_small_constants_do_not_count_and_large_ones_do():
    def entry(n):
        return f"\n  %x = $ parameter(0)\n  %c = f32[{n}]{{0}} constant({{...}})\n  ROOT %y = $ negate(%x)\n"

    assert find_peak(module(entry(16))).bytes == 2 * K
    assert find_peak(module(entry(1 << 19))).bytes == 2 * K + 4 * (1 << 19)


def test_donated_parameter():
    entry = "\n  %x = $ parameter(0)\n  %y = $ parameter(1)\n  ROOT %z = $ add(%x, %y)\n"
    donated = ", input_output_alias={ {}: (0, {}, may-alias) }"
    assert find_peak(module(entry)).bytes == 3 * K
    found = find_peak(module(entry, header=donated))
    assert found.bytes == 2 * K
    assert found.by_kind == {"state": 2 * K, "residual": 0, "transient": 0}


# ------------------------------------------------------------------------------------------------ loops


STATE = "(s32[], $, f32[8,1024]{1,0})"
FILL = """
  %n = s32[] get-tuple-element(%b), index=0
  %v = $ get-tuple-element(%b), index=1
  %stack = f32[8,1024]{1,0} get-tuple-element(%b), index=2
  %one = s32[] constant(1)
  %next = s32[] add(%n, %one)
  %row = f32[1,1024]{1,0} bitcast(%v)
  %zero = s32[] constant(0)
  %written = f32[8,1024]{1,0} dynamic-update-slice(%stack, %row, %n, %zero), \
metadata={op_name="jit(f)/jvp()/while/body/dynamic_update_slice" source_file="model.py" source_line=7}
  %old = $ copy(%v)
  %new = $ custom-call(%old), custom_call_target="f", metadata={op_name="jit(f)/jvp()/while/body/layer"}
  ROOT %out = (s32[], $, f32[8,1024]{1,0}) tuple(%next, %new, %written)
"""
STACK = """
  %x = $ parameter(0)
  %i = s32[] constant(0)
  %start = $ copy(%x)
  %nil = f32[] constant(0)
  %zeros = f32[8,1024]{1,0} broadcast(%nil), dimensions={}, metadata={op_name="jit(f)/jvp()/broadcast"}
  %init = (s32[], $, f32[8,1024]{1,0}) tuple(%i, %start, %zeros)
WHILE  %kept = f32[8,1024]{1,0} get-tuple-element(%while), index=2
  ROOT %y = f32[] custom-call(%kept), custom_call_target="f", metadata={op_name="jit(f)/transpose(jvp())/read"}
"""


def stacked(fill=FILL, entry=STACK):
    condition, body, call = loop("%init", fill, STATE)
    return module(entry.replace("WHILE", call), condition, body)


def large(found):
    (buffer,) = [buffer for buffer in found.buffers if buffer.bytes == 8 * K]
    return buffer


def test_loop_state_is_one_buffer_and_is_filled_in_place():
    found = find_peak(stacked())
    assert found.bytes == pytest.approx((8 + 1 + 2) * K, abs=64)  # stack, parameter, old and new carry; counters
    assert names(found) == ["new", "old", "written", "x"]


def test_a_stack_is_named_after_what_fills_it():
    buffer = large(find_peak(stacked()))
    assert buffer.scope == "jit(f)/jvp()/while/body/dynamic_update_slice"
    assert buffer.holds == "jit(f)/jvp()/while/body/layer"
    assert (buffer.source, buffer.name, buffer.computation) == ("model.py:7", "written", "body")
    assert (buffer.shape, buffer.dtype) == ((8, 1024), "f32")


def test_a_fusion_fills_in_place_too():
    fused = """
%fill (p: f32[8,1024], q: $, r: s32[]) -> f32[8,1024] {
  %p = f32[8,1024]{1,0} parameter(0)
  %q = $ parameter(1)
  %r = s32[] parameter(2)
  %u = f32[1,1024]{1,0} bitcast(%q)
  %z = s32[] constant(0)
  %d = f32[8,1024]{1,0} dynamic-update-slice(%p, %u, %r, %z), metadata={op_name="jit(f)/jvp()/while/body/fill"}
  ROOT %t = (f32[8,1024]{1,0}) tuple(%d)
}"""
    inside = FILL.splitlines(keepends=True)
    k = next(k for k, line in enumerate(inside) if "%written" in line)
    inside[k] = (
        "  %both = (f32[8,1024]{1,0}) fusion(%stack, %v, %n), kind=kLoop, calls=%fill\n"
        "  %written = f32[8,1024]{1,0} get-tuple-element(%both), index=0\n"
    )
    condition, body, call = loop("%init", "".join(inside), STATE)
    found = find_peak(module(STACK.replace("WHILE", call), fused, condition, body))
    assert found.bytes == pytest.approx(11 * K, abs=64)
    assert large(found).scope == "jit(f)/jvp()/while/body/fill"


@pytest.mark.parametrize("count", [2, 3, 4])
def test_several_fill_it_in_turn(count):
    """The last hands over to what the first of the next turn reads."""
    lines = FILL.splitlines(keepends=True)
    k = next(k for k, line in enumerate(lines) if "%written" in line)
    links = [f"%part.{n}" for n in range(count - 1)]
    for old, new in zip(["%stack", *links], [*links, "%written"], strict=True):
        lines.insert(k, f"  {new} = f32[8,1024]{{1,0}} dynamic-update-slice({old}, %row, %n, %zero)\n")
        k += 1
    del lines[k]
    assert find_peak(stacked("".join(lines))).bytes == pytest.approx((8 + 1 + 2) * K, abs=64)


def test_memory_between_old_and_new_carry_is_free():
    """A carry that dies early in the body and is made again late leaves room between."""
    fill = FILL.replace("custom-call(%old)", "custom-call(%small)").replace(
        "  %old = $ copy(%v)\n",
        '  %small = f32[] custom-call(%v), custom_call_target="f"\n'
        '  %wide = $ custom-call(%small), custom_call_target="f"\n'
        '  %seen = f32[] custom-call(%wide), custom_call_target="f"\n',
    )
    assert find_peak(stacked(fill)).bytes == pytest.approx((8 + 1 + 1) * K, abs=64)


def test_nested_loops_add_to_what_is_alive_outside():
    state = "(s32[], $)"
    inner = """
%inner (p: (s32[], $)) -> (s32[], $) {
  %p = (s32[], $) parameter(0)
  %m = s32[] get-tuple-element(%p), index=0
  %w = $ get-tuple-element(%p), index=1
  %scratch = f32[4,1024]{1,0} custom-call(%w), custom_call_target="f"
  %w.2 = $ custom-call(%scratch), custom_call_target="f"
  ROOT %o = (s32[], $) tuple(%m, %w.2)
}"""
    fill = """
  %n = s32[] get-tuple-element(%b), index=0
  %v = $ get-tuple-element(%b), index=1
  %across = f32[2,1024]{1,0} custom-call(%v), custom_call_target="f"
  %into = (s32[], $) tuple(%n, %v)
  %run = (s32[], $) while(%into), condition=%condition, body=%inner
  %res = $ get-tuple-element(%run), index=1
  %new = $ custom-call(%res, %across), custom_call_target="f"
  ROOT %out = (s32[], $) tuple(%n, %new)
"""
    entry = """
  %x = $ parameter(0)
  %i = s32[] constant(0)
  %start = $ copy(%x)
  %init = (s32[], $) tuple(%i, %start)
WHILE  ROOT %y = $ get-tuple-element(%while), index=1
"""
    condition, body, call = loop("%init", fill, state)
    found = find_peak(module(entry.replace("WHILE", call), condition, inner, body))
    assert found.bytes == pytest.approx((1 + 2 + 1 + 4) * K, abs=64)  # parameter, across, carry, scratch
    assert found.at in ("scratch", "w.2")


def test_of_branches_the_largest_counts():
    def branch(name, rows):
        return f"""
%{name} (p.{name}: $) -> $ {{
  %p.{name} = $ parameter(0)
  %t.{name} = f32[{rows},1024]{{1,0}} custom-call(%p.{name}), custom_call_target="f"
  ROOT %r.{name} = $ custom-call(%t.{name}), custom_call_target="f"
}}"""

    entry = """
  %x = $ parameter(0)
  %which = pred[] parameter(1)
  %a = $ custom-call(%x), custom_call_target="f"
  ROOT %y = $ conditional(%which, %a, %a), true_computation=%one, false_computation=%two
"""
    found = find_peak(module(entry, branch("one", 6), branch("two", 3)))
    assert found.bytes == pytest.approx((1 + 1 + 6 + 1) * K, abs=64)
    assert "t.one" in names(found)
    assert "t.two" not in names(found)


# ------------------------------------------------------------------------------------------------ asynchronous


GATHER = """
  %x = $ parameter(0)
  %a = $ custom-call(%x), custom_call_target="f"
  %start = ($, f32[8,1024]{1,0}) all-gather-start(%a), replica_groups={}, dimensions={0}
  %other = f32[2,1024]{1,0} custom-call(%x), custom_call_target="f"
  %done = f32[8,1024]{1,0} all-gather-done(%start)
  ROOT %y = f32[] custom-call(%done, %other), custom_call_target="f"
"""


def test_a_gather_under_way_holds_operand_and_result_once():
    found = find_peak(module(GATHER))
    assert found.bytes == (1 + 1 + 8 + 2) * K
    assert names(found) == ["a", "other", "start", "x"]


def test_a_wrapped_collective():
    wrapped = """
%wrapped (p: $) -> f32[8,1024] {
  %p = $ parameter(0)
  ROOT %g = f32[8,1024]{1,0} all-gather(%p), replica_groups={}, dimensions={0}
}"""
    text = GATHER.replace("($, f32[8,1024]{1,0}) all-gather-start(%a), replica_groups={}, dimensions={0}", "WRAPPED")
    text = text.replace("WRAPPED", "(($), f32[8,1024]{1,0}, u32[]) async-start(%a), calls=%wrapped")
    text = text.replace("all-gather-done(%start)", "async-done(%start), calls=%wrapped")
    found = find_peak(module(text, wrapped))
    assert found.bytes == pytest.approx((1 + 1 + 8 + 2) * K, abs=64)
    assert names(found) == ["a", "g", "other", "x"]


def test_other_memories_do_not_count_and_tiles_pad():
    entry = """
  %x = f32[1024,8]{1,0:T(8,128)} parameter(0)
  %h = f32[1024,8]{1,0:T(8,128)S(5)} custom-call(%x), custom_call_target="f"
  %s = f32[1024,8]{1,0:T(8,128)S(1)} custom-call(%h), custom_call_target="f"
  ROOT %y = f32[] custom-call(%s), custom_call_target="f"
"""
    found = find_peak(module(entry))
    assert found.bytes == 1024 * 128 * 4 + 4
    assert found.host_bytes == 1024 * 128 * 4


# ------------------------------------------------------------------------------------------------ kinds


def test_residuals_are_made_forward_and_read_backward():
    assert large(find_peak(stacked())).kind == "residual"
    unread = STACK.replace("transpose(jvp())/read", "jvp()/read").replace("  %i =", BACKWARD + "  %i =")
    assert large(find_peak(stacked(entry=unread))).kind == "transient"
    backward = FILL.replace("jvp()", "transpose(jvp())")
    zeros = STACK.replace("jit(f)/jvp()/broadcast", "jit(f)/transpose(jvp())/broadcast")
    assert large(find_peak(stacked(backward, zeros))).kind == "transient"


BACKWARD = '  %back = f32[] custom-call(%x), custom_call_target="f", metadata={op_name="transpose(jvp())/mul"}\n'


def test_without_backward_residuals_are_what_crosses_the_outermost_loop():
    def nameless(text):
        return text.replace("transpose(jvp())", "").replace("jvp()", "")

    crossing = '  %i = s32[] constant(0)\n  %cross = f32[2,1024]{1,0} custom-call(%x), custom_call_target="f"\n'
    entry = (
        nameless(STACK).replace("  %i = s32[] constant(0)\n", crossing).replace("call(%kept)", "call(%kept, %cross)")
    )
    kinds = {buffer.name: buffer.kind for buffer in find_peak(stacked(nameless(FILL), entry)).buffers}
    assert (kinds["x"], kinds["cross"], kinds["written"]) == ("state", "residual", "residual")
    entry = entry.replace("call(%kept, %cross)", "call(%cross)")
    assert {b.name: b.kind for b in find_peak(stacked(nameless(FILL), entry)).buffers}["cross"] == "residual"


def test_by_kind_adds_up():
    found = find_peak(stacked())
    assert sum(found.by_kind.values()) == found.bytes == sum(buffer.bytes for buffer in found.buffers)
    assert [b.bytes for b in found.buffers] == sorted((b.bytes for b in found.buffers), reverse=True)


# ------------------------------------------------------------------------------------------------ a compiler's word


@pytest.mark.parametrize("donate", [(), (0,)])
def test_against_the_compiler(donate):
    def layer(x, w):
        return jnp.tanh(x @ w), None

    def loss(ws, x):
        return (lax.scan(jax.checkpoint(layer), x, ws)[0] ** 2).sum()

    def step(ws, x):
        return ws - 0.1 * jax.grad(loss)(ws, x)

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((8, 256, 256), (1024, 256))]
    compiled = jax.jit(step, donate_argnums=donate).lower(*shapes).compile()
    found = find_peak(inspect.parse(compiled.as_text()))
    assert found.bytes == pytest.approx(inspect.compiled_memory(compiled).peak_bytes, rel=0.05)
    assert found.buffers[0].shape == (8, 1024, 256)  # one input of each layer
    assert found.buffers[0].kind == "residual"
    assert found.by_kind["state"] == 4 * (8 * 256 * 256 + 1024 * 256)


def test_sends_and_receives_in_flight_between_iterations():
    """A buffer for what arrives, one for what is sent, and the argument; the loop holds both beside a token."""
    flight = "($, u32[], token[])"
    state = f"(s32[], {flight}, {flight})"
    body = f"""
  %n = s32[] get-tuple-element(%b), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%n, %one)
  %r = {flight} get-tuple-element(%b), index=1
  %s = {flight} get-tuple-element(%b), index=2
  %recv-done = ($, token[]) recv-done(%r)
  %send-done = token[] send-done(%s)
  %got = $ get-tuple-element(%recv-done), index=0
  %y = $ custom-call(%got), custom_call_target="f"
  %token = token[] after-all()
  %recv = {flight} recv(%token)
  %send = {flight} send(%y, %token)
  ROOT %out = {state} tuple(%next, %recv, %send)
"""
    condition, text, call = loop("%init", body, state)
    entry = f"""
  %x = $ parameter(0)
  %zero = s32[] constant(0)
  %token.0 = token[] after-all()
  %copy = $ copy(%x)
  %recv.0 = {flight} recv(%token.0)
  %send.0 = {flight} send(%copy, %token.0)
  %init = {state} tuple(%zero, %recv.0, %send.0)
{call}
  %r.1 = {flight} get-tuple-element(%while), index=1
  %recv-done.1 = ($, token[]) recv-done(%r.1)
  ROOT %result = $ get-tuple-element(%recv-done.1), index=0
"""
    found = find_peak(module(entry, condition, text))
    assert names(found) == ["recv.0", "x", "y"]
    assert 3 * K <= found.bytes < 3 * K + 64
