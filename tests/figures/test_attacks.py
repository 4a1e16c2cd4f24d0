"""attacks.py: ROC curves on log axes, leakage over the number of images, rows of pictures."""

import numpy as np
import pandas as pd
import pytest

from fedmitr import figures


@pytest.fixture
def points():
    fpr = np.geomspace(1e-4, 1, 5)
    rows = []
    for target, power in (("upload", 0.5), ("gram", 0.0)):
        for attack in ("LiRA", "RMIA"):
            for kind in ("random", "mislabelled"):
                tpr = fpr**power if attack == "LiRA" else fpr
                where = {"target": target, "attack": attack, "records": kind}
                rows.append(pd.DataFrame(where | {"fpr": fpr, "tpr": tpr}))
    return pd.concat(rows)


def test_the_roc_has_a_panel_for_each_kind_of_records_and_a_line_for_each_label(points, drawn):
    figure = drawn(figures.roc(points, {"upload · LiRA": "upload", "gram · RMIA": "Gram matrix"}))
    assert [axis.get_title() for axis in figure.axes] == ["random records", "mislabelled records"]
    for axis in figure.axes:
        assert axis.get_xscale() == axis.get_yscale() == "log"
        chance, upload, gram = (line.get_ydata() for line in axis.lines)
        assert np.allclose(upload, np.geomspace(1e-4, 1, 5) ** 0.5)
        assert np.allclose(gram, np.geomspace(1e-4, 1, 5)) and chance[0] == 1e-4


def test_a_curve_begins_where_it_leaves_zero(points, drawn):
    points.loc[points["fpr"] < 1e-2, "tpr"] = 0
    line = drawn(figures.roc(points, {"upload · LiRA": "upload"})).axes[0].lines[1]
    assert min(line.get_xdata()) >= 1e-2


def test_scores_of_a_record_are_dots_on_both_sides_with_their_means(drawn):
    records = {"first": (np.array([1.0, 3.0]), np.array([0.0])), "second": (np.array([5.0]), np.array([4.0]))}
    axis = drawn(figures.in_and_out(records)).axes[0]
    assert [text.get_text() for text in axis.get_yticklabels()] == ["first", "second"]
    dots = [line.get_xdata().tolist() for line in axis.lines if line.get_marker() == "o"]
    means = [np.ravel(line.get_xdata()).tolist() for line in axis.lines if line.get_marker() == "|"]
    assert dots == [[1.0, 3.0], [0.0], [5.0], [4.0]] and means == [[2.0], [0.0], [5.0], [4.0]]


def test_leakage_is_drawn_over_images_with_the_number_of_features(drawn):
    table = pd.DataFrame({"images": [50, 200], "auc": [1.0, 0.8], "tpr": [1.0, 0.3]})
    width, auc, tpr = drawn(figures.leakage(table, 192)).axes[0].lines
    assert set(width.get_xdata()) == {192}
    assert auc.get_ydata().tolist() == [1, 0.8] and tpr.get_ydata().tolist() == [1, 0.3]


def test_neighbours_are_rows_of_pictures(drawn):
    rows = [(name, np.random.default_rng(0).random((3, 24, 24))) for name in ("made", "nearest")]
    figure = drawn(figures.neighbours(rows, ["a 1", "a 2", "a 3"]))
    assert len(figure.axes) == 6 and all(len(axis.images) == 1 for axis in figure.axes)
    assert figure.axes[0].get_title() == "a 1" and figure.axes[3].get_ylabel() == "nearest"
