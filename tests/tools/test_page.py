"""Reports as pages: what a page holds, and that nothing in it can run or load but its own code."""

import base64
import hashlib
import json
import math
from html.parser import HTMLParser

import pytest

from tests.builders.pages import HOSTILE, program, write
from tsp_jax.errors import ConfigError
from tsp_jax.inspect import report
from tsp_jax.tools import page as module
from tsp_jax.tools.inspect import Outputs
from tsp_jax.tools.page import shortened, write_page

VOID = {"meta", "input", "br", "link", "img"}
KINDS = ["inspect", "compare", "plan"]


class Page(HTMLParser):
    """Elements and texts of a page; fails if an element is not closed in its parent."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.texts = [], [], {}
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append((tag, dict(attrs).get("id", "")))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open:
            self.texts[self.open[-1]] = self.texts.get(self.open[-1], "") + data


@pytest.fixture(params=KINDS)
def written(request, tmp_path):
    path, data = write(request.param, tmp_path)
    return Page(path.read_text()), data


def test_a_page_holds_the_json_of_its_report(written):
    page, data = written
    assert json.loads(page.texts["script", "data"]) == data


def test_names_are_no_markup(written):
    page, _ = written
    assert [tag for tag, _ in page.elements].count("script") == 3
    assert not [tag for tag, _ in page.elements if tag in ("img", "iframe", "link", "object", "base")]
    assert HOSTILE in json.dumps([json.loads(page.texts["script", name]) for name in ("page", "data")])
    hidden = page.texts["script", "data"] + page.texts["script", "page"]
    assert not set("<>&") & set(hidden)


def test_only_the_pages_own_code_and_style_run(written):
    page, _ = written
    (policy,) = [attrs["content"] for _, attrs in page.elements if attrs.get("http-equiv") == "Content-Security-Policy"]
    code, style = (page.texts[key] for key in (("script", ""), ("style", "")))
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (code, style)]
    assert policy == f"default-src 'none'; script-src 'sha256-{digests[0]}'; style-src 'sha256-{digests[1]}'"


def test_nothing_is_loaded(written):
    page, _ = written
    for _, attrs in page.elements:
        assert not {"src", "srcset", "style", "action", "background"} & set(attrs)
        assert attrs.get("href", "#").startswith("#")
        assert not [name for name in attrs if name.startswith("on")]
    assert "url(" not in page.texts["style", ""] and "@import" not in page.texts["style", ""]
    assert not [
        word
        for word in ("fetch(", "XMLHttpRequest", "import(", "innerHTML", "eval(")
        if word in page.texts["script", ""]
    ]


def test_the_page_says_how_it_was_made(written, monkeypatch):
    facts = json.loads(written[0].texts["script", "page"])
    assert set(facts["versions"]) == {"tsp-jax", "jax", "jaxlib"} and facts["command"]


def test_the_command_can_be_pasted(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/usr/bin/tsp-compare", "tiny", "--layouts", "tsp:8,tsp(weights=data+tsp):2x4"])
    write_page(tmp_path / "page.html", {"rows": []}, kind="compare", title="")
    facts = json.loads(Page((tmp_path / "page.html").read_text()).texts["script", "page"])
    assert facts["command"] == "tsp-compare tiny --layouts 'tsp:8,tsp(weights=data+tsp):2x4'"


def test_figures_that_are_no_numbers_are_null(tmp_path):
    rows = {"rows": [{"step_s": math.inf, "peak_bytes": math.nan, "seq_len": 5}]}
    write_page(tmp_path / "page.html", rows, kind="compare", title="")
    page = Page((tmp_path / "page.html").read_text())
    assert json.loads(page.texts["script", "data"]) == {"rows": [{"step_s": None, "peak_bytes": None, "seq_len": 5}]}


def test_a_page_of_a_large_program_is_small(tmp_path):
    data = report(program(kernels=5000), target="h100:8").to_json()
    write_page(tmp_path / "page.html", data, kind="inspect", title="")
    assert (tmp_path / "page.html").stat().st_size < 3e6
    held = json.loads(Page((tmp_path / "page.html").read_text()).texts["script", "data"])
    assert held["left_out"]["by_scope"]["count"] == len(data["timeline"]["by_scope"]) - module.MOST_ROWS
    kept = sum(held["timeline"]["by_scope"].values()) + held["left_out"]["by_scope"]["seconds"]
    assert kept == pytest.approx(sum(data["timeline"]["by_scope"].values()))


def test_what_is_left_out_is_counted(monkeypatch):
    monkeypatch.setattr(module, "MOST_ROWS", 2)
    collectives = [{"total_bytes": n} for n in (1, 5, 3, 4)]
    found = shortened({"collectives": collectives, "shardings": dict.fromkeys("abc", "")})
    assert [c["total_bytes"] for c in found["collectives"]] == [5, 4]
    assert found["left_out"] == {"collectives": {"count": 2, "total_bytes": 4}, "shardings": {"count": 1}}
    assert "left_out" not in shortened({"collectives": collectives[:2]})


def test_a_page_that_cannot_be_written_is_refused_first(tmp_path):
    with pytest.raises(ConfigError, match=r"^html=.*missing/page\.html cannot be written; use a file in a folder"):
        Outputs(html=str(tmp_path / "missing" / "page.html")).check()
