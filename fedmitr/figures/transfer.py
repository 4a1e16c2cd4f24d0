"""How much the start decides: accuracy of methods against the pretraining of the shared model."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.isotonic import isotonic_regression

from ..methods import described
from .accuracies import _COLORS
from .style import new_figure, styled

_GAP = 0.055  # between the labels of lines, as a share of the axes' height
_SIDE = 0.0075  # between the dots of two methods, as a share of the axes' width


@styled
def pretraining(table: pd.DataFrame) -> Figure:
    """Draw accuracy against pretraining steps: the mean of each method as a line, its seeds as dots.

    table: what `experiments.transfer.transfer` returns. The scale of steps is linear up to the smallest above
    zero, and logarithmic from there; lines of references are dashed.
    """
    figure = new_figure(8, 4.6)
    axis = figure.subplots()
    steps = sorted(table["steps"].unique())
    least = min((s for s in steps if s > 0), default=1)
    axis.set_xscale("symlog", linthresh=least, linscale=0.5)
    axis.set(ylim=(0, 1.02), xlim=(steps[0] - 0.12 * least, 1.15 * steps[-1] + 0.12 * least))
    axis.set_xticks(steps, [f"{s:,}" for s in steps])
    axis.minorticks_off()
    means = table.pivot_table(index="steps", columns="method", values="accuracy", sort=False).sort_index()
    for number, method in enumerate(means):
        color = _color(method)
        style = "o--" if described(method).is_reference else "o-"
        axis.plot(means.index, means[method], style, ms=4, lw=1.4, color=color, clip_on=False)
        _draw_seeds(axis, table[table["method"] == method], _SIDE * (number - (len(means.columns) - 1) / 2))
    _name_lines(axis, means)
    axis.grid(axis="y", alpha=0.3)
    axis.set(xlabel="steps of pretraining that the shared model had", title="Dashed: references")
    axis.set(ylabel="validation accuracy: mean (line), each seed (dots)")
    return figure


def _color(method: str) -> str:
    """Return the colour of a method, the same as that of its bar; grey for one without."""
    return _COLORS.get(described(method).label, "#777777")


def _draw_seeds(axis: Axes, runs: pd.DataFrame, aside: float) -> None:
    """Draw one method's seeds as dots, beside their steps by a share of the axes' width."""
    to_share = axis.transScale + axis.transLimits
    at = to_share.transform(runs[["steps", "accuracy"]].to_numpy())[:, 0] + aside
    color = _color(runs["method"].iloc[0])
    across = axis.get_yaxis_transform()
    axis.plot(at, runs["accuracy"], "o", ms=2.6, alpha=0.45, color=color, mew=0, transform=across)


def _name_lines(axis: Axes, means: pd.DataFrame) -> None:
    """Write the methods' labels to the right of their lines' ends, in that order, joined by thin lines."""
    ends = means.iloc[-1]
    low, high = axis.get_ylim()
    rows = spread(ends, _GAP * (high - low), low, high)
    last = (axis.transScale + axis.transLimits).transform((means.index[-1], 0))[0]
    across = {"transform": axis.get_yaxis_transform(), "clip_on": False}
    for method, end, row in zip(means, ends, rows, strict=True):
        color = _color(method)
        axis.plot([last, 1.04], [end, row], color=color, lw=0.6, alpha=0.6, zorder=0, **across)
        axis.text(1.05, row, described(method).label, va="center", fontsize=9, color=color, **across)


def spread(values: Sequence[float], gap: float, low: float, high: float) -> np.ndarray:
    """Move values as little as possible so that they lie at least `gap` apart in [low, high].

    Their order stays, so this is the least-squares fit of a rising sequence (isotonic regression).
    """
    order = np.argsort(values, kind="stable")
    steps = gap * np.arange(len(order))
    apart = isotonic_regression(np.asarray(values)[order] - steps, y_min=low, y_max=high - steps[-1]) + steps
    moved = np.empty(len(order))
    moved[order] = apart
    return moved
