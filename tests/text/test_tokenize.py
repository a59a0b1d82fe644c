"""Texts and chats -> the ids of the folder's tokenizer, whole or cut, and which of them the assistant wrote."""

import json
import random

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from tests.builders.tokenizers import KINDS, SPECIAL, characters, save_tokenizer
from tsp_jax.config import DataConfig
from tsp_jax.errors import ConfigError
from tsp_jax.text import tokenize
from tsp_jax.text.readers import Meter, Place
from tsp_jax.text.sources import find_sources
from tsp_jax.text.tokenize import TokenEncoder

EOS = {"tokenizer_config.json": {"eos_token": "</s>"}}


@pytest.fixture
def encode(tmp_path):
    """Encodes rows with a tokenizer, and other files in its folder: a list of (ids, loss) of each document."""

    def call(made: Tokenizer, rows: list[dict], files: dict | None = None, template: str = "", **changes) -> list:
        folder = save_tokenizer(tmp_path / "tokenizer", made, files)
        if template:
            (folder / "chat_template.jinja").write_text(template)
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = DataConfig(files=str(tmp_path / "rows.jsonl"), tokenizer=str(folder), **changes)
        sources = find_sources(data)[1]
        documents, parts = [], []
        for part in TokenEncoder(data, sources).parts(Place(), Meter(sources)):
            parts.append(part)
            if part.is_last:
                loss = [np.ones(len(one.ids)) if one.loss is None else one.loss for one in parts]
                documents.append((np.concatenate([one.ids for one in parts]).tolist(), np.concatenate(loss).tolist()))
                parts = []
        assert not parts
        return documents

    return call


def words(count: int, chance: random.Random, ends: str = "  \n") -> str:
    """A text of words of a few letters, some before the end of a line."""
    return "".join("".join(chance.choices("abcdehilotHs", k=4)) + chance.choice(ends) for _ in range(count))


def merges() -> Tokenizer:
    """Byte pairs that are merged across words and lines, since nothing splits the text first."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    made.train_from_iterator([words(3000, random.Random(1))], trainer)
    return made


# ------------------------------------------------------------------------------------------------ texts


def test_documents_are_in_order_and_encoded_as_by_the_package(encode, monkeypatch):
    monkeypatch.setattr(tokenize, "BATCH", 300)
    texts = [words(number % 40, random.Random(number)) for number in range(200)]
    made = merges()
    found = encode(made, [{"text": text} for text in texts])
    assert [ids for ids, _ in found] == [made.encode(text).ids for text in texts if text]


@pytest.mark.parametrize(
    ("template", "files", "before", "after"),
    [
        ("", {}, [], []),
        ("", EOS, [], [2]),
        ("<s> $A", EOS, [1], [2]),
        ("<s> $A </s>", EOS, [1], [2]),
        ("$A <unk>", EOS, [], [0]),
    ],
)
def test_tokens_around_a_document(template, files, before, after, encode):
    made = characters()
    if template:
        tokens = [(token, number) for number, token in enumerate(SPECIAL)]
        made.post_processor = processors.TemplateProcessing(single=template, special_tokens=tokens)
    inner = made.encode("Hello", add_special_tokens=False).ids
    assert encode(made, [{"text": "Hello"}], files) == [([*before, *inner, *after], [1] * (5 + len(before + after)))]


def test_a_document_that_ends_with_the_end_of_text_gets_no_other(encode):
    assert encode(characters(), [{"text": "a</s>"}], EOS) == [([3, 2], [1, 1])]


MADE = {**KINDS, "merges": merges}


@pytest.mark.parametrize("kind", MADE)
def test_long_documents_are_cut_without_another_token(kind, encode, monkeypatch):
    monkeypatch.setattr(tokenize, "LONGEST", 3000)
    monkeypatch.setattr(tokenize, "BLOCK", 2500)
    made, cuts = MADE[kind](), []
    divide = TokenEncoder._divide
    monkeypatch.setattr(TokenEncoder, "_divide", lambda *given: (cuts.append(1) or one for one in divide(*given)))
    text = words(4000, random.Random(2))
    ((ids, _),) = encode(made, [{"text": text}])
    assert ids == made.encode(text, add_special_tokens=False).ids
    assert len(cuts) > 5


def test_a_text_without_a_place_to_cut_is_encoded_whole(encode, monkeypatch):
    """Here tokens reach over every end of a word and line, so no cut leaves them as they are."""
    monkeypatch.setattr(tokenize, "LONGEST", 3000)
    made = Tokenizer(
        models.BPE({"a": 0, " ": 1, "a ": 2, "a a ": 3, "a a a a ": 4}, [("a", " "), ("a ", "a "), ("a a ", "a a ")])
    )
    ((ids, _),) = encode(made, [{"text": "a " * 4000}])
    assert ids == [4] * 1000 == made.encode("a " * 4000).ids


def test_unknown_tokens_are_counted(encode, capsys):
    assert encode(characters(), [{"text": "a\u4e2d\u4e2d"}])[0][0][0] == 3
    assert "2 tokens are the unknown token of the tokenizer in" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ chats

ASK, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo yo"}
PLAIN = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<s>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}</s>{% endgeneration %}\n{% else %}{{ m.content }}</s>\n{% endif %}{% endfor %}"
)
SHORTENED = (
    "{% for m in messages %}<s>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}hm {% endif %}"
    "{{ m.content }}</s>\n{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def written(made: Tokenizer, document: tuple) -> list[str]:
    """The texts that count as labels, one for each run of tokens."""
    texts, last = [], 0
    for token, counts in zip(*document, strict=True):
        if counts:
            texts = texts if last else [*texts, ""]
            texts[-1] += made.id_to_token(token)
        last = counts
    return texts


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        (PLAIN, [ASK, ANSWER], ["yo yo</s>\n"]),
        (PLAIN, [ASK, ANSWER, ASK, {"role": "assistant", "content": "b"}, ASK], ["yo yo</s>\n", "b</s>\n"]),
        (PLAIN, [{"role": "system", "content": "yo yo"}, ASK, ANSWER], ["yo yo</s>\n"]),
        (MARKED, [ASK, ANSWER, ASK, {"role": "assistant", "content": "b"}], ["yo yo</s>", "b</s>"]),
        (MARKED.replace("{%", "{%-", 1), [ASK, ANSWER], ["yo yo</s>"]),
        (SHORTENED, [ASK, ANSWER, ASK, {"role": "assistant", "content": "b"}], ["yo yo</s>\n", "hm b</s>\n"]),
    ],
    ids=["one turn", "several turns", "system", "marked", "marked, stripped", "shortened history"],
)
def test_the_loss_counts_what_the_assistant_wrote(template, messages, expected, encode):
    made = characters()
    ((ids, loss),) = encode(made, [{"messages": messages}], template=template)
    assert written(made, (ids, loss)) == expected
    assert ids[0] == 1


def test_a_mask_written_by_hand(encode):
    ((ids, loss),) = encode(characters(), [{"messages": [ASK, ANSWER]}], template=PLAIN)
    text = ["<s>", *"user\nhi", "</s>", "\n", "<s>", *"assistant\n", *"yo yo", "</s>", "\n"]
    assert [characters().id_to_token(token) for token in ids] == text
    assert loss == [0] * 21 + [1] * 7


def test_all_tokens_count_if_told(encode):
    ((ids, loss),) = encode(characters(), [{"messages": [ASK, ANSWER]}], template=PLAIN, loss="all")
    assert loss == [1] * len(ids)


def test_texts_and_chats_may_alternate(encode):
    rows = [{"text": "a"}, {"messages": [ASK, ANSWER]}, {"text": "b"}]
    (first, chat, last) = encode(characters(), rows, EOS, template=PLAIN)
    assert first == ([3, 2], [1, 1])
    assert last == ([4, 2], [1, 1])
    assert sum(chat[1]) == 7


def test_a_template_reads_tools_and_named_tokens(encode):
    template = "{{ eos_token }}{{ tools[0].name }}{% generation %}!{% endgeneration %}{{ documents is none }}"
    ((ids, _),) = encode(characters(), [{"messages": [ASK], "tools": [{"name": "f"}]}], EOS, template=template)
    assert "".join(characters().id_to_token(token) for token in ids) == "</s>f!True"


NO_PREFIX = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "messages", "reason"),
    [
        (PLAIN, [ASK], "the assistant has written none of it"),
        (MARKED, [ASK], "the assistant has written none of it"),
        (NO_PREFIX, [ASK, ANSWER], r"messages\[1\]: the text before the answer is no prefix of the whole text"),
        ("{{ raise_exception('no\nsystem') }}", [ASK, ANSWER], "TemplateError: no system"),
        ("{{ messages[0].content.x.y }}", [ASK, ANSWER], "UndefinedError"),
    ],
)
def test_chats_that_fail_are_refused_with_their_row(template, messages, reason, encode):
    with pytest.raises(ConfigError, match=rf"fails for .*rows.jsonl line 2 \({reason}") as error:
        encode(characters(), [{"text": "fine"}, {"messages": messages}], template=template)
    assert "\n" not in str(error.value)


def test_messages_without_a_template_are_refused(encode):
    with pytest.raises(ConfigError, match=r"data.tokenizer=.* has no chat template for the messages in .* line 1"):
        encode(characters(), [{"messages": [ASK, ANSWER]}])


@pytest.mark.index
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("kind", ["characters", "byte_level", "byte_fallback"])
def test_chats_are_those_of_transformers(kind, encode, tmp_path):
    transformers = pytest.importorskip("transformers")
    made = KINDS[kind]()
    made.add_special_tokens(["<s>", "</s>"])
    messages = [ASK, ANSWER, {"role": "user", "content": "n\u00e9"}, {"role": "assistant", "content": "b c"}]
    ((ids, loss),) = encode(made, [{"messages": messages}], template=MARKED)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer" / "tokenizer.json"))
    found = theirs.apply_chat_template(
        messages, chat_template=MARKED, return_assistant_tokens_mask=True, return_dict=True, tokenize=True
    )
    assert ids == found["input_ids"]
    assert loss == found["assistant_masks"]
