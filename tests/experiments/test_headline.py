"""headline.py: numbers recorded by notebooks, and whether they agree with the stored ones."""

import pandas as pd
import pytest

from fedmitr.core.paths import output_folder, reproduced
from fedmitr.experiments.headline import (
    compare_headline,
    headline_text,
    read_numbers,
    record,
    summarise_numbers,
)


@pytest.fixture(autouse=True)
def output(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDMITR_OUTPUT", str(tmp_path))
    return tmp_path


def test_numbers_are_recorded_by_name_and_replaced(output):
    record({"b": 1.23456, "a": 2}, "laptop")
    record({"b": 3.0, "c": 0.5}, "laptop")
    found = read_numbers(output / "results" / "numbers.csv")
    assert found == {"a": 2.0, "b": 3.0, "c": 0.5} and list(found) == ["a", "b", "c"]


def test_the_same_numbers_are_the_same_bytes(output):
    record({"a": 0.1, "b": 1 / 3}, "laptop")
    before = (output / "results" / "numbers.csv").read_bytes()
    record({"b": 1 / 3}, "laptop")
    assert (output / "results" / "numbers.csv").read_bytes() == before


def test_the_spread_is_the_standard_deviation_over_all_seeds():
    table = summarise_numbers({"a": 0.5, "b": 1.0}, [{"a": 0.7, "b": 1.0}, {"a": 0.9}]).set_index("number")
    assert table.loc["a", "stored"] == 0.5
    assert table.loc["a", "spread"] == pytest.approx(0.2)  # of 0.5, 0.7, 0.9
    assert pd.isna(table.loc["b", "spread"])  # a seed lacks it


def test_a_number_agrees_within_two_standard_deviations_and_an_exact_one_exactly():
    stored = pd.DataFrame(
        {
            "number": ["far", "near", "bytes", "gone"],
            "stored": [0.5, 0.5, 100, 1],
            "spread": [0.01, 0.01, 0, 1],
        }
    )
    record({"far": 0.521, "near": 0.519, "bytes": 101, "fresh": 1}, "laptop")
    verdict = compare_headline("laptop", stored)["within?"]
    assert verdict.to_dict() == {
        "bytes": "no",
        "far": "no",
        "fresh": "new",
        "gone": "not run",
        "near": "yes",
    }


def test_another_profile_is_shown_and_not_judged():
    record({"a": 0.1}, "smoke")
    assert set(compare_headline("smoke")["within?"]) == {""}
    assert "not comparable" in headline_text("smoke")


def test_the_text_counts_what_ran():
    record({"00 test accuracy, FedMITR": -1.0}, "laptop")
    assert "0 of 1 numbers" in headline_text("laptop")


def test_a_run_writes_where_git_does_not_look(monkeypatch):
    monkeypatch.delenv("FEDMITR_OUTPUT")
    assert reproduced("smoke").parts[-2:] == ("reproduced", "smoke")
    monkeypatch.setenv("FEDMITR_OUTPUT", "elsewhere")
    assert reproduced("smoke").as_posix() == "elsewhere"


def test_output_folders_are_made(output):
    assert output_folder("figures", "laptop") == output / "figures" and (output / "figures").is_dir()
