"""trends.py: accuracy against ε, every run of the table in it."""

import math

import numpy as np
import pandas as pd
import pytest

from fedmitr.figures import accuracy_against_epsilon
from fedmitr.methods import described

NAMES, EPSILONS = ("ridge", "fedmitr", "fedmitr_plus", "mine"), (1.0, 10.0, 30.0)


def invented(starts=("vit_micro", "vit_micro_early"), seeds=3):
    rng = np.random.default_rng(0)
    rows = [
        (start, name, e, e, 1e-5, seed, rng.uniform(0.2, 0.9))
        for start in starts
        for name in NAMES
        for e in (math.nan, *EPSILONS)
        for seed in range(seeds)
    ]
    columns = ["start", "method", "epsilon", "spent", "delta", "seed", "accuracy"]
    return pd.DataFrame(rows, columns=columns)


@pytest.mark.parametrize("starts", [("vit_micro",), ("vit_micro", "vit_micro_early")], ids=len)
def test_lines_are_means_over_seeds_and_dots_are_seeds(starts, drawn):
    table = invented(starts).sample(frac=1, random_state=1)
    figure = drawn(accuracy_against_epsilon(table))
    assert {axis.get_title() for axis in figure.axes} == {f"start {start}" for start in starts}
    for axis in figure.axes:
        runs = table[table["start"] == axis.get_title().removeprefix("start ")]
        lines = [line for line in axis.lines if line.get_linestyle() == "-"]
        wanted = runs.dropna().groupby(["method", "epsilon"])["accuracy"].mean()
        found = sorted(tuple(line.get_ydata()) for line in lines)
        np.testing.assert_allclose(found, sorted(tuple(wanted[name]) for name in NAMES))
        assert all(line.get_xdata().tolist() == list(EPSILONS) for line in lines)
        dots = [line.get_ydata() for line in axis.lines if line.get_markersize() == 2.6]
        assert sorted(np.concatenate(dots)) == sorted(runs["accuracy"])
        assert [t.get_text() for t in axis.get_xticklabels()] == ["1", "10", "30", "none"]
    (legend,) = figure.legends
    assert {t.get_text() for t in legend.get_texts()} == {described(name).label for name in NAMES}


def test_a_table_that_is_not_finished_is_drawn(drawn):
    table = invented(seeds=1).query("method == 'ridge'")
    drawn(accuracy_against_epsilon(table.head(2)))
    drawn(accuracy_against_epsilon(table.dropna()))
