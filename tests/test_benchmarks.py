"""Benchmarks that name text of the package: the text is there."""

import importlib.util
from pathlib import Path

import tsp_jax

PACKAGE = Path(tsp_jax.__file__).parent
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def test_each_fault_of_the_quick_tests_benchmark_can_be_planted():
    spec = importlib.util.spec_from_file_location("quick_tests", BENCHMARKS / "quick_tests.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    counts = {name: (PACKAGE / file).read_text().count(text) for name, (file, text, _) in module.FAULTS.items()}
    assert len(counts) > 20
    assert {name: count for name, count in counts.items() if count != 1} == {}
