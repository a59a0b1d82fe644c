"""Layouts as text: presets, rows of one's own and their names, and what is refused."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tsp_jax.errors import ConfigError
from tsp_jax.layout import LAYOUTS, WEIGHT_DIMS, Layout, get_layout


@pytest.mark.parametrize("name", LAYOUTS)
def test_get_layout(name):
    assert get_layout(name) is LAYOUTS[name]


REPLICAS = "tsp(weights=data+tsp)"
ROWS = {
    REPLICAS: {"sequence": "tsp", "heads": "data+tsp", "mlp": "data+tsp", "vocab": "data+tsp"},
    " tsp ( weights = data + tsp ) ": REPLICAS,
    "tsp(vocab=data+tsp,mlp=data+tsp,heads=data+tsp)": REPLICAS,
    "tsp(sequence=node+tsp)": {"sequence": "node+tsp", "heads": "tsp", "mlp": "tsp", "vocab": "tsp"},
    "tsp(weights=model+tsp)": {"sequence": "tsp", "heads": "model+tsp", "mlp": "model+tsp", "vocab": "model+tsp"},
    "tsp(weights=tsp+model)": "tsp(weights=model+tsp)",  # tensor axes first
    "tsp(weights=tsp+data)": REPLICAS,  # folded axes as tokens have them
    "tsp(heads=data+tsp,vocab=)": {"sequence": "tsp", "heads": "data+tsp", "mlp": "tsp"},
    "tsp(vocab=,sequence=tsp,heads=data+tsp)": "tsp(heads=data+tsp,vocab=)",
    "dp(batch=node+data,sequence=seq)": {"batch": "node+data", "sequence": "seq"},
    "tp(batch=)": {"batch": "", "heads": "model", "mlp": "model", "vocab": "model"},
    "fsdp(whole_weights=true)": {"heads": "data", "mlp": "data", "vocab": "data", "whole_weights": True},
    "fsdp( whole_weights=True, batch = data )": "fsdp(whole_weights=true)",
    # rows of presets
    "tsp()": "tsp",
    "single(batch=data)": "single",
    "single(weights=data)": "fsdp",
    "tp(weights=)": "dp",
    "fsdp_cp(whole_weights=false)": "tsp",
    "sp(weights=tsp,sequence=tsp,whole_weights=true)": "fsdp_cp",
}
"""text of a layout -> its dimensions; or another text of the same layout, which is its name"""


def axes_of(text: str) -> tuple[str, ...]:
    return tuple(text.split("+")) if text else ()


@pytest.mark.parametrize("text", ROWS)
def test_a_row_of_ones_own(text):
    want, found = ROWS[text], get_layout(text)
    if isinstance(want, str):
        assert found == get_layout(want)
        assert found.name == want
    else:
        fields = {dim: axes_of(value) if isinstance(value, str) else value for dim, value in want.items()}
        assert found == Layout(name=text, **fields)
        assert get_layout(found.name) == found


PRESETS = "use one of single, dp, fsdp, tp, sp, tp_sp, tsp, fsdp_cp, or a row such as tsp(weights=data+tsp)"
BAD_ROWS = {
    "zp": f"layout=zp is unknown; {PRESETS}",
    "": f"layout= is unknown; {PRESETS}",
    "zp(mlp=a)": f"layout=zp(mlp=a): preset 'zp' is unknown; {PRESETS}",
    "tsp(mlp=a": "layout=tsp(mlp=a must end with its only parenthesis; use tsp(mlp=a)",
    "tsp(mlp=a):8": "must end with its only parenthesis; use tsp(mlp=a)",
    "tsp(mlp=a))": "must end with its only parenthesis; use tsp(mlp=a)",
    "tsp(ffn=a)": "'ffn=a' does not set a dimension; use batch, sequence, heads, mlp, vocab, weights or whole_weights",
    "tsp(mlp)": "'mlp' does not set a dimension",
    "tsp(mlp=a,)": "'' does not set a dimension",
    "tsp(mlp=a,mlp=a)": "mlp is set twice",
    "tsp(mlp=a,weights=b)": "mlp is set twice (weights sets heads, mlp, vocab); use each dimension once",
    "tsp(mlp=a+b+a)": "layout=tsp(mlp=a+b+a): mlp=a+b+a names an axis twice; use mlp=a+b",
    "tsp(batch=tsp)": "batch=tsp and sequence=tsp share tsp; use each axis in one of them",
    "tsp(mlp=a+)": "mlp=a+ is not understood; use axis+axis, such as data+tsp",
    "tsp(mlp=a b)": "mlp=a b is not understood",
    "tsp(mlp=2x)": "mlp=2x is not understood",
    "tsp(mlp=\u00e9)": "mlp=\u00e9 is not understood",
    "tsp(whole_weights=1)": "whole_weights=1 is not understood; use true or false",
    "single(batch=)": "layout=single(batch=) has no mesh axis; use batch=data",
    f"tsp(mlp={'a' * 1000})": "has 1009 characters; use at most 1000",
}


@pytest.mark.parametrize("text", BAD_ROWS)
def test_a_text_that_is_no_layout_is_refused(text):
    with pytest.raises(ConfigError, match=re.escape(BAD_ROWS[text])) as error:
        get_layout(text)
    assert str(error.value).startswith(f"layout={text[:40]}")


NAMES = st.lists(st.sampled_from(["data", "tsp", "model", "node"]), max_size=4, unique=True).map("+".join)
SETTINGS = st.dictionaries(st.sampled_from(["batch", "sequence", *WEIGHT_DIMS]), NAMES)


@given(st.sampled_from(sorted(LAYOUTS)), SETTINGS, st.randoms())
def test_the_name_of_a_row_is_the_row_in_any_order(preset, settings, random):
    items = [f"{dim}={axes}" for dim, axes in settings.items()]
    try:
        found = get_layout(f"{preset}({','.join(items)})")
    except ConfigError:
        return
    random.shuffle(items)
    assert get_layout(f" {preset}( {' , '.join(items)})") == found == get_layout(found.name)
    assert all(getattr(found, dim) == axes_of(axes) for dim, axes in settings.items() if dim not in WEIGHT_DIMS)
    assert all({*getattr(found, dim)} == {*axes_of(axes)} for dim, axes in settings.items())
