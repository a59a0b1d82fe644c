"""A folder whose weights no device holds is refused before they are loaded."""

import re

import pytest

from tests.builders.arrays import place_case
from tests.builders.folders import save_folder
from tsp_jax import inference
from tsp_jax.errors import ConfigError
from tsp_jax.hardware import memory


def test_weights_beyond_the_memory_are_refused(tmp_path, monkeypatch):
    folder = save_folder(tmp_path / "model")
    monkeypatch.setattr("tsp_jax.inference.model.Tokenizer", lambda folder: None)
    monkeypatch.setattr(memory, "host_bytes", lambda: 100_000)
    with pytest.raises(ConfigError, match=re.escape(f"{folder} in bfloat16 needs ") + r".*there are 12,500; use more"):
        inference.load(folder, place_case("single"), dtype="bfloat16")
