"""The program of the child process that runs a folder's tokenizer and chat templates (see `process`).

Each line of stdin is a call in JSON: {"call": name, ...arguments}; each line of stdout is {"result": ...} or
{"error": ...}. The program imports nothing from tsp_jax, so that it starts in a tenth of a second.
"""

import base64
import functools
import itertools
import json
import re
import resource
import secrets
import sys
from array import array
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

CPU_S, CPU_S_PER_BYTE = 2, 2e-5
"""limit on a call's processor time in seconds: a constant, plus a time per byte of the request; tokenizers need about a
tenth of it"""
MEMORY_BYTES, MEMORY_PER_BYTE = 3 * 2**29, 500
LARGEST_TEXT = 2**24
"""most characters that a chat template or decoder may produce beyond those of its arguments"""
CONTEXT = 256
"""characters on each side of a place in a text that decide whether the text may be cut there"""
BEGINS = (0, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89)
"""where the text before such a place is taken to begin"""
MARKS = (f"\ue000{secrets.token_hex(8)}\ue001", f"\ue001{secrets.token_hex(8)}\ue000")
"""marks around what a template says that the model wrote; no template knows them"""
Span = tuple[int, int]
"""characters [start, stop) of a text"""


def allow(request_bytes: int) -> None:
    """Limits processor time and memory from now on; the kernel ends the process if it needs more."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = used.ru_utime + used.ru_stime + CPU_S + CPU_S_PER_BYTE * request_bytes
    limits = {resource.RLIMIT_CPU: int(seconds) + 1, resource.RLIMIT_CORE: 0}
    limits[resource.RLIMIT_AS] = MEMORY_BYTES + MEMORY_PER_BYTE * request_bytes
    for kind, limit in limits.items():
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


class Text:
    """The calls that the process answers; `load` must come before all others except `render`."""

    tokenizer: Any
    unknown: int | None

    def load(self, content: str, special: list[str], unknown: str | None) -> None:
        """Makes a tokenizer from the text of tokenizer.json.

        `special`: tokens that are special, whatever `content` says; `unknown`: the token for text that has no token.
        """
        import tokenizers

        self.tokenizer = tokenizers.Tokenizer.from_str(content)
        self.unknown = self.tokenizer.token_to_id(unknown) if unknown else None
        known = {token.content for token in self.tokenizer.get_added_tokens_decoder().values()}
        self.tokenizer.add_special_tokens([token for token in special if token not in known])

    def encode(self, text: str, special: bool) -> list[int]:
        """Returns token ids; fails if a part of the text can only be encoded as the unknown token."""
        encoding = self.tokenizer.encode(text, add_special_tokens=special)
        if self.unknown in encoding.ids:
            name = self.tokenizer.id_to_token(self.unknown)
            for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
                if token == self.unknown and text[start:end] not in ("", name):
                    raise ValueError(f"it has no token for {text[start:end]!r:.80}")
        return encoding.ids

    def decode(self, tokens: list[int]) -> tuple[str, bool]:
        """(text, whether the last token is a byte token: one byte of a character that has no token of its own)."""
        last = self.tokenizer.id_to_token(tokens[-1]) if tokens else None
        return bounded([self.tokenizer.decode(tokens)]), bool(re.fullmatch("<0x[0-9A-Fa-f]{2}>", last or ""))

    def render(self, template: str, variables: dict[str, Any]) -> str:
        """The text that a chat template makes."""
        return _render(compiled(template), variables)

    def around(self) -> dict[str, Any]:
        """The largest token id, and the ids that the tokenizer puts before and after every text."""
        encoding = self.tokenizer.encode("a", add_special_tokens=True)
        added = list(map(bool, encoding.special_tokens_mask))
        first = added.index(False) if False in added else len(added)
        last = max((place for place, one in enumerate(added) if not one), default=len(added) - 1)
        largest = max(self.tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        return {"largest": largest, "before": encoding.ids[:first], "after": encoding.ids[last + 1 :]}

    def find_cut(self, sides: list[tuple[str, str]]) -> int | None:
        """The first of some places at which a text may be cut; None: at none of them.

        Its tokens near the place must be the same with and without the cut, wherever the text before it begins: in
        ``a a a a`` a token of two words may end at a place or reach over it. What stands behind the cut is encoded
        together with the `CONTEXT` characters before it, as `encode_many` does.

        Args:
          sides: for each place, 2 `CONTEXT` characters before it, and `CONTEXT` characters after it.
        """
        for number, (left, right) in enumerate(sides):
            behind = self._after(left[-CONTEXT:], right)
            starts = (left[begin:] for begin in BEGINS)
            if all(self._ids(start + right) == [*self._ids(start), *behind] for start in starts):
                return number
        return None

    def encode_many(
        self, items: list[Any], templates: dict[str, str], variables: dict[str, Any], assistant: bool
    ) -> dict[str, Any]:
        """Encodes texts and conversations without the tokens that the tokenizer puts around a text.

        Args:
          items: a pair (the text before it, text), or a conversation: the name of its template, and variables.
          templates: chat templates by name.
          variables: what templates are given besides.
          assistant: find out which tokens of conversations the assistant wrote.

        Returns:
          lengths: number of ids of each item; ids: all of them, base64 of uint32; loss: a byte for each id, base64: 1,
          or 0 where someone else than the assistant wrote the token; "" if all are 1; unknown: number of tokens that
          are the unknown token.
        """
        lengths, ids, loss = [], array("I"), bytearray()
        for item in items:
            if isinstance(item, dict):
                given = {"documents": None, **variables, **item, "add_generation_prompt": False}
                new, mask = self._chat(templates[given.pop("template")], given, assistant)
            else:
                new = self._after(*item)
                mask = bytes([1]) * len(new)
            lengths.append(len(new))
            ids.extend(new)
            loss += mask
        return {
            "lengths": lengths, "ids": base64.b64encode(ids).decode(),
            "loss": base64.b64encode(loss).decode() if 0 in loss else "",
            "unknown": 0 if self.unknown is None else ids.count(self.unknown),
        }  # fmt: skip

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids if text else []

    def _after(self, context: str, text: str) -> list[int]:
        """The ids of a text that stands behind another one."""
        return self._ids(context + text)[len(self._ids(context)) :]

    def _chat(self, template: str, variables: dict[str, Any], assistant: bool) -> tuple[list[int], bytes]:
        """(ids of a conversation, a byte for each: 1 where the assistant wrote the token's first character)."""
        if not assistant:
            ids = self._ids(_render(compiled(template), variables))
            return ids, bytes([1]) * len(ids)
        text, spans = assistant_spans(template, variables)
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        mask = bytes(any(a <= start < b for a, b in spans) for start, _ in encoding.offsets)
        if 1 not in mask:
            raise ValueError("the assistant has written none of it; --data.loss all counts every token")
        return encoding.ids, mask


def assistant_spans(template: str, variables: dict[str, Any]) -> tuple[str, list[Span]]:
    """Returns a conversation as text, and what the assistant wrote in it.

    That is what the template marks by ``{% generation %}``. If it marks nothing, it is what each assistant message adds
    to the messages before it and the prompt for an answer; ValueError is raised if that is no part of the text.
    """
    if re.search(r"{%[-+]?\s*generation\b", template):
        pieces = re.split("|".join(MARKS), _render(compiled(template, MARKS), variables))
        ends = list(itertools.accumulate(map(len, pieces)))
        return "".join(pieces), list(zip(ends[::2], ends[1::2], strict=False))
    made = compiled(template)

    def render(messages: Sequence[dict[str, Any]], prompt: bool = False) -> str:
        return _render(made, variables | {"messages": messages, "add_generation_prompt": prompt})

    messages = variables["messages"]
    text = render(messages)
    turns = [number for number, message in enumerate(messages) if message.get("role") == "assistant"]
    return text, [_turn(text, messages, number, render) for number in turns]


def _turn(text: str, messages: list[dict[str, Any]], number: int, render: Callable[..., str]) -> Span:
    """What message `number` adds to the text of all messages."""
    start, turn = render(messages[:number], True), render(messages[: number + 1])
    if text.startswith(turn) and turn.startswith(start):
        return len(start), len(turn)
    # Some templates shorten an answer when another one follows it (its reasoning is left out). What stands behind its
    # content ends it in both texts, and a mark in place of the content tells where that is.
    mark = MARKS[0]
    marked = {**messages[number], "content": mark}
    last = render([*messages[:number], marked]).partition(mark)[2]
    before, found, after = render([*messages[:number], marked, *messages[number + 1 :]]).partition(mark)
    stop = len(text) - len(after)
    same = found and text.startswith(start) and before.startswith(start) and text.endswith(after)
    if not (same and len(before) <= stop and text.startswith(before) and after.startswith(last)):
        raise ValueError(f"messages[{number}]: the text before the answer is no prefix of the whole text")
    return len(start), stop + len(last)


@functools.lru_cache(maxsize=8)
def compiled(template: str, marks: tuple[str, str] = ("", "")) -> Any:
    """A chat template, ready to be rendered; see `environment`."""
    return environment(marks).from_string(template)


def _render(template: Any, variables: dict[str, Any]) -> str:
    return bounded(template.generate(**variables), LARGEST_TEXT + len(json.dumps(variables)))


def bounded(pieces: Any, largest: int = LARGEST_TEXT) -> str:
    """Joins pieces of text; raises MemoryError if they have more than `largest` characters."""
    texts, size = [], 0
    for piece in pieces:
        size += len(piece)
        if size > largest:
            raise MemoryError
        texts.append(piece)
    return "".join(texts)


def environment(marks: tuple[str, str] = ("", "")) -> Any:
    """A sandboxed Jinja environment that offers chat templates what transformers offers them.

    `marks`: texts that are put before and after what stands in ``{% generation %}``, which the model wrote.
    """
    import jinja2.ext
    from jinja2 import nodes, sandbox, utils

    class Generation(jinja2.ext.Extension):
        """``{% generation %}`` marks text that the model wrote."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            opened, closed = (nodes.Output([nodes.TemplateData(mark)], lineno=line) for mark in marks)
            return nodes.Scope([opened, *body, closed], lineno=line)

    class Namespace(utils.Namespace):
        """A Jinja namespace that refuses names that begin with an underscore, as Python's internal attributes do."""

        def __setitem__(self, name: str, value: Any) -> None:
            if name.startswith("_"):
                raise jinja2.exceptions.SecurityError(f"namespace has no {name!r:.80}")
            super().__setitem__(name, value)

    def namespace(**values: Any) -> Namespace:
        made = Namespace()
        for name, value in values.items():
            made[name] = value
        return made

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def to_json(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        """The filter `tojson`; Jinja's own one escapes HTML."""
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    made = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    made.filters["tojson"] = to_json
    made.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "namespace": namespace,
        "dict": lambda *args, **values: dict(*args, **values),
    }
    return made


def answer(text: Text, line: bytes) -> dict[str, Any]:
    """Returns the answer to a call; any exception, a panic of tokenizers included, becomes a one-line error."""
    try:
        arguments = json.loads(line)
        return {"result": getattr(text, arguments.pop("call"))(**arguments)}
    except MemoryError:
        return {"error": "it needs too much memory"}
    except BaseException as error:  # a panic of tokenizers is no Exception
        reason = " ".join(str(error).split()) or "no reason given"
        return {"error": f"{'' if type(error) is ValueError else f'{type(error).__name__}: '}{reason:.300}"}


def main() -> None:
    """Answers calls until stdin ends."""
    text = Text()
    for line in sys.stdin.buffer:
        allow(len(line))
        sys.stdout.write(json.dumps(answer(text, line)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
