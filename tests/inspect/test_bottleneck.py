"""What would shorten a step: programs whose gain is known, every kind of change, and simulations without a change."""

import dataclasses
import gzip
from pathlib import Path

import pytest

from tests.builders.hlo import GROUPS, UNIT, at_rates, gather, kernel, lines, loop, module_of, overlapped, simulated
from tsp_jax.hardware.devices import HARDWARE, Hardware
from tsp_jax.hardware.rates import Attention, Band, Collective, Contention, Product, Source, exactly
from tsp_jax.inspect import parse, report, simulate
from tsp_jax.inspect.bottleneck import Bottleneck, Bottlenecks, find_bottlenecks
from tsp_jax.inspect.prices import Change
from tsp_jax.inspect.timeline import step_seconds

TEST = Source("assumed", "a test")
DATA = Path(__file__).parents[1] / "data"
PRODUCT = "lhs_contracting_dims={1}, rhs_contracting_dims={0}"


def with_rates(hardware: Hardware = UNIT, **rates) -> Hardware:
    return dataclasses.replace(hardware, rates=dataclasses.replace(hardware.rates, **rates))


def named(op_name: str) -> str:
    return f', metadata={{op_name="jit(f)/{op_name}"}}'


def found(entry: str, *computations: str, hardware: Hardware = UNIT) -> Bottlenecks:
    return find_bottlenecks(simulated(entry, *computations, hardware=hardware))


def gain(result: Bottlenecks, kind: str) -> Bottleneck:
    (one,) = [each for each in result.found if each.kind == kind]
    return one


@pytest.mark.parametrize(("moved", "shorter"), [(56, 56), (112, 80)])
def test_an_exposed_gather_can_hide_behind_what_computes(moved, shorter):
    """Hidden, it takes its links all the same: the step is no shorter than they are busy."""
    start, done = gather("g", moved)
    result = found(lines(start + named("tsp/mlp/all_gather"), done, kernel("k", 80)))
    each = gain(result, "communication")
    assert (each.gain_s, each.step_s) == (exactly(shorter), moved + 80 - shorter)
    assert each.mostly == "tsp/mlp (all-gather g), 100%"


def test_hidden_work_may_pile_up_over_the_iterations_of_a_loop():
    start, done = gather("g", 56)
    instruction, bodies = loop("w", lines(start, done, kernel("k", 40)), 10)
    each = gain(found(lines(instruction), bodies), "communication")
    assert each.step_s == pytest.approx(560)


def test_larger_collectives_share_a_fixed_cost():
    slow = Collective(fixed_s=exactly(40.0), bytes_per_s=exactly(1.0), source=TEST)
    start, done = gather("g", 56)
    result = found(lines(start, done, kernel("k", 8)), hardware=with_rates(collectives=(("all-gather", slow),)))
    assert gain(result, "fixed cost").gain_s == exactly(30.0)  # three of four


def test_padding_of_products_is_seen():
    product = lines(f"%d = f32[100,128] dot(f32[100,64] %p.a, f32[64,128] %p.b), {PRODUCT}")
    result = found(product, hardware=with_rates(at_rates(memory=1e9), tile=64))
    each = gain(result, "products")
    assert each.gain_s.typical == pytest.approx(2 * 28 * 64 * 128)
    assert each.step_s == pytest.approx(2 * 100 * 64 * 128)


def test_small_products_are_compared_with_the_fastest_shape():
    row = Product(m=1024, n=1024, k=1024, flops_per_s=exactly(4.0), source=TEST)
    small = dataclasses.replace(row, m=8, n=8, k=8, flops_per_s=Band(0.5, 1.0, 2.0))
    product = lines(f"%d = f32[8,8] dot(f32[8,8] %p.a, f32[8,8] %p.b), {PRODUCT}")
    each = gain(found(product, hardware=with_rates(at_rates(memory=1e9), products=(row, small))), "products")
    assert each.gain_s == Band(1024 * 0.25, 1024 * 0.75, 1024 * 1.75)


def test_attention_is_compared_with_the_fastest_kernel():
    rows = [
        Attention(kernel=kernel, direction="forward", head_dim=64, flops_per_s=exactly(rate), source=TEST)
        for kernel, rate in (("triton", 2.0), ("cudnn", 8.0), ("xla", 1.0))
    ]
    scope = named("mean_flops[attention_forward.triton.h64=1600]/pallas_call")
    call = f'%c = f32[2] custom-call(f32[2] %p.c), custom_call_target="a"{scope}'
    each = gain(found(lines(call), hardware=with_rates(at_rates(memory=1e9), attention=tuple(rows))), "attention")
    assert (each.gain_s, each.what.partition(",")[0]) == (exactly(600.0), "attention at the rate of cudnn")


def test_elementwise_work_counts_by_part():
    entry = lines(
        kernel("a", 16, named("jvp()/tsp/mlp/up/mul")),
        kernel("b", 24, named("transpose(jvp())/tsp/mlp/mul")),
        kernel("c", 16, named("optimizer/add")),
    )
    result = found(entry)
    assert [(each.part, each.gain_s.typical) for each in result.found] == [("tsp/mlp", 40), ("optimizer", 16)]
    assert result.together_s == 0


@pytest.mark.parametrize("scope", ["checkpoint/rematted_computation", "while/body/jvp()"])
def test_recomputation_is_told_from_the_rest_of_backward(scope):
    entry = lines(
        kernel("a", 16, named(f"transpose(jvp())/{scope}/tsp/mlp/mul")),
        kernel("b", 80, named("transpose(jvp())/while/body/transpose(jvp())/tsp/mlp/mul")),
        kernel("c", 80, named("transpose(jvp())/tsp/mlp/jvp(jit(silu))/mul")),
    )
    assert gain(found(entry), "recomputation").gain_s.typical == 16


def test_copies_to_the_host_can_be_awaited_later():
    start = "%c = (f32[6]{0:S(5)}, f32[6], u32[]) copy-start(f32[6] %x.c)"
    entry = lines(start, kernel("k", 8), "%d = f32[6]{0:S(5)} copy-done(%c)", kernel("l", 40))
    assert gain(found(entry), "host").gain_s.typical == 16


def test_contention_counts_what_both_lose():
    hardware = with_rates(contention=Contention(compute=exactly(0.5), links=exactly(0.0), source=TEST))
    each = gain(found(overlapped(56, 80), hardware=hardware), "contention")
    assert (each.gain_s.typical, each.step_s, each.mostly) == (28, 80, "")


def test_a_step_of_fast_products_says_that_nothing_helps():
    product = f"%d = f32[8,8] dot(f32[8,8] %p.a, f32[8,8] %p.b), {PRODUCT}"
    result = found(lines(product), hardware=at_rates(memory=1e9))
    assert result.found == () and result.together_s == 1024
    assert "no change simulated here" in result.verdict and "fastest take 100% of the step" in result.verdict


def test_gains_below_half_a_percent_are_left_out():
    product = f"%d = f32[100,100] dot(f32[100,100] %p.a, f32[100,100] %p.b), {PRODUCT}"
    reduce = f"%r = f32[4] all-reduce(f32[4] %x.r), {GROUPS}, to_apply=%add"
    assert found(lines(product, reduce), hardware=at_rates(memory=1e9)).found == ()
    assert found(lines(reduce), hardware=at_rates(memory=1e9)).found == ()  # nothing to hide behind


@pytest.mark.parametrize(("name", "target"), [("H10", "h100"), ("T3", "v5p")])
def test_a_change_of_nothing_changes_nothing(name, target):
    """Of real programs, in every scenario, whatever was simulated before."""
    module = parse(gzip.decompress((DATA / f"{name}.hlo.gz").read_bytes()).decode())
    timeline = simulate(module, HARDWARE[target])
    before = find_bottlenecks(timeline)
    steps = {name: step_seconds(each.changed(Change())) for name, each in timeline.prices.items()}
    assert steps == {name: times.step_s for name, times in timeline.scenarios.items()}
    assert find_bottlenecks(timeline) == before
    assert all(0 < each.step_s < timeline.step_s for each in before.found) and len(before.found) == 3
    assert before.together_s < min(each.step_s for each in before.found)


def test_reports_hold_them_with_a_remedy():
    start, done = gather("g", 56)
    text = module_text(lines(start, done, kernel("k", 80)))
    plain = report(text, target=UNIT)
    own = dataclasses.replace(plain, remedy=lambda found: f"--{found.kind}").to_json()["bottlenecks"]["found"]
    assert [(each["kind"], each["remedy"], each["gain_s"]["low"]) for each in own] == [
        ("memory", "--memory", 80),
        ("communication", "--communication", 56),
    ]
    assert plain.bottlenecks and "prefetch" in plain.bottlenecks.found[1].remedy
    assert report(text).bottlenecks is None and report(text).to_json()["bottlenecks"] is None


def module_text(entry: str) -> str:
    assert module_of(entry)
    return f"HloModule test, is_scheduled=true, num_partitions=8\n\nENTRY %main () -> () {{\n{entry}\n}}\n"
