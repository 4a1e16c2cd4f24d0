"""methods.py: every seed is drawn, no label covers another, and any method is drawn."""

from itertools import combinations

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import comparison_table, registrations_taken_back
from hypothesis import given
from hypothesis import strategies as st

from fedmitr import figures
from fedmitr.figures.methods import _spread
from fedmitr.figures.style import BLACK
from fedmitr.methods import METHODS, Method, register

LABELS = sorted(record.label for record in METHODS.values())


def markers(figure, shape):
    """(face, x, y) of every marker of a shape in the axes."""
    lines = [line for axis in figure.axes for line in axis.lines if line.get_marker() == shape]
    return [(ln.get_markerfacecolor(), *xy) for ln in lines for xy in ln.get_xydata()]


def test_every_seed_is_a_dot_of_its_own_and_several_models_are_open(table, drawn):
    tied = table.assign(accuracy=table["accuracy"].round(1))  # many seeds agree
    figure = drawn(figures.comparison(tied))
    dots = markers(figure, "o")
    assert sorted(x for _, x, _ in dots) == sorted(tied["accuracy"])
    assert len({(x, y) for _, x, y in dots}) == len(tied)
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    faces = {names[round(y)]: face for shape in "Ds" for face, _, y in markers(figure, shape)}
    assert {name for name, face in faces.items() if face == "white"} == {"FuseFL", "ensemble"}
    assert faces["DENSE"] == BLACK


def test_the_comparison_is_drawn_of_older_files_and_of_methods_without_a_name(table):
    few = table.loc[
        table["method"].isin(["fedmitr", "local"]), ["method", "task", "alpha", "clients", "seed"]
    ]
    few = pd.concat([few, few.assign(method="mine")]).assign(accuracy=0.5)
    names = [label.get_text() for label in figures.comparison(few).axes[0].get_yticklabels()]
    assert sorted(names) == ["FedMITR", "local", "mine"]


@pytest.mark.parametrize("seeds", [1, 5])
def test_costs_name_every_method_and_nothing_covers_a_name(table, seeds, drawn):
    table = table[table["seed"] < seeds]
    figure = drawn(figures.costs(table, table))
    for axis in figure.axes:
        texts = [t for t in axis.texts if not t.get_text().endswith("each")]
        assert sorted(t.get_text() for t in texts) == LABELS
        boxes = [t.get_window_extent() for t in axis.texts]
        assert not [pair for pair in combinations(boxes, 2) if pair[0].overlaps(pair[1])]
        points = [ln for ln in axis.lines if ln.get_marker() in "Ds"]
        at = np.array([ln.get_transform().transform(ln.get_xydata())[0] for ln in points])  # pixels
        assert not [(b, xy) for b in boxes for xy in at if b.contains(*xy)]
        gaps = np.linalg.norm(at[:, None] - at[None], axis=2) + 1e3 * np.eye(len(at))
        assert gaps.min() > 5 * figure.dpi / 72  # a marker is five points wide


def test_costs_bracket_the_methods_of_one_cost(table, drawn):
    left, right = drawn(figures.costs(table, table)).axes
    assert not [t for t in left.texts if t.get_text().endswith("each")]
    assert [t.get_text() for t in right.texts if t.get_text().endswith("each")] == ["12 each"]


@given(
    st.lists(st.floats(-0.2, 1.2), min_size=1, max_size=12),
    st.floats(0.0, 0.05),
)
def test_spread_keeps_order_gap_and_limits(values, gap):
    moved = _spread(values, gap, 0.0, 1.0)
    order = np.argsort(values, kind="stable")
    assert (np.diff(moved[order]) >= gap - 1e-9).all()
    assert moved.min() >= -1e-9 and moved.max() <= 1 + 1e-9


def test_spread_moves_nothing_that_is_apart_already():
    assert _spread([0.9, 0.1, 0.5], 0.1, 0, 1).tolist() == pytest.approx([0.9, 0.1, 0.5])
    assert _spread([0.5, 0.5], 0.1, 0, 1).tolist() == pytest.approx([0.45, 0.55])


def test_weights_are_written_as_per_cent(drawn):
    shares = torch.tensor([[0.25, 1.0, 0.0], [0.75, 0.0, 1.0]])
    figure = drawn(figures.weights({"shares": shares, "others": shares.flip(0)}, ["a", "b", "c"]))
    told = [t.get_text() for t in figure.axes[0].texts]
    assert told == ["25", "100", "0", "75", "0", "100"]
    assert [t.get_text() for t in figure.axes[1].texts] == told[3:] + told[:3]


# Methods of a user, registered here or only in the table.


@pytest.fixture
def with_others():
    """Runs of shipped methods, of one that the user registers, and of one that this process does not know."""
    with registrations_taken_back():
        run = METHODS["fedavg"].run
        register(Method("mine", run, label="My method", family="reference", single_model=False))
        yield comparison_table(["fedmitr", "mine", "theirs", "central"])


def drawn_as(figure, label, axis=0):
    """Marker and face of a method in a comparison, by its label."""
    labels = [text.get_text() for text in figure.axes[axis].get_yticklabels()]
    lines = [line for line in figure.axes[axis].lines if line.get_marker() in ("D", "s")]
    (line,) = [line for line in lines if round(line.get_ydata()[0]) == labels.index(label)]
    return line.get_marker(), line.get_markerfacecolor()


def test_a_comparison_draws_a_users_methods_as_their_records_say(with_others, drawn):
    figure = drawn(figures.comparison(with_others))
    assert drawn_as(figure, "My method") == ("s", "white")
    assert drawn_as(figure, "theirs") == ("D", BLACK)
    assert drawn_as(figure, "central") == ("s", BLACK)


def test_costs_draw_a_users_methods_too(with_others, drawn):
    for axis in drawn(figures.costs(with_others, with_others)).axes:
        told = {text.get_text() for text in axis.texts if not text.get_text().endswith("each")}
        assert told == {"FedMITR", "My method", "theirs", "central"}
        assert len([line for line in axis.lines if line.get_marker() in ("D", "s")]) == 4


def test_panels_draw_a_users_methods_too(with_others, drawn):
    figure = drawn(figures.panels(with_others.assign(panel="methods", cell=with_others["method"])))
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert labels == ["central", "theirs", "mine", "fedmitr"]


def test_the_key_says_what_the_markers_of_the_shipped_methods_mean(table, drawn):
    figure = drawn(figures.comparison(table))
    (legend,) = figure.legends
    key = {t.get_text(): h for t, h in zip(legend.get_texts(), legend.legend_handles, strict=True)}
    shown = {name: (line.get_marker(), line.get_markerfacecolor()) for name, line in key.items()}
    assert shown["one model"] == drawn_as(figure, "FedAvg")
    assert shown["all clients' blocks at every prediction"] == drawn_as(figure, "FuseFL")
    assert shown["reference"] == drawn_as(figure, "central")
