"""Texts and chats -> token ids, by the tokenizer of a Hugging Face folder, in several processes.

A document has the tokens that the tokenizer puts around a text. Where it puts none at the end, the end-of-text token
(`eos_token`) follows, so that a model learns where texts end. A chat has the tokens of its template alone.
"""

import base64
import functools
import hashlib
import itertools
import os
import re
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple, TypeVar

import numpy as np

from tsp_jax.config import DataConfig
from tsp_jax.errors import ConfigError, import_optional
from tsp_jax.files import read_bytes
from tsp_jax.hf.chat import chat_message, read_templates, read_tokenizer_config
from tsp_jax.hf.process import TextError, TextProcess
from tsp_jax.hf.process_main import CONTEXT
from tsp_jax.hf.tokenizer import Around, Tokenizer
from tsp_jax.text.encode import Encoder, Part, look_ahead
from tsp_jax.text.readers import BLOCK, Chat, Document, Meter, Place, decode, read_documents
from tsp_jax.text.sources import Source

T = TypeVar("T")
LONGEST = 1 << 20
"""characters of a text that are encoded at once; a longer one is cut where that changes no token"""
BATCH = 1 << 18
"""characters that a process is given at a time, unless one text is longer"""
MOST_PROCESSES = 64
_CUTS = 32  # places that are tried at a time
_END_OF_LINE, _SPACE = re.compile(r"(?<=\w)(?=\n)"), re.compile(r"(?<=\w)(?= \w)")
_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


class _Item(NamedTuple):
    """A text, or a conversation, to encode at once."""

    content: tuple[str, str] | Chat
    """(the characters before the text, the text), or a conversation"""
    size: int
    """characters, about"""
    is_first: bool
    is_last: bool
    """whether it is the first, and the last, of its document"""
    document: Document


class TokenEncoder(Encoder):
    """Texts and chats, by the tokenizer and the chat template in the folder `data.tokenizer`.

    Raises:
      ConfigError: the folder has no tokenizer, or the package `tokenizers` is not installed.
    """

    def __init__(self, data: DataConfig, sources: Sequence[Source]):
        super().__init__(data, sources)
        self._folder = Path(os.path.expanduser(data.tokenizer))
        config, self._named = read_tokenizer_config(self._folder)
        self._templates = read_templates(self._folder, config)

    @functools.cached_property
    def _tokenizer(self) -> Tokenizer:
        return Tokenizer(self._folder)

    @functools.cached_property
    def _around(self) -> Around:
        """What stands before and after every text, with the end-of-text token if nothing stands after it."""
        around, end = self._tokenizer.around(), self._named.get("eos_token")
        return around if around.after or not end else around._replace(after=self._tokenizer.encode(end, special=False))

    @property
    def largest(self) -> tuple[int, str]:
        return self._around.largest, f"the tokenizer in {self._folder}"

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.uint16 if self._around.largest < 2**16 else np.uint32)

    @property
    def key(self) -> list[str]:
        data = self._data
        files = [self._folder / name for name in _FILES]
        content = [hashlib.sha256(read_bytes(path)).hexdigest() if path.exists() else "" for path in files]
        return [*content, data.text_field, data.loss, data.invalid_utf8, str(sorted(self._templates.items()))]

    def parts(self, start: Place, meter: Meter) -> Iterator[Part]:
        count = min(len(os.sched_getaffinity(0)), MOST_PROCESSES)
        processes = [self._tokenizer.process() for _ in range(count)]
        free = SimpleQueue[TextProcess]()
        for process in processes:
            free.put(process)
        threads = ThreadPoolExecutor(count, thread_name_prefix="tsp_tokenize")
        batches = _batches(self._items(read_documents(self._data, self._sources, start, meter)))
        unknown = 0
        try:
            for parts, new in _in_order((threads.submit(self._encode, free, batch) for batch in batches), 2 * count):
                unknown += new
                yield from parts
        finally:
            threads.shutdown(cancel_futures=True)
            for process in processes:
                process.close()
        if unknown:
            print(f"{unknown:,} tokens are the unknown token of the tokenizer in {self._folder}", file=sys.stderr)

    def _items(self, documents: Iterator[Document]) -> Iterator[_Item]:
        for document in documents:
            content = document.content
            if isinstance(content, dict):
                size = sum(len(str(message.get("content"))) for message in content["messages"])
                yield _Item(self._chat(content, document.where), size, True, True, document)
                continue
            if isinstance(content, str):
                texts = (content[start : start + BLOCK] for start in range(0, len(content), BLOCK))
            else:
                texts = decode(self._data, content, document.where)
            is_first = True
            for (context, text), is_last in look_ahead(self._divide(texts)):
                yield _Item((context, text), len(text), is_first, is_last, document)
                is_first = False

    def _chat(self, chat: Chat, where: str) -> dict[str, Any]:
        """What `encode_many` is given of a conversation."""
        import_optional("jinja2", "hf")
        name = "tool_use" if chat["tools"] is not None and "tool_use" in self._templates else "default"
        if name not in self._templates:
            raise ConfigError(
                f"data.tokenizer={self._data.tokenizer} has no chat template for the messages in {where}; "
                "use a folder with chat_template.jinja, or --data.text-field NAME"
            )
        return {"template": name, "messages": list(map(chat_message, chat["messages"])), "tools": chat["tools"]}

    def _divide(self, texts: Iterator[str]) -> Iterator[tuple[str, str]]:
        """Yields (the characters before, text) for parts of a text that may be encoded apart; none for no text."""
        context = text = ""
        searched = LONGEST // 2
        for more in texts:
            text += more
            while len(text) > LONGEST:
                place = self._find_cut(text, searched)
                if place is None:
                    searched = len(text) - CONTEXT
                    break
                yield context, text[:place]
                context, text, searched = text[place - CONTEXT : place], text[place:], LONGEST // 2
        if text:
            yield context, text

    def _find_cut(self, text: str, start: int) -> int | None:
        """A place from `start` on at which the text may be cut, at the end of a line or else of a word."""
        for kind in (_END_OF_LINE, _SPACE):
            found = itertools.islice(kind.finditer(text, start, len(text) - CONTEXT), _CUTS)
            places = [match.start() for match in found]
            sides = [(text[place - 2 * CONTEXT : place], text[place : place + CONTEXT]) for place in places]
            if sides and (number := self._tokenizer.find_cut(sides)) is not None:
                return places[number]
        return None

    def _encode(self, free: SimpleQueue[TextProcess], items: list[_Item]) -> tuple[list[Part], int]:
        """(parts of the documents, how many of their tokens are the unknown token)."""
        process = free.get()
        try:
            try:
                return self._ask(process, items)
            except TextError:  # one of them fails, or all together need too much memory: one at a time
                answers = [self._ask_one(process, item) for item in items]
                return [part for parts, _ in answers for part in parts], sum(unknown for _, unknown in answers)
        finally:
            free.put(process)

    def _ask_one(self, process: TextProcess, item: _Item) -> tuple[list[Part], int]:
        try:
            return self._ask(process, [item])
        except TextError as error:
            what, fix = "tokenizer in", "divide the text"
            if isinstance(item.content, dict):
                what, fix = "chat template or tokenizer in", "correct its messages"
            raise ConfigError(f"the {what} {self._folder} fails for {item.document.where} ({error}); {fix}") from None

    def _ask(self, process: TextProcess, items: list[_Item]) -> tuple[list[Part], int]:
        answer = process.call(
            "encode_many", items=[item.content for item in items], templates=self._templates, variables=self._named,
            assistant=self._data.loss == "assistant",
        )  # fmt: skip
        ids = np.frombuffer(base64.b64decode(answer["ids"]), np.uint32).astype(self.dtype)
        borders = np.cumsum(answer["lengths"])[:-1]
        losses = [None] * len(items)
        if answer["loss"]:
            losses = np.split(np.frombuffer(base64.b64decode(answer["loss"]), np.uint8), borders)
        parts = map(self._part, items, np.split(ids, borders), losses)
        return list(parts), answer["unknown"]

    def _part(self, item: _Item, ids: np.ndarray, loss: np.ndarray | None) -> Part:
        document = item.document
        if not isinstance(item.content, dict):
            before, after = self._around.before, self._around.after
            has_end = len(after) == 1 and ids[-1:].tolist() == after
            parts = (before if item.is_first else [], ids, after if item.is_last and not has_end else [])
            ids = np.concatenate(parts).astype(self.dtype)
            loss = None
        return Part(ids, loss, document.name, item.is_last, document.where, document.after)


def _in_order(futures: Iterator[Future[T]], ahead: int) -> Iterator[T]:
    """Yields the results of futures, which are made up to `ahead` before the one that is awaited."""
    pending = deque[Future[T]]()
    for future in futures:
        pending.append(future)
        if len(pending) > ahead:
            yield pending.popleft().result()
    yield from (future.result() for future in pending)


def _batches(items: Iterator[_Item]) -> Iterator[list[_Item]]:
    batch, size = [], 0
    for item in items:
        if batch and size + item.size > BATCH:
            yield batch
            batch, size = [], 0
        batch.append(item)
        size += item.size
    if batch:
        yield batch
