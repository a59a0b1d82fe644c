"""Cost of instructions: operations of matrix products, bytes of memory traffic."""

import pytest

from tests.builders.hlo import cost
from tsp_jax.inspect.flops import _hits


@pytest.mark.parametrize(
    ("instruction", "flops", "size"),
    [
        (
            "%d = f32[2,3] dot(bf16[2,5] %p.a, bf16[5,3] %p.b), lhs_contracting_dims={1}, rhs_contracting_dims={0}",
            2 * 2 * 3 * 5,
            2 * (10 + 15) + 4 * 6,
        ),
        (
            "%d = bf16[7,2,3] dot(bf16[7,2,5] %p.a, bf16[7,3,5] %p.b), lhs_batch_dims={0}, lhs_contracting_dims={2}, "
            "rhs_batch_dims={0}, rhs_contracting_dims={2}",
            2 * 7 * 2 * 3 * 5,
            2 * 7 * (10 + 15 + 6),
        ),
        (
            '%d = (bf16[2,3], s8[64]) custom-call(bf16[5,2] %p.a, bf16[5,3] %p.b), custom_call_target="__cublas$gemm", '
            'backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["0"],'
            '"rhs_contracting_dimensions":["0"]}}}',
            2 * 2 * 3 * 5,
            2 * (10 + 15 + 6) + 64,
        ),
        (
            "%d = (bf16[2,3], s8[64]) custom-call(bf16[2,5] %p.a, bf16[3,5] %p.b), "
            'custom_call_target="__cublas$lt$matmul", '
            'backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}',
            2 * 2 * 3 * 5,
            2 * (10 + 15 + 6) + 64,
        ),
        ('%d = f32[4] custom-call(f32[8] %p.a), custom_call_target="__gpu$xla.gpu.triton"', 0, 16 + 32),
        ('%d = f32[400] custom-call(), custom_call_target="AllocateBuffer"', 0, 0),
    ],
)
def test_products(instruction, flops, size):
    assert cost(instruction) == (flops, size)


@pytest.mark.parametrize(
    ("instruction", "flops"),
    [
        ("%c = f32[6,7] convolution(f32[6,5] %p.a, f32[5,7] %p.b), dim_labels=bf_io->bf", 2 * 6 * 7 * 5),
        ("%c = f32[6,7] convolution(f32[5,6] %p.a, f32[7,5] %p.b), dim_labels=fb_oi->bf", 2 * 6 * 7 * 5),
        (
            "%c = f32[6,4,7] convolution(f32[6,5] %p.a, f32[4,5,7] %p.b), window={size=4 pad=3_3 rhs_reversal=1}, "
            "dim_labels=bf0_0io->b0f".replace("f32[6,5]", "f32[6,5,1]"),
            2 * 6 * 4 * 7 * 5,  # [6, 5] x [5, 4 x 7]
        ),
        (
            "%c = f32[8,6,7] convolution(f32[8,6,5] %p.a, f32[8,7,5] %p.b), window={size=8 stride=7 lhs_dilate=8}, "
            "dim_labels=0bf_0oi->0bf",
            2 * 8 * 6 * 7 * 5,  # 8 products, one a batch element
        ),
        (
            "%c = f32[8,6,7] convolution(f32[8,6,5] %p.a, f32[5,7,1] %p.b), window={size=1}, dim_labels=0bf_io0->0bf",
            2 * 8 * 6 * 7 * 5,
        ),
        (
            "%c = f32[2,9,7] convolution(f32[2,9,3] %p.a, f32[3,3,7] %p.b), window={size=3 pad=1_1}, "
            "dim_labels=b0f_0io->b0f",
            2 * 2 * 7 * 3 * (3 * 9 - 2),  # the ends meet padding
        ),
    ],
)
def test_products_written_as_convolutions(instruction, flops):
    assert cost(instruction)[0] == flops


@pytest.mark.parametrize("stride", [1, 2, 3, 7])
@pytest.mark.parametrize("low", [-2, 0, 1, 3])
@pytest.mark.parametrize(("spread", "gap"), [(1, 1), (2, 1), (1, 2), (3, 2), (8, 1)])
def test_windows_meet_what_counting_finds(stride, low, spread, gap):
    size, window, out = 7, 4, 9
    counted = sum(
        0 <= (place := o * stride + k * gap - low) <= (size - 1) * spread and place % spread == 0
        for o in range(out)
        for k in range(window)
    )
    sides = {"stride": f"{stride}", "pad": f"{low}_0", "lhs_dilate": f"{spread}", "rhs_dilate": f"{gap}"}
    assert _hits(size, window, out, 0, sides) == counted


@pytest.mark.parametrize(
    ("instruction", "size"),
    [
        ("%b = f32[100] bitcast(f32[10,10] %p.a)", 0),
        ("%b = f32[10] get-tuple-element((f32[10]) %p.a), index=0", 0),
        ("%b = f32[100] copy(f32[100] %p.a)", 800),
        ("%b = f32[100] multiply(f32[100] %p.a, f32[100] %p.a)", 800),
        ("%b = f32[10] slice(f32[100] %p.a), slice={[0:10]}", 80),
        ("%b = f32[10] dynamic-slice(f32[100] %p.a, s32[] %p.i), dynamic_slice_sizes={10}", 80 + 4),
        ("%b = f32[100] dynamic-update-slice(f32[100] %p.a, f32[10] %p.u, s32[] %p.i)", 80),
        ("%b = f32[3,4] gather(f32[100,4] %p.a, s32[3,1] %p.i), slice_sizes={1,4}", 2 * 48 + 12),
        ("%b = f32[100,4] scatter(f32[100,4] %p.a, s32[3,1] %p.i, f32[3,4] %p.u), to_apply=%add", 3 * 48 + 12),
        ("%b = (f32[100]{0:S(1)}, f32[100], u32[]) copy-start(f32[100] %p.a)", 800),
        ("%b = ((f32[100]), f32[10], s32[]) slice-start(f32[100] %p.a), slice={[0:10]}", 80),
    ],
)
def test_bytes_of_plain_instructions(instruction, size):
    assert cost(instruction) == (0, size)


def fused(parameters: str, *body: str) -> str:
    """A fusion's computation from its parameters' shapes."""
    shapes = parameters.split(" ")
    text = "\n".join([f"  %p{n} = {shape} parameter({n})" for n, shape in enumerate(shapes)] + [f"  {b}" for b in body])
    return f"%fused () -> f32[] {{\n{text}\n}}\n"


SLICED = fused(
    "f32[100] s32[]",
    "%c = f64[100] convert(%p0)",
    "%s = f64[10] dynamic-slice(%c, %p1), dynamic_slice_sizes={10}",
    "ROOT %n = f64[10] negate(%s)",
)
UPDATED = fused(
    "f32[100] f32[10] s32[]",
    "%n = f32[10] negate(%p1)",
    "%v = f32[100] bitcast(%p0)",
    "ROOT %u = f32[100] dynamic-update-slice(%v, %n, %p2)",
)
ACCUMULATED = fused(
    "f32[100] f32[10] s32[]",
    "%s = f32[10] dynamic-slice(%p0, %p2), dynamic_slice_sizes={10}",
    "%n = f32[10] add(%p1, %s)",
    "%u = f32[100] dynamic-update-slice(%p0, %n, %p2)",
    "%e = f32[10] exponential(%n)",
    "ROOT %t = (f32[100], f32[10]) tuple(%u, %e)",
)
FILLED = fused(
    "f32[10] s32[]",
    "%z = f32[] constant(0)",
    "%b = f32[100] broadcast(%z), dimensions={}",
    "ROOT %u = f32[100] dynamic-update-slice(%b, %p0, %p1)",
)
TWICE = fused(
    "f32[100] s32[]",
    "%s = f32[10] dynamic-slice(%p0, %p1), dynamic_slice_sizes={10}",
    "%r = f32[] constant(0)",
    "%m = f32[] reduce(%p0, %r), dimensions={0}, to_apply=%add",
    "ROOT %t = (f32[10], f32[]) tuple(%s, %m)",
)
THROUGH = fused("f32[100] f32[10]", "%n = f32[10] negate(%p1)", "ROOT %t = (f32[100], f32[10]) tuple(%p0, %n)")
INNER = "%inner (i: f32[100]) -> f32[10] {\n  %i = f32[100] parameter(0)\n  ROOT %s = f32[10] slice(%i)\n}\n"
RETILED = (
    "%retile (i: f32[100]) -> f32[100] {\n  %i = f32[100] parameter(0)\n  ROOT %c = f32[100] copy(%i)\n}\n"
    + fused(
        "f32[100] f32[10] s32[]",
        "%v = f32[100] fusion(%p0), kind=kLoop, ALIAS, calls=%retile",
        "ROOT %u = f32[100] dynamic-update-slice(%v, %p1, %p2)",
    )
)
SAME_MEMORY = "output_to_operand_aliasing={{}: (0, {})}"
NESTED = INNER + fused("f32[100]", "ROOT %f = f32[10] fusion(%p0), calls=%inner")


@pytest.mark.parametrize(
    ("call", "body", "size"),
    [
        ("f64[10] fusion(f32[100] %p.a, s32[] %p.i)", SLICED, 80 + 40 + 4),
        ("f32[100] fusion(f32[100] %p.a, f32[10] %p.b, s32[] %p.i)", UPDATED, 40 + 40 + 4),
        ("(f32[100], f32[10]) fusion(f32[100] %p.a, f32[10] %p.b, s32[] %p.i)", ACCUMULATED, 4 * 40 + 4),
        ("f32[100] fusion(f32[10] %p.b, s32[] %p.i)", FILLED, 400 + 40 + 4),
        ("(f32[10], f32[]) fusion(f32[100] %p.a, s32[] %p.i)", TWICE, 400 + 40 + 4 + 4),
        ("(f32[100], f32[10]) fusion(f32[100] %p.a, f32[10] %p.b)", THROUGH, 80),
        ("f32[10] fusion(f32[100] %p.a)", NESTED, 80),
        (
            "f32[100] fusion(f32[100] %p.a, f32[10] %p.b, s32[] %p.i)",
            RETILED.replace("ALIAS", SAME_MEMORY),
            40 + 40 + 4,
        ),
        (
            "f32[100] fusion(f32[100] %p.a, f32[10] %p.b, s32[] %p.i)",
            RETILED.replace("ALIAS, ", ""),
            400 + 400 + 40 + 4,
        ),
    ],
    ids=["sliced", "updated", "accumulated", "filled", "twice", "through", "nested", "retiled in place", "copied"],
)
def test_bytes_of_fusions(call, body, size):
    assert cost(f"%f = {call}, kind=kLoop, calls=%fused", body) == (0, size)


def test_products_in_nested_fusions_count():
    inner = """%inner (i: f32[2,5], j: f32[5,3]) -> f32[2,3] {
  %i = f32[2,5] parameter(0)
  %j = f32[5,3] parameter(1)
  ROOT %d = f32[2,3] dot(%i, %j), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""
    body = inner + fused("f32[2,5] f32[5,3]", "ROOT %f = f32[2,3] fusion(%p0, %p1), calls=%inner")
    assert cost("%f = f32[2,3] fusion(f32[2,5] %p.a, f32[5,3] %p.b), calls=%fused", body) == (60, 4 * (10 + 15 + 6))


@pytest.mark.parametrize(("on_chip", "size"), [(True, 400), (False, 800)])
def test_on_chip_arrays_move_no_bytes_of_main_memory(on_chip, size):
    """On GPU the same mark is of main memory that collectives may use."""
    assert cost("%b = f32[100]{0:S(1)} copy(f32[100] %p.a)", on_chip=on_chip)[1] == size


@pytest.mark.parametrize(
    ("instruction", "flops"),
    [
        (  # each of 3 groups has some rows of the first
            "%d = f32[11,7] ragged-dot(f32[11,5] %p.a, f32[3,5,7] %p.b, s32[3] %p.g), lhs_contracting_dims={1}, "
            "rhs_contracting_dims={1}, lhs_ragged_dims={0}, rhs_group_dims={0}",
            2 * 11 * 5 * 7,
        ),
        (  # each of 3 groups has some of the 5 terms
            "%d = f32[3,11,7] ragged-dot(f32[11,5] %p.a, f32[5,7] %p.b, s32[3] %p.g), lhs_contracting_dims={1}, "
            "rhs_contracting_dims={0}, lhs_ragged_dims={1}",
            2 * 11 * 5 * 7,
        ),
        (
            "%d = f32[3,2,11,7] ragged-dot(f32[2,11,5] %p.a, f32[2,5,7] %p.b, s32[2,3] %p.g), lhs_batch_dims={0}, "
            "rhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_contracting_dims={1}, lhs_ragged_dims={2}",
            2 * 2 * 11 * 5 * 7,
        ),
    ],
)
def test_groups_of_a_ragged_product_share_its_work(instruction, flops):
    assert cost(instruction)[0] == flops
