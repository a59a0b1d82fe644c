"""Mutated files of a Hugging Face folder are read or refused in a line, quickly and in little memory."""

import json

import pytest

from tests.builders.arrays import place_case
from tests.builders.folders import MODELS
from tests.builders.fuzz import check_door
from tsp_jax.errors import ConfigError
from tsp_jax.hf import weights as hf
from tsp_jax.hf.config import config_json, read_dtype
from tsp_jax.hf.tensors import INDEX
from tsp_jax.hf.tokenizer import read_stop_tokens

pytestmark = pytest.mark.soak
SPECIAL = {"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": None, "max_position_embeddings": 640}
LONG = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "layer_types": ["full_attention"] * 2,
    "rope_scaling": {"type": "linear", "factor": 4.0}, "use_sliding_window": False, "dtype": "bfloat16",
}  # fmt: skip
CONFIGS = [config_json(config, "bfloat16", SPECIAL) for config in MODELS.values()]
CONFIGS += [{**CONFIGS[0], "model_type": "qwen3", **LONG}]


def check(folder) -> None:
    """Reads a folder up to where its weights would be loaded."""
    read_dtype(folder)
    hf.check_folder(folder, hf.read_config(folder), place_case("tsp4"))


def test_config(folder):
    def read(content: bytes) -> None:
        (folder / "config.json").write_bytes(content)
        check(folder)

    check_door(read, [json.dumps(config, indent=2).encode() for config in CONFIGS], (ConfigError,))


def test_index(folder):
    def read(content: bytes) -> None:
        (folder / INDEX).write_bytes(content)
        check(folder)

    check_door(read, [(folder / INDEX).read_bytes()], (ConfigError,))


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_stop_tokens(name, folder):
    def read(content: bytes) -> None:
        (folder / name).write_bytes(content)
        read_stop_tokens(folder)

    generation = {"eos_token_id": [2, 3], "do_sample": True, "temperature": 0.6, "transformers_version": "5.24.0"}
    check_door(read, [json.dumps(content).encode() for content in (generation, CONFIGS[0])], (ConfigError,))


def test_header_of_safetensors(folder):
    path = max(folder.glob("*.safetensors"))
    whole = path.read_bytes()
    header = whole[: 8 + int.from_bytes(whole[:8], "little")]

    def read(content: bytes) -> None:
        path.write_bytes(content + whole[len(header) :])
        check(folder)

    check_door(read, [header], (ConfigError,))
