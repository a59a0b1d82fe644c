"""Convert GGUF files of the Llama family to Hugging Face folders of float32 weights.

RoPE rotates rows 2i and 2i + 1 of q and k in GGUF (llama.cpp's order), rows i and i + H/2 in Hugging Face folders.
Dims: D model, H head.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tsp_jax.config import ModelConfig
from tsp_jax.errors import ConfigError, import_optional
from tsp_jax.hf.config import config_json
from tsp_jax.hf.tensors import MAX_FILE_BYTES, new_folder, write_json, write_tensors

NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
"""name after ``blk.N.`` in GGUF -> name after ``model.layers.N.`` in a Hugging Face folder"""
SPLITS: dict[str, list[dict[str, Any]]] = {"gpt-2": [], "smollm": [{"type": "Digits", "individual_digits": True}]}
"""name of the tokenizer in GGUF -> pre-tokenizers that split a text before byte-level BPE"""
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
CONTROL, USER_DEFINED = 3, 4
"""types of tokens that are matched before pre-tokenization"""


def convert_gguf(path: str | Path, folder: str | Path) -> ModelConfig:
    """Writes the dequantized weights and the tokenizer of a GGUF file to a Hugging Face folder, new or empty.

    Returns:
      The model's configuration.

    Raises:
      ConfigError: the file is not a readable GGUF file of a Llama with a byte-level BPE tokenizer; or the folder
        exists.
    """
    gguf = import_optional("gguf", "hf")
    try:
        reader = gguf.GGUFReader(path)
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise ConfigError(f"{path} cannot be read as GGUF ({error}); use an intact file") from None
    fields = {name: field.contents() for name, field in reader.fields.items()}
    config = _model_config(path, fields, {tensor.name for tensor in reader.tensors})
    tokenizer = tokenizer_json(path, fields)
    tensors = {_hf_name(path, tensor.name): tensor for tensor in reader.tensors}

    def values() -> Iterator[tuple[str, np.ndarray]]:
        for name, tensor in tensors.items():
            value = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
            heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}.get(name.split(".")[-2])
            yield name, halves(value, heads) if heads else np.ascontiguousarray(value)

    special = _special_ids(fields)
    with new_folder(folder) as partial:
        nbytes = {name: int(tensor.n_elements) * 4 for name, tensor in tensors.items()}
        write_tensors(partial, nbytes, values(), MAX_FILE_BYTES)
        carried = {**special, "max_position_embeddings": fields["llama.context_length"]}
        write_json(partial / "config.json", config_json(config, "float32", carried))
        write_json(partial / "generation_config.json", special)
        write_json(partial / "tokenizer.json", tokenizer)
        write_json(partial / "tokenizer_config.json", _tokenizer_config(fields, special))
    return config


def halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Moves rows 2i and 2i + 1 of each head of [heads x H, D], which RoPE rotates together, to rows i and i + H/2."""
    return np.ascontiguousarray(rows.reshape(heads, -1, 2, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape))


def _hf_name(path: str | Path, name: str) -> str:
    if name in NAMES:
        return NAMES[name]
    block, _, rest = name.removeprefix("blk.").partition(".")
    if not name.startswith("blk.") or rest not in LAYER_NAMES:
        raise ConfigError(f"{path}: tensor {name} has no place in the model; use a plain Llama")
    return f"model.layers.{block}.{LAYER_NAMES[rest]}"


def _model_config(path: str | Path, fields: Mapping[str, Any], names: set[str]) -> ModelConfig:
    if fields.get("general.architecture") != "llama" or "llama.rope.scaling.type" in fields:
        raise ConfigError(f"{path}: {fields.get('general.architecture')} is not supported; use a plain llama")

    def of(key: str) -> Any:
        if f"llama.{key}" not in fields:
            raise ConfigError(f"{path}: llama.{key} is missing; use a complete file")
        return fields[f"llama.{key}"]

    num_heads, d_model = of("attention.head_count"), of("embedding_length")
    return ModelConfig(
        vocab_size=len(fields["tokenizer.ggml.tokens"]), tie_embeddings="output.weight" not in names,
        d_model=d_model, num_layers=of("block_count"), d_ff=of("feed_forward_length"),
        num_heads=num_heads, num_kv_heads=of("attention.head_count_kv"),
        head_dim=fields.get("llama.attention.key_length", d_model // num_heads),
        rope_theta=_shortest(of("rope.freq_base")), norm_eps=_shortest(of("attention.layer_norm_rms_epsilon")),
    )  # fmt: skip


def _shortest(value: float) -> float:
    """The shortest decimal number with the same float32: 1e-5, not 9.99999975e-6."""
    return float(str(np.float32(value)))


def tokenizer_json(path: str | Path, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the content of `tokenizer.json` (of the tokenizers library) from the metadata of a GGUF file."""
    kind, splits = fields.get("tokenizer.ggml.model"), SPLITS.get(fields.get("tokenizer.ggml.pre", ""))
    if kind != "gpt2" or splits is None:
        pre = fields.get("tokenizer.ggml.pre")
        raise ConfigError(f"{path}: tokenizer {kind}, {pre} is not supported; use gpt2 with {', '.join(SPLITS)}")
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": number, "content": token, **flags, "special": kind == CONTROL}
            for number, (token, kind) in enumerate(zip(tokens, types, strict=True))
            if kind in (CONTROL, USER_DEFINED)
        ],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, BYTES]},
        "decoder": BYTES,
        "model": {
            "type": "BPE",
            "vocab": {token: number for number, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in fields["tokenizer.ggml.merges"]],
        },
    }


def _special_ids(fields: Mapping[str, Any]) -> dict[str, int]:
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    ids = {key: fields.get(f"tokenizer.ggml.{name}_token_id") for key, name in names.items()}
    return {key: int(value) for key, value in ids.items() if value is not None}


def _tokenizer_config(fields: Mapping[str, Any], special: Mapping[str, int]) -> dict[str, Any]:
    tokens = fields["tokenizer.ggml.tokens"]
    config = {key.removesuffix("_id"): tokens[number] for key, number in special.items()}
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config["model_max_length"] = fields["llama.context_length"]
    if "tokenizer.chat_template" in fields:
        config["chat_template"] = fields["tokenizer.chat_template"]
    return config
