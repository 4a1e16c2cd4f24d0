"""The built wheel in an empty folder: every notebook runs at the smoke profile, and writes there alone."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import nbformat
import pandas as pd
import pytest

import fedmitr
from fedmitr.core.paths import default_store

ROOT = Path(fedmitr.__file__).parent.parent


def call(*words, **options):
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    call("-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", out, ROOT)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def run(wheel, tmp_path_factory):
    """The folder in which a stranger ran the notebooks, where the package lay, and what was printed."""
    site, folder = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("empty")
    zipfile.ZipFile(wheel).extractall(site)
    env = {n: value for n, value in os.environ.items() if n not in ("FEDMITR_OUTPUT", "FEDMITR_PROFILE")}
    env |= {"PYTHONPATH": str(site), "FEDMITR_JOBS": "1", "TQDM_DISABLE": "1"}
    env |= {"FEDMITR_STORE": str(default_store())}  # nbval, which runs the notebooks too, goes on from here
    place = call("-c", "import fedmitr; print(fedmitr.__file__)", cwd=folder, env=env)
    assert Path(place.strip()).is_relative_to(site)
    before = sorted(p for p in site.rglob("*") if "__pycache__" not in p.parts)
    said = call("-m", "fedmitr.cli", "reproduce", "--profile", "smoke", cwd=folder, env=env)
    assert before == sorted(p for p in site.rglob("*") if "__pycache__" not in p.parts)
    return folder, said


def test_the_wheel_has_what_notebooks_read(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("results", "notebooks", "notebooks/profiles"):
        for path in (ROOT / folder).glob("*.*"):
            assert f"fedmitr/shipped/{path.relative_to(ROOT).as_posix()}" in names
    assert not [n for n in names if "reproduced" in n or n.startswith("tests")]


def test_every_notebook_runs_and_only_one_folder_is_made(run):
    folder, _ = run
    assert {p.name for p in folder.iterdir()} == {"reproduced"}
    done = sorted((folder / "reproduced" / "smoke" / "notebooks").glob("*.ipynb"))
    assert [p.name for p in done] == sorted(p.name for p in (ROOT / "notebooks").glob("*.ipynb"))
    for path in done:
        cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
        assert not [o for c in cells for o in c.outputs if o.output_type == "error"], path.name


def test_the_run_leaves_every_figure_that_ships(run):
    folder, _ = run
    made = {p.name for p in (folder / "reproduced" / "smoke" / "figures").iterdir()}
    assert made == {p.name for p in (ROOT / "figures").iterdir()}
    assert any(name.endswith(".gif") for name in made)


def test_the_run_ends_with_a_table_of_the_stored_headline_numbers(run):
    folder, said = run
    stored = pd.read_csv(ROOT / "results" / "headline.csv")
    found = pd.read_csv(folder / "reproduced" / "smoke" / "results" / "numbers.csv")
    assert set(found["number"]) == set(stored["number"])
    assert all(number in said for number in stored["number"]) and "within?" in said
    assert "not comparable" in said  # smoke is no laptop profile
