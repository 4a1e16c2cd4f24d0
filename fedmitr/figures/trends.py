"""How accuracy, time and memory change with one quantity: pretraining, ε, workers, clients."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.isotonic import isotonic_regression

from ..methods import described
from .accuracies import _COLORS
from .style import BLACK, BLUE, GREEN, ORANGE, VERMILLION, new_figure, styled

_SIDE = 0.0075  # between the dots of two methods, as a share of the axes' width
_BEYOND = 2.5  # between the largest ε and the place of no protection, as a factor
_STYLES = ((BLACK, "o-"), (ORANGE, "s--"), (BLUE, "^-"))  # of the ways to make labels, in order


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
    ends = {described(m).label: (means[m].iloc[-1], _color(m)) for m in means}
    name_line_ends(axis, means.index[-1], ends, gap=0.055)
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


def name_line_ends(axis: Axes, last: float, ends: Mapping[str, tuple[float, str]], gap: float) -> None:
    """Write names to the right of the ends of lines, joined to them: name -> (last value, colour).

    last: where the lines end, along the x axis; gap: between names of one row, as a share of the axes'
    height. Names are moved apart where they would overlap. Scales of the axes must be final.
    """
    axis.autoscale_view()  # limits that are not set follow the data
    shares = (axis.transScale + axis.transLimits).transform([(last, value) for value, _ in ends.values()])
    most = max(name.count("\n") for name in ends) + 1  # rows of the longest name
    heights = spread(shares[:, 1], gap * most, 0.0, 1.0)
    within = {"transform": axis.transAxes, "clip_on": False}
    for (name, (_, color)), end, height in zip(ends.items(), shares, heights, strict=True):
        axis.plot([end[0], 1.04], [end[1], height], color=color, lw=0.6, alpha=0.6, zorder=0, **within)
        axis.text(1.05, height, name, va="center", fontsize=9, color=color, **within)


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


@styled
def accuracy_against_epsilon(table: pd.DataFrame) -> Figure:
    """Draw accuracy against ε, a panel for each start: each method's mean as a line, its seeds as dots.

    table: what `privacy.cost.cost` returns. The scale of ε is logarithmic; runs without protection stand to
    the right of it, not joined to the lines.
    """
    starts = list(dict.fromkeys(table["start"]))
    figure = new_figure(1.6 + 4.6 * len(starts), 3.9)
    axes = figure.subplots(1, len(starts), sharey=True, squeeze=False)[0]
    largest = table["epsilon"].max()
    ticks = sorted(table["epsilon"].dropna().unique())
    right = _BEYOND * largest
    for axis, start in zip(axes, starts, strict=True):
        axis.set_xscale("log")
        for method, runs in table[table["start"] == start].groupby("method", sort=False):
            label = described(method).label
            color = _color(method)
            at = runs["epsilon"].fillna(right)
            means = runs["accuracy"].groupby(at).mean()
            lined = means[means.index <= largest]
            axis.plot(lined.index, lined, "-", lw=1.4, color=color)
            axis.plot(means.index, means, "o", ms=5, color=color, label=label)
            axis.plot(at, runs["accuracy"], "o", ms=2.6, alpha=0.45, color=color, mew=0)
        axis.axvline(right / _BEYOND**0.5, color="#bbbbbb", lw=0.8, ls=":")
        axis.set_xticks([*ticks, right], [*(f"{tick:g}" for tick in ticks), "none"])
        axis.minorticks_off()
        axis.set(ylim=(0, 1.02), xlabel="ε of a client's upload", title=f"start {start}")
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("test accuracy: mean (line), each seed (dots)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
    return figure


@styled
def scaling(table: pd.DataFrame) -> Figure:
    """Draw seconds and speed-up by workers, from `experiments.scaling.strong_scaling`, beside ideal ones.

    Points are not joined: nothing was measured between them.
    """
    figure = new_figure(8, 3.2)
    time, gain = figure.subplots(1, 2)
    workers = table["workers"]
    times = workers / workers.iloc[0]
    ideals = {"seconds": table["seconds"].iloc[0] / times, "speed-up": times}
    beside = {"xytext": (9, 0), "textcoords": "offset points", "va": "center", "fontsize": 9}
    for axis, (column, ideal) in zip((time, gain), ideals.items(), strict=True):
        axis.plot(workers, table[column], "o", color=VERMILLION, ms=6, label="measured")
        axis.plot(workers, ideal, "o", color=BLACK, mfc="none", ms=10, label="ideal: no cost of sharing")
        for place, value in zip(workers, table[column], strict=True):
            axis.annotate(f"{value:.2f}", (place, value), **beside)
        axis.set(xscale="log", xlim=(0.8 * workers.min(), 1.4 * workers.max()), xlabel="worker processes")
        axis.set_ylim(0, 1.15 * max(ideal.max(), table[column].max()))
        axis.set_xticks(workers, [str(count) for count in workers])
        axis.minorticks_off()
    time.set(title="Time for the same batches", ylabel="seconds")
    gain.set(title="Speed-up", ylabel="times as fast as the first")
    time.legend(loc="lower left")
    return figure


@styled
def projection(table: pd.DataFrame) -> Figure:
    """Draw the server's operations and memory over clients, one line for each way to make labels.

    table: what `experiments.scaling.projection` returns. Ways with the same values share one line, and its
    label names them all.
    """
    figure = new_figure(9.6, 4.2)
    axes = figure.subplots(1, 2)
    styles = dict(zip(table["way"].unique(), _STYLES, strict=True))
    for axis, column in zip(axes, ("server, TFLOP", "memory, GB"), strict=True):
        lines: dict[str, pd.Series] = {}
        for way, rows in table.set_index("clients").groupby("way", sort=False):
            values = rows[column]
            same = [name for name, other in lines.items() if np.allclose(values, other, rtol=0.01)]
            if same:
                lines = {f"{n}\n{way}" if n == same[0] else n: other for n, other in lines.items()}
            else:
                lines[way] = values
        for names, values in lines.items():
            color, style = styles[names.split("\n")[0]]
            axis.loglog(values.index, values, style, color=color, ms=4.5, lw=1.4, label=names)
        ends = {names: (v.iloc[-1], styles[names.split("\n")[0]][0]) for names, v in lines.items()}
        name_line_ends(axis, table["clients"].max(), ends, gap=0.075)
        axis.set(xlabel="clients K", ylabel=column)
        axis.grid(alpha=0.3)
    axes[0].set_title("Server's operations, computed")
    axes[1].set_title("Most memory of a stage, computed")
    return figure


@styled
def stage_costs(table: pd.DataFrame) -> Figure:
    """Draw the operations of each stage of a run over the number of clients, one line a stage.

    table: a row a number of clients and stage, with the columns clients, stage and TFLOP.
    """
    figure = new_figure(7, 3.6)
    axis = figure.subplots()
    wide = table.pivot_table(index="clients", columns="stage", values="TFLOP", sort=False)
    colors = dict(zip(wide, (GREEN, BLACK, VERMILLION, BLUE, ORANGE), strict=False))
    for stage, values in wide.items():
        axis.loglog(values.index, values, "o-", color=colors[stage], ms=4, lw=1.4, label=stage)
    ends = {stage: (values.iloc[-1], colors[stage]) for stage, values in wide.items()}
    name_line_ends(axis, wide.index[-1], ends, gap=0.075)
    axis.set(xlabel="clients K", ylabel="operations (TFLOP)")
    axis.grid(alpha=0.3)
    return figure
