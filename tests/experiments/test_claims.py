"""claims.py: what is said of each claim follows from scipy's interval of the paired difference."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from fedmitr.core.paths import home
from fedmitr.experiments.claims import FAILS, HOLDS, OPEN, UNTESTED, best_other, claims, judge
from fedmitr.experiments.differences import paired

CELLS = ("relabel", "pseudo-label tokens", "none")


@pytest.fixture
def made():
    """Runs in which FedMITR leads rivals by about 0.1, and cells of which the dense and relabelled lead.

    Ahead of it are what is no rival: FedMITR+, a method of several models, one of two exchanges, references.
    """
    rng = np.random.default_rng(0)
    level = dict(fedmitr=0.9, dense=0.8, fedavg=0.6, ensemble=0.91, fusefl=0.95, central=0.99, local=0.4)
    level |= dict(fedmitr_plus=0.98, fedavg_ridge=0.97, ridge_plus=0.7)
    runs = [
        dict(method=m, seed=s, alpha=0.1, accuracy=v + rng.normal(0, 0.01))
        for m, v in level.items() for s in range(6)
    ]  # fmt: skip
    cells = [
        dict(panel="components", cell=f"{kind} · {label}", seed=s, accuracy=v + rng.normal(0, 0.01))
        for kind, v in (("sparse", 0.8), ("dense", 0.9)) for label in CELLS for s in range(5)
    ]  # fmt: skip
    skews = [row | dict(alpha=a, accuracy=row["accuracy"] - a) for row in runs for a in (0.05, 0.1)]
    return pd.DataFrame(runs), pd.DataFrame(cells), pd.DataFrame(skews)


def test_the_interval_is_scipys(made):
    of = made[0].pivot(index="seed", columns="method", values="accuracy")
    wanted = stats.ttest_rel(of["fedmitr"], of["dense"]).confidence_interval(0.95)
    mean, half = paired(of["fedmitr"], of["dense"])
    assert (mean - half, mean + half) == pytest.approx((wanted.low, wanted.high))
    assert mean == pytest.approx((of["fedmitr"] - of["dense"]).mean())


@pytest.mark.parametrize(
    "low, high, said", [(0.01, 0.2, HOLDS), (-0.2, -0.01, FAILS), (-0.1, 0.1, OPEN), (-0.1, -0.1, OPEN)]
)
def test_a_claim_holds_where_the_whole_interval_is_above_zero(low, high, said):
    assert judge(low, high) == said


def test_the_best_rival_takes_one_exchange_and_leaves_a_single_model(made):
    assert best_other(made[0]) == "dense"
    assert best_other(made[0][made[0]["method"].isin(["fedmitr", "ensemble"])]) is None


def rows_of(card, claim):
    """The rows of a claim by what is judged: "FedMITR", "FedMITR+"."""
    rows = [row for _, row in card[card["claim"] == claim].iterrows()]
    return {row["what was run"].split(" − ")[0]: row for row in rows}


def test_the_card_judges_every_claim_by_its_own_runs(made):
    card = claims(*made)
    best = rows_of(card, "The best single global model of one-shot federated learning under label skew")
    assert [row["verdict"] for row in best.values()] == [HOLDS, HOLDS]
    assert best["FedMITR"]["what was run"] == "FedMITR − DENSE; 6 seeds, α = 0.1"
    (dense,) = rows_of(card, "Sparse inversion is better than dense").values()
    assert dense["verdict"] == FAILS
    lifted = rows_of(card, "Synthetic images lift the model that the student starts as")
    assert {row["verdict"] for row in lifted.values()} == {HOLDS}
    assert [row["what was run"].split(";")[0] for row in lifted.values()] == [
        "FedMITR − FedAvg",
        "FedMITR+ − ridge+",
    ]
    assert card["verdict"].iloc[-1] == UNTESTED
    of = made[0].pivot(index="seed", columns="method", values="accuracy")
    for claim, other in (
        ("The best single global model of one-shot federated learning under label skew", "dense"),
        ("One model replaces the ensemble of all uploads", "ensemble"),
    ):
        for name, label in (("fedmitr", "FedMITR"), ("fedmitr_plus", "FedMITR+")):
            mean, half = paired(of[name], of[other])  # every alpha takes as much from all methods
            row = rows_of(card, f"{claim}, over several skews")[label]
            assert row["result"] == f"{mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}]"
            assert "6 seeds, mean over α = 0.05, 0.1" in row["what was run"]
            assert rows_of(card, claim)[label]["result"].startswith(f"{mean:+.3f} [")


def test_a_claim_whose_runs_are_missing_is_not_tested(made):
    runs, cells, skews = made
    without = [table[table["method"] != "fedmitr_plus"] for table in (runs, skews)]
    card = claims(without[0], cells[cells["cell"] != "dense · none"], without[1])
    for claim in card["claim"].unique()[:6]:
        verdicts = {name: row["verdict"] for name, row in rows_of(card, claim).items()}
        assert verdicts["FedMITR"] != UNTESTED and verdicts["FedMITR+"] == UNTESTED
    (both,) = rows_of(card, "Sparse inversion and token relabel together are better than neither").values()
    assert both["verdict"] == UNTESTED and both["result"] == ""


def test_the_shipped_results_make_a_card():
    tables = (home() / "results" / f"{name}.csv" for name in ("comparison", "ablations", "skews"))
    card = claims(*map(pd.read_csv, tables))
    assert len(card) == 17 and card["verdict"].isin([HOLDS, FAILS, OPEN, UNTESTED]).all()
