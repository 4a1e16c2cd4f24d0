"""differences.py: means over seeds, at one skew and at several; the paired interval against scipy."""

import numpy as np
import pandas as pd
import pytest
from helpers import registrations_taken_back
from scipy import stats

from fedmitr.experiments.differences import (
    GAP,
    HALF,
    summarise,
    summarise_skews,
)
from fedmitr.methods import METHODS, Method, register


@pytest.fixture
def runs():
    rng = np.random.default_rng(0)
    rows = [
        dict(method=m, task="digits", alpha=0.1, clients=5, seed=s, accuracy=rng.uniform(0.3, 0.8))
        for s in range(5)
        for m in ("fedavg", "fedmitr_plus", "ensemble")
    ]
    return pd.DataFrame(rows)


def of(runs, method):
    return runs[runs["method"] == method].sort_values("seed")["accuracy"].to_numpy()


def test_the_paired_difference_and_its_interval_are_scipys(runs):
    table = summarise(runs)
    for method in ("fedavg", "ensemble"):
        paired = stats.ttest_rel(of(runs, method), of(runs, "fedmitr_plus")).confidence_interval(0.95)
        row = table.loc[method]
        assert row[GAP] == pytest.approx((paired.low + paired.high) / 2)
        assert row[HALF] == pytest.approx((paired.high - paired.low) / 2)


def test_mean_and_deviation_are_over_the_seeds(runs):
    table = summarise(runs)
    assert list(table.index) == ["fedavg", "fedmitr_plus", "ensemble"]
    for method in table.index:
        values = of(runs, method)
        assert table.loc[method, "mean"] == pytest.approx(values.mean())
        assert table.loc[method, "std"] == pytest.approx(values.std(ddof=1))
        assert table.loc[method, "seeds"] == 5
    assert table.loc["fedmitr_plus", GAP] == 0


def test_the_order_of_the_rows_does_not_matter(runs):
    shuffled = runs.sample(frac=1, random_state=1)
    pd.testing.assert_frame_equal(summarise(shuffled).sort_index(), summarise(runs).sort_index())


def test_several_alphas_are_summarised_each_by_itself(runs):
    harder = runs.assign(alpha=0.05, accuracy=runs["accuracy"] / 2)
    table = summarise_skews(pd.concat([runs, harder]))
    pd.testing.assert_frame_equal(table.loc[0.1], summarise(runs))
    pd.testing.assert_frame_equal(table.loc[0.05], summarise(harder))


def test_without_fedmitr_plus_or_with_one_seed_there_is_no_interval(runs):
    assert summarise(runs[runs["method"] != "fedmitr_plus"])[[GAP, HALF]].isna().all(axis=None)
    one = summarise(runs[runs["seed"] == 0])
    assert one[HALF].isna().all() and one[GAP].notna().all()


def test_a_users_method_is_summarised_whether_it_is_registered_here_or_not(runs):
    names = {"fedavg": "mine", "ensemble": "theirs"}
    with registrations_taken_back():
        register(Method("mine", METHODS["fedavg"].run))
        table = summarise(runs.replace({"method": names}))
    pd.testing.assert_frame_equal(table, summarise(runs).rename(index=names))
