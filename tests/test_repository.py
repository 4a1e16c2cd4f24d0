"""What ships beside the code: profiles, weights, environments, and the commands of its pages."""

import hashlib
import importlib.metadata
import os
import re
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import yaml
from click.testing import CliRunner
from packaging.requirements import Requirement

import fedmitr as fm
from fedmitr.cli import main
from fedmitr.settings import PROFILES, defaults
from fedmitr.vision.vit import MICROS, letter_weights

ROOT = Path(fm.__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MACHINE = re.compile(r"/(home|root|work|Users|mnt|opt|tmp|var)/|[A-Z]:\\\\")


def lines(name):
    return (ROOT / name).read_text().splitlines()


# Profiles.


@pytest.mark.parametrize("name", PROFILES)
def test_a_profile_sets_only_what_is_a_setting(name):
    profile = yaml.safe_load((ROOT / "notebooks" / "profiles" / f"{name}.yaml").read_text())
    assert set(profile) == {"PROFILE", "SETTINGS"} and profile["PROFILE"] == name
    assert set(profile["SETTINGS"]) <= set(defaults())
    fm.Settings.load(name)


def test_every_profile_file_is_a_known_profile():
    files = {p.stem for p in (ROOT / "notebooks" / "profiles").glob("*.yaml")}
    assert files == set(PROFILES)


# The shipped weights.


def card_of(name):
    rows = [line.split("|") for line in lines(f"data/{name}_letters.md") if line.startswith("| ")]
    return {row[1].strip(): row[2].strip() for row in rows if row[1].strip()}


@pytest.mark.parametrize("name", MICROS)
def test_the_weights_are_those_of_their_card(name):
    card, weights = card_of(name), letter_weights(name)
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == card["sha256"]
    assert weights.stat().st_size == int(card["bytes"])
    vit = fm.create_vit(name, 52, checkpoint=weights)
    assert sum(p.numel() for p in vit.parameters()) == int(card["parameters"])
    shape = ", ".join(f"{key}={value}" for key, value in MICROS[name].items())
    assert card["model"] == f"{name}: {shape}"
    for part in ("training fonts", "held-out fonts"):
        least = 5 / 52 if name == "vit_micro_early" else 0.5  # early: five times chance
        assert least < float(card[f"accuracy, {part}"]) <= 1


@pytest.mark.parametrize("name", MICROS)
def test_the_shared_model_starts_from_the_shipped_weights(name):
    shipped = fm.create_vit(name, 52, checkpoint=letter_weights(name)).state_dict()
    model = fm.create_vit(name, 10, pretrained=True).state_dict()
    for name, value in model.items():
        if not name.startswith("head"):
            assert value.equal(shipped[name]), name


def test_all_weights_are_in_the_package():
    wheel = [line.strip() for line in lines("pyproject.toml")]
    assert all(f'"data/{name}_letters.safetensors",' in wheel for name in MICROS)


# Environments and commands.


def test_the_version_is_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert importlib.metadata.version("fedmitr") == fm.__version__
    assert str(citation.get("version", fm.__version__)) == fm.__version__


def test_every_dependency_is_pinned():
    pinned = {re.split(r"[=\[]", line)[0].lower() for line in lines("requirements.txt") if "==" in line}
    asked = importlib.metadata.requires("fedmitr")
    asked = [r for r in asked if "extra" not in r or "extra == 'dev'" in r.replace('"', "'")]
    assert len(asked) > 15
    assert {re.split(r"[><=!;\[ ]", r)[0].lower() for r in asked} <= pinned


def test_the_conda_environment_installs_the_pins_and_the_package_itself():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    (pip,) = (d["pip"] for d in environment["dependencies"] if isinstance(d, dict))
    assert {"-r requirements.txt", "-e ."} <= set(pip)
    assert any(str(d).startswith("python=3.") for d in environment["dependencies"])


def targets():
    return {m[1] for line in lines("Makefile") if (m := re.match(r"([a-z-]+):", line))}


def test_make_has_the_two_targets_that_outside_checks_call():
    assert {"setup", "test", "reproduce"} <= targets()


def test_make_tells_of_every_target():
    (phony,) = (line for line in lines("Makefile") if line.startswith(".PHONY:"))
    assert set(phony.split()[1:]) == targets()
    (told,) = (line for line in lines("Makefile") if "make setup |" in line)
    assert targets() - {"help"} <= set(re.findall(r"[a-z-]+", told))


def test_flower_is_pinned_as_the_extra_asks_and_its_tests_are_part_of_every_check():
    pins = dict(line.split("==") for line in lines("requirements-flower.txt") if line[:1] not in ("", "#"))
    (asked,) = (r for r in importlib.metadata.requires("fedmitr") if "flower" in r)
    assert Requirement(asked).specifier.contains(pins["flwr"])
    assert not {"torch", "numpy"} & set(pins)  # those of requirements.txt
    recipe = (ROOT / "Makefile").read_text().split("\ntest: ")[1].split("\n\n")[0]
    assert re.search(r"\$\(MAKE\) .*\btest-flower\b", recipe)


def test_the_shipped_runs_over_flower_gave_the_models_of_a_run():
    table = pd.read_csv(ROOT / "results" / "flower.csv")
    assert table["nodes"].tolist() == [5, 5] and table["killed"].tolist() == [0, 1]
    assert table["usable_uploads"].tolist() == [5, 4] and table["missing_clients"].tolist() == ["none", "2"]
    assert table["same_weights"].all()
    assert table["accuracy_flower"].equals(table["accuracy_in_process"])


def test_the_book_is_pinned_and_its_tests_are_part_of_every_check():
    pins = dict(line.split("==") for line in lines("requirements-book.txt") if line[:1] not in ("", "#"))
    assert not {"torch", "numpy"} & set(pins)  # those of requirements.txt
    extra = [r for r in importlib.metadata.requires("fedmitr") if re.search(r"extra == .book", r)]
    assert len(extra) >= 4
    assert all(Requirement(r).specifier.contains(pins[Requirement(r).name]) for r in extra)
    recipe = (ROOT / "Makefile").read_text().split("\ntest: ")[1].split("\n\n")[0]
    assert re.search(r"\$\(MAKE\) .*\btest-book\b", recipe)


PAGES = ("README.md", "docs/using.md", "docs/results.md", "docs/map.md", "docs/scope.md", "docs/privacy.md")


@pytest.fixture(params=PAGES)
def page(request):
    return (ROOT / request.param).read_text()


def test_a_page_names_only_commands_that_exist(page):
    spans = re.findall(r"```.*?```|`[^`\n]+`", page, re.DOTALL)
    words = "\n".join(spans)
    called = set(re.findall(r"(?:^|[\s`;&])make ([a-z-]+)", words))
    assert called <= targets(), called - targets()
    commands = set(re.findall(r"(?<!import )(?<!from )\bfedmitr ([a-z]+)", words))
    assert commands <= set(main.commands), commands - set(main.commands)
    assert not MACHINE.search(page.replace("https://", ""))


def test_a_page_sets_only_what_is_a_setting(page):
    assert set(re.findall(r"--set ([a-z_.]+)=", page)) <= set(defaults())


def test_options_that_a_page_shows_exist(page):
    for command, rest in re.findall(r"fedmitr ([a-z]+)((?: [^\n`|&;]+)?)", page):
        if command in main.commands:
            below = getattr(main.commands[command], "commands", {})  # a group, such as bench
            words = [command, *(word for word in rest.split()[:1] if word in below)]
            told = CliRunner().invoke(main, [*words, "--help"]).output
            assert not [o for o in re.findall(r"--[a-z]+", rest) if o not in told], (command, rest)


def test_the_pages_show_commands_at_all():
    text = "".join((ROOT / name).read_text() for name in PAGES)
    assert len(re.findall(r"\nfedmitr [a-z]+", text)) > 10 and "--set " in text


# Links and spelling.


def texts():
    """Every page's Markdown by its name: pages, and the prose of notebooks."""
    names = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("data/*.md")]
    books = ((p, nbformat.read(p, as_version=4).cells) for p in NOTEBOOKS)
    prose = {p: "\n\n".join(c.source for c in cells if c.cell_type == "markdown") for p, cells in books}
    return {p: p.read_text() for p in names} | prose


def anchors(text):
    """The anchors of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#{1,6} (.+)$", re.sub(r"```.*?```", "", text, flags=re.S), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.strip().lower()).replace(" ", "-") for head in heads}


def dead_links(pages):
    """Relative links that lead to no file, or to no heading of a page."""
    dead = []
    for path, text in pages.items():
        text = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.S)
        targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"(?:src|href)=\"([^\"]+)\"", text)
        for target in targets:
            if re.match(r"[a-z]+:", target):
                continue
            name, _, anchor = target.partition("#")
            there = (path.parent / name).resolve() if name else path
            known = pages.get(there)
            if not (there.exists() or there in pages) or (
                anchor and known is not None and anchor not in anchors(known)
            ):
                dead.append((path.name, target))
    return dead


def test_every_relative_link_and_anchor_leads_somewhere():
    assert not dead_links(texts())


def test_a_dead_link_and_a_dead_anchor_are_found():
    page = ROOT / "docs" / "page.md"
    text = "# A head, here\n[a](glossary.md) [b](#a-head-here) [c](gone.md) [d](#gone) `[e](code.md)`"
    assert dead_links({page: text}) == [("page.md", "gone.md"), ("page.md", "#gone")]


def test_the_bibliography_has_the_works_of_the_citation_file():
    entries = (ROOT / "docs" / "references.bib").read_text()
    for work in yaml.safe_load((ROOT / "CITATION.cff").read_text())["references"]:
        known = [identifier["value"].removeprefix("arXiv:") for identifier in work.get("identifiers", [])]
        assert work["title"] in entries and all(number in entries for number in known)


@pytest.mark.skipif(os.name == "nt", reason="no executable bit")
def test_the_check_of_a_bare_checkout_can_be_run():
    assert os.access(ROOT / ".ci" / "run", os.X_OK) and "make test" in (ROOT / ".ci" / "run").read_text()


def test_the_public_names_are_there():
    names = "load_task partition create_vit train_client invert relabel_tokens distill run"
    assert {*names.split(), "Upload", "Ensemble", "Settings"} <= set(fm.__all__)
    assert all(hasattr(fm, name) for name in fm.__all__)
