"""methods.py: every seed is drawn, rows by family, no text covers another, and any method is drawn."""

from itertools import combinations

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import comparison_table, registrations_taken_back

from fedmitr import figures
from fedmitr.figures.style import BLACK, VERMILLION
from fedmitr.methods import METHODS, Method, in_order, register


def markers(figure, shape):
    """(face, x, y) of every marker of a shape in the axes."""
    lines = [line for axis in figure.axes for line in axis.lines if line.get_marker() == shape]
    return [(ln.get_markerfacecolor(), *xy) for ln in lines for xy in ln.get_xydata()]


def rows_of(figure):
    """Label of each row -> its height."""
    axis = figure.axes[0]
    labels = [label.get_text() for label in axis.get_yticklabels()]
    return dict(zip(labels, axis.get_yticks(), strict=True))


def row_of(line, rows):
    """The label of the row whose marker this is."""
    (name,) = [name for name, height in rows.items() if line.get_ydata()[0] == height]
    return name


def test_every_seed_is_a_dot_of_its_own_and_several_models_are_open(table, drawn):
    tied = table.assign(accuracy=table["accuracy"].round(1))  # many seeds agree
    figure = drawn(figures.comparison(tied))
    dots = markers(figure, "o")
    assert sorted(x for _, x, _ in dots) == sorted(tied["accuracy"])
    assert len({(x, y) for _, x, y in dots}) == len(tied)
    heights = {height: name for name, height in rows_of(figure).items()}
    faces = {heights[y]: face for shape in "Ds" for face, _, y in markers(figure, shape)}
    several = {record.label for record in METHODS.values() if not record.single_model}
    assert {name for name, face in faces.items() if face == "white"} == several
    assert faces["DENSE"] == faces["FedMITR"] == BLACK and faces["FedMITR+"] == VERMILLION


def test_rows_stand_family_by_family_and_each_family_is_named(table, drawn):
    shuffled = table.sample(frac=1, random_state=0)
    figure = drawn(figures.comparison(shuffled))
    rows = rows_of(figure)
    assert list(rows) == [METHODS[name].label for name in in_order(METHODS)]
    heights = list(rows.values())
    assert (np.diff(heights) < 0).all()
    families = {text.get_text().replace("\n", " "): text for text in figure.axes[-1].texts}
    for family, text in families.items():
        own = [rows[r.label] for r in METHODS.values() if r.family == family]
        assert text.xy[1] == pytest.approx(sum(own) / len(own))
    assert set(families) == {record.family for record in METHODS.values()}


@pytest.mark.parametrize("skews", [(0.1,), (0.05, 0.1, 0.3)])
def test_no_text_covers_another(table, skews, drawn):
    figure = drawn(figures.comparison(pd.concat([table.assign(alpha=alpha) for alpha in skews])))
    first, last = figure.axes[0], figure.axes[-1]
    texts = [*first.get_yticklabels(), *last.texts, *(axis.xaxis.label for axis in figure.axes)]
    for axis in figure.axes:
        low, high = axis.get_xlim()  # ticks beyond them are not drawn
        texts += [axis.title, *(t for t in axis.get_xticklabels() if low <= t.get_position()[0] <= high)]
    texts += figure.legends[0].get_texts()
    boxes = [t.get_window_extent() for t in texts if t.get_text() and t.get_visible()]
    assert len(boxes) > len(METHODS)
    assert not [pair for pair in combinations(boxes, 2) if pair[0].overlaps(pair[1])]
    edge = figure.bbox
    assert all(b.x0 >= edge.x0 and b.x1 <= edge.x1 and b.y0 >= edge.y0 and b.y1 <= edge.y1 for b in boxes)


def test_the_comparison_is_drawn_of_older_files_and_of_methods_without_a_name(table):
    few = table.loc[
        table["method"].isin(["fedmitr", "local"]), ["method", "task", "alpha", "clients", "seed"]
    ]
    few = pd.concat([few, few.assign(method="mine")]).assign(accuracy=0.5)
    assert list(rows_of(figures.comparison(few))) == ["FedMITR", "mine", "local"]


def test_a_panel_for_each_skew_shares_its_rows(table):
    one = table["method"].ne("ridge")  # at one skew a method is missing
    figure = figures.comparison(pd.concat([table.assign(alpha=0.05), table[one].assign(alpha=0.3)]))
    titles = [axis.get_title().splitlines()[1] for axis in figure.axes]
    assert titles == ["α = 0.05, 5 seeds", "α = 0.3, 5 seeds"]
    counts = [sum(line.get_marker() in "Ds" for line in axis.lines) for axis in figure.axes]
    assert counts == [len(METHODS), len(METHODS) - 1]


def test_weights_are_written_as_per_cent(drawn):
    shares = torch.tensor([[0.25, 1.0, 0.0], [0.75, 0.0, 1.0]])
    figure = drawn(figures.weights({"shares": shares, "others": shares.flip(0)}, ["a", "b", "c"]))
    told = [t.get_text() for t in figure.axes[0].texts]
    assert told == ["25", "100", "0", "75", "0", "100"]
    assert [t.get_text() for t in figure.axes[1].texts] == told[3:] + told[:3]


def test_one_weight_for_all_classes_is_one_column(drawn):
    panels = {"by class": torch.full((4, 3), 0.25), "alike": torch.tensor([[0.1], [0.2], [0.3], [0.4]])}
    by_class, alike = drawn(figures.weights(panels, ["a", "b", "c"])).axes[:2]
    assert [t.get_text() for t in alike.texts] == ["10", "20", "30", "40"]
    assert len(by_class.get_xticks()) == 3 and [t.get_text() for t in alike.get_xticklabels()] == [
        "every class"
    ]


def test_attention_of_clients_covers_the_image_whatever_their_grids(drawn):
    maps = {
        "client 0,\nfour patches": torch.tensor([0.1, 0.2, 0.3, 0.4]),
        "client 1,\nnine": torch.ones(9) / 9,
    }
    figure = drawn(figures.client_attention(np.zeros((6, 6)), maps))
    shown = [axis for axis in figure.axes if axis.get_title()]
    assert [axis.get_title() for axis in shown] == ["image", *maps]
    assert len({tuple(axis.images[0].get_extent()) for axis in shown}) == 1
    assert np.allclose(shown[1].images[0].get_array(), [[0.1, 0.2], [0.3, 0.4]])
    assert shown[2].images[0].get_clim() == shown[1].images[0].get_clim()
    titles = [axis.title.get_window_extent() for axis in shown]
    assert not [pair for pair in combinations(titles, 2) if pair[0].overlaps(pair[1])]


# Methods of a user, registered here or only in the table.


@pytest.fixture
def with_others():
    """Runs of shipped methods, of one that the user registers, and of one that this process does not know."""
    with registrations_taken_back():
        run = METHODS["fedavg"].run
        register(Method("mine", run, label="My method", family="reference", single_model=False))
        yield comparison_table(["fedmitr", "mine", "theirs", "central"])


def drawn_as(figure, label):
    """Marker and face of a method in a comparison, by its label."""
    rows = rows_of(figure)
    lines = [line for line in figure.axes[0].lines if line.get_marker() in ("D", "s")]
    (line,) = [line for line in lines if row_of(line, rows) == label]
    return line.get_marker(), line.get_markerfacecolor()


def test_a_comparison_draws_a_users_methods_as_their_records_say(with_others, drawn):
    figure = drawn(figures.comparison(with_others))
    assert drawn_as(figure, "My method") == ("s", "white")
    assert drawn_as(figure, "theirs") == ("D", BLACK)
    assert drawn_as(figure, "central") == ("s", BLACK)


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
    assert shown["several models run at every prediction"] == drawn_as(figure, "FuseFL")
    assert shown["reference"] == drawn_as(figure, "central")
