"""Accuracies: of models, of classes, of clients and of the cells of a study."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from ..methods import described
from .style import BLACK, BLUE, GREEN, ORANGE, PINK, SKY, VERMILLION, WINE, new_figure, styled, write_cells

_COLORS = {
    described(name).label: color
    for name, color in {
        "fedmitr_plus": VERMILLION,
        "fedmitr": BLACK,
        "ridge": PINK,
        "ridge_plus": WINE,
        "ensemble": BLUE,
        "ensemble_statistics": SKY,
        "fedavg": ORANGE,
        "central": GREEN,
    }.items()
}


def draw_bars(axis: Axes, scores: Mapping[str, float], chance: float | None) -> None:
    """Draw one bar for each name, and a dotted line at the accuracy of guessing.

    A bar has its method's colour where the name is the method's label, alone or before a comma.
    """
    names, values = list(scores), list(scores.values())
    bar = axis.barh(names, values, color=[_COLORS.get(n.split(",")[0], "#999999") for n in names])
    axis.bar_label(bar, [f"{v:.2f}" for v in values], padding=3, fontsize=9)
    if chance is not None:
        axis.axvline(chance, color=BLACK, ls=":", lw=1.2)
        axis.text(chance, -0.62, " guessing", fontsize=9, va="bottom")
    axis.set(xlim=(0, 1), ylim=(len(names) - 0.4, -1.1), xlabel="test accuracy")


@styled
def bars(scores: Mapping[str, float], title: str = "", chance: float | None = 0.1) -> Figure:
    """Draw test accuracies in [0, 1] by name, with the accuracy of guessing as a line."""
    figure = new_figure(7, 0.9 + 0.34 * len(scores))
    draw_bars(figure.subplots(), scores, chance)
    figure.axes[0].set(title=title)
    return figure


@styled
def per_class(
    rows: Mapping[str, Tensor], classes: Sequence[str], title: str = "", outlined: Tensor | None = None
) -> Figure:
    """Draw the accuracy of each class in per cent: name -> (C,) in [0, 1].

    outlined (rows, C): true for the cells that get a line around them.
    """
    figure = new_figure(7.5, 1.2 + 0.34 * len(rows))
    axis = figure.subplots()
    values = 100 * torch.stack(list(rows.values())).numpy()
    axis.imshow(values, vmin=0, vmax=100, aspect="auto")
    write_cells(axis, values, [f"{v:.0f}" for v in values.flat], high=100)
    if outlined is not None:
        for row, column in outlined.nonzero().tolist():
            box = (column - 0.45, row - 0.43), 0.9, 0.86
            axis.add_patch(Rectangle(*box, fill=False, edgecolor=VERMILLION, linewidth=1.6))
    axis.set_xticks(range(len(classes)), classes)
    axis.set_yticks(range(len(rows)), rows)
    axis.set(xlabel="class", title=title)
    figure.colorbar(axis.images[0], ax=axis, label="accuracy (%)")
    return figure


@styled
def confidence(own: Tensor, others: Tensor) -> Figure:
    """Draw each client's mean confidence (K,) on test images of classes that it holds, and of the others."""
    figure = new_figure(7, 2.8)
    axis, at = figure.subplots(), np.arange(len(own))
    axis.bar(at - 0.2, own, 0.38, color=BLUE, label="classes in its shard")
    axis.bar(at + 0.2, others, 0.38, color=ORANGE, label="other classes: every prediction is wrong")
    axis.set_xticks(at, map(str, at))
    axis.set(xlabel="client", ylabel="mean confidence", ylim=(0, 1.3), yticks=[0, 0.5, 1])
    axis.legend(loc="upper center", ncols=2)
    return figure


@styled
def panels(table: pd.DataFrame) -> Figure:
    """Draw each cell's seeds as dots and their mean ± std, panel by panel.

    table: a row a run, with the columns panel, cell, seed and accuracy. A dashed line marks the mean of a
    panel's first cell, with which the others are compared.
    """
    parts = list(table.groupby("panel", sort=False))
    counts = [runs["cell"].nunique() for _, runs in parts]
    figure = new_figure(8, 0.6 + sum(0.5 + 0.3 * n for n in counts))
    axes = figure.subplots(len(parts), 1, squeeze=False, sharex=True, height_ratios=[n + 0.6 for n in counts])
    for axis, (panel, runs) in zip(axes[:, 0], parts, strict=True):
        names = list(dict.fromkeys(runs["cell"]))
        for row, name in enumerate(reversed(names)):
            values = runs[runs["cell"] == name].sort_values("seed")["accuracy"]
            climb = row + np.linspace(0.1, 0.4, len(values))
            axis.plot(values, climb, "o", color=SKY, ms=4.5, mec="white", mew=0.5)
            color = VERMILLION if name == names[0] else BLACK
            axis.errorbar(values.mean(), row, xerr=values.std(), capsize=3, marker="o", ms=5, color=color)
        first = runs[runs["cell"] == names[0]]["accuracy"].mean()
        axis.axvline(first, color=VERMILLION, lw=0.8, ls="--", zorder=0)
        axis.set_yticks(range(len(names)), list(reversed(names)))
        axis.set(title=panel, ylim=(-0.5, len(names) - 0.4))
    axes[-1, 0].set_xlabel("test accuracy: each seed (dots), mean ± standard deviation")
    return figure
