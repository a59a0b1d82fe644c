"""Tokenizer and stop tokens of a Hugging Face folder."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from tsp_jax.errors import ConfigError, import_optional
from tsp_jax.files import Count, read_json
from tsp_jax.hf.chat import Message, read_tokenizer_config, render_chat
from tsp_jax.hf.process import TextError, TextProcess

CUT_OR_PAD = ("truncation", "padding")
"""settings in tokenizer.json, left by a training tool, that would truncate or pad every text"""
AT_RANDOM = ("dropout", "alpha", "nbest_size")
"""settings of the model in tokenizer.json that would make a text's tokenization random"""
REPLACEMENT = "\ufffd"
"""character shown for bytes that do not form a character, or not yet a complete one"""


class Around(NamedTuple):
    """The largest token id, and the ids that a tokenizer puts before and after every text."""

    largest: int
    before: list[int]
    after: list[int]


class Tokenizer:
    """Converts text to token ids and back, with the tokenizer.json of a folder.

    Raises:
      ConfigError: the file is missing or broken, or the package `tokenizers` is not installed.
    """

    def __init__(self, folder: str | Path):
        import_optional("tokenizers", "hf")
        self.folder = Path(folder)
        path = self.folder / "tokenizer.json"
        content = read_json(path, advice="use a Hugging Face folder with an intact copy of it")
        special = list(read_tokenizer_config(self.folder)[1].values())
        unknown = _unknown(content.get("model"))
        self._load = {"content": json.dumps(_plain(content)), "special": special, "unknown": unknown}
        self._process = TextProcess(self._load)
        try:
            self._process.call("encode", text="", special=True)
        except TextError as error:
            raise ConfigError(f"{path} is not a tokenizer ({error}); use an intact copy") from None

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Returns the token ids of a text; the name of a special token in the text becomes that token.

        `special` adds the tokens that the tokenizer puts around every text. Raises ConfigError if the tokenizer has no
        token for a part of the text, or fails.
        """
        return self._call("encode", text=text, special=special)

    def decode(self, tokens: Sequence[int]) -> str:
        """Returns the text of token ids, without special tokens."""
        return self._call("decode", tokens=list(map(int, tokens)))[0]

    def decoder(self) -> "Decoder":
        """Returns a decoder that takes one token at a time."""
        return Decoder(self)

    def chat(
        self, messages: str | Sequence[Message], *, tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None, template: str | None = None,
        add_generation_prompt: bool = True, **variables: Any,
    ) -> str:  # fmt: skip
        """Returns a conversation as text, rendered with a chat template of the folder.

        Args:
          messages: the text of one user message, or all messages, each with its role and content.
          tools: functions that the model may call, as JSON schemas.
          documents: texts that the model may use, each with its title and text.
          template: name of a template, where the folder has several; None: "tool_use" with tools, else "default".
          add_generation_prompt: end the text where the model's answer begins.
          variables: other variables that the template reads.

        Raises:
          ConfigError: the folder has no such template, the template fails, or the package `jinja2` is not installed.
        """
        return render_chat(
            self.folder, messages, tools=tools, documents=documents, template=template,
            add_generation_prompt=add_generation_prompt, variables=variables,
        )  # fmt: skip

    def around(self) -> Around:
        """Returns the largest token id, and the ids that the tokenizer puts before and after every text."""
        return Around(**self._call("around"))

    def find_cut(self, sides: Sequence[tuple[str, str]]) -> int | None:
        """Returns the first place at which a text may be cut, of some (text before, text after); None: none may be."""
        return self._call("find_cut", sides=sides)

    def process(self) -> TextProcess:
        """Returns another process with this tokenizer, for the call `encode_many`."""
        content = json.loads(self._load["content"])
        content.pop("post_processor", None)  # adds tokens around a text, and trims offsets
        return TextProcess({**self._load, "content": json.dumps(content)})

    def _call(self, name: str, **arguments: Any) -> Any:
        try:
            return self._process.call(name, **arguments)
        except TextError as error:
            raise ConfigError(f"the tokenizer in {self.folder} fails ({error}); use another text") from None


class Decoder:
    """Converts tokens to text, one token at a time. The returned pieces together are the text of all tokens.

    Bytes are held back until they form a character. The bytes of byte tokens are held back until another token follows,
    because only then is it known whether they form characters.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._before: list[int] = []
        """the last tokens whose text was returned; kept because a token's text may depend on the tokens before it"""
        self._waiting: list[int] = []
        self._shown = self._text = ""
        """`_shown`: text of the tokens in `_before`; `_text`: text of the tokens in `_before` and `_waiting`"""

    def step(self, token: int) -> str:
        """Returns the text that a token completes, which may be empty."""
        self._waiting.append(int(token))
        text, is_byte = self._tokenizer._call("decode", tokens=self._before + self._waiting)
        adds, self._text = text != self._text, text
        return "" if is_byte or not adds or text.endswith(REPLACEMENT) else self._take()

    def finish(self) -> str:
        """Returns the text held back after the last token, with `REPLACEMENT` for bytes that form no character."""
        return self._take()

    def _take(self) -> str:
        new = self._text[len(self._shown) :]
        self._before, self._waiting = self._waiting, []
        self._shown = self._text = self._tokenizer.decode(self._before)
        return new


def _plain(content: dict[str, Any]) -> dict[str, Any]:
    """tokenizer.json without the settings that make a text's ids depend on anything but the text."""
    plain = {key: value for key, value in content.items() if key not in CUT_OR_PAD}
    if isinstance(model := plain.get("model"), dict):
        plain["model"] = {key: value for key, value in model.items() if key not in AT_RANDOM}
    return plain


def _unknown(model: Any) -> str | None:
    """The unknown token; None if there is none, or if the model in tokenizer.json is malformed."""
    try:
        token = model["vocab"][model["unk_id"]][0] if model.get("type") == "Unigram" else model.get("unk_token")
    except (AttributeError, KeyError, IndexError, TypeError):
        return None
    return token if isinstance(token, str) else None


class _StopTokens(msgspec.Struct):
    eos_token_id: Count | list[Count] | None = None


def read_stop_tokens(folder: str | Path) -> tuple[int, ...]:
    """Returns the ids of the tokens that end a text, from generation_config.json or else config.json; () if none."""
    for name in ("generation_config.json", "config.json"):
        path = Path(folder) / name
        ids = read_json(path, _StopTokens).eos_token_id if path.exists() else None
        if ids is not None:
            return tuple(ids) if isinstance(ids, list) else (ids,)
    return ()
