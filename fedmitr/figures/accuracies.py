"""What figures share: style, colours, saving, and the parts that several of them draw.

A figure's size in inches is the size at which notebooks show it, 96 pixels an inch; no text is below
9 points there. Colours: Okabe-Ito for kinds, cividis and viridis for amounts, grey for pixels.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from .style import BLACK, BLUE, GREEN, ORANGE, SKY, VERMILLION, new_figure, styled, write_cells

COLORS = {"FedMITR": VERMILLION, "ensemble": BLUE, "FedAvg": ORANGE, "central": GREEN}


def draw_bars(axis: Axes, scores: Mapping[str, float], chance: float | None) -> None:
    names, values = list(scores), list(scores.values())
    bar = axis.barh(names, values, color=[COLORS.get(n.split(",")[0], "#999999") for n in names])
    axis.bar_label(bar, [f"{v:.2f}" for v in values], padding=3, fontsize=9)
    if chance is not None:
        axis.axvline(chance, color=BLACK, ls=":", lw=1.2)
        axis.text(chance, -0.62, " guessing", fontsize=9, va="bottom")
    axis.set(xlim=(0, 1), ylim=(len(names) - 0.4, -1.1), xlabel="test accuracy")


# --- accuracies -----------------------------------------------------------------------------------


@styled
def bars(scores: Mapping[str, float], title: str = "", chance: float | None = 0.1) -> Figure:
    """Test accuracies in [0, 1] by name, with the accuracy of guessing as a line."""
    figure = new_figure(7, 0.9 + 0.34 * len(scores))
    draw_bars(figure.subplots(), scores, chance)
    figure.axes[0].set(title=title)
    return figure


@styled
def per_class(
    rows: Mapping[str, Tensor], classes: Sequence[str], title: str = "", outlined: Tensor | None = None
) -> Figure:
    """Accuracy of each class, name -> (C,), in per cent; outlined (rows, C) puts a line around cells."""
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
def confidence(seen: Tensor, unseen: Tensor) -> Figure:
    """Mean confidence of every client (K,) on test images of classes it holds and of classes it never saw."""
    figure = new_figure(7, 2.8)
    axis, at = figure.subplots(), np.arange(len(seen))
    axis.bar(at - 0.2, seen, 0.38, color=BLUE, label="classes in its shard")
    axis.bar(at + 0.2, unseen, 0.38, color=ORANGE, label="classes it never saw: every answer is wrong")
    axis.set_xticks(at, map(str, at))
    axis.set(xlabel="client", ylabel="mean confidence", ylim=(0, 1.3), yticks=[0, 0.5, 1])
    axis.legend(loc="upper center", ncols=2)
    return figure


@styled
def panels(table: pd.DataFrame) -> Figure:
    """Runs with columns panel, cell, seed, accuracy: each cell's seeds as dots, mean ± std, panel by panel.

    A dashed line marks the mean of a panel's first cell, with which the others are compared.
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
