"""trends.py: accuracy against the steps of pretraining, every line named."""

from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmitr.figures.trends import pretraining, spread
from fedmitr.methods import METHODS, described

STEPS = (0, 100, 200, 400, 1000, 3600)
NAMES = ("ridge", "ensemble", "ensemble_statistics", "fedavg", "fedmitr", "fedmitr_plus", "central", "mine")


def invented(seeds=5, steps=STEPS, names=NAMES, tied=False):
    """Accuracies that rise with the steps, the methods close together at the end, or all the same."""
    rng = np.random.default_rng(0)
    rows = [
        (at, seed, name, 0.5 if tied else 0.9 * (rank + 1) / len(steps) + 0.02 * rng.standard_normal())
        for rank, at in enumerate(steps)
        for seed in range(seeds)
        for name in names
    ]
    return pd.DataFrame(rows, columns=["steps", "seed", "method", "accuracy"])


def lines_of_means(axis):
    return [line for line in axis.lines if line.get_marker() == "o" and line.get_linestyle() != "None"]


def test_lines_are_means_and_dots_are_seeds(drawn):
    table = invented().sample(frac=1, random_state=0)  # the order of rows does not matter
    (axis,) = drawn(pretraining(table)).axes
    names = list(dict.fromkeys(table["method"]))
    lines = lines_of_means(axis)
    for name, line in zip(names, lines, strict=True):
        runs = table[table["method"] == name]
        wanted = [runs[runs["steps"] == at]["accuracy"].mean() for at in STEPS]
        assert line.get_xdata().tolist() == list(STEPS)
        np.testing.assert_allclose(line.get_ydata(), wanted)
        assert line.get_linestyle() == ("--" if described(name).is_reference else "-")
    dots = [line.get_ydata() for line in axis.lines if line.get_linestyle() == "None"]
    assert sorted(np.concatenate(dots)) == sorted(table["accuracy"])


def test_the_scale_shows_zero_and_every_number_of_steps(drawn):
    (axis,) = drawn(pretraining(invented())).axes
    assert axis.get_xticks().tolist() == list(STEPS)
    assert [label.get_text() for label in axis.get_xticklabels()] == [
        "0",
        "100",
        "200",
        "400",
        "1,000",
        "3,600",
    ]
    at = axis.transData.transform([(s, 0.5) for s in STEPS])[:, 0]  # pixels
    left, right = axis.bbox.x0, axis.bbox.x1
    assert left < at[0] and at[-1] < right and (np.diff(at) > 0.08 * (right - left)).all()


@pytest.mark.parametrize("options", [{}, {"tied": True}, {"seeds": 1}, {"steps": (0,)}, {"steps": (5, 50)}])
def test_labels_do_not_cover_each_other_and_their_lines_do_not_cross(options, drawn):
    figure = drawn(pretraining(invented(**options)))
    (axis,) = figure.axes
    texts = {text.get_text(): text for text in axis.texts}
    assert texts.keys() == {described(name).label for name in NAMES}
    boxes = [text.get_window_extent() for text in texts.values()]
    assert not [pair for pair in combinations(boxes, 2) if pair[0].overlaps(pair[1])]
    assert not [box for box in boxes if box.x0 < axis.bbox.x1 or box.x1 > figure.bbox.x1]
    joins = [line.get_ydata() for line in axis.lines if line.get_marker() == "None"]  # (end, label) heights
    assert len(joins) == len(NAMES)
    assert all((a[0] - b[0]) * (a[1] - b[1]) >= 0 for a, b in combinations(joins, 2))


def test_every_shipped_method_of_the_study_has_a_colour_of_its_own(drawn):
    names = [name for name in NAMES if name in METHODS]
    (axis,) = drawn(pretraining(invented(names=names))).axes
    assert len({line.get_color() for line in lines_of_means(axis)}) == len(names)


@given(st.lists(st.floats(-0.2, 1.2), min_size=1, max_size=12), st.floats(0.0, 0.05))
def test_spread_keeps_order_gap_and_limits(values, gap):
    moved = spread(values, gap, 0.0, 1.0)
    order = np.argsort(values, kind="stable")
    assert (np.diff(moved[order]) >= gap - 1e-9).all()
    assert moved.min() >= -1e-9 and moved.max() <= 1 + 1e-9


def test_spread_moves_nothing_that_is_apart_already():
    assert spread([0.9, 0.1, 0.5], 0.1, 0, 1).tolist() == pytest.approx([0.9, 0.1, 0.5])
    assert spread([0.5, 0.5], 0.1, 0, 1).tolist() == pytest.approx([0.45, 0.55])
