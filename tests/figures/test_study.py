"""study.py: every seed, both intervals and every label of the study's pictures, none over another."""

from itertools import combinations

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from helpers import comparison_table
from hypothesis import given
from hypothesis import strategies as st

from fedmitr import figures
from fedmitr.figures.study import crosses, label_points
from fedmitr.figures.style import new_figure
from fedmitr.methods import METHODS, described
from fedmitr.study.analysis import part_table
from fedmitr.study.protocol import Ground, Panel, Protocol

GROUNDS = ("early", "shipped")
CELLS = {"sparse": {}, "dense": {}, "none": {}}


@pytest.fixture
def protocol():
    grounds = {name: Ground(role="primary", seeds="0-4") for name in GROUNDS}
    panels = {"parts": Panel(seeds="0-4", method="fedmitr", cells=CELLS)}
    more = {"profile": "laptop", "settings": {}, "level": 0.05, "size": 0.01, "claims": ()}
    return Protocol(grounds=grounds, panels=panels, **more)


@pytest.fixture
def runs():
    rng, parts = np.random.default_rng(0), []
    for name in GROUNDS:
        table = comparison_table()
        parts.append(table.assign(part=name, cell=table["method"], accuracy=rng.uniform(0.3, 1, len(table))))
    cells = [
        {"part": "parts", "cell": cell, "method": "fedmitr", "seed": seed, "accuracy": rng.uniform(0.5, 0.9)}
        for cell in CELLS
        for seed in range(5)
    ]
    return pd.concat([*parts, pd.DataFrame(cells)], ignore_index=True)


@pytest.fixture
def tables(protocol, runs):
    return {name: part_table(protocol, runs, name) for name in GROUNDS}


def test_the_forest_has_every_seed_and_both_intervals(tables, runs, drawn):
    figure = drawn(figures.forest(tables, runs))
    for axis, (ground, table) in zip(figure.axes, tables.items(), strict=True):
        assert ground in axis.get_title()
        wide = runs[runs["part"] == ground].pivot(index="seed", columns="cell", values="accuracy")
        gaps = wide.drop(columns="fedmitr_plus").sub(wide["fedmitr_plus"], axis=0).to_numpy()
        dots = np.concatenate([line.get_xdata() for line in axis.lines if line.get_marker() == "o"])
        assert np.allclose(np.sort(dots), np.sort(gaps.ravel()))
        spans = {tuple(np.round(line.get_xdata(), 9)) for line in axis.lines if len(line.get_xdata()) == 2}
        for name, row in table.drop(index="fedmitr_plus").iterrows():
            assert tuple(np.round(row[["low", "high"]].astype(float), 9)) in spans, name
            assert tuple(np.round(row[["low Holm", "high Holm"]].astype(float), 9)) in spans, name
    labels = {label.get_text() for label in figure.axes[0].get_yticklabels()}
    assert labels == {record.label for record in METHODS.values()} - {"FedMITR+"}


def test_cells_are_drawn_against_the_first(protocol, runs, drawn):
    table = part_table(protocol, runs, "parts")
    figure = drawn(figures.cell_differences({"parts": table}, runs))
    (axis,) = figure.axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["none", "dense"]
    assert "sparse" in axis.get_title() and f"{table.loc['sparse', 'mean']:.3f}" in axis.get_title()
    marks = sorted(line.get_xdata()[0] for line in axis.lines if line.get_marker() == "D")
    assert marks == pytest.approx(sorted(table["difference"].dropna()))


def boxes_of(axis):
    return [text.get_window_extent() for text in axis.texts if text.get_text()]


def test_two_accuracies_and_their_differences_share_a_scale(drawn):
    one = pd.Series([0.80, 0.82, 0.79], index=[30, 31, 32], name="one")
    other = pd.Series([0.79, 0.83, 0.79], index=[30, 31, 32], name="other")
    left, right = drawn(figures.pairing(one, other, (-0.02, 0.02))).axes
    shown = {line.get_label(): line.get_ydata() for line in left.lines}
    assert np.allclose(shown["one"], one) and np.allclose(shown["other"], other)
    assert any(
        np.allclose(line.get_ydata(), one - other) for line in right.lines if len(line.get_xdata()) == 3
    )
    spans = [np.diff(axis.get_ylim()).item() for axis in (left, right)]
    assert spans[0] == pytest.approx(spans[1])


def test_every_method_but_references_is_a_labelled_point_against_both_costs(tables, drawn):
    table = tables["early"]
    figure = drawn(figures.tradeoffs(table))
    names = [name for name in table.index if not described(name).is_reference]
    for axis in figure.axes:
        assert axis.get_xscale() == "log"
        assert {text.get_text() for text in axis.texts} == {described(name).label for name in names}
        points = [line for line in axis.lines if len(line.get_xdata()) == 1]
        heights = sorted(float(line.get_ydata()[0]) for line in points)
        assert heights == pytest.approx(sorted(table.loc[names, "mean"]))


@given(st.lists(st.tuples(st.floats(0.05, 0.9), st.floats(0.05, 0.95)), min_size=2, max_size=12, unique=True))
def test_labels_of_points_cover_nothing_and_their_lines_do_not_cross(points):
    with mpl.rc_context({"font.size": 9}):
        figure = new_figure(8, 6)
        axis = figure.subplots()
        axis.set(xlim=(0, 1), ylim=(0, 1))
        figure.canvas.draw()
        figure.set_layout_engine("none")
        label_points(axis, points, [f"method {i}" for i in range(len(points))])
    boxes = boxes_of(axis)
    assert not [pair for pair in combinations(boxes, 2) if pair[0].overlaps(pair[1])]
    at = axis.transData.transform(points)
    assert not [box for box in boxes for x, y in at if box.contains(x, y)]
    lines = [axis.transData.transform(line.get_xydata()) for line in axis.lines]
    assert not [pair for pair in combinations(lines, 2) if crosses(*pair)]


def test_segments_that_cross_and_that_do_not():
    across = np.array([[0, 0], [1, 1]]), np.array([[0, 1], [1, 0]])
    apart = np.array([[0, 0], [1, 1]]), np.array([[2, 0], [3, 1]])
    joined = np.array([[0, 0], [1, 1]]), np.array([[1, 1], [2, 0]])
    assert crosses(*across) and not crosses(*apart) and not crosses(*joined)


def test_means_over_grounds_are_lines_family_by_family(tables, drawn):
    figure = drawn(figures.across_grounds(tables))
    assert [axis.get_title() for axis in figure.axes] == list(
        dict.fromkeys(m.family for m in map(described, tables["early"].index))
    )
    for axis in figure.axes:
        names = [m.name for m in METHODS.values() if m.family == axis.get_title()]
        lines = {tuple(line.get_ydata()) for line in axis.lines}
        for name in [*names, "fedmitr_plus"]:
            assert tuple(tables[ground].loc[name, "mean"] for ground in GROUNDS) in lines
        boxes = boxes_of(axis)
        assert not [pair for pair in combinations(boxes, 2) if pair[0].overlaps(pair[1])]
