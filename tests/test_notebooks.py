"""The notebooks that ship: valid, run from top to bottom, and written to the plan of CONTRIBUTING.md."""

import ast
import hashlib
import json
import re
from pathlib import Path

import nbformat
import pytest

import fedmitr as fm

ROOT = Path(fm.__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
CODED = re.compile(r"[A-Za-z0-9+/=]{200,}")  # a picture inside a page, in base64
MACHINE = re.compile(r"/(home|root|work|Users|mnt|opt|tmp|var)/|[A-Z]:\\\\")


def test_notebooks_are_numbered_from_00_each_number_once():
    numbers = [p.name[:3] for p in NOTEBOOKS]
    assert numbers[0] == "00_" and len(set(numbers)) == len(numbers)
    assert all(re.fullmatch(r"\d\d_", number) for number in numbers)


@pytest.fixture(params=NOTEBOOKS, ids=lambda p: p.stem)
def notebook(request):
    return nbformat.read(request.param, as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


def test_a_notebook_is_valid(notebook):
    nbformat.validate(notebook)


def test_a_notebook_has_one_cell_of_parameters_with_the_profile(notebook):
    tagged = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    assert len(tagged) == 1 and re.search(r"^PROFILE\s*=", tagged[0].source, re.MULTILINE)


def test_a_notebook_ran_from_top_to_bottom_without_an_error(notebook):
    counts = [cell.execution_count for cell in code(notebook)]
    assert counts == list(range(1, len(counts) + 1))
    assert not [o for c in code(notebook) for o in c.outputs if o.output_type == "error"]


def test_a_notebook_explains_itself(notebook):
    prose = [cell for cell in notebook.cells if cell.cell_type == "markdown"]
    assert prose[0].source.startswith("# ") and len(prose) >= 3


def test_a_notebook_names_no_machine(notebook):
    for cell in notebook.cells:
        assert not MACHINE.search(cell.source), cell.source
        for output in cell.get("outputs", []):
            said = {k: v for k, v in output.get("data", {}).items() if not k.startswith("image/")}
            assert not MACHINE.search(CODED.sub("", json.dumps([output.get("text"), said])))


# The plan of a notebook.


@pytest.fixture(params=NOTEBOOKS, ids=lambda p: p.stem)
def planned(request):
    return request.param


def prose(path):
    """The markdown cells of a notebook."""
    return [cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "markdown"]


def part(path, title):
    """The text of a notebook below the heading `## title`, up to the next heading of that level."""
    (found,) = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", "\n\n".join(prose(path)), re.M | re.S)
    return found


def test_the_head_names_number_minutes_goals_and_needs(planned):
    head = prose(planned)[0]
    assert head.startswith(f"# {int(planned.stem[:2])} · ")
    assert re.search(r"minutes? to read", head) and re.search(r"minutes? to run on 2 cores", head)
    goals = head.split("**You will learn**")[1].split("**You need**")[0]
    assert 2 <= len(re.findall(r"^- ", goals, re.M)) <= 4
    assert "(../docs/glossary.md)" in head and "(../docs/notation.md)" in head


def test_the_badge_opens_this_notebook(planned):
    opens = "https://colab.research.google.com/github/fedmitr/fedmitr/blob/main/notebooks"
    image = "https://colab.research.google.com/assets/colab-badge.svg"
    assert f"[![Open in Colab]({image})]({opens}/{planned.name})" in prose(planned)[0]


def test_head_and_end_lead_to_the_notebooks_before_and_after(planned):
    at = NOTEBOOKS.index(planned)
    before = [path.name for path in NOTEBOOKS[:at]][-1:]
    after = [path.name for path in NOTEBOOKS[at + 1 :]][:1]
    for text in (prose(planned)[0], prose(planned)[-1]):
        assert re.findall(r"\[← [^\]]+\]\(([^)]+)\)", text) == before
        assert re.findall(r"\[[^\]]+ →\]\(([^)]+)\)", text) == after


def test_links_to_other_notebooks_lead_somewhere(planned):
    links = re.findall(r"\]\(([^)#\s]+\.ipynb)\)", "\n".join(prose(planned)))
    local = [link for link in links if "://" not in link]
    assert local and not [link for link in local if not (planned.parent / link).exists()]


def test_every_exercise_has_a_folded_solution(planned):
    exercises = [int(n) for n in re.findall(r"^(\d+)\. ", part(planned, "Exercises"), re.M)]
    solutions = part(planned, "Solutions")
    folded = re.findall(
        r"<details><summary>Solution (\d+)</summary>\n\n.+?\n\n</details>", solutions, re.DOTALL
    )
    assert exercises == list(range(1, len(exercises) + 1)) and exercises
    assert [int(n) for n in folded] == exercises
    assert solutions.count("<details>") == solutions.count("</details>") == len(exercises)


def test_each_reference_has_a_link(planned):
    entries = re.findall(r"^- .+$", part(planned, "References"), re.M)
    sites = r"\]\(https://(arxiv|doi|openreview|www\.jstor|www\.jmlr|www\.dask)"
    assert entries and all(re.search(sites, entry) for entry in entries)
    part(planned, "What to take away")  # its points may be printed by code


def test_every_saved_picture_has_alternative_text(planned):
    cells = [c.source for c in code(nbformat.read(planned, 4)) if "figures.save(" in c.source]
    calls = [node for source in cells for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    saved = [call for call in calls if ast.unparse(call.func) == "figures.save"]
    assert saved and all("alt" in [keyword.arg for keyword in call.keywords] for call in saved)


def test_cells_are_short_and_the_seed_is_a_reporting_one(planned):
    cells = code(nbformat.read(planned, 4))
    assert max(len(cell.source.splitlines()) for cell in cells) <= 25
    assert any(re.search(r"^SEED = 30\b", cell.source, re.M) for cell in cells)


def test_no_two_pictures_are_the_same():
    digests = {}
    for path in sorted((ROOT / "figures").glob("*.png")):
        digests.setdefault(hashlib.sha256(path.read_bytes()).hexdigest(), []).append(path.name)
    assert not [names for names in digests.values() if len(names) > 1]


def test_colab_installs_the_version_of_the_package(notebook):
    (cell,) = (cell for cell in code(notebook) if "google.colab" in cell.source)
    wanted = f'%pip install -q "fedmitr @ git+https://github.com/fedmitr/fedmitr@v{fm.__version__}"'
    first = code(nbformat.read(NOTEBOOKS[0], 4))[0]
    assert cell.source == first.source and cell.source.endswith(f"\n    {wanted}")
