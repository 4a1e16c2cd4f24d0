"""What the figures share: style, colours, saving, and the parts that several modules draw.

A figure's size in inches is the size at which notebooks show it, 96 pixels an inch; no text is below 9 points
there. Colours: Okabe-Ito and Tol's wine for kinds, cividis and viridis for amounts, grey for pixels.
"""

import io
import math
from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
import PIL.Image
from IPython.display import Image
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from torch import Tensor

from ..core.paths import output_folder

BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, VERMILLION, PINK = "#F0E442", "#0072B2", "#D55E00", "#CC79A7"
WINE = "#882255"
DPI, SHOWN = 150, 96
MOVING = 100  # pixels an inch of an animation
COLORS = 64  # of an animation, so that it stays small
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


def show(figure: Figure, alt: str = "") -> Image:
    """Return the figure as a picture that every viewer of notebooks displays.

    alt: one sentence on what can be seen, for readers who do not see the picture.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return Image(buffer.getvalue(), width=round(figure.get_figwidth() * SHOWN), alt=alt or None)


def pixels(images: Tensor, stats: tuple[Tensor, Tensor]) -> np.ndarray:
    """Return the brightness in [0, 1] of normalised images (..., ch, H, W).

    stats: the mean and std that they were normalised with. The result is (..., H, W) for one channel and
    (..., H, W, 3) in colour.
    """
    mean, std = stats
    bright = (images.detach().cpu() * std + mean).clamp(0, 1)  # (..., ch, H, W)
    return (bright.squeeze(-3) if bright.shape[-3] == 1 else bright.movedim(-3, -1)).numpy()


def square(tokens: Tensor) -> Tensor:
    """Return values of patches (N,) as the square grid (√N, √N) that they come from."""
    return tokens.cpu().view(math.isqrt(len(tokens)), -1)


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of this size in inches."""
    return Figure(figsize=(width, height), layout="constrained")


def picture_grid(
    rows: int, columns: int, cell: float, left: float, right: float = 0.1, head: float = 0.5
) -> tuple[Figure, np.ndarray]:
    """Return a figure and its axes (rows, columns), all for square pictures of side `cell`.

    left, right, head: margins for the names of rows, a colour bar and titles. All lengths are in inches.
    """
    figure = new_figure(left + columns * cell + right, rows * cell + head)
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0.02, hspace=0.02)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        bare(axis)
    return figure, axes


def bare(axis: Axes) -> None:
    """Remove ticks and frame from the axes of a picture."""
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)


def name_rows(axes: np.ndarray, names: Sequence[str]) -> None:
    """Write a name to the left of each row of axes."""
    for axis, name in zip(axes[:, 0], names, strict=True):
        axis.set_ylabel(name, rotation=0, ha="right", va="center")


def mark(axis: Axes, color: str) -> None:
    """Draw a box around the axes of a picture."""
    axis.spines[:].set(visible=True, color=color, linewidth=2.2)


def draw_image(axis: Axes, image: np.ndarray, mask: Tensor | None = None) -> None:
    """Draw a picture with values in [0, 1], and a line around the patches of mask (N,) where some are out."""
    axis.imshow(image, cmap="gray", vmin=0, vmax=1)
    bare(axis)
    if mask is not None and not mask.all():
        draw_outline(axis, square(mask).numpy(), color=ORANGE, cell=image.shape[0] / math.isqrt(len(mask)))


def draw_outline(axis: Axes, inside: np.ndarray, color: str, cell: float = 1.0) -> None:
    """Draw a line along the border of the true cells of a grid (rows, columns).

    cell: the side of a cell in units of the axes.
    """
    framed = np.pad(inside, 1).astype(int)
    lines = [((c, r), (c + 1, r)) for r, c in np.argwhere(np.diff(framed, axis=0)[:, 1:-1])]
    lines += [((c, r), (c, r + 1)) for r, c in np.argwhere(np.diff(framed, axis=1)[1:-1])]
    axis.add_collection(
        LineCollection(np.array(lines) * cell - 0.5, colors=color, linewidths=1.6, clip_on=False)
    )


def write_cells(axis: Axes, values: np.ndarray, texts: Sequence[str], high: float) -> None:
    """Write a text into each cell of a heatmap (rows, columns): dark on light cells, light on dark ones.

    high: the value at the light end of the colour scale.
    """
    for (row, column), text in zip(np.ndindex(values.shape), texts, strict=True):
        color = BLACK if values[row, column] > 0.55 * high else "white"
        axis.text(column, row, text, ha="center", va="center", color=color, fontsize=9)


def save(figure: Figure, name: str, profile: str, alt: str = "") -> Image:
    """Write figures/NAME.png into the output folder of a profile, and return it as `show` does."""
    image = show(figure, alt)
    (output_folder("figures", profile) / f"{name}.png").write_bytes(image.data)
    return image


def save_animation(frames: Sequence[Figure], name: str, profile: str, alt: str = "") -> Image:
    """Write figures/NAME.gif into a profile's output folder, and return it for display; `alt` as in `show`.

    frames: figures of one size. Each stands for 0.4 s, the last for 3 s, and then the first comes again. What
    is returned is the same as an animated PNG: some viewers of notebooks show no GIF.
    """
    pictures, last = animated(frames), len(frames) - 1
    timing = {"duration": [400] * last + [3000], "loop": 0, "save_all": True, "append_images": pictures[1:]}
    path = output_folder("figures", profile) / f"{name}.gif"
    pictures[0].save(path, **timing)
    buffer = io.BytesIO()
    pictures[0].save(buffer, format="png", **timing)
    return Image(buffer.getvalue(), width=round(frames[0].get_figwidth() * SHOWN), alt=alt or None)


def animated(frames: Sequence[Figure]) -> list[PIL.Image.Image]:
    """Draw figures of one size as pictures that share one palette of `COLORS` colours."""
    rows = np.concatenate([np.asarray(picture(figure, MOVING)) for figure in frames])  # (F · H, W, 3)
    sheet = few_colors(PIL.Image.fromarray(rows), COLORS)
    height = sheet.height // len(frames)
    return [sheet.crop((0, k * height, sheet.width, (k + 1) * height)) for k in range(len(frames))]


def picture(figure: Figure, dpi: int) -> PIL.Image.Image:
    """Draw a figure at so many pixels an inch, in colour."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return PIL.Image.open(buffer).convert("RGB")


def few_colors(image: PIL.Image.Image, count: int) -> PIL.Image.Image:
    """Return a picture in its `count` most fitting colours, which takes fewer bytes."""
    return image.quantize(count, dither=PIL.Image.Dither.NONE)
