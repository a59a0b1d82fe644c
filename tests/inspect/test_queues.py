"""Simulated time of small programs whose answer is known."""

import pytest

from tests.builders.hlo import (
    GROUPS,
    SYNC,
    TPU_UNIT,
    UNIT,
    at_rates,
    cost,
    gather,
    kernel,
    lines,
    loop,
    overlapped,
    simulated,
)


@pytest.mark.parametrize("spelling", ["all-reduce", "all-reduce-start"])
def test_what_blocks_is_wholly_exposed(spelling):
    reduce = f"%r = f32[4] {spelling}(f32[4] %x.r), {GROUPS}, to_apply=%add, {SYNC}"
    done = ["%r.done = f32[4] all-reduce-done(%r)"] if spelling.endswith("start") else []
    result = simulated(lines(kernel("a", 80), reduce, kernel("b", 40), *done))
    assert (result.step_s, result.compute_s) == (148, 120)
    assert result.exposed_comm_s == result.comm_s == 28  # 16 bytes, 2 x 7 / 8
    assert result.hidden_fraction == {"r": 0.0}


@pytest.mark.parametrize(
    ("moved", "computed", "step", "exposed", "hidden"),
    [(56, 80, 80, 0, 1.0), (56, 56, 56, 0, 1.0), (56, 16, 56, 40, 16 / 56), (56, 0, 56, 56, 0.0)],
)
def test_what_computes_meanwhile_hides_communication(moved, computed, step, exposed, hidden):
    result = simulated(overlapped(moved, computed))
    assert (result.step_s, result.compute_s, result.comm_s) == (step, computed, moved)
    assert result.exposed_comm_s == exposed
    assert result.hidden_fraction == {"g": pytest.approx(hidden)}


def test_the_second_collective_waits_for_the_first():
    (a, a_done), (b, b_done) = gather("a", 28), gather("b", 56)
    result = simulated(lines(a, b, kernel("k", 16), a_done, kernel("l", 40), b_done))
    # a ends at 28, compute waits 12; l until 68, b from 28 to 84, compute waits 16
    assert (result.step_s, result.exposed_comm_s) == (84, 28)
    assert result.hidden_fraction == {"a": pytest.approx(16 / 28), "b": pytest.approx(40 / 56)}


def test_waiting_for_the_second_alone_includes_the_first():
    (a, a_done), (b, b_done) = gather("a", 28), gather("b", 56)
    result = simulated(lines(a, b, b_done, a_done))
    assert (result.step_s, result.exposed_comm_s) == (84, 84)
    assert result.hidden_fraction == {"a": 1.0, "b": 0.0}


def test_links_idle_until_something_is_issued():
    (a, a_done), (b, b_done) = gather("a", 28), gather("b", 28)
    assert simulated(lines(a, kernel("k", 80), a_done, b, b_done)).step_s == 108


def test_what_blocks_waits_for_what_was_started_before():
    a, a_done = gather("a", 56)
    result = simulated(lines(a, f"%r = f32[4] all-reduce(f32[4] %x.r), {GROUPS}, to_apply=%add", a_done))
    assert (result.step_s, result.exposed_comm_s) == (84, 84)


def test_a_program_ends_when_all_that_it_started_has():
    start, _ = gather("a", 56)
    assert simulated(lines(start, kernel("k", 16))).step_s == 56


def test_compute_takes_the_longer_of_products_and_memory():
    def product(k):
        left, right = f"f32[2,{k}] %p.a", f"f32[{k},2] %p.b"
        return lines(f"%d = f32[2,2] dot({left}, {right}), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}")

    fast = at_rates(memory=1000.0)
    assert simulated(product(50), hardware=UNIT).step_s == 4 * (100 + 100 + 4)
    result = simulated(product(50), hardware=fast)
    assert result.step_s == result.matmul_s == result.flops == 2 * 4 * 50


def test_generic_async_collectives_run_on_the_links():
    wrapped = f"""%wrapped (q: f32[2]) -> f32[16] {{
  %q = f32[2] parameter(0)
  ROOT %inner = f32[16] all-gather(%q), {GROUPS}, dimensions={{0}}
}}
"""
    start = "%s = ((f32[2]), f32[16], u32[]) async-start(f32[2] %x.s), calls=%wrapped"
    update = "%u = ((f32[2]), f32[16], u32[]) async-update(%s), calls=%wrapped"
    done = "%d = f32[16] async-done(%u), calls=%wrapped"
    result = simulated(lines(start, kernel("k", 40), update, done, kernel("l", 8)), wrapped)
    assert (result.step_s, result.comm_s, result.exposed_comm_s) == (64, 56, 16)
    assert result.hidden_fraction == {"inner": pytest.approx(40 / 56)}


def test_generic_async_compute_takes_its_turn():
    wrapped = "%wrapped (q: f32[2]) -> f32[2] {\n  %q = f32[2] parameter(0)\n  ROOT %inner = f32[2] copy(%q)\n}\n"
    start = "%s = ((f32[2]), f32[2], u32[]) async-start(f32[2] %x.s), calls=%wrapped"
    result = simulated(lines(start, kernel("k", 40), "%d = f32[2] async-done(%s), calls=%wrapped"), wrapped)
    assert (result.step_s, result.compute_s) == (56, 56)


@pytest.mark.parametrize(("computed", "exposed"), [(16, 8), (80, 0)])
def test_host_copies_have_a_queue_of_their_own(computed, exposed):
    start = "%c = (f32[6]{0:S(5)}, f32[6], u32[]) copy-start(f32[6] %x.c)"
    g, g_done = gather("g", 28)
    result = simulated(lines(start, g, kernel("k", computed), "%d = f32[6]{0:S(5)} copy-done(%c)", g_done))
    assert (result.host_s, result.exposed_host_s, result.exposed_comm_s) == (
        24,
        exposed,
        max(0, 28 - computed - exposed),
    )
    assert result.step_s == max(28, computed)


SLOTS = "f32[10,6]{1,0:S(5)}"
PUT_AND_TAKE = f"""%put (a: f32[10,6], b: f32[1,6], c: s32[]) -> f32[10,6] {{
  %a = {SLOTS} parameter(0)
  %b = f32[1,6] parameter(1)
  %c = s32[] parameter(2)
  ROOT %u = {SLOTS} dynamic-update-slice(%a, %b, %c, %c)
}}

%take (d: f32[10,6], e: s32[]) -> f32[1,6] {{
  %d = {SLOTS} parameter(0)
  %e = s32[] parameter(1)
  ROOT %s = f32[1,6] dynamic-slice(%d, %e, %e), dynamic_slice_sizes={{1,6}}
}}
"""


def test_kernels_of_one_name_in_several_computations_are_told_apart():
    """XLA gives each instruction of a module a name of its own; texts written by hand may not."""
    (a, bodies_a), (b, bodies_b) = loop("v", lines(kernel("k", 16)), 2), loop("w", lines(kernel("k", 80)), 3)
    result = simulated(lines(a, b), bodies_a, bodies_b)
    assert result.step_s == result.compute_s == 2 * 16 + 3 * 80
    assert [(t.task.name, t.seconds) for t in result.kernels] == [("k of w.body", 240), ("k", 32)]


def test_of_slots_in_the_host_a_started_fusion_copies_one():
    """As XLA offloads what a scan keeps: six numbers there and six back, 4 bytes each."""
    put = f"%f = (({SLOTS}, f32[1,6], s32[]), {SLOTS}, u32[]) fusion-start({SLOTS} %x.a, f32[1,6] %x.b, s32[] %x.c)"
    take = f"%g = (({SLOTS}, s32[]), f32[1,6], u32[]) fusion-start(%f-done, s32[] %x.c)"
    put, take = f"{put}, kind=kLoop, calls=%put", f"{take}, kind=kLoop, calls=%take"
    entry = lines(
        put,
        kernel("k", 16),
        f"%f-done = {SLOTS} fusion-done(%f)",
        take,
        kernel("m", 40),
        "%g-done = f32[1,6] fusion-done(%g)",
    )
    result = simulated(entry, PUT_AND_TAKE)
    assert (result.host_s, result.exposed_host_s, result.compute_s) == (48, 8, 56)


def test_copies_to_the_host_that_are_not_started_block():
    result = simulated(lines("%c = f32[6]{0:S(5)} copy(f32[6] %p.c)", kernel("k", 16)))
    assert (result.step_s, result.compute_s, result.exposed_host_s) == (64, 40, 24)


CHAINED = f'{GROUPS}, dimensions={{0}}, frontend_attributes={{chain_id="5"}}'
FUSIONS = f"""%start (s: f32[2]) -> (f32[2], f32[16]) {{
  %s = f32[2] parameter(0)
  %all-gather.1 = f32[16] all-gather(%s), {CHAINED}
  ROOT %cs = (f32[2], f32[16], u32[]{{:S(2)}}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}}

%step (q: f32[2], r: f32[16], a: f32[2,8], b: f32[8,2]) -> (f32[2,2], f32[2], f32[16]) {{
  %q = f32[2] parameter(0)
  %r = f32[16] parameter(1)
  %a = f32[2,8] parameter(2)
  %b = f32[8,2] parameter(3)
  %conv = f32[2,2] convolution(%a, %b), dim_labels=bf_io->bf
  %all-gather.2 = f32[16] all-gather(%q), {CHAINED}
  ROOT %t = (f32[2,2], f32[2], f32[16]) tuple(%conv, %q, %all-gather.2)
}}

%finish (f: f32[2]) -> f32[16] {{
  %f = f32[2] parameter(0)
  %all-gather.3 = f32[16] all-gather(%f), {CHAINED}
  ROOT %cd = f32[16] custom-call(%f, %all-gather.3), custom_call_target="AsyncCollectiveDone"
}}
"""


CHAIN = (
    "%f.1 = (f32[2], f32[16], u32[]{:S(2)}) fusion(f32[2] %x.s), kind=kCustom, calls=%start",
    "%f.2 = (f32[2,2], f32[2], f32[16]) fusion(f32[2] %x.q, f32[16] %x.r, f32[2,8] %x.a, f32[8,2] %x.b), "
    "kind=kOutput, calls=%step",
    "%f.3 = f32[16] fusion(f32[2] %x.f), kind=kCustom, calls=%finish",
)


def test_tpu_spreads_a_gather_over_fusions():
    fast = at_rates(TPU_UNIT, memory=1e9)
    result = simulated(lines(*CHAIN), FUSIONS, hardware=fast)
    assert result.flops == 2 * 4 * 8
    assert (result.comm_s, result.exposed_comm_s) == (56, 0)
    assert result.step_s == 64
    slow = at_rates(TPU_UNIT, memory=1e9, flops=2.0)
    after = "%d = f32[1,1] dot(f32[1,8] %p.a, f32[8,1] %p.b), lhs_contracting_dims={1}, rhs_contracting_dims={0}"
    result = simulated(lines(*CHAIN, after), FUSIONS, hardware=slow)
    assert (result.step_s, result.exposed_comm_s) == (56 + 8, 24)
    assert set(result.hidden_fraction) == {"all-gather.1"}


@pytest.mark.parametrize(("fusion", "size"), [*zip(CHAIN, [0, 4 * (16 + 16 + 4), 0], strict=True)])
def test_what_fusions_of_a_gather_hand_on_is_no_traffic_of_memory(fusion, size):
    assert cost(fusion, FUSIONS)[1] == size


def test_a_fused_collective_without_a_chain_blocks():
    fused = f"""%scatter (i: f32[32]) -> f32[4] {{
  %i = f32[32] parameter(0)
  %all-reduce.1 = f32[32] all-reduce(%i), {GROUPS}, to_apply=%add
  %n = s32[] constant(0)
  ROOT %keep = f32[4] dynamic-slice(%all-reduce.1, %n), dynamic_slice_sizes={{4}}
}}
"""
    result = simulated(lines("%f = f32[4] fusion(f32[32] %x.f), kind=kCustom, calls=%scatter"), fused)
    assert result.comm_s == result.exposed_comm_s == 128 * 7 / 8
    assert [t.task.op for t in result.collectives] == ["reduce-scatter"]
