"""The built book: its links without a browser, its pages in one, without a network."""

import re
from urllib.parse import unquote

import pytest

pytest.importorskip("myst_nb", reason="the book's tools are not installed: make test-book")
from bs4 import BeautifulSoup

PHONE, DESK = {"width": 375, "height": 700}, {"width": 1280, "height": 900}
RENDERED = "() => !window.MathJax || !document.querySelector('.math') || window.MathJax.startup?.promise"


@pytest.fixture(scope="module")
def parsed(pages):
    return {page: BeautifulSoup(page.read_text(), "html.parser") for page in pages}


def test_every_link_and_anchor_between_pages_leads_somewhere(parsed):
    dead = []
    for page, soup in parsed.items():
        for link in soup.select("article a[href], aside a[href]"):
            name, _, anchor = unquote(link["href"]).partition("#")
            if re.match(r"[a-z]+:", name):
                continue
            there = (page.parent / name).resolve() if name else page
            if not there.exists() or (anchor and there in parsed and not parsed[there].find(id=anchor)):
                dead.append((page.name, link["href"]))
    assert not dead


def test_every_picture_is_in_the_book(parsed):
    sources = [(page, img["src"]) for page, soup in parsed.items() for img in soup.select("img[src]")]
    assert len(sources) > 40
    for page, source in sources:
        assert source.startswith("data:") or (page.parent / unquote(source)).exists(), (page.name, source)


def test_nothing_comes_from_the_network(parsed):
    for page, soup in parsed.items():
        loaded = [
            tag.get("src") or tag.get("href") for tag in soup.select("script[src], link[href], img[src]")
        ]
        assert not [source for source in loaded if re.match(r"(https?:)?//", source)], page.name


def test_every_notebook_shows_its_outputs_and_every_setting_has_a_row(site, parsed):
    from fedmitr.settings import defaults

    for page in (site / "notebooks").glob("*.html"):
        assert parsed[page].select(".cell_output img"), page.name
    text = parsed[site / "reference" / "settings.html"].get_text(" ")
    assert not [name for name in defaults() if name not in text]
    assert parsed[site / "reference" / "fedmitr.html"].find(id="fedmitr.invert")


@pytest.fixture(scope="module")
def opened(browser, pages):
    """What the browser found on each page: errors, pictures, equations, and widths on a phone."""
    context = browser.new_context(viewport=PHONE, offline=True)
    found = {}
    for page in pages:
        tab, errors = context.new_page(), []
        tab.on(
            "console", lambda said, errors=errors: errors.append(said.text) if said.type == "error" else None
        )
        tab.on("pageerror", lambda error, errors=errors: errors.append(str(error)))
        tab.on("requestfailed", lambda request, errors=errors: errors.append(request.url))
        tab.goto(page.as_uri())
        tab.evaluate(RENDERED)
        found[page] = tab.evaluate(
            """() => ({
                 images: [...document.images].filter(i => i.complete && !i.naturalWidth)
                   .map(i => i.src),
                 equations: document.querySelectorAll('.math').length,
                 rendered: document.querySelectorAll('.math mjx-container').length,
                 failed: document.querySelectorAll('[data-mjx-error], mjx-merror').length,
                 wide: document.documentElement.scrollWidth - window.innerWidth,
               })"""
        ) | {"errors": errors}
        tab.close()
    context.close()
    return found


def test_every_page_opens_without_an_error(opened):
    assert not {page.name: facts["errors"] for page, facts in opened.items() if facts["errors"]}
    assert not {page.name: facts["images"] for page, facts in opened.items() if facts["images"]}


def test_every_equation_is_rendered(opened):
    assert sum(facts["equations"] for facts in opened.values()) > 100
    for page, facts in opened.items():
        assert facts["rendered"] >= facts["equations"] and not facts["failed"], page.name


def test_no_page_scrolls_sideways_on_a_phone(opened):
    assert not {page.name: facts["wide"] for page, facts in opened.items() if facts["wide"] > 0}


def test_sliders_of_stored_outputs_show_another_picture_when_they_move(browser, site):
    sliders = 0
    for page in sorted((site / "notebooks").glob("*.html")):
        if 'type="range"' not in page.read_text():
            continue
        tab = browser.new_page(viewport=DESK)
        tab.goto(page.as_uri())
        for slider in tab.locator(".cell_output input[type=range]").all():
            output = slider.locator("xpath=ancestor::div[contains(@class, 'cell_output')]")
            slider.scroll_into_view_if_needed()
            before = output.screenshot()
            slider.press("End" if slider.input_value() != slider.get_attribute("max") else "Home")
            assert output.screenshot() != before, page.name
            sliders += 1
        tab.close()
    assert sliders == 3  # α and clients in notebook 01, the iteration in 03


def test_the_theme_follows_the_system(browser, site):
    colours = set()
    for scheme in ("light", "dark"):
        tab = browser.new_page(color_scheme=scheme)
        tab.goto((site / "index.html").as_uri())
        colours.add(tab.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert len(colours) == 2


def test_search_finds_a_page(browser, site):
    tab = browser.new_page()
    tab.goto((site / "search.html").as_uri() + "?q=dirichlet")
    tab.wait_for_selector("#search-results li")
    assert tab.locator("#search-results li").count() > 0
