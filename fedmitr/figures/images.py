"""Inverted images: how they emerge, which of their patches survive, and what that costs."""

from collections.abc import Mapping

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from ..data.tasks import Split
from ..server.synthetic import SyntheticSet
from .style import (
    BLACK,
    BLUE,
    GREEN,
    SKY,
    VERMILLION,
    draw_image,
    mark,
    name_rows,
    new_figure,
    picture_grid,
    pixels,
    square,
    styled,
)


def _returned(history: Mapping[str, Tensor], index: int) -> bool:
    """Whether a recorded frame is the last one: the images that inversion returns, and a student gets."""
    return index == len(history["frame_at"]) - 1


def _frame_title(history: Mapping[str, Tensor], index: int) -> str:
    """Return the iteration of a recorded frame, and how many patches of an image were left."""
    if _returned(history, index):
        return "the student\ngets"
    left = int(history["frame_masks"][index, 0].sum())
    return f"iteration {int(history['frame_at'][index])}\n{left} left"


def _dimmed(image: np.ndarray, mask: Tensor) -> np.ndarray:
    """Return an image (H, W) or (H, W, 3), pale where patches of mask (N,) are false."""
    live = square(mask).numpy().repeat(len(image) // square(mask).shape[0], 0)
    live = live.repeat(image.shape[1] // live.shape[1], 1)  # (H, W)
    return np.where(live.reshape(*live.shape, *[1] * (image.ndim - 2)), image, 0.675 + 0.25 * image)


def one_of_each(labels: Tensor, count: int) -> list[int]:
    """Return the index of the first image of each class, for the first `count` classes that occur."""
    found = [int((labels == label).nonzero()[0, 0]) for label in labels.unique()]
    return found[:count]


@styled
def attention(split: Split, importance: Tensor, mask: Tensor, stats: tuple[Tensor, Tensor]) -> Figure:
    """Draw scenes with their true foreground, CLS attention on their patches, and the patches that survive.

    importance (n, N): CLS attention; mask (n, N): true for patches that the stops keep.
    """
    count = len(split)
    figure, axes = picture_grid(3, count, cell=1.0, left=1.1, right=0.8)
    for column, image in enumerate(pixels(split.images[:], stats)):
        draw_image(axes[0, column], image)
        axes[0, column].contour(split.foreground[column, 0], [0.5], colors=[SKY], linewidths=1.2)
        heat = axes[1, column].imshow(
            square(importance[column]), cmap="viridis", vmin=0, vmax=importance.max()
        )
        draw_image(axes[2, column], image, mask[column])
    figure.colorbar(heat, ax=axes[1], label="attention", shrink=0.9)
    name_rows(axes, ["scene, true\nforeground", "attention\nof CLS", "patches\nthat survive"])
    return figure


@styled
def places(panels: Mapping[str, Tensor], label: str) -> Figure:
    """Draw one value for each position on the patch grid, title -> (N,), on one scale from zero."""
    figure = new_figure(8.5, 2.9)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    most = max(float(values.max()) for values in panels.values())
    for axis, (title, values) in zip(axes, panels.items(), strict=True):
        heat = axis.imshow(square(values), cmap="viridis", vmin=0, vmax=most)
        axis.set(title=title, xlabel="column of patches", ylabel="row" if axis is axes[0] else "")
    figure.colorbar(heat, ax=axes, label=label, shrink=0.9)
    return figure


@styled
def emerging(
    synthetic: SyntheticSet, truth: Split, stats: tuple[Tensor, Tensor], count: int = 5, frames: int = 7
) -> Figure:
    """Draw images as they emerge over iterations, live patches outlined, beside a true image of their class.

    synthetic.history holds frames (F, B, ch, H, W), frame_masks (F, B, N) and frame_at (F,). The frames drawn
    are spread evenly; the last is the image that inversion returns, in a green box.
    """
    history = synthetic.history
    chosen = torch.linspace(0, len(history["frame_at"]) - 1, frames).round().long().tolist()
    picks = one_of_each(synthetic.labels[: history["frames"].shape[1]], count)
    figure, axes = picture_grid(len(picks), frames + 1, cell=0.98, left=0.7)
    for row, pick in enumerate(picks):
        label = int(synthetic.labels[pick])
        for axis, frame in zip(axes[row], chosen, strict=False):
            _draw_frame(axis, history, frame, pick, stats)
        true = truth.images[(truth.labels == label).nonzero()[0, 0]]
        draw_image(axes[row, -1], pixels(true, stats))
        axes[row, 0].set_ylabel(f"target {label}")
    for axis, frame in zip(axes[0], chosen, strict=False):
        axis.set_title(_frame_title(history, frame))
    axes[0, -1].set_title("true\nimage")
    return figure


def _draw_frame(
    axis: Axes,
    history: Mapping[str, Tensor],
    index: int,
    pick: int,
    stats: tuple[Tensor, Tensor],
    dim: bool = False,
) -> None:
    """Draw one image of a recorded frame, live patches outlined; in a green box where it is the returned one.

    dim: draw stopped patches pale, but not in the returned image.
    """
    image, mask = pixels(history["frames"][index, pick], stats), history["frame_masks"][index, pick]
    returned = _returned(history, index)
    draw_image(axis, _dimmed(image, mask) if dim and not returned else image, mask)
    if returned:
        mark(axis, GREEN)


@styled
def frame(synthetic: SyntheticSet, index: int, stats: tuple[Tensor, Tensor], count: int = 10) -> Figure:
    """Draw images as they were at one recorded iteration, the frame `index`, five in a row.

    Live patches are outlined, stopped ones are pale. The last frame shows what inversion returns.
    """
    history = synthetic.history
    picks = one_of_each(synthetic.labels[: history["frames"].shape[1]], count)
    rows = -(-len(picks) // 5)
    figure, axes = picture_grid(rows, min(5, len(picks)), cell=1.3, left=0.1, head=0.6)
    for axis, pick in zip(axes.flat, picks, strict=False):
        _draw_frame(axis, history, index, pick, stats, dim=True)
        axis.set_title(f"target {int(synthetic.labels[pick])}", fontsize=9)
    total = history["frame_masks"].shape[2]
    left = int(history["frame_masks"][index, 0].sum())
    title = f"iteration {int(history['frame_at'][index])}: {left} of {total} patches left"
    figure.suptitle("what the student gets" if _returned(history, index) else title, fontsize=11)
    return figure


def animation(synthetic: SyntheticSet, stats: tuple[Tensor, Tensor], count: int = 10) -> list[Figure]:
    """Draw every recorded frame with `frame`, in order, for `save_animation`."""
    return [frame(synthetic, index, stats, count) for index in range(len(synthetic.history["frame_at"]))]


@styled
def schedule(kept: Mapping[str, Tensor], flops: Mapping[str, Tensor]) -> Figure:
    """Draw the patches left at each iteration, and the operations so far of one teacher on one image.

    kept, flops: name -> (I,), patches and operations of every iteration.
    """
    figure = new_figure(8.5, 2.8)
    left, right = figure.subplots(1, 2)
    for name, color, style in zip(kept, (BLUE, VERMILLION), ("--", "-"), strict=False):
        left.step(range(len(kept[name])), kept[name], style, where="post", color=color, label=name)
        right.plot(flops[name].double().cumsum(0) / 1e9, style, color=color, label=name)
    left.set(xlabel="iteration", ylabel="patches left", ylim=(0, None))
    right.set(xlabel="iteration", ylabel="operations so far (GFLOP)", ylim=(0, None))
    left.legend()
    return figure


@styled
def curves(histories: Mapping[str, Mapping[str, Tensor]]) -> Figure:
    """Draw cross-entropy to the target, and the teacher's confidence in it, over iterations.

    histories: name -> `SyntheticSet.history`. A dotted line stands at every iteration with a stop.
    """
    figure = new_figure(8.5, 2.8)
    left, right = figure.subplots(1, 2)
    for (name, history), color, style in zip(
        histories.items(), (BLUE, VERMILLION), ("--", "-"), strict=False
    ):
        left.plot(history["cross_entropy"], style, color=color, label=name)
        right.plot(history["confidence"], style, color=color, label=name)
        stops = 1 + (history["kept"].diff() < 0).nonzero()[:, 0]
        for axis in (left, right):
            for count, stop in enumerate(stops.tolist()):
                axis.axvline(stop, color="#777777", ls=":", lw=1, label="" if count else "a stop")
    left.set(xlabel="iteration", ylabel="cross-entropy (nats)", ylim=(0, None))
    right.set(xlabel="iteration", ylabel="confidence in the target", ylim=(0, 1))
    left.legend()
    return figure


@styled
def foreground(panels: Mapping[str, Mapping[str, Tensor]]) -> Figure:
    """Draw which share of the foreground several choices of patches keep: title -> name -> shares (n,).

    A dot is the mean over images, a thick line their middle half, a thin one their middle nine tenths.
    """
    figure = new_figure(8.5, 1.2 + 0.42 * max(map(len, panels.values())))
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axis, (title, rows) in zip(axes, panels.items(), strict=True):
        for row, (values, color) in enumerate(zip(rows.values(), (VERMILLION, BLUE, BLACK), strict=False)):
            low, first, third, high = np.quantile(values.numpy(), (0.05, 0.25, 0.75, 0.95))
            axis.plot([low, high], [row, row], color=color, lw=1.2)
            axis.plot([first, third], [row, row], color=color, lw=5, alpha=0.45, solid_capstyle="butt")
            mean = float(values.double().mean())
            axis.plot(mean, row, "o", color=color)
            axis.annotate(
                f"{mean:.2f}", (mean, row), xytext=(0, 6), textcoords="offset points", fontsize=9, ha="center"
            )
        axis.set(title=title, xlim=(0, 1.04), xlabel="share of the foreground kept")
        axis.set_yticks(range(len(rows)), rows)
    axes[0].set_ylim(max(map(len, panels.values())) - 0.5, -0.7)
    return figure


@styled
def generated(sets: Mapping[str, SyntheticSet], truth: Split, stats: tuple[Tensor, Tensor]) -> Figure:
    """Draw the first image of each class of several synthetic sets, and a true one below.

    A dash stands where a set has no image of the class; where patches stopped, a line holds the survivors.
    """
    classes = truth.labels.unique().tolist()
    figure, axes = picture_grid(len(sets) + 1, len(classes), cell=0.76, left=1.2)
    rows = [(made.pixels, made.labels.cpu(), made.mask) for made in sets.values()]
    for row, (images, labels, masks) in enumerate([*rows, (truth.images, truth.labels, None)]):
        for axis, label in zip(axes[row], classes, strict=True):
            picks = (labels == label).nonzero().flatten().tolist()
            if picks:
                mask = None if masks is None else masks[picks[0]]
                draw_image(axis, pixels(images[picks[0]], stats), mask)
            else:
                axis.text(0.5, 0.5, "–", ha="center", va="center", transform=axis.transAxes)
    for axis, label in zip(axes[0], classes, strict=True):
        axis.set_title(f"a {label}")
    name_rows(axes, [*sets, "true scene"])
    return figure
