"""Tokenizer, stop tokens and chat template of a Hugging Face folder."""

from functools import partial
from pathlib import Path
from typing import Any

from tsp_jax.errors import ConfigError, import_optional
from tsp_jax.files import read_json


class Tokenizer:
    """Converts text to token ids and back, by the tokenizer.json of a folder.

    Raises:
      ConfigError: the file is missing or broken, or the package `tokenizers` is not installed.
    """

    def __init__(self, folder: str | Path):
        tokenizers = import_optional("tokenizers", "hf")
        self.folder = Path(folder)
        path = self.folder / "tokenizer.json"
        read_json(path)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises nothing narrower
            raise ConfigError(f"{path} is not a tokenizer ({error}); use an intact copy") from None
        self._new_stream = partial(tokenizers.decoders.DecodeStream, skip_special_tokens=True)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Returns the token ids of a text; names of special tokens in it become these tokens.

        `special` adds the tokens that the tokenizer puts around every text. Raises ConfigError if no token stands for a
        part of the text.
        """
        encoding = self._tokenizer.encode(text, add_special_tokens=special)
        unknown = getattr(self._tokenizer.model, "unk_token", None)
        for token, (start, end) in zip(encoding.tokens, encoding.offsets, strict=True):
            if token == unknown and text[start:end] not in ("", unknown):
                raise ConfigError(
                    f"the tokenizer in {self.folder} has no token for {text[start:end]!r:.80}; use a text without it"
                )
        return encoding.ids

    def decode(self, tokens: list[int]) -> str:
        """Returns the text of token ids, without special tokens."""
        return self._tokenizer.decode(tokens)

    def decoder(self) -> "Decoder":
        """Returns a decoder of one token at a time."""
        return Decoder(self._tokenizer, self._new_stream())

    def chat(self, message: str) -> str:
        """Wraps a user's message in the folder's chat template, up to where the answer begins.

        Raises:
          ConfigError: the folder has no template, the template fails, or the package `jinja2` is not installed.
        """
        jinja2, sandbox = (import_optional(name, "hf") for name in ("jinja2", "jinja2.sandbox"))
        path = self.folder / "tokenizer_config.json"
        config = read_json(path) if path.is_file() else {}
        file = self.folder / "chat_template.jinja"
        template = file.read_text(encoding="utf-8") if file.is_file() else config.get("chat_template")
        if not isinstance(template, str):
            raise ConfigError(f"{self.folder} has no chat template; use the prompt alone, without --chat")
        tokens = {key: config.get(key) or "" for key in ("bos_token", "eos_token")}  # strings, or objects
        names = {key: token.get("content", "") if isinstance(token, dict) else token for key, token in tokens.items()}
        messages = [{"role": "user", "content": message}]
        try:
            compiled = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(template)
            return compiled.render(messages=messages, add_generation_prompt=True, **names)
        except jinja2.TemplateError as error:
            raise ConfigError(f"the chat template of {self.folder} fails ({error}); use the prompt alone") from None


class Decoder:
    """Converts one token at a time to text; a character of several tokens is returned with the last of them."""

    def __init__(self, tokenizer: Any, stream: Any):
        self._tokenizer, self._stream = tokenizer, stream
        self._tokens: list[int] = []
        self._text = ""

    def step(self, token: int) -> str:
        """Returns the text that a token completes, which may be empty."""
        self._tokens.append(token)
        text = self._stream.step(self._tokenizer, token) or ""
        self._text += text
        return text

    def finish(self) -> str:
        """Returns the rest of the text after the last token: characters that were not completed."""
        whole = self._tokenizer.decode(self._tokens)
        return whole[len(self._text) :] if whole.startswith(self._text) else ""


def read_stop_tokens(folder: str | Path) -> tuple[int, ...]:
    """Returns the ids of the tokens that end a text, from generation_config.json or else config.json; () if none."""
    for name in ("generation_config.json", "config.json"):
        path = Path(folder) / name
        ids = read_json(path).get("eos_token_id") if path.is_file() else None
        if ids is None:
            continue
        ids = ids if isinstance(ids, list) else [ids]
        if not all(type(token) is int and token >= 0 for token in ids):
            raise ConfigError(f"{path}: eos_token_id={ids} is neither a token id nor a list of them; use a number")
        return tuple(ids)
    return ()
