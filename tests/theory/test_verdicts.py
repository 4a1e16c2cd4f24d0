"""verdicts.py: invented tables whose effects are known, against their own means and scipy's tests."""

import numpy as np
import pytest
from scipy import stats
from theory_tables import invented_inversions, invented_students

from fedmitr.study.verdicts import FAILS, HOLDS, OPEN
from fedmitr.theory.stability import predicted_distance
from fedmitr.theory.verdicts import CARD, LESS_NOISE, card, slopes, with_bounds

START = "vit_micro"


@pytest.fixture(scope="module")
def students():
    return invented_students()


@pytest.fixture(scope="module")
def found(students):
    return card(students, invented_inversions(), START)


def verdicts(found, claim):
    return dict(zip(*(found[found["claim"] == claim][c] for c in ("compared", "verdict")), strict=True))


def test_what_is_built_in_holds(found):
    assert list(found.columns) == list(CARD)
    assert set(verdicts(found, "less gradient variance").values()) == {HOLDS}
    assert len(verdicts(found, "less gradient variance")) == len(LESS_NOISE)
    assert set(verdicts(found, "closer students").values()) == {HOLDS}
    for kind in ("sparse", "dense"):
        for what in ("have the larger gradient", "'s gradients keep their signs more"):
            rows = found[found["claim"].str.startswith(f"{kind}: surviving patches")]
            assert set(rows["verdict"]) == {HOLDS}, what


def test_what_is_reversed_fails_and_what_is_noise_is_open(students, found):
    swapped = students.assign(inversion=students["inversion"].map({"sparse": "dense", "dense": "sparse"}))
    turned = verdicts(card(swapped, invented_inversions(), START), "less gradient variance")
    assert turned["dense · relabel against sparse · relabel"] == FAILS
    assert turned["sparse · pseudo-label tokens against sparse · relabel"] == HOLDS
    assert OPEN in verdicts(found, "more accurate on real images").values()
    assert set(verdicts(found, "the synthetic gap is the larger").values()) == {FAILS}


def test_a_ratio_is_the_geometric_mean_and_its_interval_holms(students, found):
    rows = students.query("start == @START and optimizer == 'sgd' and images == 400")
    logs = (
        rows.assign(value=np.log(rows["variance"])).groupby(["seed", "inversion", "labels"])["value"].mean()
    )
    wide = logs.unstack(["inversion", "labels"])
    gaps = {
        (more, less): wide[tuple(more.split(" · "))] - wide[tuple(less.split(" · "))]
        for more, less in LESS_NOISE
    }
    p = {pair: stats.ttest_1samp(gap, 0).pvalue for pair, gap in gaps.items()}
    first = min(p, key=p.get)
    said = found[(found["claim"] == "less gradient variance")]
    row = said[said["compared"] == f"{first[0]} against {first[1]}"].iloc[0]
    mean, error = gaps[first].mean(), gaps[first].std() / np.sqrt(len(gaps[first]))
    half = stats.t.ppf(1 - 0.05 / len(gaps) / 2, len(gaps[first]) - 1) * error
    low, high = np.exp([mean - half, mean + half])
    assert row["difference"] == f"× {np.exp(mean):.3g} [{low:.3g}, {high:.3g}]"


def test_bounds_are_the_recursion_of_each_run(students):
    rows = with_bounds(students)
    assert set(rows["optimizer"]) == {"sgd"} and len(rows) == (students["optimizer"] == "sgd").sum()
    run = rows.query("start == @START and seed == 1 and inversion == 'dense' and labels == 'relabel'")
    expected = predicted_distance(run["step"].tolist(), run["variance"].tolist(), 400, run["rate"].iloc[0])
    assert np.allclose(run["convex"], expected)
    assert (run["smooth"].iloc[1:] > run["convex"].iloc[1:]).all()
    assert np.allclose(run["convex_loss"], expected * np.sqrt(run["signal"] + run["variance"]))


def test_a_bound_that_lies_below_what_it_bounds_fails(students):
    near = card(students, invented_inversions(), START)
    claim = "the bound is above the losses' distance"
    assert set(verdicts(near, claim).values()) == {FAILS}  # invented: 0.01, far above any bound
    small = students.assign(loss_distance=students["distance"] * 1e-3)
    assert set(verdicts(card(small, invented_inversions(), START), claim).values()) == {HOLDS}


def test_slopes_are_those_that_were_built_in(students):
    table = slopes(students)
    assert np.allclose(table["distance"], 1.0, atol=0.1)  # built in as t^1, up to noise
    assert len(table) == 2 * (6 + 1)


def test_fewer_images_are_compared_with_all(found):
    rows = found[found["claim"].str.contains("of order 1/n")]
    assert len(rows) == 1 and "× 4" in rows["claim"].item()
    assert rows["compared"].item() == "sparse · relabel, n = 100 against sparse · relabel, n = 400"
    assert rows["difference"].item().startswith(("× 3.9", "× 4"))


def test_adamw_is_judged_without_the_bound_of_sgd(students):
    found = card(students, invented_inversions(), START, optimizer="adamw")
    assert set(verdicts(found, "less gradient variance").values()) == {HOLDS}
    assert not found["claim"].str.contains("bound|1/n").any()


def test_one_seed_decides_nothing():
    found = card(invented_students(seeds=1), invented_inversions(seeds=1), START)
    assert set(found["verdict"]) == {OPEN}
