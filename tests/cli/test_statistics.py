"""cli.py: methods on statistics alone, from the command line: nobody trains, one number for any skew."""

import json

import pandas as pd
import pytest
from helpers import SMALL_OPTIONS, call_cli, read_cli

from fedmitr.experiments import clients
from fedmitr.methods import METHODS
from fedmitr.settings import Settings

RUN = ["run", "--method", "ridge", "--seed", 3, *SMALL_OPTIONS]
SENT_ALONE = [name for name, record in METHODS.items() if not record.needs_weights]


@pytest.fixture
def nobody_trains(forbid):
    forbid(clients, "train_client")


def test_a_run_of_ridge_reports_what_was_not_trained_as_null(tmp_path, nobody_trains):
    found = read_cli(*RUN, "--json", "--store", tmp_path)
    for name in ("ensemble_accuracy", "fedavg_accuracy", "best_local_accuracy"):
        assert found[name] is None
    assert found["local_accuracies"] == [] and 0 <= found["accuracy"] <= 1
    assert set(found["seconds"]) == {"clients", "solving"}
    sums = 2 * 8 * (10 + 10 * 192 + 192 * 193 // 2)
    assert sums < found["upload_bytes"] < sums + 2000
    assert found["download_bytes"] > 2 * 1_200_000
    assert Settings.model_validate(found["settings"]).statistics.ridge == 1.0


def test_without_json_it_is_told_in_words_without_those_references(tmp_path, nobody_trains):
    done = call_cli(*RUN, "--store", tmp_path)
    first, second = done.stdout.splitlines()
    assert done.exit_code == 0 and first.startswith("ridge on digits, 2 clients, seed 3: 0.")
    assert second.startswith("  uplink 0.3") and "None" not in done.stdout and "FedAvg" not in done.stdout


def test_any_skew_and_number_of_clients_is_one_number(tmp_path, nobody_trains):
    def told(*more):
        return read_cli(*RUN, *more, "--json", "--store", tmp_path)["accuracy"]

    first = told()
    cells = [("--alpha", "0.05"), ("--alpha", "100"), ("--clients", "5"), ("--clients", "1")]
    assert {told(*cell) for cell in cells} == {first}
    assert told("--model", "vit_micro_early") == told("--model", "vit_micro_early", "--clients", "4")


def test_a_second_run_sums_nothing_anew(tmp_path, nobody_trains, forbid):
    first = read_cli(*RUN, "--json", "--store", tmp_path)
    forbid(clients, "sent_statistics")
    assert read_cli(*RUN, "--json", "--store", tmp_path) == first
    other = read_cli(*RUN, "--set", "statistics.ridge=10", "--json", "--store", tmp_path)
    assert other["run_id"] != first["run_id"]


def test_methods_on_statistics_are_compared_on_clients_that_never_train(tmp_path, nobody_trains):
    out = tmp_path / "runs.csv"
    words = ["compare", "--methods", ",".join(SENT_ALONE), "--seeds", "3-4", "--out", out, "--json"]
    table = read_cli(*words, *SMALL_OPTIONS, "--set", "fishermix.epochs=1", "--store", tmp_path / "store")
    rows = pd.read_csv(out)
    assert set(rows["method"]) == set(SENT_ALONE) and len(rows) == 2 * len(SENT_ALONE)
    scores = {row["method"]: row["mean"] for row in table["summary"]}
    assert scores["ridge"] == scores["central_ridge"]
    assert not (tmp_path / "store" / "uploads").exists()


@pytest.mark.parametrize("method", METHODS)
def test_a_dry_run_plans_every_method_and_does_nothing(method, tmp_path, no_work):
    words = ["run", "--method", method, "--dry-run", "--store", tmp_path / "store"]
    done = call_cli(*words)
    assert done.exit_code == 0, done.output
    stages = json.loads(call_cli(*words, "--json").stdout.splitlines()[-1])
    assert stages[0]["stage"] == ("central" if "central" in method else "clients")
    assert all(stage["stage"] in done.stdout for stage in stages)
    assert not (tmp_path / "store").exists()
    if method in SENT_ALONE:
        views = Settings.load(method=method).fedmitr_plus.views if method == "ridge_plus" else 0
        passes = f"{1 + views} passes" if views else "one pass"  # the image and its moved copies
        assert len(stages) == 1 and passes in stages[0]["what"]
