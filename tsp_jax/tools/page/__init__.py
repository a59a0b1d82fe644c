"""A report as one HTML page that needs no network: the report's own JSON, and the code that draws it.

page.html is the template, page.css its style; tables.js, charts.js, timeline.js and pages.js are its code, in that
order. The code takes all figures from the JSON in the page. Texts of programs stand in that JSON alone, where no
character ends an element, and reach the page as text nodes; the page's policy lets nothing else run, and nothing load.
"""

import base64
import hashlib
import json
import math
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata, resources
from pathlib import Path
from typing import Any, Literal

import jax

from tsp_jax.tools.cli import program

Kind = Literal["inspect", "compare", "plan"]
SCRIPTS = ("tables.js", "charts.js", "timeline.js", "pages.js")
MOST_ROWS = 2000
"""rows of a table that a page holds; the others are counted"""


def write_page(path: Path, data: Mapping[str, Any], *, kind: Kind, title: str, lines: Sequence[str] = ()) -> None:
    """Writes a page.

    Args:
      path: the file.
      data: what the command writes with ``--json``.
      kind: which page to draw.
      title: its heading.
      lines: said below the heading.
    """
    versions = {name: _version(name) for name in ("tsp-jax", "jax", "jaxlib")}
    facts = {"kind": kind, "title": title, "lines": list(lines), "command": _command(), "versions": versions}
    path.write_text(_page(facts, shortened(data)), encoding="utf-8")


def _page(facts: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    style, script = _file("page.css"), "\n".join(map(_file, SCRIPTS))
    parts = {
        "style": style, "style_hash": _hash(style), "script": script, "script_hash": _hash(script),
        "page": _embedded(facts), "data": _embedded(data),
    }  # fmt: skip
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], _file("page.html"))


def shortened(data: Mapping[str, Any]) -> dict[str, Any]:
    """`data` with at most MOST_ROWS collectives and scopes, those that count most; `left_out` sums up the others."""
    short, left = dict(data), {}
    collectives = sorted(data.get("collectives") or (), key=lambda c: -c["total_bytes"])
    if rest := collectives[MOST_ROWS:]:
        short["collectives"] = collectives[:MOST_ROWS]
        left["collectives"] = {"count": len(rest), "total_bytes": sum(c["total_bytes"] for c in rest)}
    timeline = data.get("timeline") or {}
    scopes = list(timeline.get("by_scope", {}).items())
    if rest := scopes[MOST_ROWS:]:
        short["timeline"] = timeline | {"by_scope": dict(scopes[:MOST_ROWS])}
        left["by_scope"] = {"count": len(rest), "seconds": sum(seconds for _, seconds in rest)}
    shardings = list(data.get("shardings", {}).items())
    if rest := shardings[MOST_ROWS:]:
        short["shardings"] = dict(shardings[:MOST_ROWS])
        left["shardings"] = {"count": len(rest)}
    return short | ({"left_out": left} if left else {})


def _embedded(value: Any) -> str:
    """JSON in which nothing can end or open an element; what is not a finite number is null."""
    text = json.dumps(_finite(value), separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _file(name: str) -> str:
    return resources.files(__name__).joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """What names a script or style in a page's policy."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _command() -> str:
    return f"{program()} {shlex.join(sys.argv[1:])}"


def _version(name: str) -> str:
    try:
        return jax.__version__ if name == "jax" else metadata.version(name)
    except metadata.PackageNotFoundError:
        return "unknown"
