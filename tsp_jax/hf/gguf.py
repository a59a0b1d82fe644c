"""Convert GGUF files of the Llama family to Hugging Face folders of float32 weights.

RoPE rotates the rows of each head of Wq and Wk in pairs: rows 2i and 2i + 1 in GGUF (llama.cpp's order), rows i and
i + H/2 in Hugging Face folders.
Dims: D model, H head.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from tsp_jax.config import ModelConfig, RopeScaling
from tsp_jax.errors import ConfigError
from tsp_jax.files import Finite, Size, check_json
from tsp_jax.hf.config import config_json
from tsp_jax.hf.gguf_file import Tensor, read_gguf
from tsp_jax.hf.gguf_tokenizer import GGUFTokenizer, read_tokenizer, tokenizer_config, tokenizer_json
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


class _Metadata(msgspec.Struct, kw_only=True):
    """The model's metadata, as far as it is read. Defaults are those of llama.cpp (src/llama-model.cpp)."""

    context: Size = msgspec.field(name="llama.context_length")
    d_model: Size = msgspec.field(name="llama.embedding_length")
    num_layers: Size = msgspec.field(name="llama.block_count")
    d_ff: Size = msgspec.field(name="llama.feed_forward_length")
    num_heads: Size = msgspec.field(name="llama.attention.head_count")
    num_kv_heads: Size | None = msgspec.field(name="llama.attention.head_count_kv", default=None)
    norm_eps: Finite = msgspec.field(name="llama.attention.layer_norm_rms_epsilon")
    key_length: Size | None = msgspec.field(name="llama.attention.key_length", default=None)
    value_length: Size | None = msgspec.field(name="llama.attention.value_length", default=None)
    rotated: Size | None = msgspec.field(name="llama.rope.dimension_count", default=None)
    rope_theta: Finite = msgspec.field(name="llama.rope.freq_base", default=10_000.0)
    scaling: Literal["linear", "none"] = msgspec.field(name="llama.rope.scaling.type", default="linear")
    factor: Finite | None = msgspec.field(name="llama.rope.scaling.factor", default=None)
    older_factor: Finite = msgspec.field(name="llama.rope.scale_linear", default=0.0)
    no_experts: Literal[0] = msgspec.field(name="llama.expert_count", default=0)
    no_experts_used: Literal[0] = msgspec.field(name="llama.expert_used_count", default=0)


NO_EFFECT = (
    "llama.vocab_size", "llama.rope.scaling.original_context_length", "llama.rope.scaling.finetuned",
)  # fmt: skip
"""keys that have no effect here: the vocabulary size follows from the tokens, and the other keys belong to YaRN"""
CHECKED = ("llama.", "tokenizer.ggml.add_")
"""prefixes of keys that must be known: an unknown one could change the mathematics or the tokens"""


def convert_gguf(path: str | Path, folder: str | Path) -> ModelConfig:
    """Writes the dequantized weights and the tokenizer of a GGUF file to a Hugging Face folder, new or empty.

    Returns:
      The model's configuration.

    Raises:
      ConfigError: the file is not a complete GGUF file of a Llama with byte-level BPE, or the folder is not empty.
    """
    fields, found = read_gguf(path)
    metadata, tokenizer = _metadata(path, fields), read_tokenizer(path, fields)
    config = _model_config(path, metadata, len(tokenizer.tokens), tie_embeddings="output.weight" not in found)
    tensors, special = _tensors(path, found, config), tokenizer.special_ids()
    settings = tokenizer_config(path, tokenizer, fields, metadata.context)

    def values() -> Iterator[tuple[str, np.ndarray]]:
        for name, tensor in tensors.items():
            heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}.get(name.split(".")[-2])
            try:
                value = tensor.values()
            except NotImplementedError:
                raise ConfigError(f"{path}: type {tensor.kind.name} of {name} is not supported; use Q8_0") from None
            yield name, halves(value, heads) if heads else np.ascontiguousarray(value)

    with new_folder(folder) as partial:
        nbytes = {name: math.prod(tensor.shape) * 4 for name, tensor in tensors.items()}
        write_tensors(partial, nbytes, values(), MAX_FILE_BYTES)
        carried = {**special, "max_position_embeddings": metadata.context}
        write_json(partial / "config.json", config_json(config, "float32", carried))
        write_json(partial / "generation_config.json", special)
        write_json(partial / "tokenizer.json", tokenizer_json(tokenizer))
        write_json(partial / "tokenizer_config.json", settings)
    return config


def halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Moves rows 2i and 2i + 1 of each head, which RoPE rotates together, to rows i and i + H/2.

    `rows`: [heads x H, D].
    """
    return np.ascontiguousarray(rows.reshape(heads, -1, 2, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape))


def _hf_name(path: str | Path, name: str) -> str:
    if name in NAMES:
        return NAMES[name]
    block, _, rest = name.removeprefix("blk.").partition(".")
    if not name.startswith("blk.") or not block.isdecimal() or rest not in LAYER_NAMES:
        raise ConfigError(f"{path}: tensor {name:.80} has no place in the model; use a plain Llama")
    return f"model.layers.{int(block)}.{LAYER_NAMES[rest]}"


def _tensors(path: str | Path, found: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The tensors by their Hugging Face names; raises ConfigError if one is missing or has another shape."""
    named = {_hf_name(path, name): tensor for name, tensor in found.items()}
    total = len(NAMES) - config.tie_embeddings + config.num_layers * len(LAYER_NAMES)
    if len(found) != total or len(named) != total:
        raise ConfigError(f"{path} has {len(named)} of the {total} tensors of the model; use a whole file")
    D, V, F = config.d_model, config.vocab_size, config.d_ff
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes = {
        "embed_tokens": (V, D), "lm_head": (V, D), "q_proj": (queries, D), "k_proj": (keys, D), "v_proj": (keys, D),
        "o_proj": (D, queries), "gate_proj": (F, D), "up_proj": (F, D), "down_proj": (D, F),
    }  # fmt: skip
    for name, tensor in named.items():
        shape = shapes.get(name.split(".")[-2], (D,))
        if tensor.shape != shape:
            raise ConfigError(
                f"{path}: {name} has shape {list(tensor.shape)}, its metadata says {list(shape)}; use an intact file"
            )
    return named


def _metadata(path: str | Path, fields: Mapping[str, Any]) -> _Metadata:
    if fields.get("split.count", 1) not in (0, 1):  # all parts but the first lack the metadata below
        split = f"split.count={fields['split.count']!s:.80}"
        raise ConfigError(f"{path}: {split}; use llama-gguf-split --merge to make one file")
    if fields.get("general.architecture") != "llama":
        raise ConfigError(f"{path}: {fields.get('general.architecture')!s:.80} is not supported; use a plain llama")
    metadata = check_json(dict(fields), str(path), _Metadata, "use a complete file")
    schemas = (*msgspec.structs.fields(_Metadata), *msgspec.structs.fields(GGUFTokenizer))
    known = {field.encode_name for field in schemas} | set(NO_EFFECT)
    for key, value in fields.items():
        if key.startswith(CHECKED) and key not in known:
            raise ConfigError(f"{path}: {key:.80}={value!r:.80} is not supported; use a plain llama")
    return metadata


def _model_config(path: str | Path, metadata: _Metadata, vocab_size: int, tie_embeddings: bool) -> ModelConfig:
    if not metadata.key_length and metadata.d_model % metadata.num_heads:
        raise ConfigError(
            f"{path}: llama.attention.head_count={metadata.num_heads} does not divide "
            f"llama.embedding_length={metadata.d_model}; use an intact file"
        )
    head_dim = metadata.key_length or metadata.d_model // metadata.num_heads
    for key, value in (("rope.dimension_count", metadata.rotated), ("attention.value_length", metadata.value_length)):
        if value not in (None, head_dim):
            raise ConfigError(
                f"{path}: llama.{key}={value} is not supported; use a model with {head_dim}, a whole head"
            )
    factor = (metadata.older_factor if metadata.factor is None else metadata.factor) or 1.0  # 0 says nothing, too
    scaled = metadata.scaling == "linear" and factor != 1.0
    try:
        scaling = RopeScaling(
            kind="linear" if scaled else "none", factor=_shortest(factor) if scaled else 1.0,
            original_context=metadata.context,
        )  # fmt: skip
        return ModelConfig(
            vocab_size=vocab_size, tie_embeddings=tie_embeddings,
            d_model=metadata.d_model, num_layers=metadata.num_layers, d_ff=metadata.d_ff, head_dim=head_dim,
            num_heads=metadata.num_heads, num_kv_heads=metadata.num_kv_heads or metadata.num_heads,
            rope_theta=_shortest(metadata.rope_theta), norm_eps=_shortest(metadata.norm_eps),
            rope_scaling=scaling,
        )  # fmt: skip
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _shortest(value: float) -> float:
    """The shortest decimal number that rounds to the same float32: 1e-5, not 9.99999975e-6."""
    return float(str(np.float32(value)))
