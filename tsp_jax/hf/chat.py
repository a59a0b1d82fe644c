"""Chat templates of a Hugging Face folder and the variables that they receive, as in transformers.

Templates are programs in Jinja; `process` runs them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from tsp_jax.errors import ConfigError, import_optional
from tsp_jax.files import read_json, read_text
from tsp_jax.hf.process import TextError, TextProcess

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
REASONING = ("reasoning_content", "thinking", "reasoning")
"""keys under which a message may have its reasoning text; templates are given it under the first two"""

Message = Mapping[str, Any]
"""a message: its role, its content (a text, or a list of parts), and what else the template reads"""


class _Token(msgspec.Struct):
    content: str


class _Template(msgspec.Struct):
    name: str
    template: str


class _NamedTokens(msgspec.Struct):
    bos_token: str | _Token | None = None
    eos_token: str | _Token | None = None
    unk_token: str | _Token | None = None
    sep_token: str | _Token | None = None
    pad_token: str | _Token | None = None
    cls_token: str | _Token | None = None
    mask_token: str | _Token | None = None

    def texts(self) -> dict[str, str]:
        found = {name: getattr(self, name) for name in NAMED_TOKENS}
        texts = {name: token.content if isinstance(token, _Token) else token for name, token in found.items()}
        return {name: text for name, text in texts.items() if text is not None}


class TokenizerConfig(_NamedTokens):
    """The keys of tokenizer_config.json that are read."""

    chat_template: str | list[_Template] | dict[str, str] | None = None
    added_tokens_decoder: dict[str, Any] | None = None


def read_tokenizer_config(folder: Path) -> tuple[TokenizerConfig, dict[str, str]]:
    """Returns the keys of tokenizer_config.json, and the texts of special tokens by name, such as bos_token.

    Reads tokenizer_config.json and special_tokens_map.json. Either file may be absent; FileError is raised if one is
    damaged.
    """
    path, names = folder / "tokenizer_config.json", folder / "special_tokens_map.json"
    config = read_json(path, TokenizerConfig) if path.exists() else TokenizerConfig()
    tokens = config.texts()
    if config.added_tokens_decoder is None and names.exists():  # a newer tokenizer_config.json replaces this file
        tokens |= read_json(names, _NamedTokens).texts()
    return config, tokens


def read_templates(folder: Path, config: TokenizerConfig) -> dict[str, str]:
    """Returns chat templates by name; separate template files take precedence over tokenizer_config.json."""
    files = {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (folder / "chat_template.jinja").exists():
        files["default"] = folder / "chat_template.jinja"
    if files:
        return {name: read_text(path) for name, path in files.items()}
    found = config.chat_template
    if isinstance(found, list):
        return {one.name: one.template for one in found}
    return {"default": found} if isinstance(found, str) else found or {}


def choose_template(folder: Path, templates: Mapping[str, str], name: str | None, tools: bool) -> str:
    """Returns the template `name`; for None, "tool_use" if there are tools and such a template, else "default"."""
    if not templates:
        raise ConfigError(f"{folder} has no chat template; use the prompt alone, without --chat")
    wanted = name or ("tool_use" if tools and "tool_use" in templates else "default")
    if wanted not in templates:
        raise ConfigError(f"{folder} has no chat template {wanted!r:.80}; use template={' or '.join(templates)!s:.200}")
    return templates[wanted]


def render_chat(
    folder: Path, messages: str | Sequence[Message], *, tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None, template: str | None = None,
    add_generation_prompt: bool = True, variables: Mapping[str, Any] = {},
) -> str:  # fmt: skip
    """Returns a conversation as text, rendered with a chat template of the folder; see `Tokenizer.chat`."""
    import_optional("jinja2", "hf")
    config, tokens = read_tokenizer_config(folder)
    chosen = choose_template(folder, read_templates(folder, config), template, tools is not None)
    messages = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
    if not messages or not all(isinstance(message, Mapping) for message in messages):
        raise ConfigError(f"messages={messages!r:.80} are no messages; use [{{'role': 'user', 'content': 'Hello'}}]")
    given = {**tokens, **variables, "tools": tools, "documents": documents}
    given |= {"messages": list(map(chat_message, messages)), "add_generation_prompt": add_generation_prompt}
    try:
        return TextProcess().call("render", template=chosen, variables=given)
    except TextError as error:
        raise ConfigError(f"the chat template of {folder} fails ({error}); use the prompt alone") from None


def chat_message(message: Message) -> dict[str, Any]:
    """Returns the message without fields that are None, and with its reasoning under both keys that templates read."""
    fields = {key: value for key, value in message.items() if value is not None}
    thought = next((fields[key] for key in REASONING if key in fields), None)
    return fields if thought is None else {"thinking": thought, **fields, "reasoning_content": thought}
