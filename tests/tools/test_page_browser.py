"""Pages in a headless browser: they open without an error, show the report's figures, and can be searched."""

import dataclasses
import itertools
import json
import re
from typing import Any

import pytest

from tests.builders.browser import browser
from tests.builders.pages import HOSTILE, program, write
from tsp_jax.hardware.rates import Band
from tsp_jax.inspect.units import format_band, format_bytes, format_seconds

pytestmark = pytest.mark.index
KINDS = ["inspect", "compare", "plan"]
WIDTHS = [400, 1400]
SCHEMES = ["light", "dark"]
FORMATS = {
    "bytes": format_bytes,
    "seconds": format_seconds,
    "band": lambda band: format_band(Band(**band)),
    "percent": lambda value: f"{value:.0%}",
    "ratio": lambda value: f"{value:.2f} x",
    "count": lambda value: f"{value:,.{0 if value == int(value) or abs(value) >= 100 else 2}f}",
    "text": lambda value: (
        json.dumps(value) if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else value
    ),
}
"""unit of a figure -> its text; the first three are those of the printed tables"""


def with_unknowns() -> str:
    """A program whose inner loop does not say how often it runs, and with a kernel that does not say what it does."""
    known, kernel = ', backend_config={"known_trip_count":{"n":"7"}}', "%k.2 = f32[1000000] copy(%x)"
    text = program()
    assert known in text and kernel in text
    return text.replace(known, "").replace(kernel, '%k.2 = f32[1000000] custom-call(%x), custom_call_target="mine"')


@dataclasses.dataclass
class Opened:
    """A page in a browser, the JSON of its report, and what the browser complained about or asked for."""

    page: Any
    data: dict[str, Any]
    messages: list[str]
    requests: list[str]

    def show_all(self):
        while (more := self.page.locator(".more button").first).count():
            more.click()


@pytest.fixture(scope="module")
def chromium():
    with browser() as running:
        yield running


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    written = {kind: write(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}
    return written | {"unknown": write("inspect", tmp_path_factory.mktemp("unknown"), with_unknowns())}


@pytest.fixture
def opened(chromium, files):
    """Function (kind, width, scheme) -> Opened. Checked after: an empty console, and no request beside the page's."""
    context, found = [], []

    def open_(kind, width=1400, scheme="light"):
        path, data = files[kind]
        context.append(chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme))
        page = context[0].new_page()
        found.append(Opened(page, data, [], []))
        page.on("console", lambda message: found[0].messages.append(message.text))
        page.on("pageerror", lambda error: found[0].messages.append(str(error)))
        page.on("request", lambda request: found[0].requests.append(request.url))
        page.goto(path.as_uri())
        return found[0]

    yield open_
    assert found[0].messages == []
    assert found[0].requests == [found[0].page.url]
    context[0].close()


@pytest.mark.parametrize(("kind", "width", "scheme"), [*itertools.product(KINDS, WIDTHS, SCHEMES)])
def test_a_page_opens_and_is_as_wide_as_the_screen(opened, kind, width, scheme):
    shown = opened(kind, width, scheme)
    assert shown.page.evaluate("document.documentElement.scrollWidth") == width
    assert shown.page.locator("section h2").count() >= 2
    assert shown.page.evaluate("window.pwned") is None and shown.page.locator("img, iframe").count() == 0
    light = shown.page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (min(light) > 200) == (scheme == "light")


@pytest.mark.parametrize("kind", KINDS)
def test_the_figures_are_those_of_the_json(opened, kind):
    shown = opened(kind)
    shown.show_all()
    read = "nodes => nodes.map(n => [JSON.parse(n.dataset.path), n.dataset.unit, n.textContent])"
    figures = shown.page.locator("[data-path]").evaluate_all(read)
    for path, unit, text in figures:
        value = shown.data
        for key in path:
            value = value[key]
        assert text == FORMATS[unit](value), path
    shown_paths = {json.dumps(path) for path, _, _ in figures}
    assert {json.dumps(path) for path in EXPECTED[kind](shown.data)} <= shown_paths


def _of_inspect(data):
    paths = [["memory", "peak_bytes"], ["timeline", "step_s"], ["timeline", "exposed_fraction"]]
    paths += [["memory", "by_kind", kind] for kind in data["memory"]["by_kind"]]
    assert len(data["bottlenecks"]["found"]) == 3
    paths += [["bottlenecks", "found", n, name] for n in range(3) for name in ("gain_s", "step_s")]
    paths += [["bottlenecks", "together_s"]]
    paths += [["memory", "largest", n, "bytes"] for n in range(len(data["memory"]["largest"]))]
    paths += [["collectives", n, name] for n in range(len(data["collectives"])) for name in ("total_bytes", "bytes")]
    paths += [["collectives", n, "hidden_fraction"] for n in range(len(data["collectives"]))]
    paths += [["timeline", "bands", name] for name in ("step_s", "compute_s", "comm_s", "exposed_comm_s")]
    paths += [["timeline", "scenarios", name, "step_s"] for name in data["timeline"]["scenarios"]]
    return paths + [["timeline", "by_scope", scope] for scope in data["timeline"]["by_scope"]]


def _of_compare(data):
    names = "peak_bytes", "predicted_bytes", "step_s", "step_low_s", "step_high_s", "tokens_per_s", "largest_seq_len"
    return [["rows", n, name] for n, row in enumerate(data["rows"]) for name in names if row[name] is not None]


def _of_plan(data):
    found = [(n, part, c[part]) for n, c in enumerate(data["candidates"]) for part in ("compiled", "closed_form")]
    paths = [["candidates", n, part, name] for n, part, row in found if row for name in ("peak_bytes", "step_s")]
    paths += [["candidates", n, "tokens_per_s"] for n in range(len(data["candidates"]))]
    paths += [["budget", "reserves", name, "bytes"] for name in data["budget"]["reserves"]]
    return paths + [["longest", layout] for layout in data["longest"]]


EXPECTED = {"inspect": _of_inspect, "compare": _of_compare, "plan": _of_plan}
"""kind of page -> paths of the figures that it must show"""


def test_the_search_filters_every_table(opened):
    shown = opened("inspect")
    total = shown.page.locator("tbody tr").count()
    shown.page.get_by_label("Search all tables").fill("TSP/part1 op")
    assert shown.page.locator("tbody tr").count() == 0
    shown.page.get_by_label("Search all tables").fill("TSP/part1")
    shown.show_all()
    rows = shown.page.locator("tbody tr").all_inner_texts()
    scopes = [scope for scope in shown.data["timeline"]["by_scope"] if "tsp/part1" in scope]
    assert len(scopes) == 11 and len(rows) >= 11 and all("tsp/part1" in row for row in rows)
    assert shown.page.locator("#found").inner_text().startswith(f"{len(rows)} of ")
    shown.page.get_by_label("Search all tables").fill("")
    assert shown.page.locator("tbody tr").count() >= total


def test_tables_sort_by_the_keyboard(opened):
    shown = opened("compare")
    head = shown.page.locator("th", has_text="tokens/s")
    head.locator("button").focus()
    shown.page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "descending"
    cells = shown.page.locator("td[data-path*=tokens_per_s]")
    figures = [float(text.replace(",", "")) for text in cells.all_inner_texts()]
    assert figures == sorted(figures, reverse=True)
    shown.page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "ascending"


@pytest.mark.parametrize("width", WIDTHS)
def test_candidates_sort_by_a_click(opened, width):
    shown = opened("plan", width)
    table = shown.page.locator("section", has=shown.page.locator("#candidates"))
    while (more := table.locator(".more button").first).count():
        more.click()
    head = table.locator("th", has_text=re.compile("^step$"))
    known = {n: c["compiled"]["step_s"] for n, c in enumerate(shown.data["candidates"]) if c["compiled"]}
    for order in ("descending", "ascending"):
        head.locator("button").click()
        assert head.get_attribute("aria-sort") == order
        paths = table.locator("td[data-path]").evaluate_all("nodes => nodes.map(n => JSON.parse(n.dataset.path))")
        numbers = [path[1] for path in paths if path[2:] == ["compiled", "step_s"]]
        assert sorted(numbers) == sorted(known)
        steps = [known[n] for n in numbers]
        assert steps == sorted(steps, reverse=order == "descending")


@pytest.mark.parametrize("width", WIDTHS)
def test_a_page_says_what_the_text_does_not_tell(opened, width):
    shown = opened("unknown", width)
    table = shown.page.locator("section", has=shown.page.locator("#unknown"))
    assert table.locator("h2").inner_text() == "What the text does not tell"
    lines = dict(zip(table.locator("tbody th").all_inner_texts(), table.locator("td").all_inner_texts(), strict=True))
    assert lines == shown.data["unknown"] and set(lines) == {"trips", "flops"}
    assert "inner" in lines["trips"] and "mine" in lines["flops"] and table.locator("td").last.is_visible()


def test_a_page_of_a_text_that_tells_all_has_no_such_section(opened):
    assert opened("inspect").page.locator("#unknown").count() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_everything_has_a_name(opened, kind):
    shown = opened(kind)
    tables = shown.page.locator("table")
    assert shown.page.locator("table > caption").count() == tables.count() > 0
    bare = "nodes => nodes.filter(n => !(n.labels?.length || n.ariaLabel || n.textContent.trim())).length"
    assert shown.page.locator("input, select, button, canvas, [role=img], .scroll").evaluate_all(bare) == 0
    assert shown.page.locator("svg:not([aria-hidden])").count() == 0
    assert shown.page.locator("html").get_attribute("lang") == "en"


def test_the_tab_key_reaches_what_can_be_used(opened):
    shown = opened("inspect", 400)
    reached = []
    for _ in range(60):
        shown.page.keyboard.press("Tab")
        reached.append(
            shown.page.evaluate(
                "document.activeElement.id || document.activeElement.className || document.activeElement.tagName"
            )
        )
    assert reached[:2] == ["skip", "query"]
    assert {"INPUT", "scroll", "SELECT", "CANVAS"} <= set(reached)


def test_the_memory_curve_tells_each_moment(opened):
    shown = opened("inspect")
    moment, output = shown.page.get_by_label("Moment of the schedule"), shown.page.locator("figure output").first
    curve = shown.data["memory"]["curve"]
    for key, point in (("Home", curve["points"][0]), ("End", curve["points"][-1])):
        moment.press(key)
        text = output.inner_text()
        assert f"instruction {point[0]:,} of {curve['moments']:,}" in text
        assert f": {format_bytes(sum(point[1:]))}; state {format_bytes(point[1])}" in text


def test_the_timeline_zooms_and_names_its_tasks(opened):
    shown = opened("inspect")
    canvas = shown.page.locator("canvas")
    picture = "node => node.toDataURL()"
    whole = canvas.evaluate(picture)
    canvas.press("+")
    near = canvas.evaluate(picture)
    canvas.press("0")
    assert near != whole == canvas.evaluate(picture)
    parts = shown.page.get_by_label("Part of the timeline")
    names = [text.strip() for text in parts.locator("option").all_inner_texts()]
    assert [name.split(" iteration")[0] for name in names[1:]] == ["other", "other"]
    parts.select_option(index=2)
    box = canvas.bounding_box()
    shown.page.mouse.move(box["x"] + 4, box["y"] + 3 * 17 + 20 + 10)
    assert "forward tsp/attention (copy k.1)" in shown.page.locator("figure:has(canvas) output").inner_text()


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_prints_on_white_without_its_controls(opened, kind):
    shown = opened(kind, 700, "dark")
    shown.page.emulate_media(media="print", color_scheme="dark")
    assert not shown.page.locator("#search").is_visible()
    assert shown.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert len(shown.page.pdf()) > 10_000


def test_names_are_shown_as_they_are(opened):
    shown = opened("compare")
    assert shown.page.title() == f"compare of {HOSTILE}"
    assert shown.page.locator("tbody th", has_text=HOSTILE).count() == 1
