"""Convert the tokenizer of a GGUF file to tokenizer.json and tokenizer_config.json."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from tsp_jax.errors import ConfigError
from tsp_jax.files import Count, check_json

SPLITS: dict[str, list[dict[str, Any]]] = {"gpt-2": [], "smollm": [{"type": "Digits", "individual_digits": True}]}
"""name of the tokenizer in GGUF -> pre-tokenizers that split a text before byte-level BPE"""
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
CONTROL, USER_DEFINED = 3, 4
"""types of tokens that are matched before pre-tokenization"""
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
TEMPLATE = "tokenizer.chat_template"


class GGUFTokenizer(msgspec.Struct, kw_only=True):
    """The tokenizer's metadata, as far as it is read. Defaults are those of llama.cpp (src/llama-vocab.cpp)."""

    kind: str = msgspec.field(name="tokenizer.ggml.model")
    pre: str = msgspec.field(name="tokenizer.ggml.pre", default="")
    tokens: list[str] = msgspec.field(name="tokenizer.ggml.tokens")
    types: list[int] = msgspec.field(name="tokenizer.ggml.token_type")
    merges: list[str] = msgspec.field(name="tokenizer.ggml.merges")
    bos: Count | None = msgspec.field(name="tokenizer.ggml.bos_token_id", default=None)
    eos: Count | None = msgspec.field(name="tokenizer.ggml.eos_token_id", default=None)
    end_of_turn: Count | None = msgspec.field(name="tokenizer.ggml.eot_token_id", default=None)
    end_of_message: Count | None = msgspec.field(name="tokenizer.ggml.eom_token_id", default=None)
    padding: Count | None = msgspec.field(name="tokenizer.ggml.padding_token_id", default=None)
    add_bos: bool = msgspec.field(name="tokenizer.ggml.add_bos_token", default=False)
    add_eos: bool = msgspec.field(name="tokenizer.ggml.add_eos_token", default=False)
    add_space: bool = msgspec.field(name="tokenizer.ggml.add_space_prefix", default=False)
    """a setting of SentencePiece tokenizers; not used, since only byte-level BPE is read"""

    def special_ids(self) -> dict[str, int | list[int]]:
        """Key of config.json -> id of the special token; a list of ids if several tokens end a text."""
        ends = dict.fromkeys(token for token in (self.eos, self.end_of_turn, self.end_of_message) if token is not None)
        ids = {"bos_token_id": self.bos, "eos_token_id": list(ends) or None, "pad_token_id": self.padding}
        found = {key: value for key, value in ids.items() if value is not None}
        return {key: value[0] if isinstance(value, list) and len(value) == 1 else value for key, value in found.items()}


def read_tokenizer(path: str | Path, fields: Mapping[str, Any]) -> GGUFTokenizer:
    """Reads the tokenizer from a GGUF file's metadata; raises ConfigError if it is incomplete or not supported."""
    found = check_json(dict(fields), str(path), GGUFTokenizer, "use a complete file")
    if found.kind != "gpt2" or found.pre not in SPLITS:
        names = f"{found.kind:.80}, {found.pre:.80}"
        raise ConfigError(f"{path}: tokenizer {names} is not supported; use gpt2 with {', '.join(SPLITS)}")
    vocab = set(found.tokens)
    if len(vocab) != len(found.tokens) or len(found.types) != len(found.tokens):
        counts = f"{len(found.tokens)} tokens, {len(vocab)} of them different, and {len(found.types)} types"
        raise ConfigError(f"{path}: tokenizer.ggml.tokens has {counts}; use an intact file")
    for merge in found.merges:
        left, _, right = merge.partition(" ")
        if not {left, right, left + right} <= vocab:
            raise ConfigError(f"{path}: tokenizer.ggml.merges has {merge!r:.80}, of no tokens; use an intact file")
    for name in ("bos", "eos", "end_of_turn", "end_of_message", "padding"):
        if (token := getattr(found, name)) is not None and token >= len(vocab):
            key = msgspec.structs.fields(GGUFTokenizer)[GGUFTokenizer.__struct_fields__.index(name)].encode_name
            raise ConfigError(f"{path}: {key}={token} is no token; use a file with one below {len(vocab)}")
    for name in ("bos", "eos"):
        if getattr(found, f"add_{name}") and getattr(found, name) is None:
            raise ConfigError(f"{path}: add_{name}_token without {name}_token_id; use a complete file")
    return found


def tokenizer_json(found: GGUFTokenizer) -> dict[str, Any]:
    """Returns the content of `tokenizer.json` (of the tokenizers library)."""
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": number, "content": token, **FLAGS, "special": kind == CONTROL}
            for number, (token, kind) in enumerate(zip(found.tokens, found.types, strict=True))
            if kind in (CONTROL, USER_DEFINED)
        ],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*SPLITS[found.pre], BYTES]},
        "post_processor": _around(found),
        "decoder": BYTES,
        "model": {
            "type": "BPE",
            "vocab": {token: number for number, token in enumerate(found.tokens)},
            "merges": [merge.split(" ") for merge in found.merges],
        },
    }


def _around(found: GGUFTokenizer) -> dict[str, Any] | None:
    """The post-processor that adds tokens before and after a text; None if none are added."""
    first = [found.bos] if found.add_bos and found.bos is not None else []
    last = [found.eos] if found.add_eos and found.eos is not None else []
    names = {number: found.tokens[number] for number in first + last}
    if not names:
        return None
    text = {"Sequence": {"id": "A", "type_id": 0}}
    pieces = {number: {"SpecialToken": {"id": name, "type_id": 0}} for number, name in names.items()}
    return {
        "type": "TemplateProcessing",
        "single": [*(pieces[number] for number in first), text, *(pieces[number] for number in last)],
        "pair": [text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {name: {"id": name, "ids": [number], "tokens": [name]} for number, name in names.items()},
    }


def tokenizer_config(path: str | Path, found: GGUFTokenizer, fields: Mapping[str, Any], context: int) -> dict[str, Any]:
    """Returns the content of `tokenizer_config.json`, with the chat templates of the GGUF file."""
    ids = {"bos_token": found.bos, "eos_token": found.eos, "pad_token": found.padding}
    config: dict[str, Any] = {name: found.tokens[number] for name, number in ids.items() if number is not None}
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config["model_max_length"] = context
    keys = {
        key: key.removeprefix(TEMPLATE).removeprefix(".") or "default" for key in fields if key.startswith(TEMPLATE)
    }
    for key in keys:
        if key != f"{TEMPLATE}s" and not isinstance(fields[key], str):
            raise ConfigError(f"{path}: {key:.80}={fields[key]!r:.80} is no text; use an intact file")
    named = {name: fields[key] for key, name in keys.items() if key != f"{TEMPLATE}s"}  # that lists the others' names
    if named:
        config["chat_template"] = [{"name": name, "template": text} for name, text in named.items()]
    if list(named) == ["default"]:
        config["chat_template"] = named["default"]
    return config
