"""sweep.py: grids and cells of settings, each run once, summed up per cell."""

import json

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from scipy import stats

import fedmitr.experiments.sweep as module
from fedmitr.cli import main
from fedmitr.core.errors import BadInput
from fedmitr.core.paths import home
from fedmitr.experiments.sweep import choose, grid_cells, read_cells, summarise_cells, sweep
from fedmitr.settings import Settings


@pytest.fixture
def asked(monkeypatch):
    """Settings that runs were asked for; accuracy is made of alpha, rate and seed."""
    seen = []

    def compare(methods, settings, store):
        seen.extend(settings)
        rows = [
            dict(method=methods[0], task=s.task.name, alpha=s.partition.alpha, clients=s.partition.clients)
            | dict(seed=s.seed, accuracy=s.partition.alpha + s.distill.lr + s.seed / 100)
            | dict(synthetic_images=s.inversion.images, student_steps=s.distill.steps, server_seconds=1.0)
            for s in settings
        ]
        return pd.DataFrame(rows)

    monkeypatch.setattr(module, "compare", compare)
    return seen


def test_a_grid_is_the_product_of_its_values_read_as_yaml():
    cells = grid_cells(["partition.alpha=0.1,1e-2", "inversion.stop_at=[],[5,10]"])
    assert [c.overrides for c in cells] == [
        {"partition.alpha": a, "inversion.stop_at": s} for a in (0.1, 0.01) for s in ([], [5, 10])
    ]
    assert len({c.name for c in cells}) == 4 and {c.panel for c in cells} == {"grid"}


@pytest.mark.parametrize("text", ["alpha", "alpha=", "=", "a=[1"])
def test_what_is_no_grid_is_one_line(text, one_line):
    with pytest.raises(BadInput) as error:
        grid_cells([text])
    one_line(error.value, "grid", text)


def test_cells_of_a_file(tmp_path, one_line):
    file = tmp_path / "cells.yaml"
    file.write_text("one:\n  default:\n  low: {distill.lr: 1e-4}\ntwo:\n  7: {seed: 3}\n")
    cells = read_cells(file)
    assert [(c.panel, c.name, c.overrides) for c in cells] == [
        ("one", "default", {}), ("one", "low", {"distill.lr": 1e-4}), ("two", "7", {"seed": 3})
    ]  # fmt: skip
    assert choose(cells, []) == cells and [c.name for c in choose(cells, ["two"])] == ["7"]
    with pytest.raises(BadInput) as error:
        choose(cells, ["one", "three"])
    one_line(error.value, "three", "one, two")
    with pytest.raises(BadInput):
        sweep([], [0])
    for text in ("[1, 2]", "a: {b: [", "a: 3", "3"):
        file.write_text(text)
        with pytest.raises(BadInput) as error:
            read_cells(file)
        one_line(error.value, "cells")
    with pytest.raises(BadInput):
        read_cells(tmp_path / "absent.yaml")


def test_runs_that_cells_share_are_asked_for_once(asked, tmp_path):
    cells = [
        module.Cell("a", "default", {}),
        module.Cell("b", "default too", {"distill.lr": Settings().distill.lr}),
        module.Cell("b", "skewed", {"partition.alpha": 0.05}),
    ]
    table = sweep(cells, [3, 4], profile="smoke", overrides={"partition.clients": 4}, out=tmp_path / "a.csv")
    assert len(asked) == 4 and {s.partition.clients for s in asked} == {4}
    assert list(zip(table["panel"], table["cell"], table["seed"], strict=True)) == [
        (c.panel, c.name, seed) for c in cells for seed in (3, 4)
    ]
    for _, row in table.iterrows():
        alpha = 0.05 if row["cell"] == "skewed" else 0.1
        assert row["alpha"] == alpha
        assert row["accuracy"] == pytest.approx(alpha + Settings().distill.lr + row["seed"] / 100)
    written = pd.read_csv(tmp_path / "a.csv")
    assert "server_seconds" not in written and len(written) == 6


def test_a_bad_cell_stops_before_any_run(asked):
    with pytest.raises(BadInput):
        sweep(grid_cells(["distill.lr=1e-4,-1"]), [0])
    assert not asked


def test_the_summary_is_scipys_paired_difference_to_the_first_cell():
    rng = np.random.default_rng(1)
    table = pd.DataFrame(
        [
            dict(panel=p, cell=c, seed=s, accuracy=rng.uniform())
            for p in "xy" for c in ("base", "other") for s in range(5)
        ]
    )  # fmt: skip
    found = summarise_cells(table)
    for panel, runs in table.groupby("panel"):
        base, other = (runs[runs["cell"] == c]["accuracy"].to_numpy() for c in ("base", "other"))
        paired = stats.ttest_rel(other, base).confidence_interval(0.95)
        row = found.loc[panel, "other"]
        assert row["minus first"] - row["± 95 %"] == pytest.approx(paired.low)
        assert row["minus first"] + row["± 95 %"] == pytest.approx(paired.high)
        assert (row["mean"], row["std"]) == pytest.approx((other.mean(), other.std(ddof=1)))
        assert np.isnan(found.loc[panel, "base"]["minus first"])


def test_the_command_line_prints_cells_and_ends_with_json(asked, tmp_path):
    words = ["sweep", "--grid", "distill.lr=1e-4,2e-4", "--seeds", "1,2", "--alpha", "0.3", "--json"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout.splitlines()[-1])
    assert [row["cell"] for row in answer["summary"]] == ["distill.lr=0.0001", "distill.lr=0.0002"]
    assert len(answer["runs"]) == 4 and {row["alpha"] for row in answer["runs"]} == {0.3}


@pytest.mark.parametrize(
    "words, name",
    [
        (["--method", "nope", "--grid", "seed=1"], "method"),
        ([], "--grid"),
        (["--grid", "seed=1", "--cells", "x.yaml"], "--grid"),
        (["--grid", "no.setting=1"], "no.setting"),
        (["--cells", "absent.yaml"], "absent.yaml"),
        (["--grid", "distill.steps=1", "--seeds", "x"], "seeds"),
        (["--grid", "seed=1,2"], "seed"),
        (["--grid", "distill.lr=1e-3,0.001"], "distill.lr=0.001"),
        (["--grid", "distill.lr=1e-3", "--grid", "distill.lr=1e-4"], "distill.lr"),
        (["--grid", "distill.lr=1e-3", "--panel", "skew"], "--panel"),
    ],
)
def test_bad_input_is_one_line_and_status_2(asked, words, name):
    result = CliRunner().invoke(main, ["sweep", *words])
    assert result.exit_code == 2 and not asked
    assert name in result.stderr and len(result.stderr.strip().splitlines()) == 1


def test_the_shipped_cells_are_settings_that_exist():
    cells = read_cells(home() / "results" / "scale.yaml")
    for cell in cells:
        Settings.load("laptop", dict(cell.overrides))
    names = [(c.panel, c.name) for c in cells]
    assert len(names) == len(set(names))
