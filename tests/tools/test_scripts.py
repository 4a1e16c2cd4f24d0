"""Every script in tools/ runs at toy size; flower_run.py does in tests/flower, for it needs Flower."""

import importlib.util
import os
import sys
from types import ModuleType

import flower_processes
import nbformat
import numpy as np
import pandas as pd
import psutil
import pytest
from click.testing import CliRunner

from fedmitr.core.paths import home
from fedmitr.evaluation.metrics import ERRORS
from fedmitr.experiments.compare import parse_seeds
from fedmitr.experiments.headline import HEADLINE, record
from fedmitr.experiments.reproduce import notebooks
from fedmitr.methods import METHODS
from fedmitr.study.protocol import planned, read_protocol
from fedmitr.study.run import read_study

FOLDER = home() / "tools"


def load(name: str) -> ModuleType:
    """A script as a module of its own, which a test may change."""
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_script_has_a_test():
    scripts = {path.stem for path in FOLDER.glob("*.py")}
    assert scripts == {"dp", "flower_processes", "flower_run", "publish", "readme", "why"}


# dp.py


def test_dp_writes_the_table_s_numbers_between_the_markers(tmp_path, monkeypatch):
    script = load("dp")
    rows = [
        ("vit_micro", method, e, e, 1e-5, seed, base - (0 if np.isnan(e) else 0.3 / e) + 0.02 * seed)
        for method, base in (("ridge", 0.9), ("fedmitr_plus", 0.8))
        for e in (np.nan, 3.0, 10.0)
        for seed in (0, 1)
    ]
    columns = ["start", "method", "epsilon", "spent", "delta", "seed", "accuracy"]
    pd.DataFrame(rows, columns=columns).to_csv(tmp_path / "dp.csv", index=False)
    (tmp_path / "docs").mkdir()
    for name in ("docs/scope.md", "docs/privacy.md"):
        (tmp_path / name).write_text("before\n<!-- dp: x -->\nold\n<!-- /dp -->\nafter\n")
    monkeypatch.setattr(script, "home", lambda: tmp_path)
    monkeypatch.setattr(script, "RUNS", tmp_path / "dp.csv")
    script.main()
    scope, page = ((tmp_path / name).read_text() for name in ("docs/scope.md", "docs/privacy.md"))
    assert scope.startswith("before\n") and scope.endswith("\n<!-- /dp -->\nafter\n") and "old" not in scope
    assert "ε = 3" in scope and "ridge 0.81 (0.91 without), FedMITR+ 0.71 (0.81 without)" in scope
    assert "2 seeds" in scope and "start `vit_micro`" in scope
    lines = page.splitlines()[2:6]
    assert lines[0] == "| start | method | no protection | ε = 3 | ε = 10 |"
    assert lines[2] == "| vit_micro | ridge | 0.910 ± 0.014 | 0.810 ± 0.014 | 0.880 ± 0.014 |"
    assert lines[3].startswith("|  | FedMITR+ | 0.810 ± 0.014 |")


def test_the_pages_that_ship_have_the_markers():
    fill = load("readme").fill
    for name in ("docs/scope.md", "docs/privacy.md"):
        assert fill((home() / name).read_text(), "dp", "new words").count("new words") == 1


# readme.py


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout with a README, a page of results, a notebook, and the same notebook executed."""
    blocks = [f"<!-- {name}: x -->\nold\n<!-- /{name} -->\n" for name in ("results", "times", "start")]
    (tmp_path / "README.md").write_text("before\n" + "between\n".join(blocks) + "after\n")
    for folder in ("docs", "executed", "notebooks"):
        (tmp_path / folder).mkdir()
    (tmp_path / "docs" / "results.md").write_text("before\n<!-- table: x -->\nold\n<!-- /table -->\nafter\n")
    head = nbformat.v4.new_markdown_cell("# 0 · First: it\n\n**7 minutes to read, 2 to run** on 2 cores")
    book = nbformat.v4.new_notebook(metadata={"papermill": {"duration": 90.0}}, cells=[head])
    for folder in ("executed", "notebooks"):
        nbformat.write(book, tmp_path / folder / "00_quickstart.ipynb")
    return tmp_path


def test_readme_writes_the_shipped_study_and_measured_times(checkout, monkeypatch):
    script = load("readme")
    monkeypatch.setattr(script, "home", lambda: checkout)
    monkeypatch.setattr(script, "EXECUTED", checkout / "executed")
    script.main()
    text = (checkout / "README.md").read_text()
    page = (checkout / "docs" / "results.md").read_text()
    assert text.startswith("before\n") and text.endswith("<!-- /start -->\nafter\n")
    assert page.startswith("before\n") and page.endswith("<!-- /table -->\nafter\n")
    assert "\nold\n" not in text + page
    first, second, third = text.split("between\n")
    protocol, runs = read_protocol(), read_study(script.STUDY)
    assert script.verdict(protocol, runs) in first and script.table(protocol, runs) in page
    assert "1.5 minutes for 1 notebooks from an empty store" in second
    assert "| [0 · First: it](notebooks/00_quickstart.ipynb) | 7 | 2 |" in third


def test_without_a_run_of_the_notebooks_their_time_is_left_as_it_is(checkout, monkeypatch):
    script = load("readme")
    monkeypatch.setattr(script, "home", lambda: checkout)
    monkeypatch.setattr(script, "EXECUTED", checkout / "absent")
    script.main()
    assert "<!-- times: x -->\nold\n" in (checkout / "README.md").read_text()


def test_readme_shows_a_ground_when_all_of_its_runs_are_there_and_says_what_is_missing():
    script, protocol = load("readme"), read_protocol()
    ground = protocol.primary[0]
    runs = read_study(script.STUDY).query("part == @ground")
    assert len(runs) == protocol.runs_of(ground)
    text = script.verdict(protocol, runs) + "\n\n" + script.table(protocol, runs)
    assert f"{len(runs)} of {len(planned(protocol)):,} runs are there" in text and f"({ground})" in text
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "|" in line
    ]
    shown = {row[1].removesuffix(" *"): row[2] for row in rows[2:]}
    scores = runs.groupby("method")["accuracy"].agg(["mean", "std"])
    wanted = {METHODS[m].label: f"{mean:.3f} ± {std:.3f}" for m, (mean, std) in scores.T.items()}
    assert shown == wanted
    assert sum(line[:2] in ("1.", "2.", "3.", "4.", "5.") for line in text.splitlines()) == 5
    lacking = script.verdict(protocol, runs[1:])
    assert "(none yet)" in lacking and "no primary ground is finished" in lacking
    assert "|" not in lacking + script.table(protocol, runs[1:])


# publish.py


@pytest.fixture
def published(tmp_path, monkeypatch):
    """What publish.py writes, and how it calls `reproduce`, which here records one number and one picture."""
    script, calls = load("publish"), []
    monkeypatch.setattr(script, "home", lambda: tmp_path)

    def reproduce(profile, only=None, store=None, seed=None):
        calls.append((only, seed))
        assert os.environ["FEDMITR_STATIC"] == "1"
        record({"accuracy": 0.5 + 0.1 * ((seed or 30) - 30)}, profile)
        output = tmp_path / "reproduced" / "publish" / (f"seed{seed}" if seed else "shipped")
        for name in ("figures", "notebooks"):
            (output / name).mkdir(exist_ok=True)
        (output / "figures" / "00_overview.png").write_bytes(b"picture")
        (output / "figures" / "00_moving.gif").write_bytes(b"animation")
        book = nbformat.v4.new_notebook(metadata={"papermill": {"duration": 1.0}})
        book.cells = [
            nbformat.v4.new_code_cell("SEED = 1", metadata={"tags": ["injected-parameters"]}),
            nbformat.v4.new_code_cell("1 + 1", metadata={"papermill": {"status": "completed"}}),
        ]
        nbformat.write(book, output / "notebooks" / "00_quickstart.ipynb")
        return "the table"

    monkeypatch.setattr(script, "reproduce", reproduce)
    before, into = dict(os.environ), tmp_path / "into"
    (into / "figures").mkdir(parents=True)
    for name in ("00_gone.png", "00_gone.gif"):
        (into / "figures" / name).write_bytes(b"of a notebook that changed")
    done = CliRunner().invoke(
        script.main, ["--profile", "smoke", "--into", str(into)], catch_exceptions=False
    )
    assert done.exit_code == 0 and "the table" in done.output, done.output
    assert dict(os.environ) == before
    return into, calls, script


def test_publish_stores_pictures_numbers_with_their_spread_and_outputs(published):
    into, calls, script = published
    assert calls == [*((script.ON_SEEDS, seed) for seed in (31, 32, 33, 34)), (None, None)]
    assert {figure.name for figure in (into / "figures").iterdir()} == {"00_moving.gif", "00_overview.png"}
    assert (into / "figures" / "00_overview.png").read_bytes() == b"picture"
    (row,) = pd.read_csv(into / HEADLINE).to_dict("records")
    assert row["number"] == "accuracy" and row["stored"] == 0.5
    assert row["spread"] == pytest.approx(pd.Series([0.5, 0.6, 0.7, 0.8, 0.9]).std(), abs=1e-4)


def test_publish_leaves_nothing_of_papermill_in_a_notebook(published):
    into, *_ = published
    book = nbformat.read(into / "notebooks" / "00_quickstart.ipynb", as_version=4)
    assert [cell.source for cell in book.cells] == ["1 + 1"] and book.cells[0].execution_count == 1
    assert "papermill" not in book.metadata and not book.cells[0].metadata


def test_publish_runs_notebooks_that_are_there_on_its_seeds():
    script = load("publish")
    assert set(script.ON_SEEDS.split(",")) <= {path.name[:2] for path in notebooks()}
    protocol = read_protocol()
    first, *others = parse_seeds(protocol.parts[protocol.primary[0]].seeds)  # notebooks have the first
    assert list(script.OTHER_SEEDS) == others[:4] and first == 30


# flower_processes.py: what needs no Flower. Its cluster runs in tests/flower.


def test_a_cluster_starts_logs_and_kills_processes(tmp_path):
    nodes = flower_processes.Cluster(tmp_path)
    nest = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"
    parent = nodes.start("parent", sys.executable, "-c", f"print('started', flush=True); {nest}")
    nodes.wait_for("parent", "started", seconds=60)
    family = psutil.Process(parent.pid)
    assert flower_processes.wait_until(lambda: bool(family.children()), 60)
    (child,) = family.children()
    nodes.kill("parent")
    assert flower_processes.wait_until(lambda: not child.is_running() or child.status() == "zombie", 10)
    assert parent.returncode and nodes.logs() == nodes.log("parent") == "started\n"


def test_words_that_do_not_come_are_an_error_with_the_logs(tmp_path):
    nodes = flower_processes.Cluster(tmp_path)
    nodes.start("short", sys.executable, "-c", "print('all there is')")
    with pytest.raises(RuntimeError, match="all there is"):
        nodes.wait_for("short", "something else", seconds=60)


def test_a_free_port_is_one_that_nothing_listens_on():
    assert not flower_processes.listens(flower_processes.free_port())
    assert not flower_processes.wait_until(lambda: False, 0)


# why.py


def test_why_writes_every_models_kinds_of_errors_and_two_figures(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDMITR_STORE", str(tmp_path / "store"))
    script = load("why")
    done = CliRunner().invoke(
        script.main, ["--profile", "smoke", "--seeds", "1", "--into", str(tmp_path)], catch_exceptions=False
    )
    assert done.exit_code == 0
    table = pd.read_csv(tmp_path / "results" / "errors.csv")
    assert len(table) == len(script.STARTS) * (len(script.MODELS) + 1)
    assert np.allclose(table[list(ERRORS)].sum(axis=1), 1, atol=1e-5)
    for name in ("why_errors", "why_toy"):
        assert (tmp_path / "docs" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    right = {name: f"{value:.3f}" for name, value in table.groupby("model")["right"].mean().items()}
    assert set(right) == {*script.MODELS, script.CHANCE} and all(name in done.output for name in right)
