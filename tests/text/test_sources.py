"""The glob of a corpus: what Python's glob finds, and an end where links lead in circles."""

import glob
import os
from pathlib import Path

import pytest

from tsp_jax.config import DataConfig
from tsp_jax.text.sources import find_sources

FILES = ("a.txt", "one/a.txt", "one/two/b.txt", "one/two/three/a.txt", ".hidden/a.txt", "one/.b.txt", "[x]/**/a.txt")


@pytest.fixture
def root(tmp_path):
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text")
    return tmp_path


def names(pattern: Path | str) -> list[str]:
    folder, sources = find_sources(DataConfig(files=str(pattern)))
    return [os.path.relpath(folder / source.name, folder) for source in sources]


PATTERNS = ["*", "**", "**/*", "**/a.txt", "one/**", "one/**/a.txt", "**/two/**", "**/**/*.txt", "o*/**/[ab].txt",
            "**/t*/*/a.txt", "**/.b.txt", ".hidden/**", "[[]x]/**/*.txt"]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_match_what_glob_matches(pattern, root):
    found = {path for path in glob.glob(str(root / pattern), recursive=True) if os.path.isfile(path)}
    folder, sources = find_sources(DataConfig(files=str(root / pattern)))
    assert found
    assert {str(folder / source.name) for source in sources} == found


def test_links_to_the_parent_end_and_a_folder_is_read_once(root):
    (root / "one" / "up").symlink_to("..")
    (root / "one" / "again").symlink_to("..")
    (root / "one" / "two" / "top").symlink_to(root)
    (root / "aside").symlink_to(root / "one")
    assert names(root / "**" / "a.txt") == ["[x]/**/a.txt", "a.txt", "one/a.txt", "one/two/three/a.txt"]


def test_a_linked_folder_is_read(root, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "c.txt").write_text("text")
    (root / "one" / "linked").symlink_to(elsewhere)
    assert names(root / "**" / "c.txt") == ["one/linked/c.txt"]
