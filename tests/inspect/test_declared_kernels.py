"""Kernels that declare their matrix products: what the timeline makes of it, with known answers."""

import dataclasses

import pytest

from tests.builders.hlo import UNIT, kernel, lines, loop, module_of, simulated
from tsp_jax.errors import ConfigError
from tsp_jax.hardware.rates import Attention, Band, Direction, Source
from tsp_jax.hardware.targets import HARDWARE, parse_target
from tsp_jax.inspect import report
from tsp_jax.inspect.scopes import declared_flops


def row(kernel: str, direction: Direction, head_dim: int, rate: float) -> Attention:
    band, source = Band(0.5 * rate, rate, 2 * rate), Source("assumed", "a test")
    return Attention(kernel=kernel, direction=direction, head_dim=head_dim, flops_per_s=band, source=source)


ROWS = (
    row("triton", "forward", 128, 0.5),
    row("triton", "backward", 128, 0.25),
    row("cudnn", "forward", 128, 0.8),
    row("cudnn", "forward", 64, 0.4),
)
HALF = dataclasses.replace(UNIT, rates=dataclasses.replace(UNIT.rates, attention=ROWS, default_kernel="triton"))
SCOPE = "jit(f)/tsp/attention/mean_flops[attention_forward=600]/pallas_call"


def fused(name: str, scope: str = SCOPE, extra: str = "") -> str:
    """A kernel that moves 48 bytes."""
    call = f'{name} = f32[4] custom-call(f32[8] %p.{name}), custom_call_target="__gpu$xla.gpu.triton"{extra}'
    return f'%{call}, metadata={{op_name="{scope}"}}'


def test_a_kernel_takes_what_its_products_take_at_its_share_of_the_rate():
    result = simulated(lines(fused("a"), kernel("k", 80)), hardware=HALF)
    assert (result.step_s, result.flops, result.matmul_s) == (600 / 0.5 + 80, 600, 600)
    assert result.matmul_ratio == pytest.approx(1280 / 600)


@pytest.mark.parametrize(
    ("scope", "flops", "seconds"),
    [
        ("mean_flops[attention_forward=600]/pallas_call", 600, 1200),
        ("jit(f)/transpose(mean_flops[attention_backward=6e2])/pallas_call", 600, 2400),
        ("jit(f)/mean_flops[attention_forward=10]/pallas_call", 10, 48),  # its bytes take longer
        ("jit(f)/mean_flops[something_else=600]/pallas_call", 600, 600),
        ("jit(f)/mean_flops[attention_forward.triton.h128=600]/pallas_call", 600, 1200),
        ("jit(f)/mean_flops[attention_backward.triton.h64=600]/pallas_call", 600, 2400),  # the nearest heads
        ("jit(f)/mean_flops[attention_forward.cudnn.h128=600]/pallas_call", 600, 750),
        ("jit(f)/mean_flops[attention_forward.cudnn.h64=600]/pallas_call", 600, 1500),
        ("jit(f)/mean_flops[attention_forward.tpu.h128=600]/pallas_call", 600, 1200),  # the device's default kernel
        ("jit(f)/mean_flops[attention_forward=600]/tsp/pallas_call", 0, 48),
        ("jit(f)/not_mean_flops[attention_forward=600]/pallas_call", 0, 48),
        ("jit(f)/pallas_call", 0, 48),
    ],
)
def test_only_the_scope_directly_around_a_kernel_declares(scope, flops, seconds):
    result = simulated(lines(fused("a", scope)), hardware=HALF)
    assert (result.flops, result.step_s) == (flops, seconds)


def test_other_instructions_under_the_scope_declare_nothing():
    result = simulated(lines(kernel("k", 80, f', metadata={{op_name="{SCOPE}"}}')), hardware=HALF)
    assert (result.flops, result.step_s) == (0, 80)


def test_declared_kernels_count_in_loops():
    """And in a loop that declares its own trips, inside of one."""
    inner, inner_bodies = loop("i", lines(fused("a")), None, op_name="jit(f)/mean_trips[2.5]/while")
    outer, bodies = loop("o", lines(inner, fused("b", SCOPE.replace("600", "100"))), 4, inner=inner_bodies)
    result = simulated(lines(outer), bodies, hardware=HALF)
    assert result.flops == 4 * (2.5 * 600 + 100)
    assert result.step_s == 4 * (2.5 * 1200 + 200)


def test_declared_kernels_count_in_fusions():
    """As where XLA writes a kernel's result into a slice of an array."""
    body = (
        f"%body (p: f32[8]) -> f32[4] {{\n  %p = f32[8] parameter(0)\n  ROOT {fused('a').replace('%p.a', '%p')}\n}}\n"
    )
    result = simulated(lines("%f = f32[4] fusion(f32[8] %p.f), kind=kCustom, calls=%body"), body, hardware=HALF)
    assert (result.flops, result.step_s) == (600, 1200)
    assert "attention_forward: 2.5e-13 to 1e-12" in " ".join(result.assumptions)


def test_rates_and_their_source_are_among_the_assumptions():
    scopes = [SCOPE, SCOPE.replace("forward", "forward.cudnn.h256")]
    text = "\n".join(simulated(lines(*map(fused, "ab", scopes)), hardware=HALF).assumptions)
    assert (
        "attention_forward: 2.5e-13 to 1e-12 (5e-13) TFLOP/s, of kernel triton and of heads of 128; assumed: a test"
        in text
    )
    assert "attention_forward.cudnn.h256: 4e-13 to 1.6e-12 (8e-13) TFLOP/s, of heads of 128; assumed" in text
    assert "traffic alone" not in text
    assert "a test" not in " ".join(simulated(lines(kernel("k", 8))).assumptions)


@pytest.mark.parametrize("number", ["6.0.0", "1e400", "-5", "0", "nan", ""])
def test_a_declaration_that_is_no_positive_number_is_named(number):
    scope = SCOPE.replace("600", number)
    (i,) = (i for i in module_of(lines(fused("a", scope))).entry.instructions if i.name == "a")
    with pytest.raises(ConfigError, match=rf"a: scope mean_flops\[attention_forward={number}\] is no number above 0"):
        declared_flops(i)


def test_the_share_can_be_given():
    hardware = parse_target("mi300x:8", attention_efficiency=0.9).hardware
    assert parse_target("mi300x:8").hardware == HARDWARE["mi300x"]
    entry = lines(fused("a", SCOPE.replace("600", "6e12")))
    text = f"HloModule test, is_scheduled=true\n\nENTRY %main () -> f32[] {{\n{entry}\n}}\n"
    timelines = [report(text, target=target).timeline for target in (hardware, "mi300x")]
    assert timelines[0] and timelines[1]
    assert timelines[0].step_s == pytest.approx(6e12 / (0.9 * hardware.rates.best_flops.typical))
    assert timelines[1].step_s > timelines[0].step_s


@pytest.mark.parametrize("share", [-0.5, 1.5])
def test_a_share_beyond_the_rate_is_refused(share):
    with pytest.raises(ConfigError, match=rf"attention_efficiency={share} must be above 0 and at most 1; use 0.6"):
        parse_target("mi300x:8", attention_efficiency=share)
