"""The layout table, meshes, and errors that name a value that works."""

import dataclasses
import re

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from tests.builders.arrays import LAYOUT_CASES, MIX, REPLICAS, TWO_AXES, TWO_LEVEL, place_case
from tsp_jax.config import Config, DataConfig, ModelConfig
from tsp_jax.errors import ConfigError
from tsp_jax.layout import (
    LAYOUTS,
    WEIGHT_DIMS,
    Axes,
    Layout,
    Placement,
    check_fits,
    get_layout,
    parse_mesh,
    place,
)
from tsp_jax.mesh import make_mesh

# ------------------------------------------------------------------------------------------------ the table

ROLES = {
    "single": Axes(),
    "dp": Axes(),
    "fsdp": Axes(folded=("data",)),
    "tp": Axes(tensor=("model",)),
    "sp": Axes(sequence=("seq",)),
    "tp_sp": Axes(tensor=("model",), sequence=("seq",)),
    "tsp": Axes(folded=("tsp",), sequence=("tsp",)),
    "fsdp_cp": Axes(folded=("tsp",), sequence=("tsp",)),
}
UNUSUAL_ROLES = [
    (MIX, Axes(folded=("tsp",), tensor=("model",), sequence=("tsp",))),
    (TWO_AXES, Axes(folded=("node", "gpu"), sequence=("node", "gpu"))),
    (TWO_LEVEL, Axes(folded=("tsp",), sequence=("node", "tsp"))),
    (REPLICAS, Axes(folded=("data", "tsp"), sequence=("tsp",))),
]


def test_every_preset_has_a_row_here():
    assert set(ROLES) == set(LAYOUTS)


@pytest.mark.parametrize("dim", WEIGHT_DIMS)
@pytest.mark.parametrize(("layout", "axes"), [*((LAYOUTS[name], axes) for name, axes in ROLES.items()), *UNUSUAL_ROLES])
def test_roles_of_axes(layout, axes, dim):
    assert layout.axes(dim) == axes


def test_a_dimension_can_have_axes_of_its_own():
    layout = Layout(name="own", sequence=("a",), heads=("a",), mlp=("m",))
    assert layout.axes("heads") == Axes(folded=("a",), sequence=("a",))
    assert layout.axes("mlp") == Axes(tensor=("m",), sequence=("a",))
    assert layout.axes("vocab") == Axes(sequence=("a",))


def test_only_fsdp_cp_gathers_whole_weights():
    assert [name for name, layout in LAYOUTS.items() if layout.whole_weights] == ["fsdp_cp"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"heads": ("a", "b", "a")}, "layout=wrong: heads=a+b+a names an axis twice; use heads=a+b"),
        ({"sequence": ("seq", "seq")}, "sequence=seq+seq names an axis twice; use sequence=seq"),
        ({"sequence": ("data",)}, "batch=data and sequence=data share data; use each axis in one of them"),
        (
            {"sequence": ("a",), "vocab": ("a", "m")},
            "name tensor axes, then folded ones as tokens do; use vocab=m+a",
        ),
        ({"sequence": ("a", "b"), "mlp": ("b", "a")}, "mlp=b+a must name tensor axes, then folded ones as tokens do"),
        ({"sequence": tuple("abcdefghijklmnop")}, "it has 17 mesh axes; use at most 16"),
        ({"sequence": ("a",), "mlp": ("a",), "experts": ()}, "experts=none must be what shards whole experts; use a"),
        ({"sequence": ("a",), "mlp": ("m", "a"), "experts": ("m",)}, "shards whole experts; use a"),
        ({"mlp": ("m",), "experts": ("other",)}, "experts=other must be what shards whole experts; use axes of mlp=m"),
    ],
)
def test_a_row_that_makes_no_sense_is_refused(fields, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        Layout(name="wrong", **fields)


def test_specs():
    assert MIX.spec("batch", "sequence", None) == P(("data",), ("tsp",), None)
    assert MIX.spec("mlp", None) == P(("model", "tsp"), None)
    assert LAYOUTS["tp"].spec("batch", "sequence") == P(("data",), None)
    assert LAYOUTS["single"].spec(None) == P(None)


# ------------------------------------------------------------------------------------------------ meshes


@pytest.mark.parametrize(
    ("layout", "text", "sizes"),
    [
        ("tsp", "data=2,tsp=4", {"data": 2, "tsp": 4}),
        ("tsp", "tsp=4", {"data": 1, "tsp": 4}),
        ("tsp", " tsp = 4 , data=2", {"tsp": 4, "data": 2}),
        ("tp_sp", "seq=3", {"data": 1, "model": 1, "seq": 3}),
        ("tsp", "", {"data": 1, "tsp": 8}),
        ("single", "", {"data": 1}),
        ("tp_sp", "", {"data": 1, "model": 4, "seq": 2}),
        ("tsp(weights=data+tsp)", "tsp=4", {"data": 1, "tsp": 4}),
        ("tsp(weights=data+tsp)", "", {"data": 1, "tsp": 8}),
        ("tsp(sequence=node+tsp)", "", {"data": 1, "node": 2, "tsp": 4}),
        ("tsp(batch=)", "", {"tsp": 8}),
    ],
)
def test_parse_mesh(layout, text, sizes):
    assert parse_mesh(text, get_layout(layout), 8) == sizes


def test_a_mesh_without_an_axis_of_ones_own_row_is_refused():
    """It may be misspelt: with size 1, which a preset's axes get, it would shard nothing."""
    layout = get_layout("tsp(weights=dta+tsp)")
    with pytest.raises(ConfigError, match=r"^mesh=data=2,tsp=4 lacks dta of layout tsp\(weights=dta\+tsp\); use"):
        parse_mesh("data=2,tsp=4", layout, 8)
    assert parse_mesh("data=2,tsp=2,dta=2", layout, 8) == {"data": 2, "tsp": 2, "dta": 2}


@pytest.mark.parametrize("num_devices", [1, 2, 6, 7, 8, 12, 64])
@pytest.mark.parametrize("layout", ["tp", "sp", "tp_sp", "tsp", "fsdp_cp"])
def test_the_default_mesh_uses_every_device(layout, num_devices):
    sizes = parse_mesh("", LAYOUTS[layout], num_devices)
    assert sizes["data"] == 1
    product = 1
    for size in sizes.values():
        product *= size
    assert product == num_devices


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tsp=0", "'tsp=0' is not axis=size"),
        ("tsp", "'tsp' is not axis=size"),
        ("tsp=-2", "'tsp=-2' is not axis=size"),
        ("tsp=2.0", "'tsp=2.0' is not axis=size"),
        (f"tsp={'9' * 5000}", "is not axis=size"),
        ("model=2", "layout tsp has no axis 'model', it has data, tsp"),
        ("tsp=2,tsp=4", "axis 'tsp' is named twice"),
    ],
)
def test_parse_mesh_refuses_and_shows_an_example_that_works(text, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        parse_mesh(text, LAYOUTS["tsp"], 8)
    example = str(error.value).split()[-1]
    assert parse_mesh(example, LAYOUTS["tsp"], 8) == {"data": 1, "tsp": 2}


def test_make_mesh_has_the_axes_in_order():
    mesh = make_mesh({"data": 2, "tsp": 3})
    assert dict(mesh.shape) == {"data": 2, "tsp": 3}
    assert mesh.devices.ravel().tolist() == jax.devices()[:6]


def test_make_mesh_takes_the_first_of_the_devices_given():
    devices = jax.devices()[4:]
    assert make_mesh({"tsp": 2}, devices).devices.tolist() == devices[:2]


def test_make_mesh_refuses_more_devices_than_there_are():
    with pytest.raises(ConfigError, match=re.escape("mesh=data=2,tsp=8 needs 16 devices, there are 8")) as error:
        make_mesh({"data": 2, "tsp": 8})
    assert "--cpu-devices 16" in str(error.value)


def test_a_mesh_that_lacks_an_axis_is_refused():
    with pytest.raises(ConfigError, match=r"lacks seq of layout sp; use a mesh with data, seq"):
        Placement(LAYOUTS["sp"], make_mesh({"data": 2}))


def test_place_takes_names_and_layouts():
    assert place("tsp", tsp=4) == place(LAYOUTS["tsp"], data=1, tsp=4)


def test_axes_of_size_1_have_no_role():
    assert place("tsp", tsp=1).layout.axes("mlp") == Axes()
    assert place(MIX, model=1, tsp=8).layout.axes("mlp") == LAYOUTS["tsp"].axes("mlp")


@pytest.mark.parametrize("name", LAYOUT_CASES)
def test_sizes_of_a_placement(name):
    layout, sizes = LAYOUT_CASES[name]
    placement = place_case(name)
    for dim in ("batch", "sequence", *WEIGHT_DIMS):
        desired = 1
        for axis in getattr(layout, dim):
            desired *= sizes.get(axis, 1)
        assert placement.size(dim) == desired


@pytest.mark.parametrize("name", LAYOUT_CASES)
def test_shards_of_an_array_have_the_sizes_of_the_placement(name):
    placement = place_case(name)
    for dims in (("batch", "sequence"), ("heads", None), ("mlp", None), ("vocab", None)):
        array = jax.device_put(jax.numpy.zeros((24, 24)), placement.sharding(*dims))
        desired = tuple(24 // (placement.size(dim) if dim else 1) for dim in dims)
        assert {shard.data.shape for shard in array.addressable_shards} == {desired}


# ------------------------------------------------------------------------------------------------ check_fits

MODEL = ModelConfig(vocab_size=64, d_model=16, num_layers=1, num_heads=4, num_kv_heads=4, head_dim=4, d_ff=64)
CONFIG = Config(model=MODEL, steps=1, batch=4, seq_len=64)


@pytest.mark.parametrize("name", LAYOUT_CASES)
def test_check_fits_accepts(name):
    """Any vocabulary and any ffn, which are padded."""
    layout, sizes = LAYOUT_CASES[name]
    model = dataclasses.replace(MODEL, vocab_size=71, d_ff=113)
    config = dataclasses.replace(CONFIG, model=model, seq_len=96, batch=8)
    check_fits(config, layout, {axis: sizes.get(axis, 1) for axis in layout.axis_names})


BAD_VALUES = [
    ("seq_len", 63, {}, "seq_len=63 is not divisible by 16 over tsp (two zigzag chunks a rank); use 64"),
    ("seq_len", 60, {"data": DataConfig(order="contiguous")}, "seq_len=60 is not divisible by 8 over tsp; use 64"),
    ("batch", 5, {}, "batch=5 is not divisible by 2 over data; use 6"),
    ("batch", 4, {"accumulate": 3}, "batch=4 is not divisible by 6 over data (accumulate=3); use 6"),
]


@pytest.mark.parametrize(("field", "value", "changes", "message"), BAD_VALUES)
def test_check_fits_refuses_with_a_value_that_works(field, value, changes, message):
    sizes = {"data": 2, "tsp": 8}
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_fits(dataclasses.replace(CONFIG, **{field: value}, **changes), LAYOUTS["tsp"], sizes)
    works = {field: int(message.split()[-1])}
    check_fits(dataclasses.replace(CONFIG, **works, **changes), LAYOUTS["tsp"], sizes)


def test_one_rank_takes_any_length():
    check_fits(dataclasses.replace(CONFIG, seq_len=63), LAYOUTS["tp"], {"data": 1, "model": 8})


@given(st.integers(1, 3000), st.integers(1, 16))
def test_the_length_that_check_fits_suggests_is_the_next(seq_len, ranks):
    layout, sizes = LAYOUTS["sp"], {"data": 1, "seq": ranks}
    try:
        check_fits(dataclasses.replace(CONFIG, seq_len=seq_len), layout, sizes)
    except ConfigError as error:
        suggested = int(str(error).split()[-1])
        check_fits(dataclasses.replace(CONFIG, seq_len=suggested), layout, sizes)
        assert seq_len < suggested < seq_len + 2 * ranks
