"""What grows with workers and with clients: speed, the server's operations and its memory."""

import pandas as pd
from matplotlib.figure import Figure

from .style import BLACK, BLUE, ORANGE, VERMILLION, new_figure, styled

_STYLES = ((BLACK, "o-"), (ORANGE, "s--"), (BLUE, "^-"))  # of the ways to make labels, in order


@styled
def scaling(table: pd.DataFrame) -> Figure:
    """Draw seconds and speed-up over workers, from `experiments.scaling.strong_scaling`; dashed: perfect."""
    figure = new_figure(8, 3.4)
    time, gain = figure.subplots(1, 2)
    workers, seconds = table["workers"], table["seconds"]
    time.plot(workers, seconds, "o-", color=VERMILLION)
    time.set(ylim=(0, None), title="The same batches", xlabel="workers (processes)", ylabel="seconds")
    gain.plot(workers, workers / workers.iloc[0], "--", color=BLACK, lw=1, label="perfect")
    gain.plot(workers, table["speed-up"], "o-", color=VERMILLION, label="measured")
    gain.set(ylim=(0, None), title="Speed-up", xlabel="workers (processes)", ylabel="times as fast")
    gain.legend(frameon=False)
    for axis in (time, gain):
        axis.set_xticks(workers)
    return figure


@styled
def projection(table: pd.DataFrame) -> Figure:
    """Draw the server's operations and memory over clients, one line for each way to make labels.

    table: what `experiments.scaling.projection` returns.
    """
    figure = new_figure(9, 4.2)
    axes = figure.subplots(1, 2)
    styles = dict(zip(table["way"].unique(), _STYLES, strict=True))
    for axis, column in zip(axes, ("server, TFLOP", "memory, GB"), strict=True):
        for way, rows in table.groupby("way", sort=False):
            color, style = styles[way]
            axis.loglog(rows["clients"], rows[column], style, color=color, ms=4.5, lw=1.4, label=way)
        axis.set(xlabel="clients K", ylabel=column)
        axis.grid(alpha=0.3)
    least, most = table["memory, GB"].min(), table["memory, GB"].max()
    axes[1].set_ylim(least / 2, most * 2)
    axes[0].set_title("Server's operations, computed")
    axes[1].set_title("Most memory of a stage, computed")
    axes[0].legend(title="who labels a view", frameon=False)
    return figure
