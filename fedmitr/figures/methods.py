"""Methods against each other: accuracy, what it costs, and the weights that ensembles give their clients.

Labels and markers come from the methods' records, so a method that a user registers, or one that only a table
knows, is drawn like any other.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from sklearn.isotonic import isotonic_regression
from torch import Tensor

from ..methods import Method, described
from .clients import draw_counts
from .style import BLACK, SKY, VERMILLION, new_figure, styled, write_cells

_KEY = {
    "one model": {"marker": "D", "markerfacecolor": BLACK},
    "all clients' blocks at every prediction": {"marker": "D", "markerfacecolor": "white"},
    "reference": {"marker": "s", "markerfacecolor": BLACK},
}
_TICKS = (0, 1, 3, 10, 30, 100, 300, 1000, 3000, 10_000)  # of costs


def _marker(method: Method) -> dict[str, str]:
    """Return how a method is drawn, as `_KEY` says: square for a reference, open for several models."""
    color = VERMILLION if method.name == "fedmitr" else BLACK
    shape, inside = "s" if method.is_reference else "D", color if method.single_model else "white"
    return {"marker": shape, "color": color, "markerfacecolor": inside}


def _draw_key(figure: Figure) -> None:
    """Draw below the axes what the markers of methods mean."""
    handles = [Line2D([], [], ls="", ms=5, color=BLACK, label=label, **how) for label, how in _KEY.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, handletextpad=0.2)


def _spread(values: Sequence[float], gap: float, low: float, high: float) -> np.ndarray:
    """Move values as little as possible so that they lie at least `gap` apart in [low, high].

    Their order stays, so this is the least-squares fit of a rising sequence (isotonic regression).
    """
    order = np.argsort(values, kind="stable")
    steps = gap * np.arange(len(order))
    apart = isotonic_regression(np.asarray(values)[order] - steps, y_min=low, y_max=high - steps[-1]) + steps
    moved = np.empty(len(order))
    moved[order] = apart
    return moved


def _draw_costs(axis: Axes, scores: pd.DataFrame, cost: pd.Series) -> None:
    """Draw accuracy (columns mean, std) against a cost, both by method; logarithmic from 1 on, linear below.

    Points that would cover each other are set side by side, with a bracket under those of one cost. The
    limits of accuracy must be set before.
    """
    top = 2 * max(1, cost.max())
    axis.set_xscale("symlog", linthresh=1, linscale=0.4)
    axis.set(xlim=(-0.2, top), xticks=[t for t in _TICKS if t < top])
    axis.xaxis.set_major_formatter("{x:g}")
    table = scores.assign(cost=cost.round(1)).sort_values(["cost", "mean"])
    to_share = axis.transScale + axis.transLimits  # of the axes' width and height
    at = _spread(to_share.transform(table[["cost", "mean"]].to_numpy())[:, 0], 0.024, 0.03, 0.97)
    for x, (method, row) in zip(at, table.iterrows(), strict=True):
        across = {"transform": axis.get_yaxis_transform()}
        axis.errorbar(x, row["mean"], row["std"], ms=5, lw=0.9, **_marker(described(method)), **across)
    for value in table["cost"].unique():
        same = table["cost"] == value
        if same.sum() > 1:
            ends = at[same].min() - 0.01, at[same].max() + 0.01
            axis.plot(ends, [0.03, 0.03], color=BLACK, lw=1.2, transform=axis.transAxes)
            axis.text(
                sum(ends) / 2, 0.045, f"{value:g} each", ha="center", fontsize=9, transform=axis.transAxes
            )
    for here in (at < 0.5, at >= 0.5):
        if here.any():
            _name_points(axis, at[here], table["mean"][here])


def _name_points(axis: Axes, at: np.ndarray, heights: pd.Series) -> None:
    """Write methods' labels in a column beside their points, towards the middle, and join both by lines."""
    left, (low, high) = at.max() < 0.5, axis.get_ylim()
    edge, side = (at.max() + 0.05, "left") if left else (at.min() - 0.05, "right")
    rows = _spread(heights, 0.062 * (high - low), low, high - 0.03 * (high - low))
    across = {"transform": axis.get_yaxis_transform()}
    for x, y, row, method in zip(at, heights, rows, heights.index, strict=True):
        record = described(method)
        color = _marker(record)["color"]
        axis.plot([x, edge], [y, row], color="#999999", lw=0.6, zorder=0, **across)
        axis.text(edge, row, record.label, ha=side, va="center", fontsize=9, color=color, **across)


@styled
def comparison(table: pd.DataFrame) -> Figure:
    """Draw the accuracy of methods: seeds as dots, mean ± std, one panel for each setting.

    table: a row a run, with the columns method, task, alpha, clients, seed and accuracy. The dots
    of a method climb from its first seed to its last, so that none hides another.
    """
    settings = list(table.groupby(["task", "alpha", "clients"]))
    figure = new_figure(8, 0.9 + len(settings) * (0.6 + 0.36 * table["method"].nunique()))
    axes = figure.subplots(len(settings), 1, squeeze=False, sharex=True)[:, 0]
    for axis, ((task, alpha, clients), runs) in zip(axes, settings, strict=True):
        scores = (
            runs.groupby("method", sort=False)["accuracy"].agg(["mean", "std", "size"]).sort_values("mean")
        )
        for row, (method, score) in enumerate(scores.iterrows()):
            dots = runs[runs["method"] == method].sort_values("seed")["accuracy"]
            climb = row + np.linspace(0.2, 0.5, len(dots))
            axis.plot(dots, climb, "o", color=SKY, ms=5, mec="white", mew=0.5, clip_on=False)
            bar = _marker(described(method))
            axis.errorbar(score["mean"], row, xerr=score["std"], capsize=3, markersize=5, **bar)
        axis.set_yticks(range(len(scores)), [described(name).label for name in scores.index])
        count = scores["size"].max()
        seeds = "one seed" if count == 1 else f"{count} seeds"
        axis.set(title=f"{task}, {clients} clients, α = {alpha:g}: {seeds}")
        axis.set(xlim=(0, 1), ylim=(-0.5, len(scores) - 0.3))
    axes[-1].set_xlabel("test accuracy: each seed (dots), mean ± standard deviation")
    _draw_key(figure)
    return figure


@styled
def costs(runs: pd.DataFrame, seconds: pd.DataFrame) -> Figure:
    """Draw mean accuracy ± std over seeds against the server's seconds and all bytes, one point a method.

    runs, seconds: the two tables that `compare` writes.
    """
    scores = runs.groupby("method")["accuracy"].agg(["mean", "std"])
    total = runs.assign(cost=(runs["upload_bytes"] + runs["download_bytes"]) / 1e6)
    panels = {
        "server's work (s)": seconds.groupby("method")["server_seconds"].mean(),
        "all messages, up and down (MB)": total.groupby("method")["cost"].mean(),
    }
    figure = new_figure(9, 4.4)
    axes = figure.subplots(1, 2, sharey=True)
    lowest = (scores["mean"] - scores["std"].fillna(0)).min()
    axes[0].set(ylim=(max(0, math.floor(10 * lowest - 1) / 10), 1.05))
    for axis, (label, cost) in zip(axes, panels.items(), strict=True):
        _draw_costs(axis, scores, cost)
        axis.set(xlabel=label)
    axes[0].set(ylabel="test accuracy, mean ± std", title="What the server computes")
    axes[1].set(title="Bytes sent, up and down")
    _draw_key(figure)
    return figure


@styled
def weights(panels: Mapping[str, Tensor], classes: Sequence[str]) -> Figure:
    """Draw the weights of clients for classes in an ensemble, title -> (K, C) in [0, 1], in per cent."""
    figure = new_figure(9, 1.3 + 0.3 * len(next(iter(panels.values()))))
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (title, values) in zip(axes, panels.items(), strict=True):
        percent = 100 * values.cpu()
        draw_counts(axis, percent, classes, most=100)
        write_cells(axis, percent.numpy(), [f"{v:.0f}" for v in percent.flatten()], high=100)
        axis.set(title=title, ylabel="client" if axis is axes[0] else "")
    figure.colorbar(axes[-1].images[0], ax=axes, label="weight (%)")
    return figure
