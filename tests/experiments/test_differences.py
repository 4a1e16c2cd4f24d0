"""differences.py: means over seeds, the paired interval against scipy, tables over skews, accounts."""

import numpy as np
import pandas as pd
import pytest
from helpers import registrations_taken_back
from scipy import stats

from fedmitr.experiments.differences import (
    GAP,
    HALF,
    across_skews,
    by_family,
    interval,
    skew_table,
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


def test_the_table_of_skews_says_what_the_summaries_say(runs):
    harder = runs.assign(alpha=0.05, accuracy=runs["accuracy"] / 2)
    more = runs.assign(seed=runs["seed"] + 5)  # seeds that ran at one alpha alone
    table = skew_table(pd.concat([runs, more, harder]))
    seeds = {"α = 0.05": "5 seeds", "α = 0.1": "10 seeds", "mean over α": "5 seeds"}
    assert list(table.columns) == [f"{name}, {count}" for name, count in seeds.items()]
    table.columns = list(seeds)
    families = [("average", "FedAvg"), ("synthetic images", "FedMITR+"), ("reference", "ensemble *")]
    assert list(table.index) == families
    both = runs.assign(accuracy=0.75 * runs["accuracy"])
    for some, column in ((harder, "α = 0.05"), (pd.concat([runs, more]), "α = 0.1"), (both, "mean over α")):
        for method, row in summarise(some).iterrows():
            said = f"{row['mean']:.3f} ± {row['std']:.3f}"
            said += "" if method == "fedmitr_plus" else f", {interval(row)}"
            (index,) = by_family([method])
            assert table.loc[index, column] == said


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


# Several skews, not all of which every method ran with every seed.


@pytest.fixture
def skews(runs):
    """Five seeds at two alphas; the ensemble lacks seed 4 at the second, FedAvg all of the second."""
    harder = runs.assign(alpha=0.05, accuracy=runs["accuracy"] / 2)
    lacks = (harder["method"] == "ensemble") & (harder["seed"] == 4) | (harder["method"] == "fedavg")
    return pd.concat([runs, harder[~lacks]])


def test_a_seed_without_every_skew_is_left_out_for_its_method_alone(runs, skews):
    found = across_skews(skews)
    wanted = runs[runs["method"].isin(["fedmitr_plus", "ensemble"])].assign(accuracy=0.75 * runs["accuracy"])
    wanted = wanted[~((wanted["method"] == "ensemble") & (wanted["seed"] == 4))]
    keys = ["method", "seed"]
    pd.testing.assert_frame_equal(
        found.sort_values(keys).reset_index(drop=True),
        wanted[[*keys, "accuracy"]].sort_values(keys).reset_index(drop=True),
    )


def test_the_mean_over_skews_does_not_depend_on_which_other_methods_ran(skews):
    alone = across_skews(skews[skews["method"] == "fedmitr_plus"])
    beside = across_skews(skews)
    pd.testing.assert_frame_equal(alone, beside[beside["method"] == "fedmitr_plus"].reset_index(drop=True))


def test_the_table_of_skews_says_what_is_missing(skews):
    table = skew_table(skews)
    assert list(table.columns) == ["α = 0.05, 5 seeds", "α = 0.1, 5 seeds", "mean over α, 5 seeds"]
    assert list(table.loc[("average", "FedAvg")].eq("–")) == [True, False, True]
    cells = table.loc[("reference", "ensemble *")]
    assert [cell.endswith(" (4 seeds)") for cell in cells] == [True, False, True]
    row = summarise(across_skews(skews)).loc["ensemble"]
    assert cells.iloc[2] == f"{row['mean']:.3f} ± {row['std']:.3f}, {interval(row)} (4 seeds)"
    assert not table.map(lambda cell: "nan" in cell).any(axis=None)


def test_where_no_seed_ran_at_every_skew_the_mean_is_a_dash(runs):
    apart = pd.concat([runs[runs["seed"] < 2], runs[runs["seed"] >= 2].assign(alpha=0.05)])
    table = skew_table(apart)
    assert len(across_skews(apart)) == 0 and table.iloc[:, 2].eq("–").all()
    assert not table.iloc[:, :2].eq("–").any(axis=None)


def test_a_run_without_an_accuracy_does_not_complete_a_seed_and_one_that_stands_twice_counts_once():
    rows = [
        ("a", 0, 0.1, 0.6),
        ("a", 0, 0.1, 0.6),
        ("a", 0, 0.3, 0.8),
        ("b", 0, 0.1, 0.5),
        ("b", 0, 0.3, None),
    ]
    runs = pd.DataFrame(rows, columns=["method", "seed", "alpha", "accuracy"])
    found = across_skews(runs).set_index("method")["accuracy"]
    assert found.to_dict() == {"a": pytest.approx(0.7)}
