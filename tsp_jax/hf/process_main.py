"""The program of the child process that runs a folder's tokenizer and chat templates (see `process`).

Each line of stdin is a call in JSON: {"call": name, ...arguments}; each line of stdout is {"result": ...} or
{"error": ...}. The program imports nothing from tsp_jax, so that it starts in a tenth of a second.
"""

import json
import re
import resource
import sys
from datetime import datetime
from typing import Any

CPU_S, CPU_S_PER_BYTE = 2, 2e-5
"""limit on a call's processor time in seconds: a constant, plus a time per byte of the request; tokenizers need about a
tenth of it"""
MEMORY_BYTES, MEMORY_PER_BYTE = 3 * 2**29, 500
LARGEST_TEXT = 2**24
"""most characters that a chat template or decoder may produce beyond those of its arguments"""


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
        size = len(json.dumps(variables))
        return bounded(environment().from_string(template).generate(**variables), LARGEST_TEXT + size)


def bounded(pieces: Any, largest: int = LARGEST_TEXT) -> str:
    """Joins pieces of text; raises MemoryError if they have more than `largest` characters."""
    texts, size = [], 0
    for piece in pieces:
        size += len(piece)
        if size > largest:
            raise MemoryError
        texts.append(piece)
    return "".join(texts)


def environment() -> Any:
    """A sandboxed Jinja environment that offers chat templates what transformers offers them."""
    import jinja2.ext
    from jinja2 import nodes, sandbox, utils

    class Generation(jinja2.ext.Extension):
        """``{% generation %}`` marks text that the model wrote; here it is rendered like any other text."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

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
