"""Imports point down: config, mesh, layout <- ops <- nn <- models <- training; inspect knows no model."""

import ast
import sys
from pathlib import Path

import pytest

import tsp_jax

ROOT = Path(tsp_jax.__file__).parent
FOUNDATION = {"errors", "config", "mesh", "layout", "heads", "stored"}
ROOMS = {
    "errors": set(),
    "files": {"errors"},
    "config": {"errors"},
    "mesh": {"errors"},
    "layout": {"errors", "config", "mesh"},
    "heads": {"errors", "config", "layout"},
    "stored": {"errors", "config", "layout", "heads"},
    "cost": FOUNDATION,
    "hardware": {"errors", "files"},
    "inspect": {"errors", "files", "mesh", "hardware"},
    "ops": FOUNDATION,
    "nn": FOUNDATION | {"ops", "cost"},
    "models": FOUNDATION | {"ops", "nn", "cost"},
    "hf": FOUNDATION | {"files", "ops", "nn", "models"},
    "text": {"errors", "files", "config", "hf"},
    "training": FOUNDATION | {"files", "hardware", "ops", "nn", "models", "hf", "text", "inspect", "cost"},
    "inference": FOUNDATION | {"files", "hardware", "ops", "nn", "models", "hf", "inspect", "training"},
    "plan": FOUNDATION | {"files", "hardware", "ops", "models", "hf", "training", "inference", "inspect", "cost"},
}
"""room -> rooms of tsp_jax that it may import from, besides itself"""
TOP = {"__init__", "tools"}
"""may import everything, and nothing below them imports them"""
OUTSIDE = {
    "errors": set(),
    "files": {"msgspec"},
    "config": set(),
    "mesh": {"jax"},
    "layout": {"jax"},
    "cost": set(),
    "ops": {"jax"},
    "inspect": {"jax", "jaxlib", "numpy", "rich"},
}
"""room -> packages that it may import; a room that is not here may import any"""
LARGEST_ROOT = 8
"""modules at the root of the package, which is its table of contents"""


def modules(room: str) -> list[Path]:
    file = ROOT / f"{room}.py"
    return [file] if file.exists() else sorted((ROOT / room).rglob("*.py"))


def imports(file: Path) -> set[str]:
    """Dotted names of everything that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name} imports relatively; name the package"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def room_of(name: str) -> str:
    """tsp_jax.ops.stream.fold -> ops; "" for what the package itself exports"""
    part = name.split(".")[1]
    return part if (ROOT / part).is_dir() or (ROOT / f"{part}.py").exists() else ""


EVERY_MODULE = [pytest.param(room, file, id=str(file.relative_to(ROOT))) for room in ROOMS for file in modules(room)]


@pytest.mark.parametrize(("room", "file"), EVERY_MODULE)
def test_imports_point_down(room, file):
    own = {room_of(name) for name in imports(file) if name.split(".")[0] == "tsp_jax"}
    above = own - ROOMS[room] - {room}
    assert not above, f"{file.relative_to(ROOT)} imports from {above}, which stand above {room}"


@pytest.mark.parametrize(("room", "file"), [case for case in EVERY_MODULE if case.values[0] in OUTSIDE])
def test_imports_from_outside(room, file):
    allowed = OUTSIDE[room] | {"tsp_jax"} | sys.stdlib_module_names
    foreign = {name.split(".")[0] for name in imports(file)} - allowed
    assert not foreign, f"{file.relative_to(ROOT)} imports {foreign}; {room} may import {OUTSIDE[room] or 'nothing'}"


def test_the_root_is_a_table_of_contents():
    assert len(list(ROOT.glob("*.py"))) <= LARGEST_ROOT


def test_every_room_is_held():
    """A room that does not stand in the table is not checked."""
    rooms = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert rooms - TOP <= set(ROOMS)
