"""Methods against each other: accuracy. Clients of an ensemble: their weights, and what they attend to.

Labels and markers come from the methods' records, so a method that a user registers, or one that only a table
knows, is drawn like any other.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from ..experiments.differences import REFERENCE
from ..methods import Method, described, in_order
from .clients import draw_counts
from .style import BLACK, SKY, VERMILLION, bare, draw_image, new_figure, square, styled, write_cells

_KEY = {
    "one model": {"marker": "D", "markerfacecolor": BLACK},
    "several models run at every prediction": {"marker": "D", "markerfacecolor": "white"},
    "reference": {"marker": "s", "markerfacecolor": BLACK},
}
_ROW, _GAP = 0.25, 0.5  # height of a row in inches; between families, in rows


def _marker(method: Method) -> dict[str, str]:
    """Return how a method is drawn, as `_KEY` says: square for a reference, open for several models."""
    color = VERMILLION if method.name == REFERENCE else BLACK
    shape, inside = "s" if method.is_reference else "D", color if method.single_model else "white"
    return {"marker": shape, "color": color, "markerfacecolor": inside}


def _draw_key(figure: Figure) -> None:
    """Draw below the axes what the markers of methods mean."""
    handles = [Line2D([], [], ls="", ms=5, color=BLACK, label=label, **how) for label, how in _KEY.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, handletextpad=0.2)


def _rows(methods: Iterable[str]) -> dict[str, float]:
    """Return the height of each method's row: family by family from the top, with a gap between families."""
    heights, height, family = {}, 0.0, None
    for method in in_order(methods):
        record = described(method)
        height -= 1 + _GAP * (family not in (None, record.family))
        heights[method], family = height, record.family
    return heights


def _name_rows(axes: Sequence[Axes], rows: Mapping[str, float]) -> None:
    """Write labels of methods to the left of the first axes, and families to the right of the last."""
    families: dict[str, list[float]] = {}
    for method, height in rows.items():
        families.setdefault(described(method).family, []).append(height)
    axes[0].set_yticks(list(rows.values()), [described(name).label for name in rows])
    for label, name in zip(axes[0].get_yticklabels(), rows, strict=True):
        label.set_color(_marker(described(name))["color"])
    axes[0].set_ylim(min(rows.values()) - 0.6, max(rows.values()) + 0.7)
    for axis in axes:
        axis.grid(axis="x", alpha=0.3)
        axis.tick_params(axis="y", length=0)
        for heights in list(families.values())[1:]:
            axis.axhline(heights[0] + (1 + _GAP) / 2, color="#BBBBBB", lw=0.6)
    for family, heights in families.items():
        middle = sum(heights) / len(heights)
        axes[-1].annotate(
            family.replace(" ", "\n"),
            (1.02, middle),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=9,
            color="#555555",
        )


def _row_figure(width: float, panels: int, rows: Mapping[str, float]) -> tuple[Figure, np.ndarray]:
    """Return a figure of panels side by side that share rows of methods, and its axes."""
    figure = new_figure(width, 1.1 + _ROW * (2 - min(rows.values())))
    return figure, figure.subplots(1, panels, squeeze=False, sharey=True)[0]


@styled
def comparison(table: pd.DataFrame) -> Figure:
    """Draw the accuracy of methods: seeds as dots, mean ± std, one panel for each setting.

    table: a row a run, with the columns method, task, alpha, clients, seed and accuracy. Each dot is one
    seed, in the order of seeds from the bottom, so that none hides another. Rows are those of `in_order`.
    """
    settings, rows = list(table.groupby(["task", "alpha", "clients"])), _rows(table["method"])
    figure, axes = _row_figure(4.4 + 2.6 * min(2, len(settings)), len(settings), rows)
    for axis, ((task, alpha, clients), runs) in zip(axes, settings, strict=True):
        for method, own in runs.sort_values("seed").groupby("method")["accuracy"]:
            heights = rows[method] + np.linspace(0.18, 0.45, len(own))
            axis.plot(own, heights, "o", color=SKY, ms=4, mec="white", mew=0.4, clip_on=False)
            bar = _marker(described(method))
            axis.errorbar(own.mean(), rows[method], xerr=own.std(), capsize=2.5, markersize=4.5, **bar)
        count = runs["seed"].nunique()
        seeds = "one seed" if count == 1 else f"{count} seeds"
        axis.set(title=f"{task}, {clients} clients\nα = {alpha:g}, {seeds}", xlim=(_floor(table), 1.01))
    axes[len(axes) // 2].set_xlabel("test accuracy: each seed (dots), mean ± standard deviation")
    _name_rows(axes, rows)
    _draw_key(figure)
    return figure


def _floor(runs: pd.DataFrame) -> float:
    """Return the tenth below the lowest accuracy of any run, and below the lowest mean − std."""
    scores = runs.groupby(["method", *({"alpha"} & set(runs))])["accuracy"].agg(["mean", "std"]).fillna(0)
    lowest = min(runs["accuracy"].min(), (scores["mean"] - scores["std"]).min())
    return max(0.0, math.floor(10 * lowest) / 10)


@styled
def weights(panels: Mapping[str, Tensor], classes: Sequence[str]) -> Figure:
    """Draw the weights of clients in an ensemble in per cent, title -> (K, C) or (K, 1) in [0, 1].

    (K, C) are weights for each class, (K, 1) those for all classes alike. A column sums to 100.
    """
    widths = [values.shape[1] for values in panels.values()]
    figure = new_figure(3.2 + 0.45 * sum(widths), 1.6 + 0.3 * len(next(iter(panels.values()))))
    axes = figure.subplots(
        1, len(panels), sharey=True, squeeze=False, width_ratios=[w + 0.6 for w in widths]
    )[0]
    for axis, (title, values) in zip(axes, panels.items(), strict=True):
        percent = 100 * values.cpu()
        draw_counts(axis, percent, classes if values.shape[1] == len(classes) else ["every class"], most=100)
        write_cells(axis, percent.numpy(), [f"{v:.0f}" for v in percent.flatten()], high=100)
        axis.set(title=title, ylabel="client" if axis is axes[0] else "")
        axis.set_xlabel("class" if values.shape[1] == len(classes) else "")
    figure.colorbar(axes[-1].images[0], ax=axes, label="weight (%);\na column sums to 100")
    return figure


@styled
def client_attention(image: np.ndarray, maps: Mapping[str, Tensor], title: str = "image") -> Figure:
    """Draw an image in [0, 1] beside the attention that clients' CLS tokens pay to its patches.

    image (H, W) or (H, W, 3); maps: title -> (N,) on a square grid of patches, on one scale from zero. A map
    is drawn over the image's extent, so that equal places stand at equal heights whatever the grid.
    """
    figure = new_figure(1.2 + 1.75 * (1 + len(maps)), 2.6)
    first, *axes = figure.subplots(1, 1 + len(maps))
    draw_image(first, image)
    first.set_title(title)
    extent = (-0.5, image.shape[1] - 0.5, image.shape[0] - 0.5, -0.5)
    most = max(float(values.max()) for values in maps.values())
    for axis, (name, values) in zip(axes, maps.items(), strict=True):
        heat = axis.imshow(square(values), cmap="viridis", vmin=0, vmax=most, extent=extent)
        axis.set_title(name)
        bare(axis)
    figure.colorbar(heat, ax=axes, label="CLS attention", shrink=0.75)
    return figure
