"""What clients hold: scenes, the shards of a partition, and how skewed their classes are."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from ..data.tasks import Split
from ..vision.patches import patch_share
from .style import (
    BLUE,
    SKY,
    draw_image,
    name_rows,
    new_figure,
    picture_grid,
    pixels,
    styled,
    write_cells,
)

_BADGE = {"facecolor": "black", "edgecolor": "none", "pad": 1.5}  # behind a label that is written on an image


def draw_counts(
    axis: Axes, counts: Tensor, classes: Sequence[str], numbers: bool = False, most: int = 0
) -> None:
    """Draw counts (K, C) as a heatmap, a row a client; numbers: also as text; most: the scale's upper end."""
    axis.imshow(counts, vmin=0, vmax=most or None, aspect="auto")
    if numbers:
        write_cells(
            axis, counts.numpy(), [str(int(c)) for c in counts.flatten()], high=most or int(counts.max())
        )
    axis.set_xticks(range(len(classes)), classes)
    axis.set_yticks(range(0, len(counts), 1 + len(counts) // 12))
    axis.set(xlabel="class", ylabel="client")


@styled
def scenes(split: Split, stats: tuple[Tensor, Tensor], picks: Sequence[int], patch: int) -> Figure:
    """Draw scenes, their true foreground, and the share of it in every patch.

    split.images (n, ch, H, W) and foreground (n, 1, H, W); stats: mean and std of the images; picks: which to
    show; patch: side in pixels.
    """
    figure, axes = picture_grid(3, len(picks), cell=1.0, left=1.1, right=0.7)
    images, foreground = pixels(split.images[picks], stats), split.foreground[picks]
    share = patch_share(foreground, patch).unflatten(1, (images.shape[1] // patch, -1))
    for column, label in enumerate(split.labels[picks].tolist()):
        draw_image(axes[0, column], images[column])
        axes[0, column].set_title(f"a {label}")
        draw_image(axes[1, column], foreground[column, 0].numpy())
        heat = axes[2, column].imshow(share[column], vmin=0, vmax=1)
    figure.colorbar(heat, ax=axes[2], label="share", shrink=0.9)
    name_rows(axes, ["scene", "true\nforeground", "share in\neach patch"])
    return figure


@styled
def client_images(
    split: Split, shards: Sequence[Tensor], stats: tuple[Tensor, Tensor], count: int = 10
) -> Figure:
    """Draw the first `count` images of every client, a row a client, with their labels.

    shards: the indices of each client's images in the split; stats: mean and std of the images.
    """
    figure, axes = picture_grid(len(shards), count, cell=0.72, left=1.1, head=0.1)
    for row, shard in zip(axes, shards, strict=True):
        first = split.subset(shard[:count])
        shown = zip(row, pixels(first.images[:], stats), first.labels.tolist(), strict=False)
        for axis, image, label in shown:  # a small shard leaves the end of its row empty
            draw_image(axis, image)
            axis.text(
                0.04, 0.06, str(label), color="white", fontsize=9, bbox=_BADGE, transform=axis.transAxes
            )
    name_rows(axes, [f"client {k}\n{len(shard)} images" for k, shard in enumerate(shards)])
    return figure


@styled
def shards(counts: Tensor, classes: Sequence[str], title: str = "", most: int = 0) -> Figure:
    """Draw how many images of each class every client holds, counts (K, C); most: the scale's upper end."""
    figure = new_figure(7, 1.2 + 0.34 * len(counts))
    axis = figure.subplots()
    draw_counts(axis, counts, classes, numbers=True, most=most)
    axis.set(title=title)
    figure.colorbar(axis.images[0], ax=axis, label="images")
    return figure


@styled
def shard_grid(panels: Mapping[str, Tensor], classes: Sequence[str]) -> Figure:
    """Draw several partitions side by side, title -> counts (K, C), on one colour scale."""
    figure = new_figure(9, 2.6)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    most = max(int(c.max()) for c in panels.values())
    for axis, (title, counts) in zip(axes, panels.items(), strict=True):
        draw_counts(axis, counts, classes, most=most)
        axis.set(title=title, ylabel="client" if axis is axes[0] else "")
    figure.colorbar(axes[-1].images[0], ax=axes, label="images")
    return figure


@styled
def skew(alphas: Sequence[float], values: Tensor) -> Figure:
    """Draw label skew against α: values (A, S) for A alphas and S draws of the partition."""
    figure = new_figure(6, 3)
    axis = figure.subplots()
    axis.plot(alphas, values, ".", color=SKY)
    axis.plot(alphas, values.mean(1), "-", color=BLUE, label="mean over draws")
    axis.set(xscale="log", ylim=(0, 1), xlabel="Dirichlet concentration α")
    axis.set_xticks(alphas, [f"{alpha:g}" for alpha in alphas])
    axis.minorticks_off()
    axis.set(ylabel="label skew\n(total variation distance)", title="One dot per draw of the partition")
    axis.legend()
    return figure
