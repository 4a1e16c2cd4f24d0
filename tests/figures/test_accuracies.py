"""accuracies.py: bars in the colours of their methods, classes, clients and panels."""

import pandas as pd
import pytest
import torch
from matplotlib.colors import to_hex

from fedmitr import figures
from fedmitr.figures.style import BLACK, BLUE, GREEN, ORANGE, VERMILLION


def test_a_bar_has_the_colour_of_its_method_and_grey_for_any_other(drawn):
    names = ["FedMITR+", "FedMITR+, dense", "FedMITR", "ensemble", "FedAvg", "central", "mine"]
    (axis,) = drawn(figures.bars(dict.fromkeys(names, 0.5), chance=0.25)).axes
    colors = [to_hex(bar.get_facecolor()).upper() for bar in axis.patches]
    assert colors == [VERMILLION, VERMILLION, BLACK, BLUE, ORANGE, GREEN, "#999999"]
    assert [t.get_text() for t in axis.texts] == ["0.50"] * 7 + [" guessing"]
    assert len(figures.bars({"mine": 0.5}, chance=None).axes[0].texts) == 1


def test_accuracies_of_classes_are_per_cent_and_some_are_outlined(drawn):
    rows = {"one": torch.tensor([0.5, 1.0]), "two": torch.tensor([0.0, 0.25])}
    axis = drawn(figures.per_class(rows, ["a", "b"], outlined=torch.eye(2).bool())).axes[0]
    assert [t.get_text() for t in axis.texts] == ["50", "100", "0", "25"]
    corners = [tuple(round(at + 0.44) for at in box.get_xy()) for box in axis.patches]
    assert corners == [(0, 0), (1, 1)]


def test_confidence_has_two_bars_for_each_client(drawn):
    (axis,) = drawn(figures.confidence(torch.tensor([0.9, 0.8]), torch.tensor([0.6, 0.7]))).axes
    assert [bar.get_height() for bar in axis.patches] == pytest.approx([0.9, 0.8, 0.6, 0.7])


def test_panels_draw_every_seed_and_compare_with_the_first_cell(drawn):
    rows = [
        ("p", cell, seed, 0.1 * seed + shift) for cell, shift in (("x", 0.5), ("y", 0.2)) for seed in (0, 1)
    ]
    table = pd.DataFrame(rows, columns=["panel", "cell", "seed", "accuracy"])
    (axis,) = drawn(figures.panels(table)).axes
    dots = [x for line in axis.lines if line.get_marker() == "o" and line.get_markersize() < 5
            for x in line.get_xdata()]  # fmt: skip
    assert sorted(dots) == pytest.approx([0.2, 0.3, 0.5, 0.6])
    (dashed,) = [line for line in axis.lines if line.get_linestyle() == "--"]
    assert dashed.get_xdata() == pytest.approx([0.55, 0.55])
