"""verdicts.py: claims judged on made-up runs whose differences are known."""

import json

import numpy as np
import pandas as pd
import pytest

from fedmitr.study.analysis import part_table
from fedmitr.study.verdicts import (
    FAILS,
    HOLDS,
    OPEN,
    UNTESTED,
    judge,
    rivals,
    summary,
    verdicts,
    write_report,
)

NOISE = np.array([1, -1, 2, -2, 1, -1, 0.5, -0.5]) / 1000  # of mean 0


def ground(**leads):
    """Accuracies of every method of the ground: FedMITR+ has 0.8, another 0.8 + its lead."""
    base = 0.8 + np.linspace(0, 0.1, 8)
    usual = dict.fromkeys(["ridge", "ridge_plus", "ncm", "fedmitr", "stacking", "ensemble"], -0.1) | leads
    shifts = {name: np.roll(NOISE, i) for i, name in enumerate(usual)}
    return {"fedmitr_plus": base} | {name: base + lead + shifts[name] for name, lead in usual.items()}


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.001, 0.1, HOLDS),
        (-0.1, -0.01, FAILS),
        (-0.01, 0.009, FAILS),  # no lead that is worth a claim
        (-0.01, 0.011, f"{OPEN}: could be as large as +0.011"),
        (0.02, 0.02, OPEN),
    ],
)
def test_the_rule(low, high, verdict):
    assert judge(low, high, 0.01) == verdict


def test_rivals_take_one_exchange_leave_one_model_and_are_no_reference():
    names = ["ridge", "stacking", "fusefl", "fedmitr", "fedmitr_plus", "ensemble", "central", "fedavg"]
    assert rivals(names, "fedmitr_plus") == ["fedavg", "ridge", "fedmitr"]
    assert rivals(names, "fedmitr", images=True) == ["fedmitr_plus"]


def test_a_claim_over_all_rivals_holds_only_where_it_holds_against_each(protocol, made_up):
    card = verdicts(protocol, made_up("early", ground())).set_index("claim")
    assert card.loc["best", "verdict"] == HOLDS and card.loc["lift", "verdict"] == HOLDS
    assert card.loc["best", "difference"] == pytest.approx(0.1, abs=1e-6)
    assert card.loc["best", "wins"] == 8
    assert card.loc["penalty", "verdict"] == UNTESTED
    one_above = verdicts(protocol, made_up("early", ground(ncm=0.05))).set_index("claim")
    assert one_above.loc["best", "verdict"] == FAILS and "NCM" in one_above.loc["best", "compared"]
    assert one_above.loc["best", "difference"] == pytest.approx(-0.05, abs=1e-6)
    level = verdicts(
        protocol, made_up("early", ground(ridge=0.0) | {"ridge": 0.8 + np.roll(ground()["ridge_plus"], 3)})
    )
    assert level.set_index("claim").loc["best with images", "verdict"] == FAILS


def test_a_lead_that_may_be_large_is_not_decided(protocol, made_up):
    wild = ground()
    wild["ridge_plus"] = wild["fedmitr_plus"] + np.array([1, -1, 1, -1, 1, -1, 1, -1.2]) / 10
    card = verdicts(protocol, made_up("early", wild)).set_index("claim")
    assert card.loc["lift", "verdict"].startswith(f"{OPEN}: could be as large as +0.")


def test_the_table_of_a_ground_compares_with_fedmitr_plus_references_apart(protocol, made_up):
    table = part_table(protocol, made_up("early", ground(ensemble=0.05)), "early")
    assert np.isnan(table.loc["fedmitr_plus", "difference"])
    assert table.loc["ridge", "difference"] == pytest.approx(-0.1, abs=1e-6)
    assert table.loc["ensemble", "low"] == pytest.approx(
        table.loc["ensemble", "low Holm"]
    )  # alone in its family
    assert table.loc["ridge", "low Holm"] < table.loc["ridge", "low"]
    assert table.loc["ridge", "mean"] == pytest.approx(ground()["ridge"].mean())


def test_the_table_of_a_panel_compares_with_its_first_cell(protocol, made_up):
    runs = made_up("heads", {"λ = 1": [0.5, 0.6, 0.7], "λ = 100": [0.6, 0.69, 0.81]})
    table = part_table(protocol, runs, "heads")
    assert table.index.tolist() == ["λ = 1", "λ = 100"]
    assert table.loc["λ = 100", "difference"] == pytest.approx(0.1)


def test_the_report_is_the_same_bytes_twice_and_its_summary_has_five_lines(protocol, made_up, tmp_path):
    runs = pd.concat(
        [made_up("early", ground()), made_up("heads", {"λ = 1": [0.5, 0.6], "λ = 100": [0.6, 0.75]})]
    )
    for name in ("a", "b"):
        write_report(protocol, runs, tmp_path / f"{name}.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    told = json.loads((tmp_path / "a.json").read_text())
    assert told["summary"] == summary(protocol, runs) and len(told["summary"]) == 5
    assert "5 of 5 below it, 0 above" in told["summary"][1]
    assert "+0.100 [" in told["summary"][2] and "-0.100 [" in told["summary"][3]
    assert "2 holds" in told["summary"][4]
    assert {row["cell"] for row in told["parts"]["early"]} == set(ground())
