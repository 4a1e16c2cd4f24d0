"""What figures share: style, colours, saving, and the parts that several of them draw.

A figure's size in inches is the size at which notebooks show it, 96 pixels an inch; no text is below
9 points there. Colours: Okabe-Ito for kinds, cividis and viridis for amounts, grey for pixels.
"""

from collections.abc import Mapping

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from ..data.tasks import Split
from ..server.synthetic import SyntheticSet
from .style import (
    BLACK,
    BLUE,
    SKY,
    VERMILLION,
    draw_image,
    name_rows,
    new_figure,
    picture_grid,
    pixels,
    square,
    styled,
)


def frame_title(history: Mapping[str, Tensor], index: int) -> str:
    left = int(history["frame_masks"][index, 0].sum())
    return f"iteration {int(history['frame_at'][index])}\n{left} left"


def one_of_each(labels: Tensor, count: int) -> list[int]:
    """Index of the first image of each class, at most `count` of them, in the order of classes."""
    found = [int((labels == label).nonzero()[0, 0]) for label in labels.unique()]
    return found[:count]


# --- inversion ------------------------------------------------------------------------------------


@styled
def attention(split: Split, importance: Tensor, mask: Tensor, stats: tuple[Tensor, Tensor]) -> Figure:
    """Real scenes with their true foreground, CLS attention (n, N), and the patches (n, N) stops keep."""
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
    """One value for each place of the patch grid, title -> (N,), on one scale from zero."""
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
    """Images emerging over iterations, live patches outlined, beside a true image of the same class.

    Takes the frames in synthetic.history: frames (F, B, ch, H, W), frame_masks (F, B, N), frame_at (F,).
    """
    history = synthetic.history
    chosen = torch.linspace(0, len(history["frame_at"]) - 1, frames).round().long().tolist()
    picks = one_of_each(synthetic.labels[: history["frames"].shape[1]], count)
    figure, axes = picture_grid(len(picks), frames + 1, cell=0.98, left=0.7)
    for row, pick in enumerate(picks):
        label = int(synthetic.labels[pick])
        for axis, frame in zip(axes[row], chosen, strict=False):
            draw_image(
                axis, pixels(history["frames"][frame, pick], stats), history["frame_masks"][frame, pick]
            )
        true = truth.images[(truth.labels == label).nonzero()[0, 0]]
        draw_image(axes[row, -1], pixels(true, stats))
        axes[row, 0].set_ylabel(f"target {label}")
    for axis, frame in zip(axes[0], chosen, strict=False):
        axis.set_title(frame_title(history, frame))
    axes[0, -1].set_title("true\nimage")
    return figure


@styled
def frame(synthetic: SyntheticSet, index: int, stats: tuple[Tensor, Tensor], count: int = 8) -> Figure:
    """Frame `index` of a batch on its way, live patches outlined: `emerging` at one iteration."""
    history = synthetic.history
    picks = one_of_each(synthetic.labels[: history["frames"].shape[1]], count)
    figure, axes = picture_grid(1, len(picks), cell=1.05, left=0.1, head=0.6)
    for axis, pick in zip(axes[0], picks, strict=True):
        draw_image(axis, pixels(history["frames"][index, pick], stats), history["frame_masks"][index, pick])
        axis.set_title(f"target {int(synthetic.labels[pick])}")
    figure.suptitle(frame_title(history, index).replace("\n", ": ") + " of each image's patches", fontsize=10)
    return figure


@styled
def schedule(kept: Mapping[str, Tensor], flops: Mapping[str, Tensor]) -> Figure:
    """Patches left at each iteration (I,), and operations so far of one teacher on one image (I,)."""
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
    """Cross-entropy to the target and the teacher's confidence in it, over iterations (I,)."""
    figure = new_figure(8.5, 2.8)
    left, right = figure.subplots(1, 2)
    for (name, history), color, style in zip(
        histories.items(), (BLUE, VERMILLION), ("--", "-"), strict=False
    ):
        left.plot(history["cross_entropy"], style, color=color, label=name)
        right.plot(history["confidence"], style, color=color, label=name)
    left.set(xlabel="iteration", ylabel="cross-entropy (nats)", ylim=(0, None))
    right.set(xlabel="iteration", ylabel="confidence in the target", ylim=(0, 1))
    left.legend()
    return figure


@styled
def foreground(shares: Mapping[str, tuple[Tensor, float]]) -> Figure:
    """Share of each image's foreground that survives, title -> (shares (n,), chance)."""
    figure = new_figure(8.5, 2.8)
    axes = figure.subplots(1, len(shares), squeeze=False)[0]
    for axis, (title, (values, chance)) in zip(axes, shares.items(), strict=True):
        axis.hist(values.numpy(), bins=np.linspace(0, 1, 21), color=SKY, edgecolor="white")
        axis.axvline(chance, color=BLACK, ls="--", label=f"chance {chance:.2f}")
        axis.axvline(values.mean(), color=VERMILLION, label=f"mean {values.mean():.2f}")
        axis.set(title=title, xlim=(0, 1), xlabel="share of the foreground kept", ylabel="images")
        axis.legend(frameon=True, edgecolor="white", framealpha=1)
    return figure


@styled
def generated(sets: Mapping[str, SyntheticSet], truth: Split, stats: tuple[Tensor, Tensor]) -> Figure:
    """The first image of each class that every method made, and a true one below; a dash where it made none.

    Where patches stopped, a line holds the survivors.
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
