"""statistics.account_table: what each method reaches and what it costs, as the files of `compare` tell."""

import pandas as pd
import pytest
from helpers import comparison_table, registrations_taken_back

from fedmitr.experiments.compare import seconds_file, write_table
from fedmitr.experiments.statistics import account_table, summarise
from fedmitr.methods import METHODS, Method, register


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
    labels = [record.label for record in METHODS.values()]
    assert sorted(name.removesuffix(" *") for name in told.index) == sorted(labels)
    assert [name for name in told.index if name.endswith("*")] == ["FuseFL *", "ensemble *"]
    dense = told.loc["DENSE"]
    assert dense["accuracy"] == f"{scores.loc['dense', 'mean']:.3f} ± {scores.loc['dense', 'std']:.3f}"
    assert dense["minus FedMITR [95 %]"].startswith(f"{scores.loc['dense', 'minus fedmitr']:+.3f} [")
    assert told.loc["FedMITR", "minus FedMITR [95 %]"] == ""
    assert (dense["MB up"], dense["MB down"]) == ("6.00", "6.00")
    assert (dense["MFLOP a prediction"], told.loc["FuseFL *", "MFLOP a prediction"]) == ("24", "120 (5.0×)")
    assert dense["server seconds"] == f"{20 * list(METHODS).index('dense'):.1f}"


def test_with_one_seed_the_table_claims_no_spread(files):
    runs, seconds = (part[part["seed"] == 0] for part in files)
    told = account_table(runs, seconds)
    assert not told.astype(str).apply(lambda column: column.str.contains("nan|±")).any(axis=None)


def test_a_table_of_some_methods_is_made_too(files):
    runs, seconds = (part[part["method"] != "fedmitr"] for part in files)
    assert account_table(runs, seconds)["minus FedMITR [95 %]"].eq("").all()


def test_a_users_method_has_a_row_whether_it_is_registered_here_or_not(tmp_path):
    with registrations_taken_back():
        register(Method("mine", run=METHODS["fedavg"].run, label="My method", family="average"))
        table = comparison_table(["fedmitr", "mine", "theirs", "central"])
        told = account_table(*written(table, tmp_path))
    assert list(told.index) == ["My method", "FedMITR", "theirs", "central"]  # family by family
    assert told.loc["theirs", "MB up"] == "6.00" and told.loc["My method", "server seconds"] == "20.0"


def test_two_methods_of_one_label_are_two_rows(tmp_path):
    with registrations_taken_back():
        register(Method("mine", run=METHODS["fedavg"].run, label="FedAvg", family="average"))
        told = account_table(*written(comparison_table(["fedavg", "mine"]), tmp_path))
    assert list(told.index) == ["FedAvg", "FedAvg"] and list(told["server seconds"]) == ["0.0", "20.0"]
