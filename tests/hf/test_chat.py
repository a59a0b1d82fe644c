"""Chat templates: what transformers gives them, which of a folder's is taken, and templates that are hostile."""

import datetime
import json

import pytest

from tests.builders.fuzz import check_door
from tests.builders.tokenizers import characters, save_tokenizer
from tsp_jax.errors import ConfigError
from tsp_jax.hf.chat import render_chat

LOOP = "{% for m in messages %}"
TOOLS = [{"type": "function", "function": {"name": "f", "description": "<a> & '\u00e9'"}}]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}]
THOUGHT = [{"role": "assistant", "content": None, "reasoning": "hm"}]
YEAR = str(datetime.date.today().year)


@pytest.fixture
def render(tmp_path):
    """Renders a conversation by a template in a folder of its own."""

    def call(source: str, messages="Hello", **given) -> str:
        (tmp_path / "chat_template.jinja").write_text(source)
        return render_chat(tmp_path, messages, **given)

    return call


@pytest.mark.parametrize(
    ("template", "given", "text"),
    [
        (LOOP + "{{ m.role }}:{{ m.content }}{% endfor %}", {}, "user:Hello"),
        ("{% if add_generation_prompt %}!{% endif %}", {"add_generation_prompt": False}, ""),
        ("{% if tools is none and documents is none %}none{% endif %}", {}, "none"),
        ("{{ tools[0] | tojson }}", {"tools": TOOLS}, json.dumps(TOOLS[0], ensure_ascii=False)),
        ("{{ tools[0] | tojson(indent=2) }}", {"tools": TOOLS}, json.dumps(TOOLS[0], ensure_ascii=False, indent=2)),
        ("{{ documents[0].title }}", {"documents": [{"title": "T", "text": "x"}]}, "T"),
        ("{{ messages[0].content | map(attribute='type') | join(',') }}", {"messages": PARTS}, "text,image"),
        ("{{ thinking }}", {"variables": {"thinking": True}}, "True"),
        ("{{ 'content' in messages[0] }}", {"messages": THOUGHT}, "False"),
        ("{{ messages[0].thinking }} {{ messages[0].reasoning_content }}", {"messages": THOUGHT}, "hm hm"),
        ("{% generation %}{% set x = 1 %}a{% endgeneration %}{{ x }}", {}, "a"),
        ("{{ strftime_now('%Y') }}", {}, YEAR),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", {}, "01"),
        ("{% set n = namespace(i=1) %}" + LOOP + "{% set n.i = n.i + 1 %}{% endfor %}{{ n.i }}", {}, "2"),
        ("{{ bos_token is defined }}", {}, "False"),
        ("{{ '{0.__class__}'.format(messages) }}", {}, ""),
        ("  {% if true %}\na{% endif %}\n", {}, "a"),
    ],
)
def test_templates_are_given_what_they_read(template, given, text, render):
    assert render(template, **given) == text


@pytest.mark.parametrize(
    ("files", "given", "text"),
    [
        ({"tokenizer_config.json": {"chat_template": "a"}}, {}, "a"),
        ({"tokenizer_config.json": {"chat_template": "a"}, "chat_template.jinja": "b"}, {}, "b"),
        ({"additional_chat_templates/rag.jinja": "c", "chat_template.jinja": "b"}, {"template": "rag"}, "c"),
        ({"tokenizer_config.json": {"chat_template": [{"name": "default", "template": "a"}]}}, {}, "a"),
        (
            {"tokenizer_config.json": {"chat_template": {"default": "a", "tool_use": "t"}}},
            {"tools": TOOLS},
            "t",
        ),
        ({"tokenizer_config.json": {"bos_token": "<s>"}, "chat_template.jinja": "{{ bos_token }}"}, {}, "<s>"),
        ({"special_tokens_map.json": {"bos_token": "<s>"}, "chat_template.jinja": "{{ bos_token }}"}, {}, "<s>"),
        (
            {
                "special_tokens_map.json": {"bos_token": "<s>"},
                "tokenizer_config.json": {"bos_token": {"content": "<b>"}, "added_tokens_decoder": {}},
                "chat_template.jinja": "{{ bos_token }}",
            },
            {},
            "<b>",
        ),
    ],
)
def test_which_template_and_tokens_of_a_folder_are_taken(files, given, text, tmp_path):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    assert render_chat(tmp_path, "Hello", **given) == text


REFUSED = {
    "{{ raise_exception('roles must\nalternate') }}": "TemplateError: roles must alternate",
    "{{ 1 / 0 }}": "ZeroDivisionError",
    "{{ 'a' + 1 }}": "TypeError",
    "{{ messages[0].content.x.y }}": "UndefinedError",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "RecursionError",
    "{{ range(10**9) }}": "OverflowError",
    "{% if %}": "TemplateSyntaxError",
    "{% include 'tokenizer.json' %}": "no loader",
    "{{ 'a' * 5 * 10**9 }}": "too much memory",
    "{% for a in range(9**5) %}{{ 'a' * 10**6 }}{% endfor %}": "too much memory",
    "{% for a in range(9**5) %}{% for a in range(9**5) %}{% endfor %}{% endfor %}": "takes too long",
    "{{ ''.__class__.__mro__ }}": "SecurityError",
    "{{ messages.append(1) }}": "SecurityError",
    "{{ namespace(__class__=1) }}": "SecurityError",
    "{% set n = namespace() %}{% set n.__init__ = 1 %}": "SecurityError",
}


@pytest.mark.parametrize(("template", "reason"), REFUSED.items(), ids=REFUSED.values())
def test_templates_that_fail_do_so_in_a_line(template, reason, render):
    with pytest.raises(ConfigError, match=r"^the chat template of .* fails \(.*\); use the prompt alone$") as error:
        render(template)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"messages": []}, r"messages=\[\] are no messages"),
        ({"messages": [5]}, r"messages=\[5\] are no messages"),
        ({"messages": "a", "template": "rag"}, r"no chat template 'rag'; use template=default"),
        ({"messages": [{"content": object()}]}, "not JSON"),
    ],
)
def test_arguments_that_are_none_are_refused(given, reason, render):
    with pytest.raises(ConfigError, match=reason):
        render("a", **given)


@pytest.mark.soak
def test_any_template_is_rendered_or_refused_in_a_line(tmp_path):
    save_tokenizer(tmp_path, characters())
    template = "{% set n = namespace(i=0) %}" + LOOP
    template += "{% if m.role == 'user' %}<s>{{ m['content'] | trim }}{% set n.i = n.i + 1 %}{% endif %}"
    template += "{% generation %}{{ {'a': [1, 2]} | tojson(indent=2) }}{% endgeneration %}{% endfor %}{{ 10 * n.i }}"

    def read(changed: bytes) -> None:
        (tmp_path / "chat_template.jinja").write_bytes(changed)
        render_chat(tmp_path, "Hello")

    check_door(read, [template.encode()], (ConfigError,))
