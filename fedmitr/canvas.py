"""What figures share: style, colours, saving, and the parts that several of them draw.

A figure's size in inches is the size at which notebooks show it, 96 pixels an inch; no text is below
9 points there. Colours: Okabe-Ito for kinds, cividis and viridis for amounts, grey for pixels.
"""

import io
import math
from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
import pandas as pd
from IPython.display import Image
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from sklearn.isotonic import isotonic_regression
from torch import Tensor

from .compare import NAMES, REFERENCES, SEVERAL

BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, VERMILLION, PINK = "#F0E442", "#0072B2", "#D55E00", "#CC79A7"
OKABE_ITO = (BLUE, ORANGE, GREEN, VERMILLION, SKY, PINK, YELLOW, BLACK)
CLASSES = (*OKABE_ITO[:7], "#BBBBBB", "#777777", BLACK)  # label maps print the class as well
METHODS = {"FedMITR": VERMILLION, "ensemble": BLUE, "FedAvg": ORANGE, "central": GREEN}

DPI, SHOWN = 150, 96
STYLE = {
    "font.size": 10,
    "font.family": "DejaVu Sans",
    "axes.titlesize": 10,
    "axes.labelsize": 10,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "image.cmap": "cividis",
    "image.interpolation": "nearest",
}
styled = mpl.rc_context(STYLE)


def show(figure: Figure) -> Image:
    """The figure as a picture that any reader of a notebook displays."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return Image(buffer.getvalue(), width=round(figure.get_figwidth() * SHOWN))


def pixels(images: Tensor, stats: tuple[Tensor, Tensor]) -> np.ndarray:
    """Normalised images (..., ch, H, W) as brightness in [0, 1]: (..., H, W), or (..., H, W, 3) in colour."""
    mean, std = stats
    bright = (images.detach().cpu() * std + mean).clamp(0, 1)
    return (bright.squeeze(-3) if bright.shape[-3] == 1 else bright.movedim(-3, -1)).numpy()


def square(tokens: Tensor) -> Tensor:
    """Values of patches (N,) laid out as the square grid they come from."""
    return tokens.cpu().view(math.isqrt(len(tokens)), -1)


def one_of_each(labels: Tensor, count: int) -> list[int]:
    """Index of the first image of each class, at most `count` of them, in the order of classes."""
    found = [int((labels == label).nonzero()[0, 0]) for label in labels.unique()]
    return found[:count]


def new_figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def picture_grid(
    rows: int, columns: int, cell: float, left: float, right: float = 0.1, head: float = 0.5
) -> tuple[Figure, np.ndarray]:
    """Rows and columns of square pictures, with room for names on the left."""
    figure = new_figure(left + columns * cell + right, rows * cell + head)
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0.02, hspace=0.02)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        bare(axis)
    return figure, axes


def bare(axis: Axes) -> None:
    """No ticks and no frame: the axes of a picture."""
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)


def name_rows(axes: np.ndarray, names: Sequence[str]) -> None:
    for axis, name in zip(axes[:, 0], names, strict=True):
        axis.set_ylabel(name, rotation=0, ha="right", va="center")


def frame_title(history: Mapping[str, Tensor], index: int) -> str:
    left = int(history["frame_masks"][index, 0].sum())
    return f"iteration {int(history['frame_at'][index])}\n{left} left"


def draw_image(axis: Axes, image: np.ndarray, mask: Tensor | None = None) -> None:
    """A picture of fixed scale; a line around the patches of mask (N,), unless it holds all."""
    axis.imshow(image, cmap="gray", vmin=0, vmax=1)
    bare(axis)
    if mask is not None and not mask.all():
        draw_outline(axis, square(mask).numpy(), color=ORANGE, cell=image.shape[0] / math.isqrt(len(mask)))


def draw_outline(axis: Axes, inside: np.ndarray, color: str, cell: float = 1.0) -> None:
    """A line along the border of the true cells of a grid (rows, columns), cells of `cell` axis units."""
    framed = np.pad(inside, 1).astype(int)
    lines = [((c, r), (c + 1, r)) for r, c in np.argwhere(np.diff(framed, axis=0)[:, 1:-1])]
    lines += [((c, r), (c, r + 1)) for r, c in np.argwhere(np.diff(framed, axis=1)[1:-1])]
    axis.add_collection(
        LineCollection(np.array(lines) * cell - 0.5, colors=color, linewidths=1.6, clip_on=False)
    )


def draw_counts(
    axis: Axes, counts: Tensor, classes: Sequence[str], numbers: bool = False, most: int = 0
) -> None:
    axis.imshow(counts, vmin=0, vmax=most or None, aspect="auto")
    if numbers:
        write_cells(axis, counts.numpy(), [str(int(c)) for c in counts.flatten()], high=int(counts.max()))
    axis.set_xticks(range(len(classes)), classes)
    axis.set_yticks(range(0, len(counts), 1 + len(counts) // 12))
    axis.set(xlabel="class", ylabel="client")


def write_cells(axis: Axes, values: np.ndarray, texts: Sequence[str], high: float) -> None:
    """A text in each cell of a heatmap, dark on light and light on dark."""
    for (row, column), text in zip(np.ndindex(values.shape), texts, strict=True):
        color = BLACK if values[row, column] > 0.55 * high else "white"
        axis.text(column, row, text, ha="center", va="center", color=color, fontsize=9)


def draw_bars(axis: Axes, scores: Mapping[str, float], chance: float | None) -> None:
    names, values = list(scores), list(scores.values())
    bar = axis.barh(names, values, color=[METHODS.get(n.split(",")[0], "#999999") for n in names])
    axis.bar_label(bar, [f"{v:.2f}" for v in values], padding=3, fontsize=9)
    if chance is not None:
        axis.axvline(chance, color=BLACK, ls=":", lw=1.2)
        axis.text(chance, -0.62, " guessing", fontsize=9, va="bottom")
    axis.set(xlim=(0, 1), ylim=(len(names) - 0.4, -1.1), xlabel="test accuracy")


def draw_tokens(axis: Axes, probabilities: Tensor, mask: Tensor) -> None:
    """The likeliest class of each patch (N, C) as colour and number, survivors outlined."""
    best, label = probabilities.cpu().max(dim=1)
    colors = np.array([mpl.colors.to_rgb(CLASSES[int(c) % len(CLASSES)]) for c in label])
    colors = 1 + (colors - 1) * best.numpy()[:, None]  # from white to the class's colour
    side = math.isqrt(len(mask))
    axis.imshow(colors.reshape(side, side, 3))
    bare(axis)
    if side <= 8:
        for patch, (text, color) in enumerate(zip(label.tolist(), colors, strict=True)):
            ink = BLACK if color @ (0.3, 0.59, 0.11) > 0.5 else "white"
            axis.text(patch % side, patch // side, text, color=ink, fontsize=9, ha="center", va="center")
    if not mask.all():
        draw_outline(axis, square(mask).numpy(), color=BLACK)


# --- methods ----------------------------------------------------------------------------------------


def method_marker(method: str) -> dict[str, str]:
    """How a method is drawn: diamond, or square for a reference; open where all clients' blocks answer."""
    color = VERMILLION if method == "fedmitr" else BLACK
    shape = "s" if method in REFERENCES else "D"
    return {"marker": shape, "color": color, "markerfacecolor": "white" if method in SEVERAL else color}


def draw_method_key(figure: Figure) -> None:
    """What the markers of methods mean, below the axes."""
    said = {"fedavg": "one model", "fusefl": "all clients' blocks at every answer", "central": "reference"}
    handles = [Line2D([], [], ls="", markersize=5, label=t, **method_marker(m)) for m, t in said.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, handletextpad=0.2)


def spread(values: Sequence[float], gap: float, low: float, high: float) -> np.ndarray:
    """Values moved as little as can be to lie at least `gap` apart in [low, high], in the same order."""
    order = np.argsort(values, kind="stable")
    steps = gap * np.arange(len(order))
    apart = isotonic_regression(np.asarray(values)[order] - steps, y_min=low, y_max=high - steps[-1]) + steps
    moved = np.empty(len(order))
    moved[order] = apart
    return moved


TICKS = (0, 1, 3, 10, 30, 100, 300, 1000, 3000, 10_000)


def draw_costs(axis: Axes, scores: pd.DataFrame, cost: pd.Series) -> None:
    """Accuracy (columns mean, std) against a cost, both by method; logarithmic from 1 on, linear below.

    Points that would cover each other are set side by side, with a bracket under those of one cost. The
    limits of accuracy must be set before.
    """
    top = 2 * max(1, cost.max())
    axis.set_xscale("symlog", linthresh=1, linscale=0.4)
    axis.set(xlim=(-0.2, top), xticks=[t for t in TICKS if t < top])
    axis.xaxis.set_major_formatter("{x:g}")
    table = scores.assign(cost=cost.round(1)).sort_values(["cost", "mean"])
    to_share = axis.transScale + axis.transLimits  # of the axes' width and height
    at = spread(to_share.transform(table[["cost", "mean"]].to_numpy())[:, 0], 0.024, 0.03, 0.97)
    for x, (method, row) in zip(at, table.iterrows(), strict=True):
        across = {"transform": axis.get_yaxis_transform()}
        axis.errorbar(x, row["mean"], row["std"], ms=5, lw=0.9, **method_marker(method), **across)
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
    """Methods' names in a column beside their points, on the side of the axes' middle, joined by lines."""
    left, (low, high) = at.max() < 0.5, axis.get_ylim()
    edge, side = (at.max() + 0.05, "left") if left else (at.min() - 0.05, "right")
    rows = spread(heights, 0.062 * (high - low), low, high - 0.03 * (high - low))
    across = {"transform": axis.get_yaxis_transform()}
    for x, y, row, method in zip(at, heights, rows, heights.index, strict=True):
        color = method_marker(method)["color"]
        axis.plot([x, edge], [y, row], color="#999999", lw=0.6, zorder=0, **across)
        axis.text(edge, row, NAMES[method], ha=side, va="center", fontsize=9, color=color, **across)
