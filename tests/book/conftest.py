"""The book, built once for all tests of this folder, and a browser without a window that opens it."""

import os
import shutil
from pathlib import Path

import pytest

from fedmitr.core.paths import home

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The folder of a book that was built now; a warning of Sphinx fails here.

    $FEDMITR_BOOK names a book that is there already, for whoever works on these tests.
    """
    if given := os.environ.get("FEDMITR_BOOK"):
        return Path(given)
    from build import build

    into = tmp_path_factory.mktemp("book")
    assert build(into) == 0
    return into / "html"


@pytest.fixture(scope="session")
def pages(site):
    """All pages of the book."""
    found = sorted(p for p in site.rglob("*.html") if "_static" not in p.parts)
    assert len(found) > len(list((home() / "notebooks").glob("*.ipynb"))) + 15
    return found


@pytest.fixture(scope="session")
def browser():
    """Chromium; without one the tests that need it are skipped, in one line."""
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no browser is installed: any of {', '.join(BROWSERS)} will do")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()
