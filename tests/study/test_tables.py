"""tables.py: the text of the study's tables has the numbers of its runs."""

import json

import numpy as np
import pandas as pd
import pytest

from fedmitr.experiments.differences import span_text
from fedmitr.methods import METHODS
from fedmitr.study.analysis import part_table
from fedmitr.study.tables import (
    GAP,
    ground_table,
    grounds_table,
    markdown,
    panel_line,
    panel_table,
    search_table,
    trials_table,
    verdict_table,
)
from fedmitr.study.verdicts import verdicts

SCORES = {
    "fedmitr_plus": [0.80, 0.82, 0.81],
    "ridge": [0.70, 0.73, 0.70],
    "ridge_plus": [0.80, 0.83, 0.82],
    "stacking": [0.79, 0.84, 0.80],
}


@pytest.fixture
def protocol(protocol):
    """The small protocol with the three seeds of the made-up runs."""
    grounds = protocol.grounds | {"early": protocol.grounds["early"].model_copy(update={"seeds": "30-32"})}
    return protocol.model_copy(update={"grounds": grounds})


@pytest.fixture
def table(protocol, made_up):
    return part_table(protocol, made_up("early", SCORES), "early")


def test_a_ground_family_by_family_with_differences_and_costs(table):
    text = ground_table(table)
    assert text.index.tolist() == [
        ("statistics", "ridge"),
        ("statistics", "ridge+"),
        ("statistics", "stacking *"),
        ("synthetic images", "FedMITR+"),
    ]
    row, ridge = text.loc[("statistics", "ridge")], np.array(SCORES["ridge"])
    assert row["accuracy"] == f"{ridge.mean():.3f} ± {ridge.std(ddof=1):.3f}"
    assert row[GAP].startswith(f"{(ridge - SCORES['fedmitr_plus']).mean():+.3f} [")
    assert row["seeds above"] == "0 of 3" and row["models"] == "1"
    assert text.loc[("statistics", "stacking *"), "models"] == "K"
    assert text.loc[("statistics", "ridge+"), "seeds above"] == "2 of 3"
    ours = text.loc[("synthetic images", "FedMITR+")]
    assert ours[GAP] == ours["seeds above"] == ""


def test_grounds_side_by_side(table):
    text = grounds_table({"early": table, "later": table})
    assert [name for name in text.columns if "later" in name] == ["later", f"later: {GAP}"]
    assert (text["early"] == text["later"]).all() and "MB up" in text


def test_markdown_names_a_family_once(table):
    lines = markdown(ground_table(table)).splitlines()
    assert lines[0].startswith("| family | method | accuracy |") and len(lines) == 2 + 4
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["statistics", "", "", "synthetic images"]
    assert len({line.count("|") for line in lines}) == 1


def test_a_panel_against_its_first_cell(protocol, made_up):
    runs = made_up("heads", {"λ = 1": [0.5, 0.6, 0.7], "λ = 100": [0.6, 0.69, 0.81]})
    text = panel_table(part_table(protocol, runs, "heads"))
    assert text.index.tolist() == ["λ = 1", "λ = 100"]
    assert text.iloc[0, 1] == "" and text.iloc[1, 1].startswith("+0.100 [")


def test_a_panel_in_words_has_each_cell_on_its_side_of_the_first(protocol):
    rng = np.random.default_rng(0)
    means = {"first": 0.5, "higher": 0.6, "lower": 0.3, "level": 0.5}
    rows = [
        {"cell": cell, "mean": mean, "difference": gap, "low Holm": gap - 0.02, "high Holm": gap + 0.02}
        for cell, mean in means.items()
        for gap in [mean - 0.5 + rng.uniform(-0.01, 0.01)]
    ]
    rows[0] |= dict.fromkeys(["difference", "low Holm", "high Holm"], float("nan"))
    said = panel_line(pd.DataFrame(rows).set_index("cell"))
    gaps = [f"{row['difference']:+.3f}" for row in rows]
    assert said == (
        f"“first” has 0.500. above it: higher ({gaps[1]}); below it: lower ({gaps[2]}); "
        f"not told apart from it: level ({gaps[3]})."
    )


def test_verdicts_with_intervals_and_none_for_what_was_not_run(protocol, made_up):
    text = verdict_table(
        verdicts(protocol, made_up("early", SCORES | {"fedmitr": [0.3, 0.31, 0.3], "ncm": [0.1, 0.2, 0.1]}))
    )
    lift = text.set_index("claim").loc["lift"]
    assert lift["difference [adjusted interval]"].startswith("-0.007 [") and lift["wins"] == "0 of 3"
    penalty = text.set_index("claim").loc["penalty"]
    assert penalty["difference [adjusted interval]"] == penalty["wins"] == ""
    assert penalty["verdict"] == "not tested: 0 of 2 seeds"


def test_no_difference_is_no_text():
    assert span_text(float("nan"), 0, 0) == ""
    assert span_text(-0.0123, -0.02, 0.001) == "-0.012 [-0.020, +0.001]"


TRIALS = pd.DataFrame(
    [
        ("vit_micro", "dense", 0, "complete", 0.5),
        ("vit_micro", "dense", 1, "stopped", 0.9),
        ("vit_micro", "dense", 2, "complete", 0.7),
        ("vit_micro_early", "dense", 0, "complete", 0.4),
    ],
    columns=["start", "method", "trial", "state", "accuracy"],
)


def test_trials_are_counted_and_the_best_ran_on_all_seeds():
    assert trials_table(TRIALS).reset_index().to_dict("records") == [
        {"start": "vit_micro", "method": "DENSE", "trials": 3, "on all seeds": 2, "first": 0.5, "best": 0.7},
        {
            "start": "vit_micro_early",
            "method": "DENSE",
            "trials": 1,
            "on all seeds": 1,
            "first": 0.4,
            "best": 0.4,
        },
    ]


def test_the_table_of_search_spaces_has_every_setting_and_what_won(monkeypatch):
    import fedmitr.study.tables as module

    won = {("vit_micro", "dense"): {"dense.lr": 0.0125}}
    monkeypatch.setattr(module, "tuned_values", lambda profile, start, method: won.get((start, method), {}))
    text = search_table(TRIALS)
    assert text.loc["DENSE"].index.tolist() == list(METHODS["dense"].search)
    row = text.loc[("DENSE", "dense.lr")]
    assert row["from vit_micro"] == "0.0125" and row["from vit_micro_early"] == ""
    space = METHODS["dense"].search["dense.lr"]
    assert row["tried"] == f"{space.low:g} to {space.high:g}, logarithmic"
    steps = METHODS["dense"].search["dense.generator_steps"]
    assert json.loads(f"[{text.loc[('DENSE', 'dense.generator_steps'), 'tried']}]") == list(steps)
