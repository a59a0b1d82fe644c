"""Pages of the site that lie elsewhere: the README, the notes in benchmarks/, and the notebooks of examples/.

In the repository links between them go through its folders; on the site all pages lie under one.
"""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
NOTEBOOKS = {
    "tsp_from_scratch.md": "tsp_from_scratch.py",
    "example_own_model.md": "own_model.py",
    "example_fine_tune.md": "fine_tune.py",
    "example_collective.md": "find_a_collective.py",
    "example_plan.md": "plan_a_job.py",
}
OUTSIDE = r"(?:\.ci|configs|examples|scripts|tests|tsp_jax|CONTRIBUTING\.md|CHANGELOG\.md|pyproject\.toml)"


def on_files(files, config):
    """Adds those pages, and the pictures that they show."""
    for path in sorted((ROOT / "benchmarks").glob("*")):
        if path.suffix in (".md", ".png", ".json", ".csv", ".py") and path.name != "README.md":
            files.append(File.generated(config, f"benchmarks/{path.name}", content=path.read_bytes()))
    files.append(File.generated(config, "index.md", content=(ROOT / "README.md").read_text()))
    for page, notebook in NOTEBOOKS.items():
        files.append(File.generated(config, page, content=as_markdown((ROOT / "examples" / notebook).read_text())))
    return files


def on_page_markdown(markdown, page, config, files):
    """Turns links between folders of the repository into links between pages."""
    place = page.file.src_uri
    if place == "index.md":
        markdown = markdown.replace("](docs/", "](").replace("](benchmarks/)", "](benchmarks.md)")
    elif not place.startswith("benchmarks/"):
        markdown = markdown.replace("](../benchmarks/", "](benchmarks/")
    else:
        markdown = markdown.replace("](../docs/", "](../")
    for target, notebook in NOTEBOOKS.items():
        markdown = re.sub(rf"\]\((?:\.\./)*examples/{re.escape(notebook)}\)", f"]({target})", markdown)
    return re.sub(rf"\[([^\]]+)\]\((?:\.\./)*{OUTSIDE}[^)]*\)", r"`\1`", markdown)


def as_markdown(notebook: str) -> str:
    """A notebook in jupytext's percent format as a page: its text, and its code in blocks."""
    page = []
    for cell in re.split(r"^# %%", notebook, flags=re.MULTILINE)[1:]:
        kind, _, body = cell.partition("\n")
        if "[markdown]" in kind:
            page.append("\n".join(line.removeprefix("#").removeprefix(" ") for line in body.strip().splitlines()))
        else:
            page.append(f"```python\n{body.strip()}\n```")
    return "\n\n".join(page) + "\n"
