"""A Hugging Face folder of several files, intact, for each test to break."""

import pytest

from tests.builders.folders import save_folder


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    """A folder of several files, to be copied."""
    return save_folder(tmp_path_factory.mktemp("hf") / "intact", max_file_bytes=20_000)


@pytest.fixture
def folder(intact, tmp_path):
    made = tmp_path / "model"
    made.mkdir()
    for file in intact.iterdir():
        (made / file.name).write_bytes(file.read_bytes())
    return made
