"""The pages of the book: which files they are, their links, and the reference pages that code writes."""

import importlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from fedmitr.core.errors import BadInput
from fedmitr.methods import dotted
from fedmitr.settings import PROFILES, Settings, fields
from fedmitr.study.tables import markdown, search_table

SOURCE = "https://github.com/fedmitr/fedmitr"
PARTS = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "docs/*.md",
    "docs/*.bib",
    "docs/*.png",
    "figures/*",
    "notebooks/*.ipynb",
)
PACKAGES = ("fedmitr", "fedmitr.settings", "fedmitr.methods", "fedmitr.upload", "fedmitr.figures")

BADGE = re.compile(r"\[!\[([^\]]*)\]\(https?:[^)]*\)\]\(([^)]*)\)")
LINK = re.compile(r"(?<=\]\()([^)\s#]+)")


# Pages that are files.


def is_page(name: Path) -> bool:
    """Whether a file becomes a page, and is no picture or bibliography."""
    return name.suffix in (".md", ".ipynb")


def rewritten(path: Path, root: Path) -> str:
    """Return the text of a page as the book needs it: links by `relinked`, contents on the first page."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        text = relinked(text, path, root)
        return text + "\n" + contents(root) if path.name == "README.md" else text
    notebook = json.loads(text)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = relinked("".join(cell["source"]), path, root)
    return json.dumps(notebook)


def relinked(text: str, path: Path, root: Path) -> str:
    """Return Markdown whose links work in the book.

    A badge, whose picture comes from the network, becomes its words. A link to a file that is no page leads
    to the repository, and one to the README to the first page.
    """

    def link(match: re.Match[str]) -> str:
        target = match[1]
        if re.match(r"[a-z]+:", target):
            return target
        name = Path(os.path.normpath(path.parent / target)).relative_to(root)
        if name == Path("README.md"):
            return os.path.relpath(root / "index.md", path.parent)
        if any(name.match(part) and len(name.parts) == part.count("/") + 1 for part in PARTS):
            return target
        kind = "tree" if (root / name).is_dir() else "blob"
        return f"{SOURCE}/{kind}/main/{name.as_posix()}"

    return LINK.sub(link, BADGE.sub(r"[\1](\2)", text))


def contents(root: Path) -> str:
    """Return the table of contents, part by part, as the directives that Sphinx reads."""
    notebooks = [f"notebooks/{path.stem}" for path in sorted(root.glob("notebooks/*.ipynb"))]
    docs = {f"docs/{path.stem}" for path in root.glob("docs/*.md")}
    first = [f"docs/{name}" for name in ("glossary", "notation", "map", "using", "results", "scope")]
    parts = {
        "Notebooks": notebooks,
        "Pages": [*first, *sorted(docs - set(first))],
        "Reference": ["reference/settings", "reference/search", *map(api_name, PACKAGES), "reference/steps"],
        "Project": ["reference/references", "CONTRIBUTING", "CHANGELOG"],
    }
    options = ":hidden:\n:maxdepth: 1"
    blocks = [
        f"```{{toctree}}\n{options}\n:caption: {name}\n\n" + "\n".join(pages) + "\n```\n"
        for name, pages in parts.items()
    ]
    return "\n".join(blocks)


# Pages that code writes.


def reference_pages(root: Path) -> dict[str, str]:
    """Return the text of every reference page by its name."""
    pages = {
        "reference/settings.md": settings_page(),
        "reference/search.md": search_page(pd.read_csv(root / "results" / "tuning.csv")),
        "reference/steps.md": steps_page((root / "docs" / "map.md").read_text(encoding="utf-8")),
        "reference/references.md": "# References\n\n```{bibliography}\n:all:\n:style: plain\n```\n",
    }
    return pages | {f"{api_name(package)}.md": api_page(package) for package in PACKAGES}


def settings_page() -> str:
    """Return the page of all settings: a table a block, with what profiles change."""
    profiles = {profile: Settings.load(profile) for profile in PROFILES}
    blocks: dict[str, list[list[str]]] = {}
    for row in fields():
        name, default = row["setting"], row["default"]
        values = {p: shown(dotted(s, name) if "." in name else getattr(s, name)) for p, s in profiles.items()}
        other = ", ".join(f"{profile}: {v}" for profile, v in values.items() if v != shown(default))
        cells = [f"`{name}`", row["meaning"], shown(default), other, row["allowed"], row["source"]]
        blocks.setdefault(name.split(".")[0] if "." in name else "run", []).append([*map(escaped, cells)])
    head = ["setting", "meaning", "default", "other in a profile", "allowed", "source of the default"]
    tables = [
        f"## {block}\n\n" + markdown(pd.DataFrame(rows, columns=head).set_index(head[0]))
        for block, rows in blocks.items()
    ]
    text = (
        "# Settings\n\nEvery setting of a run, block by block, as `fedmitr settings` lists them. Write "
        "`--set block.setting=value` on the command line, or `Settings.load(profile, {name: value})` in "
        "Python. *Choice* marks a decision that the paper leaves open, *ours* a value of this project.\n"
    )
    return "\n\n".join([text, *tables]) + "\n"


def search_page(trials: pd.DataFrame) -> str:
    """Return the page of what tuning may try for each method, and what won from each start."""
    table = search_table(trials).map(escaped)
    return (
        "# Search spaces\n\nWhat `fedmitr tune` tries for each method, the value of the laptop profile "
        "before tuning, and the value that won from each start. Every trial is in "
        f"[results/tuning.csv]({SOURCE}/blob/main/results/tuning.csv). A method that is tuned as another "
        "one, or has nothing to try, has no row.\n\n" + markdown(table) + "\n"
    )


def api_name(package: str) -> str:
    """Return the name of a package's reference page."""
    return f"reference/{package.replace('.', '-')}"


def api_page(package: str) -> str:
    """Return the page of a package's public functions and classes."""
    module = importlib.import_module(package)
    about = (module.__doc__ or "").strip().split("\n\n")[0]
    names = [f"{package}.{name}" for name in module.__all__]
    if package != "fedmitr":  # what `fm` has, has its place there
        names = [name for name in names if object_of(name) not in public()]
    return f"# {package}\n\n{about}\n\n" + directives(names)


def steps_page(page: str) -> str:
    """Return the page of the functions that the map of the method names, in its order.

    Functions that `fm` has are on its own page.
    """
    names = dict.fromkeys(re.findall(r"`((?:[a-z_]+\.)+[A-Za-z_]+)`", page))
    named = [f"fedmitr.{name}" for name in names]
    text = (
        "# Functions of the map\n\nThe functions that [the map of the method](../docs/map.md) names, in its "
        "order. Those of `import fedmitr as fm` are on [a page of their own](fedmitr.md).\n\n"
    )
    return text + directives([name for name in named if object_of(name) not in public()])


def public() -> list[Any]:
    """Return all functions and classes of `import fedmitr as fm`."""
    module = importlib.import_module("fedmitr")
    return [getattr(module, name) for name in module.__all__]


def directives(names: Iterable[str]) -> str:
    """Return the directives that document functions, and classes with their methods; others are left out."""
    blocks = []
    for name in names:
        found = object_of(name)
        if not (callable(found) and found.__doc__ and getattr(found, "__module__", "").startswith("fedmitr")):
            continue
        kind = "class" if isinstance(found, type) else "function"
        if isinstance(object_of(name.rsplit(".", 1)[0]), type):
            kind = "method"
        members = "   :members:\n" if kind == "class" else ""
        blocks.append(f"```{{eval-rst}}\n.. auto{kind}:: {name}\n{members}```\n")
    return "\n".join(blocks)


def object_of(name: str) -> Any:
    """Return the object that a dotted name means; None where it is not there or cannot be imported."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except (ImportError, BadInput):  # BadInput: Flower is not installed
            continue
        for part in parts[cut:]:
            found = getattr(found, part, None)
        return found
    return None


def shown(value: Any) -> str:
    """Return a value as it is written after `--set`."""
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(shown, value)) + "]"
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def escaped(text: str) -> str:
    """Return text for a cell of a table, with the signs that Markdown would read."""
    return re.sub(r"([|*<$])", r"\\\1", str(text))
