"""GGUF files become Hugging Face folders with the same weights and tokens."""

import dataclasses
import json
import re

import gguf
import numpy as np
import pytest
from tokenizers import Tokenizer

from tests.builders.arrays import assert_trees_near, place_case
from tests.builders.folders import LLAMA, logical_params
from tsp_jax.errors import ConfigError
from tsp_jax.hf import weights as hf
from tsp_jax.hf.gguf import convert_gguf


def pairs(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of the rows of q and k: i of the first half, i of the second, i + 1 of the first, ..."""
    first, second = np.split(rows.reshape(heads, -1, rows.shape[-1]), 2, axis=1)
    return np.stack([first, second], axis=2).reshape(rows.shape)


@pytest.fixture
def gguf_file(tmp_path):
    """The logical parameters of LLAMA with a byte-level tokenizer whose one merge is "he"."""
    path, params = tmp_path / "model.gguf", logical_params(GGUF_MODEL)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_embedding_length(GGUF_MODEL.d_model)
    writer.add_block_count(GGUF_MODEL.num_layers)
    writer.add_head_count(GGUF_MODEL.num_heads)
    writer.add_head_count_kv(GGUF_MODEL.num_kv_heads)
    writer.add_key_length(GGUF_MODEL.head_dim)
    writer.add_feed_forward_length(GGUF_MODEL.d_ff)
    writer.add_context_length(64)
    writer.add_rope_freq_base(GGUF_MODEL.rope_theta)
    writer.add_layer_norm_rms_eps(GGUF_MODEL.norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] + [1] * (len(TOKENS) - 1))
    writer.add_token_merges(["h e"])
    writer.add_eos_token_id(0)
    layers = params["layers"]
    writer.add_tensor("token_embd.weight", params["embed"]["table"])
    writer.add_tensor("output.weight", params["head"]["table"])
    writer.add_tensor("output_norm.weight", params["final_norm"]["scale"])
    for number in range(GGUF_MODEL.num_layers):
        attention, mlp = ({k: v[number] for k, v in layers[part].items()} for part in ("attention", "mlp"))
        for name, value in {
            "attn_norm": layers["attention_norm"]["scale"][number],
            "attn_q": pairs(attention["w_q"], GGUF_MODEL.num_heads),
            "attn_k": pairs(attention["w_k"], GGUF_MODEL.num_kv_heads),
            "attn_v": attention["w_v"],
            "attn_output": attention["w_o"].T.copy(),
            "ffn_norm": layers["mlp_norm"]["scale"][number],
            "ffn_gate": mlp["w_gate"],
            "ffn_up": mlp["w_up"],
            "ffn_down": mlp["w_down"].T.copy(),
        }.items():
            writer.add_tensor(f"blk.{number}.{name}.weight", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


TOKENS = ["<|end|>", *"helo0123456789", "Ġ", "he", "w", "r", "d", "Ċ", "Ã", "©"]
TOKENS = list(dict.fromkeys(TOKENS))
GGUF_MODEL = dataclasses.replace(LLAMA, vocab_size=len(TOKENS))


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
    for content in (b"", b"not a GGUF file at all"):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=re.escape(str(path))):
            convert_gguf(path, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [path]
