"""Build the book: notebooks with their stored outputs, docs, and reference pages, as a site.

python book/build.py            run by `make book`; writes reproduced/book/html/index.html
"""

import shutil
import sys
from pathlib import Path

from pages import PARTS, is_page, reference_pages, rewritten
from sphinx.cmd.build import main as sphinx

from fedmitr.core.paths import home

BOOK = home() / "reproduced" / "book"


def stage(root: Path, into: Path) -> None:
    """Copy the pages of the book and their pictures into one folder, and write the reference pages.

    root: the checkout. The README becomes the first page, with the table of contents at its end.
    """
    shutil.rmtree(into, ignore_errors=True)
    for path in sorted(p for part in PARTS for p in root.glob(part)):
        name = path.relative_to(root)
        target = into / ("index.md" if name == Path("README.md") else name)
        target.parent.mkdir(parents=True, exist_ok=True)
        if is_page(name):
            target.write_text(rewritten(path, root), encoding="utf-8")
        else:
            shutil.copyfile(path, target)
    for name, text in reference_pages(root).items():
        (into / name).parent.mkdir(exist_ok=True)
        (into / name).write_text(text, encoding="utf-8")


def build(into: Path = BOOK) -> int:
    """Build the site into a folder, from nothing; a warning is an error. Returns the exit code of Sphinx."""
    stage(home(), into / "source")
    shutil.rmtree(into / "html", ignore_errors=True)
    options = ["-q", "-W", "--keep-going", "-E", "-d", str(into / "doctrees")]
    code = sphinx([*options, "-c", str(Path(__file__).parent), str(into / "source"), str(into / "html")])
    if not code:
        print(f"The book is there: {into / 'html' / 'index.html'}")
    return code


if __name__ == "__main__":
    sys.exit(build())
