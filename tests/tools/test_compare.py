"""Layouts compared on one target: rows, files and the chart."""

import csv
import dataclasses
import json
import re

import pytest

from tests.builders.steps import CONFIG, CPU, train_step
from tsp_jax.errors import ConfigError
from tsp_jax.tools.compare import _OUTER_COMMA, _default_layouts, _items
from tsp_jax.tools.sweep import Row, compare_layouts, configure, parse_layout, write_csv, write_json

pytestmark = pytest.mark.usefixtures("optax_promotes")


@pytest.mark.parametrize(("step", "tokens"), [("decode", 2), ("prefill", 2 * 64)])
def test_tokens_a_second_are_those_of_the_step(step, tokens):
    (row,) = compare_layouts(CONFIG, CPU, ["tsp:8"], [64], batch=2, step=step)
    assert row.tokens_per_s == pytest.approx(tokens / row.step_s)


SIZES = {
    ("tp_sp:2x4", 8): {"data": 1, "seq": 4, "model": 2},
    ("tsp:8", 1024): {"data": 128, "tsp": 8},
    ("single", 4): {"data": 4},
    ("fsdp", 8): {"data": 8},
    ("dp:8", 8): {"data": 8},
    ("tsp(weights=data+tsp):2x4", 8): {"data": 2, "tsp": 4},
    ("tsp(sequence=node+tsp):2x4", 16): {"data": 2, "node": 2, "tsp": 4},
    ("tsp( weights=tsp+model ) : 2 x 4", 8): {"data": 1, "tsp": 4, "model": 2},
    ("tsp(batch=pod+data):2x4", 24): {"pod": 3, "data": 2, "tsp": 4},
    ("tsp(batch=):8", 8): {"tsp": 8},
}
"""(layout and sizes, devices) -> the mesh: tensor axes, batch axes, sequence axes; the first batch axis has the rest"""


@pytest.mark.parametrize(("text", "devices"), SIZES)
def test_layouts_take_their_own_axes(text, devices):
    _, sizes = parse_layout(text, devices)
    assert list(sizes.items()) == list(SIZES[text, devices].items())


WRONG = ["tsp", "tsp:3", "tsp:2x4", "tp_sp:8", "tsp:0", "tsp:x", "bogus:8", "tsp:16", "fsdp:4", "tsp(batch=):4", "tsp:"]
WRONG += ["tsp(weights=data+tsp)", "tsp(weights=data+tsp):8", "tsp(weights=data+tsp):2x2", f"tsp:{'9' * 5000}"]


@pytest.mark.parametrize("text", WRONG)
def test_wrong_layouts_are_refused_with_one_that_works(text):
    with pytest.raises(ConfigError, match="use") as error:
        parse_layout(text, 8)
    if "bogus" not in text:
        parse_layout(str(error.value).split()[-1], 8)


@pytest.mark.parametrize("devices", [1, 2, 4, 6, 8, 64, 1024])
def test_the_default_layouts_fit(devices):
    for text in _items(",".join(_default_layouts(devices)), _OUTER_COMMA):
        parse_layout(text, devices)


@pytest.mark.parametrize(
    ("text", "batch", "mesh"),
    [("tsp:4", 6, "data=2,tsp=4"), ("tsp(weights=data+tsp):4x2", 12, "data=4,tsp=2"), ("tsp(batch=):8", 3, "tsp=8")],
)
def test_batch_is_a_number_of_sequences_a_replica(text, batch, mesh):
    config = configure(CONFIG, text, 64, 3, 8)
    assert (config.batch, config.mesh) == (batch, mesh)


@pytest.fixture(scope="module")
def rows():
    return compare_layouts(CONFIG, CPU, ["tsp:8", "tp( sequence=node ):2x4"], [64])


def test_rows(rows):
    assert [row.layout for row in rows] == ["tsp:8", "tp(sequence=node):2x4"]
    assert all(row.fits and row.peak_bytes and row.step_s and row.largest_seq_len for row in rows)
    assert rows[0].received_bytes != rows[1].received_bytes


def test_nothing_compiles_if_one_layout_is_wrong():
    lines = []
    with pytest.raises(ConfigError):
        compare_layouts(CONFIG, CPU, ["tsp:8", "tp_sp:4x4"], [64], progress=lines.append)
    assert not lines


@pytest.mark.parametrize(
    ("step", "row", "message"),
    [
        ("decode", "dp(batch=data+node,weights=data):2x4", "weights last to serve; use batch=node+data"),
        ("prefill", "tsp(heads=model,vocab=data):2x2x2", "must shard heads too; use heads=model+data"),
    ],
)
def test_nothing_compiles_if_one_layout_cannot_serve(step, row, message):
    lines = []
    with pytest.raises(ConfigError, match=f"{re.escape(message)}$"):
        compare_layouts(CONFIG, CPU, ["tsp:8", row], [64], step=step, progress=lines.append)
    assert not lines


def test_what_does_not_fit_is_a_row(monkeypatch):
    monkeypatch.setattr("tsp_jax.tools.sweep.compile_step", lambda *_: train_step())
    small = dataclasses.replace(CPU, hardware=dataclasses.replace(CPU.hardware, memory_bytes=1e5))
    (row,) = compare_layouts(CONFIG, small, ["tsp:8"], [64])
    assert not row.fits and "does not fit" in row.note and row.peak_bytes
    assert row.largest_batch == 0


def test_what_does_not_compile_is_a_row(monkeypatch):
    def refuse(*_):
        raise RuntimeError("RESOURCE_EXHAUSTED: too large\nand more")

    monkeypatch.setattr("tsp_jax.tools.sweep.compile_step", refuse)
    (row,) = compare_layouts(CONFIG, CPU, ["tsp:8"], [64])
    assert not row.fits and row.note == "does not compile: RESOURCE_EXHAUSTED: too large"


def test_files(rows, tmp_path):
    write_csv(rows, tmp_path / "rows.csv")
    write_json(rows, {"target": "cpu:8"}, tmp_path / "rows.json")
    with (tmp_path / "rows.csv").open() as file:
        lines = list(csv.DictReader(file))
    read = json.loads((tmp_path / "rows.json").read_text())
    assert [int(line["peak_bytes"]) for line in lines] == [row["peak_bytes"] for row in read["rows"]]


def test_chart(rows, tmp_path):
    pytest.importorskip("matplotlib")
    from tsp_jax.tools.chart import draw

    with_paper = [dataclasses.replace(rows[0], paper_peak_gb="85-140"), rows[1]]
    failed = Row(layout="sp:8", mesh="", seq_len=64, batch=1, fits=False, note="does not compile")
    draw([*with_paper, failed], CPU, tmp_path / "rows.png")
    assert (tmp_path / "rows.png").read_bytes().startswith(b"\x89PNG")
