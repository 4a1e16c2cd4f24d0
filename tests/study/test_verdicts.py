"""verdicts.py: claims judged on made-up runs whose differences are known."""

import json

import numpy as np
import pandas as pd
import pytest

from fedmitr.study.analysis import part_table
from fedmitr.study.protocol import rivals
from fedmitr.study.verdicts import FAILS, HOLDS, OPEN, UNTESTED, judged, summary, verdicts, write_report

NOISE = np.array([1, -1, 2, -2, 1, -1, 0.5, -0.5]) / 1000  # of mean 0


@pytest.fixture
def protocol(protocol):
    """The small protocol with the eight seeds of the made-up runs."""
    early = protocol.grounds["early"].model_copy(update={"seeds": "30-37"})
    heads = protocol.panels["heads"].model_copy(update={"seeds": "30-32"})
    grounds = protocol.grounds | {"early": early}
    return protocol.model_copy(update={"grounds": grounds, "panels": {"heads": heads}})


def ground(**leads):
    """Accuracies of every method of the ground: FedMITR+ has 0.8, another 0.8 + its lead."""
    base = 0.8 + np.linspace(0, 0.1, 8)
    usual = dict.fromkeys(["ridge", "ridge_plus", "ncm", "fedmitr", "stacking", "ensemble"], -0.1) | leads
    shifts = {name: np.roll(NOISE, i) for i, name in enumerate(usual)}
    return {"fedmitr_plus": base} | {name: base + lead + shifts[name] for name, lead in usual.items()}


def leads(**columns):
    """Accuracies of a better method and of others that it leads by these amounts, seed by seed."""
    better = 0.5 + np.linspace(0, 0.1, 8)
    return pd.DataFrame(
        {"better": better} | {name: better - np.asarray(lead) for name, lead in columns.items()}
    )


@pytest.mark.parametrize(
    ("lead", "verdict"),
    [
        (0.02 + NOISE, HOLDS),
        (0.005 + NOISE, HOLDS),  # small, and surely above zero
        (-0.02 + NOISE, FAILS),
        (0.0 + NOISE, FAILS),  # no lead that is worth a claim
        (0.01 + 10 * NOISE, OPEN),
        (np.full(8, 0.02), HOLDS),
        (np.zeros(8), FAILS),
    ],
)
def test_the_rule_for_one_lead(lead, verdict):
    _, (said,) = judged(leads(other=lead), "better", ["other"], 0.05, 0.01)
    assert said == verdict


def test_leads_of_the_claimed_size_are_said_to_fail_in_few_studies():
    rng, studies = np.random.default_rng(0), 0
    for _ in range(200):
        columns = {f"r{i}": 0.01 + rng.normal(0, 0.01, 8) for i in range(12)}
        said = judged(leads(**columns), "better", list(columns), 0.05, 0.01)[1]
        studies += FAILS in said
    assert studies <= 12  # 5 are expected; 52 where each comparison has the level to itself


def test_leads_of_zero_are_said_to_hold_in_few_studies():
    rng, studies = np.random.default_rng(1), 0
    for _ in range(200):
        columns = {f"r{i}": rng.normal(0, 0.01, 8) for i in range(12)}
        studies += HOLDS in judged(leads(**columns), "better", list(columns), 0.05, 0.0)[1]
    assert studies <= 12


def test_rivals_take_one_exchange_leave_one_model_and_are_no_reference():
    names = ["ridge", "stacking", "fusefl", "fedmitr", "fedmitr_plus", "ensemble", "central", "fedavg"]
    assert rivals(names, "fedmitr_plus") == ["fedavg", "ridge", "fedmitr"]
    assert rivals(names, "fedmitr", images=True) == ["fedmitr_plus"]


def test_a_claim_over_all_rivals_holds_only_where_it_holds_against_each(protocol, made_up):
    card = verdicts(protocol, made_up("early", ground())).set_index("claim")
    assert card.loc["best", "verdict"] == HOLDS and card.loc["lift", "verdict"] == HOLDS
    assert card.loc["best", "difference"] == pytest.approx(0.1, abs=1e-6)
    assert card.loc["best", "wins"] == 8
    assert card.loc["penalty", "verdict"] == f"{UNTESTED}: 0 of 3 seeds"
    one_above = verdicts(protocol, made_up("early", ground(ncm=0.05))).set_index("claim")
    assert one_above.loc["best", "verdict"] == FAILS and "NCM" in one_above.loc["best", "compared"]
    assert one_above.loc["best", "difference"] == pytest.approx(-0.05, abs=1e-6)


def test_a_claim_that_one_rival_leaves_open_does_not_hold(protocol, made_up):
    told = ground(ncm=-0.006)  # a small lead over NCM, surely above zero
    told["ridge"] = told["fedmitr_plus"] - 0.02 - np.array([1, -1, 1, -1, 1, -1, 1, -1]) / 20
    row = verdicts(protocol, made_up("early", told)).set_index("claim").loc["best"]
    assert row["verdict"].startswith(OPEN) and row["compared"].endswith("least lead: ridge")
    assert row["low"] < 0 < row["high"]
    told["ridge_plus"] = told["fedmitr_plus"] + 0.02 + NOISE
    row = verdicts(protocol, made_up("early", told)).set_index("claim").loc["best"]
    assert row["verdict"] == FAILS and row["compared"].endswith("least lead: ridge+") and row["high"] < 0


def test_a_claim_is_not_tested_while_seeds_are_missing(protocol, made_up):
    runs = made_up("early", ground())
    lacking = runs[(runs["seed"] < 37) | (runs["cell"] != "ncm")]
    card = verdicts(protocol, lacking).set_index("claim")
    assert card.loc["best", "verdict"] == f"{UNTESTED}: 7 of 8 seeds"
    assert card.loc["lift", "verdict"] == HOLDS  # all of its runs are there


@pytest.mark.parametrize("cells", [["ridge"], ["fedmitr_plus"], ["ridge", "ncm"], []])
def test_a_study_that_was_stopped_is_reported_as_far_as_it_is(cells, protocol, made_up, tmp_path):
    runs = pd.concat(
        [
            made_up("early", {name: values for name, values in ground().items() if name in cells}),
            made_up("heads", {"λ = 100": [0.5, 0.6, 0.7]}),
        ]
    )
    write_report(protocol, runs, tmp_path / "a.json")
    told = json.loads((tmp_path / "a.json").read_text())
    assert len(told["summary"]) == 5 and "4 not tested" in told["summary"][4]
    (row,) = told["parts"]["heads"]
    assert row["mean"] == 0.6 and row["difference"] is None  # its first cell has no runs


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
        [
            made_up("early", ground()),
            made_up("heads", {"λ = 1": [0.5, 0.6, 0.7], "λ = 100": [0.6, 0.75, 0.8]}),
        ]
    )
    for name in ("a", "b"):
        write_report(protocol, runs, tmp_path / f"{name}.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    told = json.loads((tmp_path / "a.json").read_text())
    assert told["summary"] == summary(protocol, runs) and len(told["summary"]) == 5
    assert "5 of 5 below it, 0 above" in told["summary"][1]
    assert "+0.100 [" in told["summary"][2] and "+0.100 [" in told["summary"][3]
    assert "3 holds, 1 fails, 0 not decided, 0 not tested" in told["summary"][4]
    assert {row["cell"] for row in told["parts"]["early"]} == set(ground())
