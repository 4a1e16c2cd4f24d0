"""analysis.py: paired differences against scipy and statsmodels, Holm's intervals against its decisions."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.multitest import multipletests

from fedmitr.study.analysis import DIFFERENCE, differences, finished_parts, holm_levels, part_table
from fedmitr.study.protocol import planned


def scores(seed=0, seeds=12, columns="abcdef"):
    rng = np.random.default_rng(seed)
    values = rng.normal(0.8, 0.05, (seeds, 1)) + rng.normal(0, 0.02, (seeds, len(columns)))
    values += 0.01 * np.arange(len(columns))
    return pd.DataFrame(values, columns=list(columns), index=range(30, 30 + seeds))


PAIRS = [(name, "a") for name in "bcdef"]


def test_a_difference_is_the_paired_t_test_of_scipy():
    table, found = scores(), differences(scores(), PAIRS)
    assert list(found.columns) == DIFFERENCE
    for one, other in PAIRS:
        test, row = stats.ttest_rel(table[one], table[other]), found.loc[one, other]
        assert row["p"] == pytest.approx(test.pvalue)
        assert (row["low"], row["high"]) == pytest.approx(tuple(test.confidence_interval(0.95)))
        gap = table[one] - table[other]
        assert row["difference"] == pytest.approx(gap.mean())
        assert (row["wins"], row["losses"], row["seeds"]) == ((gap > 0).sum(), (gap < 0).sum(), 12)


@given(st.integers(0, 10_000), st.sampled_from([0.01, 0.05, 0.2]))
def test_holms_interval_excludes_zero_exactly_where_statsmodels_rejects(seed, level):
    found = differences(scores(seed), PAIRS, level)
    rejected, adjusted, _, _ = multipletests(found["p"], level, method="holm")
    assert np.allclose(found["p Holm"], adjusted)
    outside = (found["low Holm"] > 0) | (found["high Holm"] < 0)
    assert outside.tolist() == rejected.tolist()


@given(st.lists(st.floats(1e-9, 1), min_size=1, max_size=12))
def test_holm_levels_by_the_steps_of_the_procedure(p_values):
    m, expected, stopped = len(p_values), {}, None
    for place, index in enumerate(np.argsort(p_values, kind="stable")):
        step = 0.05 / (m - place) if stopped is None else stopped
        expected[index] = step
        if stopped is None and p_values[index] > step:
            stopped = step
    assert holm_levels(p_values, 0.05).tolist() == [expected[i] for i in range(m)]


def test_seeds_that_one_of_two_lacks_are_left_out():
    table = scores()
    table.loc[30, "b"] = np.nan
    row = differences(table, [("b", "a")]).iloc[0]
    assert row["seeds"] == 11
    assert row["difference"] == pytest.approx((table["b"] - table["a"])[1:].mean())


def test_one_seed_is_not_tested_and_has_no_interval():
    row = differences(scores(seeds=1), [("b", "a")]).iloc[0]
    assert row["p"] == row["p Holm"] == 1 and row[["low", "high", "low Holm", "high all"]].isna().all()


def test_a_difference_that_is_the_same_on_every_seed_is_its_own_interval():
    table = scores(seeds=5, columns="a").assign(b=lambda t: t["a"] + 0.01)
    row = differences(table, [("b", "a")]).iloc[0]
    assert row["p"] == 0 and row["low Holm"] == row["high all"] == pytest.approx(0.01)
    assert differences(table, [("b", "a")], lead=0.01)["p"].item() == 1


def test_another_lead_is_tested_as_scipy_does():
    table, found = scores(), differences(scores(), PAIRS, lead=0.01)
    for one, other in PAIRS:
        gap = table[one] - table[other]
        assert found.loc[(one, other), "p"] == pytest.approx(stats.ttest_1samp(gap, 0.01).pvalue)


def test_a_part_is_finished_where_every_planned_run_is_there(protocol, made_up):
    plan = planned(protocol)
    runs = plan[["part", "cell", "seed"]]
    assert finished_parts(protocol, runs) == ["later", "early", "heads"]
    for part, some in runs.groupby("part"):
        assert protocol.runs_of(part) == len(some)
        lacking = runs.drop(some.index[-1])
        assert finished_parts(protocol, lacking) == [p for p in ("later", "early", "heads") if p != part]
    assert finished_parts(protocol, runs[:0]) == []


def test_a_tables_seconds_are_the_least_over_seeds_and_its_bytes_the_mean(protocol, made_up):
    runs = made_up("early", {"ridge": [0.5, 0.6], "fedmitr_plus": [0.6, 0.7]})
    runs["server_seconds"], runs["upload_bytes"] = [3.0, 1.0, 7.0, 9.0], [10, 20, 30, 50]
    table = part_table(protocol, runs, "early")
    assert table["server_seconds"].to_dict() == {"ridge": 1.0, "fedmitr_plus": 7.0}
    assert table["upload_bytes"].to_dict() == {"ridge": 15.0, "fedmitr_plus": 40.0}


def test_the_common_upper_end_is_bonferronis():
    table, found = scores(), differences(scores(), PAIRS)
    for one, other in PAIRS:
        both = stats.ttest_rel(table[one], table[other]).confidence_interval(1 - 0.05 / len(PAIRS))
        assert found.loc[(one, other), "high all"] == pytest.approx(both.high)
