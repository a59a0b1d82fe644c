"""What a planner may choose: every choice fits, each row of the table stands once, fixed fields stay."""

import dataclasses

import pytest

from tests.builders.steps import CONFIG, CPU
from tsp_jax.errors import ConfigError
from tsp_jax.layout import check_fits, get_layout, num_ranks
from tsp_jax.mesh import parse_sizes
from tsp_jax.plan.compile import place_on
from tsp_jax.plan.space import FIELDS, ROWS, Choice, choices

BATCHED = dataclasses.replace(CONFIG, batch=8)


def places(config, num_devices, fixed=frozenset()):
    return {choice.where for choice in choices(config, num_devices, fixed)}


@pytest.mark.parametrize("num_devices", [1, 2, 6, 8, 16])
def test_every_choice_uses_all_devices_and_divides_the_tokens(num_devices):
    config = dataclasses.replace(CONFIG, batch=24, seq_len=96)
    for choice in {choice.where: choice for choice in choices(config, num_devices)}.values():
        layout, sizes = get_layout(choice.layout), parse_sizes(choice.mesh)
        assert num_ranks(layout.axis_names, sizes) == num_devices
        check_fits(choice.apply(config), layout, sizes)


def test_one_sequence_leaves_the_layouts_without_batch():
    assert places(CONFIG, 8) == {
        "tsp data=1,tsp=8", "tp data=1,model=8", "sp data=1,seq=8", "fsdp_cp data=1,tsp=8",
        "tp_sp data=1,seq=2,model=4", "tp_sp data=1,seq=4,model=2",
        "tsp(sequence=node+tsp) data=1,node=2,tsp=4", "tsp(sequence=node+tsp) data=1,node=4,tsp=2",
    }  # fmt: skip


def test_with_more_sequences_every_row_stands_on_some_mesh():
    config = dataclasses.replace(CONFIG, batch=16, seq_len=128)
    assert {where.split()[0] for where in places(config, 16)} == {*ROWS} - {"single"}
    assert {where.split()[0] for where in places(config, 1)} == {"single"}


def test_rows_that_are_equal_on_a_mesh_count_once():
    """An axis of size 1 makes a row of another: tsp=1 of tsp is dp, data=1 of tsp(weights=data+tsp) is tsp."""
    found = places(BATCHED, 8)
    assert "dp data=8" in found and "tsp data=8,tsp=1" not in found
    assert not any(where.startswith("tsp(weights=data+tsp) data=1,") for where in found)


def test_a_choice_is_what_it_was_made_from():
    assert Choice.of(CONFIG).apply(CONFIG) == CONFIG
    assert {*FIELDS} == {field.name for field in dataclasses.fields(Choice)}


FIXED = {"remat": "full", "stream.bucket_mib": 3.5, "accumulate": 2, "optimizer.zero1": True, "layout": "fsdp"}


@pytest.mark.parametrize("field", FIXED)
def test_what_is_fixed_stays(field):
    name = next(name for name, path in FIELDS.items() if path == field)
    config = dataclasses.replace(Choice.of(BATCHED), **{name: FIXED[field]}).apply(BATCHED)
    assert {getattr(choice, name) for choice in choices(config, 8, frozenset({field}))} == {FIXED[field]}
    assert len({getattr(choice, name) for choice in choices(config, 8)}) > 1


def test_a_fixed_mesh_leaves_the_layouts_that_have_its_axes():
    config = dataclasses.replace(BATCHED, mesh="data=2,tsp=4")
    assert places(config, 8, frozenset({"mesh"})) == {
        f"{layout} data=2,tsp=4" for layout in ("tsp", "fsdp_cp", "tsp(weights=data+tsp)", "fsdp_cp(weights=data+tsp)")
    }


def test_narrow_moments_and_gradients_are_searched_when_asked_for():
    assert {(c.moments_dtype, c.grad_dtype) for c in choices(CONFIG, 8)} == {("float32", "float32")}
    assert len({(c.moments_dtype, c.grad_dtype) for c in choices(CONFIG, 8, narrow=True)}) == 4


REFUSED = {
    "a layout without such a mesh": ({"layout": "tp", "mesh": "data=1,tsp=8"}, "layout tp has no axis 'tsp'"),
    "a mesh of fewer devices": ({"mesh": "data=1,tsp=4"}, "has 4 devices, the target 8"),
    "one device": ({"layout": "single"}, "layout=single has one device, the target 8"),
    "tokens that do not divide": ({"layout": "dp"}, "batch=1 is not divisible by 8"),
    "micro-batches that do not divide": ({"accumulate": 3}, "is not divisible by"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_contradictions_are_refused(case):
    fields, words = REFUSED[case]
    with pytest.raises(ConfigError, match=words):
        choices(dataclasses.replace(CONFIG, **fields), 8, frozenset(fields))


@pytest.mark.parametrize("where", sorted(places(BATCHED, 8)))
def test_every_place_is_a_placement(where):
    layout, mesh = where.rsplit(" ", 1)
    assert place_on(dataclasses.replace(BATCHED, layout=layout, mesh=mesh), CPU).mesh.size == 8
