"""Attacks: how well members are told from others, and what synthetic images lie near to."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .style import (
    BLACK,
    BLUE,
    GREEN,
    ORANGE,
    PINK,
    SKY,
    VERMILLION,
    WINE,
    YELLOW,
    draw_image,
    name_rows,
    new_figure,
    picture_grid,
    styled,
)

COLORS = (VERMILLION, BLUE, GREEN, ORANGE, PINK, SKY, WINE, BLACK, YELLOW)
DASHES = ("-", "--", ":")


@styled
def roc(points: pd.DataFrame, labels: Mapping[str, str]) -> Figure:
    """Draw ROC curves on log axes, one panel for each kind of records, one line for each of `labels`.

    points: columns target, attack, records, fpr, tpr, with one attack a line. labels: target, or
    "target · attack", -> its name in the legend, in order. Dashed grey: guessing. A curve ends on the left
    where one false positive is all that the scores can tell, or where TPR is 0.
    """
    kinds = list(points["records"].unique())
    figure = new_figure(9, 4.6)
    axes = figure.subplots(1, len(kinds), squeeze=False, sharey=True)[0]
    for axis, kind in zip(axes, kinds, strict=True):
        own = points[points["records"] == kind]
        chance = np.geomspace(1e-4, 1, 20)
        axis.loglog(chance, chance, "--", color="grey", lw=1)
        for place, (name, label) in enumerate(labels.items()):
            target, _, attack = name.partition(" · ")
            line = own[own["target"] == target]
            line = line[line["attack"] == attack] if attack else line
            style = DASHES[place // len(COLORS) % len(DASHES)]
            above = line[line["tpr"] > 0]
            axis.loglog(
                above["fpr"], above["tpr"], style, color=COLORS[place % len(COLORS)], lw=1.5, label=label
            )
        axis.set(xlim=(1e-4, 1), ylim=(1e-4, 1.15), xlabel="false positive rate", title=f"{kind} records")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("true positive rate")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper")
    return figure


@styled
def in_and_out(records: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Figure:
    """Draw scores of single records as dots, a row for each: with the record in training, and without.

    records: name -> scores of the runs with it and of those without, of any length. Upright marks are means.
    """
    figure = new_figure(7, 0.9 + 0.6 * len(records))
    axis = figure.subplots()
    for row, sides in enumerate(records.values()):
        for scores, color, lift in zip(sides, (VERMILLION, BLUE), (-0.13, 0.13), strict=True):
            axis.plot(scores, np.full(len(scores), row + lift), "o", ms=4, alpha=0.6, color=color, mew=0)
            axis.plot(scores.mean(), row + lift, "|", ms=16, mew=2, color=color)
    axis.set_yticks(range(len(records)), list(records))
    axis.set(ylim=(len(records) - 0.5, -0.5), xlabel="score φ of the model")
    handles = [
        Line2D([], [], ls="", marker="o", color=color, label=name)
        for color, name in ((VERMILLION, "in the training data"), (BLUE, "not in it"))
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=2)
    return figure


@styled
def leakage(table: pd.DataFrame, width: int) -> Figure:
    """Draw the rates of the attack on a Gram matrix over the number of images that it sums.

    table: columns images, auc, tpr (at a FPR of 1 %). width: the number of features, a dotted line.
    """
    figure = new_figure(6, 3.0)
    axis = figure.subplots()
    axis.axvline(width, color=BLACK, ls=":", lw=1, label=f"{width} features")
    axis.plot(table["images"], table["auc"], "o-", color=BLUE, label="AUC")
    axis.plot(table["images"], table["tpr"], "s--", color=VERMILLION, label="TPR at 1 % FPR")
    axis.set(ylim=(0, 1.05), xlabel="images in the sum", ylabel="rate")
    axis.legend()
    return figure


@styled
def neighbours(rows: Sequence[tuple[str, np.ndarray]], titles: Sequence[str]) -> Figure:
    """Draw named rows of pictures (n, H, W) in [0, 1] under each other, with a title for each column."""
    count = len(titles)
    figure, axes = picture_grid(len(rows), count, cell=0.95, left=1.5)
    for (_, pictures), line in zip(rows, axes, strict=True):
        for axis, picture in zip(line, pictures, strict=True):
            draw_image(axis, picture)
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title)
    name_rows(axes, [name for name, _ in rows])
    return figure
