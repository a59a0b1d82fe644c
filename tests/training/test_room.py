"""Runs that the memory at hand cannot hold are refused before anything is compiled or written."""

import dataclasses

import pytest

from tests.builders.runs import small_config
from tsp_jax.errors import ConfigError
from tsp_jax.training.trainer import train

TOO_LARGE = {
    "vocabulary": ({"vocab_size": 2 * 10**9}, {}, "on each device the state needs"),
    "layers": ({"num_layers": 10**7, "d_model": 4096}, {}, "on each device the state needs"),
    "batch": ({}, {"batch": 2 * 10**9}, "on each device a layer's input of batch=2000000000, seq_len=96 needs"),
    "prefetch": ({}, {"prefetch": 2 * 10**9}, "on the host data.prefetch=2000000000 needs"),
}


@pytest.mark.parametrize("case", TOO_LARGE)
def test_runs_beyond_the_memory_at_hand_are_refused(case, tmp_path):
    model, changes, words = TOO_LARGE[case]
    config = small_config(tmp_path, batch=changes.get("batch", 4))
    data = dataclasses.replace(config.data, prefetch=changes.get("prefetch", 2))
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **model), data=data)
    with pytest.raises(ConfigError, match=words + r" [\d,]+ bytes of memory, there are [\d,]+; use "):
        train(config)
    assert not (tmp_path / "run").exists()
