"""Tokenizers of a folder: the ids and texts that transformers gives, one token at a time, whatever the file says."""

import json
import random

import pytest
from tokenizers import Regex, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Package

from tests.builders.fuzz import check_door
from tests.builders.tokenizers import KINDS, byte_fallback, byte_level, characters, save_tokenizer
from tsp_jax.errors import ConfigError
from tsp_jax.hf.tokenizer import Tokenizer, read_stop_tokens

CUT = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
PAD = {
    "strategy": {"Fixed": 50}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
    "pad_token": "<unk>",
}  # fmt: skip


@pytest.mark.parametrize(
    "left_behind",
    [{"truncation": CUT}, {"padding": PAD}, {"truncation": CUT | {"stride": 5}}],
    ids=["truncation", "padding", "stride above max_length"],
)
def test_settings_of_a_training_tool_change_no_text(left_behind, tmp_path):
    made = characters()
    assert Tokenizer(save_tokenizer(tmp_path, made, **left_behind)).encode("Hello") == made.encode("Hello").ids


def test_tokens_are_not_drawn_at_random(tmp_path):
    vocab = {"a": 0, "aa": 1, "aaaa": 2}
    made = Package(models.BPE(vocab=vocab, merges=[("a", "a"), ("aa", "aa")], dropout=0.5))
    assert Tokenizer(save_tokenizer(tmp_path, made)).encode("aaaa" * 20) == [2] * 20


NAMES = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}


@pytest.mark.parametrize("config", [{}, {"add_bos_token": False}, {"add_bos_token": True, "add_eos_token": True}])
def test_tokens_around_a_text_are_those_of_tokenizer_json(config, tmp_path):
    """As in transformers, which follows tokenizer_config.json only where there is no tokenizer.json."""
    made = characters()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = Tokenizer(save_tokenizer(tmp_path, made, {"tokenizer_config.json": NAMES | config}))
    assert tokenizer.encode("Hello") == [1, *tokenizer.encode("Hello", special=False)]


def test_named_tokens_are_special(tmp_path):
    """Also where tokenizer.json has them as plain words."""
    made = Package(models.WordLevel({"a": 0, "<s>": 1, "<": 2, "s": 3, ">": 4}, unk_token="a"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    folder = save_tokenizer(tmp_path, made, {"special_tokens_map.json": {"bos_token": "<s>"}})
    tokenizer = Tokenizer(folder)
    assert tokenizer.encode("<s>a") == [1, 0]
    assert tokenizer.decode([1, 0]) == "a"


@pytest.mark.parametrize("kind", ["characters", "metaspace", "word_piece"])
def test_text_without_tokens_is_refused(kind, tmp_path):
    tokenizer = Tokenizer(save_tokenizer(tmp_path, KINDS[kind]()))
    with pytest.raises(ConfigError, match="has no token for '\u00fc'"):
        tokenizer.encode("o \u00fc")
    assert tokenizer.encode("<unk>", special=False) == [0]


# ------------------------------------------------------------------------------------------------ one token at a time


@pytest.mark.parametrize("kind", KINDS)
def test_texts_of_single_tokens_are_the_text_of_all(kind, tmp_path):
    """Of any tokens: special ones, bytes that are no character, and characters cut in two."""
    made, chance = KINDS[kind](), random.Random(0)
    tokenizer = Tokenizer(save_tokenizer(tmp_path, made))
    for _ in range(40):
        likely = made.encode("Hello \u4e2d\u20ac\n", add_special_tokens=False).ids
        tokens = [
            chance.choice(likely) if chance.random() < 0.6 else chance.randrange(made.get_vocab_size())
            for _ in range(chance.randrange(1, 20))
        ]
        decoder = tokenizer.decoder()
        found = [decoder.step(token) for token in tokens] + [decoder.finish()]
        assert "".join(found) == made.decode(tokens), (tokens, found)


@pytest.mark.parametrize(
    ("make", "tokens", "texts", "rest"),
    [
        (byte_level, "a\u20ac\u4e2d!", ["a", "", "", "\u20ac", "", "", "\u4e2d", "!"], ""),
        (byte_level, "a\u20ac\u4e2d!", ["a", "", ""], "\ufffd"),
        (byte_fallback, ["<0x0A>", "<0xC3>", "\u2581Hello"], ["", "", "\ufffd\ufffd Hello"], ""),
        (byte_fallback, ["\u2581Hello", "<0x0A>", "\u2581Hello"], ["Hello", "", "\n Hello"], ""),
        (byte_fallback, ["\u2581Hello", "<0xC3>", "<0xA9>"], ["Hello", "", ""], "\u00e9"),
    ],
    ids=["whole", "cut", "invalid", "line break", "last"],
)
def test_bytes_wait_until_they_are_a_character(make, tokens, texts, rest, tmp_path):
    made = make()
    tokenizer = Tokenizer(save_tokenizer(tmp_path, made))
    ids = tokenizer.encode(tokens) if isinstance(tokens, str) else [made.token_to_id(token) for token in tokens]
    decoder = tokenizer.decoder()
    assert [decoder.step(token) for token in ids[: len(texts)]] == texts
    assert decoder.finish() == rest


# ------------------------------------------------------------------------------------------------ hostile files


def blow_up(made: Package) -> None:
    made.normalizer = normalizers.Sequence([normalizers.Replace("a", "b" * 5000), normalizers.Replace("b", "c" * 5000)])


def backtrack(made: Package) -> None:
    made.pre_tokenizer = pre_tokenizers.Split(Regex("(a|aa)+(?![a])c?$"), "isolated")


def take_long(made: Package) -> None:
    """Backtracks at each place of a text, nowhere long enough for the library to give up."""
    made.pre_tokenizer = pre_tokenizers.Split(Regex("(a|aa)+(?![a])c$"), "isolated")


@pytest.mark.parametrize(
    ("change", "text", "reason"),
    [
        (blow_up, "a" * 40, "memory"),
        (backtrack, "a" * 40 + "!", "PanicException: Onig: .*"),
        (take_long, ("a" * 28 + "!") * 100, "it takes too long"),
    ],
)
def test_hostile_tokenizers_fail_in_a_line(change, text, reason, tmp_path):
    made = characters()
    change(made)
    tokenizer = Tokenizer(save_tokenizer(tmp_path, made))
    with pytest.raises(ConfigError, match=rf"^the tokenizer in .* fails \(.*{reason}.*\); use another text$") as error:
        tokenizer.encode(text)
    assert "\n" not in str(error.value)
    assert tokenizer.encode("No") == characters().encode("No").ids, "another text is read"


def test_a_post_processor_with_a_token_that_is_missing_is_refused(tmp_path):
    made = characters()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    content = json.loads(made.to_str())
    content["post_processor"]["special_tokens"] = {}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"tokenizer\.json is not a tokenizer \(.*\); use an intact copy"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("tokenizer_config.json", {"bos_token": 5}, "bos_token=5"),
        ("tokenizer_config.json", {"chat_template": [{"name": "a"}]}, "template"),
        ("special_tokens_map.json", [], "Expected `object`"),
        ("special_tokens_map.json", {"bos_token": {"text": "<s>"}}, "content"),
    ],
)
def test_settings_of_the_wrong_shape_are_refused(file, content, reason, tmp_path):
    folder = save_tokenizer(tmp_path, characters(), {file: content})
    with pytest.raises(ConfigError, match=file) as error:
        Tokenizer(folder)
    assert reason in str(error.value)


# ------------------------------------------------------------------------------------------------ stop tokens


@pytest.mark.parametrize(
    ("files", "stops"),
    [
        ({"generation_config": {"eos_token_id": [3, 5]}, "config": {"eos_token_id": 7}}, (3, 5)),
        ({"generation_config": {}, "config": {"eos_token_id": 7}}, (7,)),
        ({"config": {"eos_token_id": None}}, ()),
    ],
)
def test_stop_tokens_are_those_of_the_folder(files, stops, tmp_path):
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    assert read_stop_tokens(tmp_path) == stops


@pytest.mark.parametrize("value", ["</s>", True, -1, 10**30, [5, "x"]])
def test_stop_tokens_that_are_none_are_refused(value, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(ConfigError, match=r"config\.json: eos_token_id.*Expected"):
        read_stop_tokens(tmp_path)


# ------------------------------------------------------------------------------------------------ fuzz


@pytest.mark.soak
@pytest.mark.parametrize("kind", KINDS)
def test_any_tokenizer_is_read_or_refused_in_a_line(kind, tmp_path):
    made = KINDS[kind]()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    content = json.loads(save_tokenizer(tmp_path, made).joinpath("tokenizer.json").read_text())
    content |= {"truncation": CUT, "padding": PAD}

    def read(changed: bytes) -> None:
        (tmp_path / "tokenizer.json").write_bytes(changed)
        tokenizer = Tokenizer(tmp_path)
        tokens = tokenizer.encode("Hello do")
        decoder = tokenizer.decoder()
        _ = [decoder.step(token) for token in tokens], decoder.finish()

    check_door(read, [json.dumps(content).encode()], (ConfigError,))


@pytest.mark.soak
@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
def test_any_settings_are_read_or_refused_in_a_line(file, tmp_path):
    template = "{% for m in messages %}{{ bos_token }}{{ m.content }}{{ eos_token }}{% endfor %}"
    content = NAMES | {"pad_token": "<unk>", "added_tokens_decoder": {"1": {"content": "<s>"}}}
    content["chat_template"] = [{"name": "default", "template": template}]
    save_tokenizer(tmp_path, characters(), {"tokenizer_config.json": content})

    def read(changed: bytes) -> None:
        (tmp_path / file).write_bytes(changed)
        tokenizer = Tokenizer(tmp_path)
        tokenizer.encode(tokenizer.chat("Hello"), special=False)

    check_door(read, [json.dumps(content).encode()], (ConfigError,))
