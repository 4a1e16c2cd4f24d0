"""cli.py, `fedmitr compare`: tables over methods, seeds and skews."""

import pandas as pd
import pytest
from helpers import SMALL_OPTIONS, call_cli, read_cli


def test_compare_writes_one_row_per_run_and_the_summary(store, first, tmp_path, no_work):
    out = tmp_path / "runs.csv"
    words = ["compare", "--methods", "fedavg,local", "--seeds", "3", "--out", out, "--json", *SMALL_OPTIONS]
    table = read_cli(*words, "--store", store)
    rows = pd.read_csv(out)
    assert list(rows["method"]) == ["fedavg", "local"] and list(rows["seed"]) == [3, 3]
    assert list(rows["exchanges"]) == [1, 0] and list(rows["upload_bytes"]) == [first["upload_bytes"], 0]
    seconds = pd.read_csv(tmp_path / "runs_seconds.csv")
    assert list(seconds["client_seconds"]) == pytest.approx([first["seconds"]["clients"]] * 2)
    assert rows["accuracy"][0] == pytest.approx(first["fedavg_accuracy"], abs=1e-6)
    assert [row["method"] for row in table["summary"]] == ["fedavg", "local"]
    assert [row["accuracy"] for row in table["runs"]] == pytest.approx(list(rows["accuracy"]), abs=1e-6)


def test_compare_goes_over_several_skews(store, tmp_path):
    words = [
        "compare",
        "--methods",
        "fedavg,local",
        "--seeds",
        "3",
        "--json",
        *SMALL_OPTIONS,
        "--alpha",
        "0.1,0.3",
    ]
    table = read_cli(*words, "--store", store)
    assert [(r["alpha"], r["method"]) for r in table["summary"]] == [
        (0.1, "fedavg"),
        (0.1, "local"),
        (0.3, "fedavg"),
        (0.3, "local"),
    ]
    assert [row["accuracy"] for row in table["runs"]] == [row["mean"] for row in table["summary"]]


def test_compare_goes_over_seeds_with_the_same_clients_for_every_method(store, first, tmp_path):
    out = tmp_path / "runs.csv"
    done = call_cli(
        "compare",
        "--methods",
        "fedmitr,fedavg",
        "--seeds",
        "3-4",
        "--out",
        out,
        *SMALL_OPTIONS,
        "--store",
        store,
    )
    assert done.exit_code == 0, done.output
    rows = pd.read_csv(out)
    assert list(zip(rows["seed"], rows["method"], strict=True)) == [
        (3, "fedmitr"),
        (3, "fedavg"),
        (4, "fedmitr"),
        (4, "fedavg"),
    ]
    assert rows["accuracy"][0] == pytest.approx(first["accuracy"], abs=1e-6)
    assert "fedmitr" in done.stdout and "fedavg" in done.stdout
