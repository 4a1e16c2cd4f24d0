"""statistics.py: means over seeds, the paired interval against scipy, tables over skews, accounts."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from fedmitr.experiments.statistics import interval, skew_table, summarise, summarise_skews


@pytest.fixture
def runs():
    rng = np.random.default_rng(0)
    rows = [
        dict(method=m, task="digits", alpha=0.1, clients=5, seed=s, accuracy=rng.uniform(0.3, 0.8))
        for s in range(5)
        for m in ("fedavg", "fedmitr", "ensemble")
    ]
    return pd.DataFrame(rows)


def of(runs, method):
    return runs[runs["method"] == method].sort_values("seed")["accuracy"].to_numpy()


def test_the_paired_difference_and_its_interval_are_scipys(runs):
    table = summarise(runs)
    for method in ("fedavg", "ensemble"):
        paired = stats.ttest_rel(of(runs, method), of(runs, "fedmitr")).confidence_interval(0.95)
        row = table.loc[method]
        assert row["minus fedmitr"] == pytest.approx((paired.low + paired.high) / 2)
        assert row["± 95 %"] == pytest.approx((paired.high - paired.low) / 2)


def test_mean_and_deviation_are_over_the_seeds(runs):
    table = summarise(runs)
    assert list(table.index) == ["fedavg", "fedmitr", "ensemble"]
    for method in table.index:
        values = of(runs, method)
        assert table.loc[method, "mean"] == pytest.approx(values.mean())
        assert table.loc[method, "std"] == pytest.approx(values.std(ddof=1))
        assert table.loc[method, "seeds"] == 5
    assert table.loc["fedmitr", "minus fedmitr"] == 0


def test_the_order_of_the_rows_does_not_matter(runs):
    shuffled = runs.sample(frac=1, random_state=1)
    pd.testing.assert_frame_equal(summarise(shuffled).sort_index(), summarise(runs).sort_index())


def test_several_alphas_are_summarised_each_by_itself(runs):
    harder = runs.assign(alpha=0.05, accuracy=runs["accuracy"] / 2)
    table = summarise_skews(pd.concat([runs, harder]))
    pd.testing.assert_frame_equal(table.loc[0.1], summarise(runs))
    pd.testing.assert_frame_equal(table.loc[0.05], summarise(harder))


def test_the_table_of_skews_says_what_the_summaries_say(runs):
    harder = runs.assign(alpha=0.05, accuracy=runs["accuracy"] / 2)
    more = runs.assign(seed=runs["seed"] + 5)  # seeds that ran at one alpha alone
    table = skew_table(pd.concat([runs, more, harder]))
    seeds = {"α = 0.05": "5 seeds", "α = 0.1": "10 seeds", "mean over α": "5 seeds"}
    assert list(table.columns) == [f"{name}, {count}" for name, count in seeds.items()]
    table.columns = list(seeds)
    assert list(table.index) == list(summarise(runs).sort_values("mean", ascending=False).index)
    both = runs.assign(accuracy=0.75 * runs["accuracy"])
    for some, column in ((harder, "α = 0.05"), (pd.concat([runs, more]), "α = 0.1"), (both, "mean over α")):
        for method, row in summarise(some).iterrows():
            said = f"{row['mean']:.3f} ± {row['std']:.3f}"
            said += "" if method == "fedmitr" else f", {interval(row)}"
            assert table.loc[method, column] == said


def test_without_fedmitr_or_with_one_seed_there_is_no_interval(runs):
    assert summarise(runs[runs["method"] != "fedmitr"])[["minus fedmitr", "± 95 %"]].isna().all(axis=None)
    one = summarise(runs[runs["seed"] == 0])
    assert one["± 95 %"].isna().all() and one["minus fedmitr"].notna().all()
