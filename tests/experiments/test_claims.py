"""claims.py: what is said of each claim follows from scipy's interval of the paired difference."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from fedmitr.core.paths import home
from fedmitr.experiments.claims import FAILS, HOLDS, OPEN, UNTESTED, best_other, claims, judge
from fedmitr.experiments.statistics import paired

CELLS = ("relabel", "pseudo-label tokens", "none")


@pytest.fixture
def made():
    """Runs in which FedMITR leads by about 0.1, and cells in which it is dense and relabelled that do."""
    rng = np.random.default_rng(0)
    level = dict(fedmitr=0.9, dense=0.8, fedavg=0.6, ensemble=0.91, fusefl=0.95, central=0.99, local=0.4)
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


@pytest.mark.parametrize("low, high, said", [(0.01, 0.2, HOLDS), (-0.2, -0.01, FAILS), (-0.1, 0.1, OPEN)])
def test_a_claim_holds_where_the_whole_interval_is_above_zero(low, high, said):
    assert judge(low, high) == said


def test_the_best_other_method_leaves_a_single_model(made):
    assert best_other(made[0]) == "dense"


def test_the_card_judges_every_claim_by_its_own_runs(made):
    card = claims(*made).set_index("claim")
    assert (
        card.loc["The best single global model of one-shot federated learning under label skew", "verdict"]
        == HOLDS
    )
    assert "DENSE" in card["what was run"].iloc[0]
    assert card.loc["Sparse inversion is better than dense", "verdict"] == FAILS
    assert card.loc["Synthetic images lift the averaged model", "verdict"] == HOLDS
    assert card["verdict"].iloc[-1] == UNTESTED
    for claim in ("The same over several skews", "It does over several skews"):
        assert "6 seeds, mean over α = 0.05, 0.1" in card.loc[claim, "what was run"]
    of = made[0].pivot(index="seed", columns="method", values="accuracy")
    for claim, other in (
        ("The same over several skews", "dense"),
        ("It does over several skews", "ensemble"),
    ):
        mean, half = paired(of["fedmitr"], of[other])  # every alpha takes as much from all methods
        assert card.loc[claim, "result"] == f"{mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}]"
    gap = (of["fedmitr"] - of["ensemble"]).mean()
    assert card.loc["One model replaces the ensemble of all uploads", "result"].startswith(f"{gap:+.3f}")


def test_the_shipped_results_make_a_card():
    tables = (home() / "results" / f"{name}.csv" for name in ("comparison", "ablations", "skews"))
    card = claims(*map(pd.read_csv, tables))
    assert len(card) == 10 and card["verdict"].isin([HOLDS, FAILS, OPEN, UNTESTED]).all()
