"""The study in pictures: paired differences, accuracy against costs and against skew."""

from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from ..experiments.differences import REFERENCE
from ..methods import described, in_order
from .methods import _draw_key, _marker, _name_rows, _row_figure, _rows
from .style import BLACK, SKY, VERMILLION, new_figure, styled
from .trends import name_line_ends

_NEAR = 0.02  # differences up to this are drawn to scale, larger ones on a logarithmic axis
_TICKS = (0.01, 0.02, 0.1, 0.5)
_LEAST = 0.01  # server seconds below this are drawn here


@styled
def forest(tables: Mapping[str, pd.DataFrame], runs: pd.DataFrame) -> Figure:
    """Draw every method's paired difference to FedMITR+, a panel a ground: seeds, mean and two intervals.

    tables: ground -> what `study.analysis.part_table` returns; runs: the study's table. Each dot is one seed,
    in the order of seeds from the bottom. The thick line is the 95 % interval, the thin one that adjusted for
    all methods. The axis is to scale up to two hundredths, and logarithmic from there.
    """
    rows = _rows({name: None for table in tables.values() for name in table.index if name != REFERENCE})
    figure, axes = _row_figure(4.2 + 3.0 * len(tables), len(tables), rows)
    for axis, (ground, table) in zip(axes, tables.items(), strict=True):
        wide = runs[runs["part"] == ground].pivot(index="seed", columns="cell", values="accuracy")
        for name in (name for name in table.index if name != REFERENCE):
            gap = (wide[name] - wide[REFERENCE]).dropna()
            _draw_difference(axis, rows[name], gap, table.loc[name], _marker(described(name)))
        _difference_axis(axis, f"{ground}, {len(wide)} seeds")
        axis.set_xlabel(f"accuracy minus {described(REFERENCE).label}'s")
    _name_rows(axes, rows)
    _draw_key(figure)
    return figure


def _draw_difference(
    axis: Axes, height: float, gap: pd.Series, row: pd.Series, marker: Mapping[str, object]
) -> None:
    """Draw the differences of seeds as dots, their mean as a marker, and both intervals as lines."""
    climb = height + np.linspace(0.16, 0.45, len(gap))
    axis.plot(gap, climb, "o", color=SKY, ms=2.6, mew=0)
    axis.plot(row[["low Holm", "high Holm"]], [height, height], color=BLACK, lw=0.8)
    axis.plot(row[["low", "high"]], [height, height], color=BLACK, lw=2.4, solid_capstyle="butt")
    axis.plot(row["difference"], height, ls="", ms=4.5, **marker)


def _difference_axis(axis: Axes, title: str) -> None:
    """Scale an axis for differences around zero."""
    axis.set_xscale("symlog", linthresh=_NEAR, linscale=0.8)
    low, high = axis.get_xlim()
    shown = [t for t in (*(-t for t in reversed(_TICKS)), 0, *_TICKS) if low <= t <= high]
    axis.set_xticks(shown, [f"{t:+g}".replace("+0", "0") if t == 0 else f"{t:+g}" for t in shown])
    axis.minorticks_off()
    axis.axvline(0, color=VERMILLION, lw=0.8, ls="--", zorder=0)
    axis.set_title(title)


@styled
def cell_differences(tables: Mapping[str, pd.DataFrame], runs: pd.DataFrame) -> Figure:
    """Draw the cells of panels as paired differences to their first cell, panel below panel.

    tables: panel -> what `study.analysis.part_table` returns; runs: the study's table. Dots and lines are
    those of `forest`; the first cell's mean accuracy stands in the panel's title.
    """
    counts = [len(table) - 1 for table in tables.values()]
    figure = new_figure(8, 0.7 + sum(0.6 + 0.34 * n for n in counts))
    ratios = [n + 0.8 for n in counts]
    axes = figure.subplots(len(tables), 1, squeeze=False, height_ratios=ratios)[:, 0]
    for axis, (panel, table) in zip(axes, tables.items(), strict=True):
        wide = runs[runs["part"] == panel].pivot(index="seed", columns="cell", values="accuracy")
        first, *others = table.index
        for height, name in enumerate(reversed(others)):
            gap = (wide[name] - wide[first]).dropna()
            _draw_difference(axis, height, gap, table.loc[name], {"marker": "D", "color": BLACK})
        axis.set_yticks(range(len(others)), list(reversed(others)))
        _difference_axis(axis, f"{panel}: minus “{first}”, {table.loc[first, 'mean']:.3f}; {len(wide)} seeds")
        axis.set_ylim(-0.5, len(others) - 0.3)
        axis.grid(axis="x", alpha=0.3)
    axes[-1].set_xlabel("difference in accuracy, seed by seed")
    return figure


@styled
def pairing(one: pd.Series, other: pd.Series, span: tuple[float, float]) -> Figure:
    """Draw why differences are taken seed by seed: two accuracies over seeds, and their differences.

    one, other: accuracies by seed, with names; span: the 95 % interval of the mean of one − other.
    """
    figure = new_figure(9, 2.9)
    left, right = figure.subplots(1, 2)
    for values, color, marker in ((one, VERMILLION, "o"), (other, BLACK, "D")):
        left.plot(values.index, values, ls="", marker=marker, ms=4, color=color, label=values.name)
    left.vlines(one.index, other, one, color=SKY, lw=1, zorder=0)
    left.set(title="accuracies, seed by seed", ylabel="test accuracy", xlabel="seed")
    left.legend(loc="lower left", bbox_to_anchor=(0, 0.98), ncols=2, borderaxespad=1.6)
    gap = one - other
    right.axhspan(*span, color=SKY, alpha=0.5, lw=0, label="95 % interval of the mean")
    right.plot(gap.index, gap, "o", ms=4, color=BLACK)
    right.axhline(0, color=VERMILLION, lw=0.8, ls="--")
    right.set(title=f"{one.name} minus {other.name}", xlabel="seed")
    reach = (left.get_ylim()[1] - left.get_ylim()[0]) / 2  # both axes have one scale
    right.set_ylim(gap.mean() - reach, gap.mean() + reach)
    right.legend(loc="upper left")
    for axis in (left, right):
        axis.xaxis.get_major_locator().set_params(integer=True)
    return figure


@styled
def tradeoffs(table: pd.DataFrame) -> Figure:
    """Draw mean accuracy against bytes of all messages and against the server's seconds, a point a method.

    table: what `study.analysis.part_table` returns for a ground; references are left out. Both costs are on
    logarithmic axes; a server that works for less than a hundredth of a second is drawn there.
    """
    table = table.loc[[name for name in in_order(table.index) if not described(name).is_reference]]
    megabytes = (table["upload_bytes"] + table["download_bytes"]) / 1e6
    panels = {
        "all messages, up and down (MB)": megabytes,
        "server's work (s)": table["server_seconds"].clip(lower=_LEAST),
    }
    figure = new_figure(9.6, 5.2)
    axes = figure.subplots(1, 2, sharey=True)
    for axis, (title, cost) in zip(axes, panels.items(), strict=True):
        axis.set_xscale("log")
        axis.set(xlim=(cost.min() / 2, cost.max() * 6), xlabel=title)
        axis.set_ylim(max(0, table["mean"].min() - 0.06), min(1.02, table["mean"].max() + 0.06))
        axis.grid(alpha=0.3)
        for name, mean in table["mean"].items():
            axis.plot(cost[name], mean, ls="", ms=5, **_marker(described(name)))
    axes[0].set_ylabel("test accuracy, mean over seeds")
    figure.draw_without_rendering()  # fixes the layout, which labels are placed in
    figure.set_layout_engine("none")
    for axis, cost in zip(axes, panels.values(), strict=True):
        label_points(
            axis, list(zip(cost, table["mean"], strict=True)), [described(n).label for n in table.index]
        )
    return figure


def label_points(axis: Axes, points: Sequence[tuple[float, float]], labels: Sequence[str]) -> None:
    """Write a label beside each point, so that none covers a point, a label or another's line.

    Labels are placed one after the other at the nearest free place around their point; one that is not close
    is joined to it by a thin line. A label without a free place within the axes stands where it covers least.
    """
    at = axis.transData.transform(points)  # pixels
    frame, taken = axis.get_window_extent(), [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in at]
    lines: list[np.ndarray] = []
    turns = np.deg2rad([0, 180, 45, -45, 135, -135, 90, -90, 22, -22, 158, -158])
    for (x, y), (here_x, here_y), label in zip(points, at, labels, strict=True):
        text = axis.text(x, y, label, fontsize=9, va="center", ha="center")
        size = text.get_window_extent()
        best = None
        for far, turn in product((9, 20, 34, 50, 70, 95, 125, 160), turns):
            centre_x = here_x + np.cos(turn) * (far + size.width / 2)
            centre_y = here_y + np.sin(turn) * (far + size.height / 2)
            box = Bbox.from_bounds(centre_x - size.width / 2, centre_y - size.height / 2, *size.size)
            edge_x = np.clip(here_x, box.x0, box.x1)
            line = np.array([[here_x, here_y], [edge_x, np.clip(here_y, box.y0, box.y1)]])
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            cost = 10 * (not inside) + sum(box.padded(1).overlaps(other) for other in taken)
            cost += sum(crosses(line, other) for other in lines)
            cost += sum(_touches(other, box) for other in lines) + sum(
                _touches(line, other) for other in taken if not other.contains(here_x, here_y)
            )
            if best is None or cost < best[0]:
                best = cost, box, line, far
            if cost == 0:
                break
        _, box, line, far = best
        taken.append(box)
        lines.append(line)
        back = axis.transData.inverted()
        text.set_position(back.transform(((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2)))
        if far > 9:
            axis.plot(*back.transform(line).T, color="#999999", lw=0.6, zorder=0)


def crosses(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two segments (2, 2) cross inside both."""

    def side(segment: np.ndarray, point: np.ndarray) -> float:
        (x0, y0), (x1, y1) = segment
        return np.sign((x1 - x0) * (point[1] - y0) - (y1 - y0) * (point[0] - x0))

    return (side(one, other[0]) * side(one, other[1]) < 0) and (side(other, one[0]) * side(other, one[1]) < 0)


def _touches(line: np.ndarray, box: Bbox) -> bool:
    """Whether a segment (2, 2) passes through a box, read at points along it."""
    return any(box.contains(x, y) for x, y in line[0] + np.linspace(0, 1, 25)[:, None] * (line[1] - line[0]))


@styled
def across_grounds(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Draw each method's mean accuracy over grounds, such as skews, in their order; a panel a family.

    tables: name of the ground -> what `study.analysis.part_table` returns. FedMITR+ is drawn in every panel;
    labels are joined to the ends of their lines.
    """
    means = pd.DataFrame({ground: table["mean"] for ground, table in tables.items()})
    families: dict[str, list[str]] = {}
    for name in in_order(means.index):
        families.setdefault(described(name).family, []).append(name)
    low = max(0.0, float(np.floor(10 * means.min().min()) / 10))
    figure = new_figure(9.6, 2.9 * -(-len(families) // 3))
    axes = figure.subplots(-(-len(families) // 3), 3, sharex=True, sharey=True, squeeze=False).flat
    for (family, names), axis in zip(families.items(), axes, strict=False):  # takes no axes too many
        shown = dict.fromkeys([*names, REFERENCE] if REFERENCE in means.index else names)
        for name in shown:
            color, width = (VERMILLION, 1.6) if name == REFERENCE else (BLACK, 0.9)
            axis.plot(range(len(tables)), means.loc[name], "o-", ms=3, lw=width, color=color, clip_on=False)
        axis.set_xticks(range(len(tables)), list(tables), rotation=40, ha="right")
        axis.set(title=family, ylim=(low, 1.01), xlim=(-0.2, len(tables) - 1))
        axis.grid(axis="y", alpha=0.3)
        last = means.loc[list(shown)].iloc[:, -1]
        ends = {described(n).label: (v, VERMILLION if n == REFERENCE else BLACK) for n, v in last.items()}
        name_line_ends(axis, len(tables) - 1, ends, gap=0.085)
    for axis in axes:  # left over
        axis.remove()
    for axis in figure.axes[-3:]:  # none below them, or one that was left over
        axis.tick_params(labelbottom=True)
    figure.supylabel("test accuracy, mean over seeds", fontsize=10)
    return figure
