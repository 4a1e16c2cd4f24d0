"""statistics.account_table: what each method reaches and what it costs, as the files of `compare` tell."""

import pandas as pd
import pytest
from helpers import comparison_table, registrations_taken_back

from fedmitr.experiments.compare import seconds_file, write_table
from fedmitr.experiments.differences import GAP, account_table, summarise
from fedmitr.methods import METHODS, Method, in_order, register


def written(table, folder):
    """The two files as `compare` writes them."""
    out = folder / "runs.csv"
    write_table(table, out)
    return pd.read_csv(out), pd.read_csv(seconds_file(out))


@pytest.fixture
def files(tmp_path):
    return written(comparison_table(), tmp_path)


def test_every_method_has_a_label_of_its_own():
    labels = [record.label for record in METHODS.values()]
    assert all(labels) and len(set(labels)) == len(METHODS)


def test_the_table_tells_what_the_files_hold(files):
    runs, seconds = files
    told, scores = account_table(runs, seconds), summarise(runs)
    records = {name: METHODS[name] for name in in_order(METHODS)}
    stars = {name: record.label + " *" * (not record.single_model) for name, record in records.items()}
    assert list(told.index) == [(records[name].family, label) for name, label in stars.items()]
    assert {"FuseFL *", "ensemble *", "stacking *"} <= set(stars.values())
    told.index = list(stars)
    assert told.loc["dense", "accuracy"] == "{mean:.3f} ± {std:.3f}".format(**scores.loc["dense"])
    assert told.loc["dense", "minus FedMITR+ [95 %]"].startswith(f"{scores.loc['dense', GAP]:+.3f} [")
    assert told.loc["fedmitr_plus", "minus FedMITR+ [95 %]"] == ""
    assert tuple(told.loc["dense", ["MB up", "MB down", "MFLOP a prediction"]]) == ("6.00", "6.00", "24")
    assert list(told.loc[["dense", "fusefl"], "models a prediction"]) == ["1", "K"]
    assert told.loc["fusefl", "MFLOP a prediction"] == "120 (5.0×)"
    assert told.loc["dense", "server seconds"] == f"{20 * list(METHODS).index('dense'):.1f}"


def test_with_one_seed_the_table_claims_no_spread(files):
    runs, seconds = (part[part["seed"] == 0] for part in files)
    told = account_table(runs, seconds)
    assert not told.astype(str).apply(lambda column: column.str.contains("nan|±")).any(axis=None)


def test_a_table_of_some_methods_is_made_too(files):
    runs, seconds = (part[part["method"] != "fedmitr_plus"] for part in files)
    assert account_table(runs, seconds)["minus FedMITR+ [95 %]"].eq("").all()


def test_a_users_method_has_a_row_whether_it_is_registered_here_or_not(tmp_path):
    with registrations_taken_back():
        register(Method("mine", run=METHODS["fedavg"].run, label="My method", family="average"))
        table = comparison_table(["fedmitr", "mine", "theirs", "central"])
        told = account_table(*written(table, tmp_path))
    labels = list(told.index.get_level_values("method"))
    assert labels == ["My method", "FedMITR", "theirs", "central"]  # family by family
    assert list(told["MB up"]) == ["6.00"] * 4 and list(told["server seconds"])[:3] == ["20.0", "0.0", "40.0"]


def test_two_methods_of_one_label_are_two_rows(tmp_path):
    with registrations_taken_back():
        register(Method("mine", run=METHODS["fedavg"].run, label="FedAvg", family="average"))
        told = account_table(*written(comparison_table(["fedavg", "mine"]), tmp_path))
    assert list(told.index) == [("average", "FedAvg")] * 2 and list(told["server seconds"]) == ["0.0", "20.0"]
