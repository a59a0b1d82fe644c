"""Benchmarks that name text of the package, and tables that show data: the text and the data are there."""

import importlib.util
import sys
from pathlib import Path

import pytest

import tsp_jax

PACKAGE = Path(tsp_jax.__file__).parent
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def loaded(name: str):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


FIGURES = loaded("figures").FIGURES


@pytest.mark.parametrize(
    ("name", "document"), [(name, document) for name, figure in FIGURES.items() for document in figure.documents]
)
def test_tables_of_documents_show_what_their_data_say(name, document):
    text = (BENCHMARKS.parent / document).read_text()
    assert FIGURES[name].replaced_in(text) == text


def test_a_figure_without_its_place_is_not_lost():
    with pytest.raises(SystemExit, match="layouts has 0 places"):
        FIGURES["layouts"].replaced_in("no table here")


def test_each_fault_of_the_quick_tests_benchmark_can_be_planted():
    module = loaded("quick_tests")
    counts = {name: (PACKAGE / file).read_text().count(text) for name, (file, text, _) in module.FAULTS.items()}
    assert len(counts) > 20
    assert {name: count for name, count in counts.items() if count != 1} == {}
