"""What protection costs: accuracy against ε."""

import pandas as pd
from matplotlib.figure import Figure

from ..methods import described
from .accuracies import _COLORS
from .style import new_figure, styled

_GAP = 2.5  # between the largest ε and the place of no protection, as a factor


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
    right = _GAP * largest
    for axis, start in zip(axes, starts, strict=True):
        axis.set_xscale("log")
        for method, runs in table[table["start"] == start].groupby("method", sort=False):
            label = described(method).label
            color = _COLORS.get(label, "#777777")
            at = runs["epsilon"].fillna(right)
            means = runs["accuracy"].groupby(at).mean()
            lined = means[means.index <= largest]
            axis.plot(lined.index, lined, "-", lw=1.4, color=color)
            axis.plot(means.index, means, "o", ms=5, color=color, label=label)
            axis.plot(at, runs["accuracy"], "o", ms=2.6, alpha=0.45, color=color, mew=0)
        axis.axvline(right / _GAP**0.5, color="#bbbbbb", lw=0.8, ls=":")
        axis.set_xticks([*ticks, right], [*(f"{tick:g}" for tick in ticks), "none"])
        axis.minorticks_off()
        axis.set(ylim=(0, 1.02), xlabel="ε of a client's upload", title=f"start {start}")
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("test accuracy: mean (line), each seed (dots)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
    return figure
