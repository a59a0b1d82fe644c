"""GGUF files become Hugging Face folders with the same weights and tokens."""

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tokenizers import Tokenizer

from tests.builders.arrays import assert_trees_near, place_case
from tests.builders.folders import LLAMA, logical_params
from tests.builders.fuzz import MUTATIONS, check_door
from tsp_jax.config import RopeScaling
from tsp_jax.errors import ConfigError
from tsp_jax.hf import weights as hf
from tsp_jax.hf.gguf import convert_gguf
from tsp_jax.hf.tokenizer import Tokenizer as Text
from tsp_jax.hf.tokenizer import read_stop_tokens


def pairs(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of the rows of q and k: i of the first half, i of the second, i + 1 of the first, ..."""
    first, second = np.split(rows.reshape(heads, -1, rows.shape[-1]), 2, axis=1)
    return np.stack([first, second], axis=2).reshape(rows.shape)


def write_gguf(path: Path, changes: dict[str, Any] | None = None, without: str = "", **tensors: np.ndarray) -> Path:
    """The logical parameters of LLAMA with a byte-level tokenizer whose one merge is "he".

    `changes`: metadata to add or replace, or to remove (None); `without`: a regular expression of tensors to leave out;
    `tensors`: in place of others.
    """
    params, layers = logical_params(GGUF_MODEL), logical_params(GGUF_MODEL)["layers"]
    writer = gguf.GGUFWriter(path, "llama")
    metadata = {key: value for key, value in (METADATA | (changes or {})).items() if value is not None}
    for key, value in metadata.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add.get(type(value), writer.add_array)(key, value)
    values = {
        "token_embd": params["embed"]["table"],
        "output": params["head"]["table"],
        "output_norm": params["final_norm"]["scale"],
    }
    for number in range(GGUF_MODEL.num_layers):
        attention, mlp = ({k: v[number] for k, v in layers[part].items()} for part in ("attention", "mlp"))
        layer = {
            "attn_norm": layers["attention_norm"]["scale"][number],
            "attn_q": pairs(attention["w_q"], GGUF_MODEL.num_heads),
            "attn_k": pairs(attention["w_k"], GGUF_MODEL.num_kv_heads),
            "attn_v": attention["w_v"],
            "attn_output": attention["w_o"].T.copy(),
            "ffn_norm": layers["mlp_norm"]["scale"][number],
            "ffn_gate": mlp["w_gate"],
            "ffn_up": mlp["w_up"],
            "ffn_down": mlp["w_down"].T.copy(),
        }
        values |= {f"blk.{number}.{name}": value for name, value in layer.items()}
    for name, value in (values | tensors).items():
        if not without or not re.fullmatch(without, name):
            writer.add_tensor(f"{name}.weight", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def gguf_file(tmp_path):
    return write_gguf(tmp_path / "model.gguf")


TOKENS = ["<|end|>", *"helo0123456789", "Ġ", "he", "w", "r", "d", "Ċ", "Ã", "©"]
TOKENS = list(dict.fromkeys(TOKENS))
GGUF_MODEL = dataclasses.replace(LLAMA, vocab_size=len(TOKENS), rope_scaling=RopeScaling(original_context=64))
METADATA = {
    "llama.embedding_length": GGUF_MODEL.d_model,
    "llama.block_count": GGUF_MODEL.num_layers,
    "llama.attention.head_count": GGUF_MODEL.num_heads,
    "llama.attention.head_count_kv": GGUF_MODEL.num_kv_heads,
    "llama.attention.key_length": GGUF_MODEL.head_dim,
    "llama.feed_forward_length": GGUF_MODEL.d_ff,
    "llama.context_length": 64,
    "llama.rope.freq_base": GGUF_MODEL.rope_theta,
    "llama.attention.layer_norm_rms_epsilon": GGUF_MODEL.norm_eps,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [3] + [1] * (len(TOKENS) - 1),
    "tokenizer.ggml.merges": ["h e"],
    "tokenizer.ggml.eos_token_id": 0,
}


def test_gguf_becomes_the_same_folder(gguf_file, tmp_path):
    config = convert_gguf(gguf_file, tmp_path / "out")
    assert config == GGUF_MODEL == hf.read_config(tmp_path / "out")
    params = hf.load_params(tmp_path / "out", config, place_case("single"))
    assert_trees_near(params, logical_params(GGUF_MODEL), 0.0)


def test_gguf_tokenizer_cuts_as_the_file_says(gguf_file, tmp_path):
    convert_gguf(gguf_file, tmp_path / "out")
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    text = "hello 10 world<|end|>\né"
    encoded = tokenizer.encode(text)
    assert encoded.tokens == ["he", *"llo", "Ġ", *"10", "Ġ", *"world", "<|end|>", "Ċ", "Ã", "©"]
    assert tokenizer.decode(encoded.ids, skip_special_tokens=False) == text
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["eos_token"] == "<|end|>"
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {"eos_token_id": 0}


def test_what_is_no_gguf_is_refused(tmp_path):
    path = tmp_path / "model.gguf"
    for content in (b"", b"not a GGUF file at all", b"GGUF"):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=re.escape(str(path))):
            convert_gguf(path, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [path]


FACTOR, LINEAR = "llama.rope.scaling.factor", RopeScaling(kind="linear", factor=4.0, original_context=64)


@pytest.mark.parametrize(
    ("changes", "model"),
    [
        ({FACTOR: 4.0}, {"rope_scaling": LINEAR}),
        ({FACTOR: 4.0, "llama.rope.scaling.type": "linear"}, {"rope_scaling": LINEAR}),
        ({FACTOR: 4.0, "llama.rope.scaling.type": "none"}, {}),
        ({"llama.rope.scale_linear": 4.0}, {"rope_scaling": LINEAR}),
        ({FACTOR: 1.0}, {}),
        ({"llama.rope.freq_base": None}, {"rope_theta": 10_000.0}),
        ({"llama.rope.dimension_count": GGUF_MODEL.head_dim, "llama.expert_count": 0}, {}),
    ],
)
def test_metadata_means_what_it_means_to_llama_cpp(changes, model, tmp_path):
    config = convert_gguf(write_gguf(tmp_path / "model.gguf", changes), tmp_path / "out")
    assert config == dataclasses.replace(GGUF_MODEL, **model) == hf.read_config(tmp_path / "out")


def test_a_file_without_output_is_tied(tmp_path):
    assert convert_gguf(write_gguf(tmp_path / "model.gguf", without="output"), tmp_path / "out").tie_embeddings


@pytest.mark.parametrize(
    ("changes", "first", "last", "stops"),
    [
        ({"tokenizer.ggml.add_bos_token": False}, [], [], (0,)),
        ({"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": 1}, [1], [], (0,)),
        ({"tokenizer.ggml.add_eos_token": True, "tokenizer.ggml.eot_token_id": 5}, [], [0], (0, 5)),
    ],
)
def test_tokens_around_a_text_and_at_its_end(changes, first, last, stops, tmp_path):
    convert_gguf(write_gguf(tmp_path / "model.gguf", changes), tmp_path / "out")
    tokenizer = Text(tmp_path / "out")
    assert tokenizer.encode("hello") == [*first, *tokenizer.encode("hello", special=False), *last]
    assert read_stop_tokens(tmp_path / "out") == stops


def test_chat_templates_keep_their_names(tmp_path):
    changes = {"tokenizer.chat_template": "a", "tokenizer.chat_template.rag": "b", "tokenizer.chat_templates": ["rag"]}
    convert_gguf(write_gguf(tmp_path / "model.gguf", changes), tmp_path / "out")
    tokenizer = Text(tmp_path / "out")
    assert (tokenizer.chat("x"), tokenizer.chat("x", template="rag")) == ("a", "b")


REFUSED = [
    ({"llama.rope.scaling.type": "yarn"}, 'llama.rope.scaling.type="yarn": Invalid enum value'),
    ({"llama.rope.dimension_count": 6}, "llama.rope.dimension_count=6 is not supported"),
    ({"llama.attention.sliding_window": 64}, "llama.attention.sliding_window=64 is not supported"),
    ({"llama.attention.head_count": 0}, "llama.attention.head_count=0: Expected `int` >= 1"),
    ({"llama.attention.head_count": "8"}, 'llama.attention.head_count="8": Expected `int`, got `str`'),
    ({"llama.attention.head_count": [8, 8]}, "head_count=[8, 8]: Expected `int`, got `array`"),
    ({"llama.attention.head_count": 12}, "has shape"),
    ({"llama.attention.key_length": None, "llama.attention.head_count": 9}, "does not divide"),
    ({"llama.block_count": 10**9}, "has 21 of the 9000000003 tensors of the model"),
    ({"llama.expert_count": 8}, "llama.expert_count=8"),
    ({"llama.context_length": None}, "missing required field `llama.context_length`"),
    ({"llama.rope.freq_base": float("nan")}, "llama.rope.freq_base=NaN"),
    ({"split.count": 2, "llama.block_count": None}, "split.count=2; use llama-gguf-split --merge"),
    ({"tokenizer.ggml.tokens": None}, "missing required field `tokenizer.ggml.tokens`"),
    ({"tokenizer.ggml.tokens": ["a", "a"], "tokenizer.ggml.token_type": [1, 1]}, "2 tokens, 1 of them different"),
    ({"tokenizer.ggml.token_type": None}, "missing required field `tokenizer.ggml.token_type`"),
    ({"tokenizer.ggml.token_type": [1]}, "and 1 types"),
    ({"tokenizer.ggml.merges": None}, "missing required field `tokenizer.ggml.merges`"),
    ({"tokenizer.ggml.merges": ["h x"]}, "tokenizer.ggml.merges has 'h x', of no tokens"),
    ({"tokenizer.ggml.pre": "llama-bpe"}, "tokenizer gpt2, llama-bpe is not supported"),
    ({"tokenizer.ggml.eos_token_id": 10**6}, "tokenizer.ggml.eos_token_id=1000000 is no token"),
    ({"tokenizer.ggml.add_bos_token": True}, "add_bos_token without bos_token_id"),
    ({"tokenizer.ggml.add_sep_token": True}, "tokenizer.ggml.add_sep_token=True is not supported"),
    ({"tokenizer.chat_template": 5}, "tokenizer.chat_template=5 is no text"),
]


@pytest.mark.parametrize(("changes", "reason"), REFUSED, ids=[reason[:40] for _, reason in REFUSED])
def test_metadata_that_cannot_be_is_refused_in_a_line(changes, reason, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", changes)
    with pytest.raises(ConfigError, match=rf"^{re.escape(str(path))}.*; use ") as error:
        convert_gguf(path, tmp_path / "out")
    assert reason in str(error.value)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("without", "tensors", "reason"),
    [
        ("output_norm|blk.1.*", {}, "has 11 of the 21 tensors of the model"),
        ("", {"output": np.zeros((3, 28), np.float32)}, "lm_head.weight has shape [3, 28]"),
        ("", {"rope_freqs": np.ones(6, np.float32)}, "tensor rope_freqs.weight has no place"),
    ],
)
def test_tensors_that_are_not_those_of_the_model_are_refused(without, tensors, reason, tmp_path):
    with pytest.raises(ConfigError, match=re.escape(reason)):
        convert_gguf(write_gguf(tmp_path / "model.gguf", without=without, **tensors), tmp_path / "out")


def test_a_gguf_file_is_read_whole_or_refused(gguf_file, tmp_path):
    """Cut anywhere, a FIFO, or with a count that no file holds."""
    content = gguf_file.read_bytes()
    for size in range(4, len(content), len(content) // 40):
        gguf_file.write_bytes(content[:size])
        with pytest.raises(ConfigError, match="cannot be read as GGUF"):
            convert_gguf(gguf_file, tmp_path / "out")
    gguf_file.write_bytes(content[:8] + b"\xff" * 16 + content[24:])
    with pytest.raises(ConfigError, match="tensors, at most"):
        convert_gguf(gguf_file, tmp_path / "out")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ConfigError, match="not a regular file"):
        convert_gguf(tmp_path / "fifo", tmp_path / "out")


@pytest.mark.soak
def test_any_gguf_file_is_converted_or_refused_in_a_line(gguf_file, tmp_path):
    content = gguf_file.read_bytes()
    header = content.index(b"blk.1.ffn_down") + 60

    def read(changed: bytes) -> None:
        gguf_file.write_bytes(changed + content[header:])
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        convert_gguf(gguf_file, tmp_path / "out")

    check_door(read, [content[:header]], (ConfigError,), count=3 * MUTATIONS)
