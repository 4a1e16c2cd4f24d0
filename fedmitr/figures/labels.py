"""Labels of patches, and the whole method in one picture."""

import math
from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from ..server.synthetic import SyntheticSet
from .accuracies import draw_bars
from .clients import draw_counts
from .images import one_of_each
from .style import (
    BLACK,
    BLUE,
    GREEN,
    ORANGE,
    PINK,
    SKY,
    VERMILLION,
    YELLOW,
    bare,
    draw_image,
    draw_outline,
    name_rows,
    new_figure,
    picture_grid,
    pixels,
    square,
    styled,
)

_CLASS_COLORS = (BLUE, ORANGE, GREEN, VERMILLION, SKY, PINK, YELLOW, "#BBBBBB", "#777777", BLACK)


def _draw_tokens(axis: Axes, probabilities: Tensor, mask: Tensor) -> None:
    """Draw each patch's most probable class, from (N, C), as colour and number; survivors are outlined.

    mask (N,): true for patches that survived every stop.
    """
    best, label = probabilities.cpu().max(dim=1)
    colors = np.array([mpl.colors.to_rgb(_CLASS_COLORS[int(c) % len(_CLASS_COLORS)]) for c in label])
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


@styled
def token_labels(
    synthetic: SyntheticSet,
    targets: Mapping[str, Tensor],
    stats: tuple[Tensor, Tensor],
    picks: Sequence[int],
    shown: str = "image",
) -> Figure:
    """Draw images with their survivors, and below them the labels of their patches.

    targets: name -> probabilities (n, N, C). Colour and number give the most probable class, the strength of
    the colour its probability. shown: what the first row is, such as a view that the student gets.
    """
    figure, axes = picture_grid(1 + len(targets), len(picks), cell=1.32, left=0.9)
    for column, pick in enumerate(picks):
        draw_image(axes[0, column], pixels(synthetic.pixels[pick], stats), synthetic.mask[pick])
        axes[0, column].set_title(f"target {int(synthetic.labels[pick])}")
        for axis, probabilities in zip(axes[1:, column], targets.values(), strict=True):
            _draw_tokens(axis, probabilities[pick], synthetic.mask[pick])
    name_rows(axes, [shown, *targets])
    return figure


@styled
def overview(
    counts: Tensor,
    synthetic: SyntheticSet,
    targets: Tensor,
    scores: Mapping[str, float],
    stats: tuple[Tensor, Tensor],
) -> Figure:
    """Draw the whole method in one picture.

    counts (K, C): the clients' images of each class; synthetic: images, and how they emerged from noise, of
    which the last column shows what the student receives; targets (n, N, C): labels of their patches;
    scores: test accuracies by name.
    """
    figure = new_figure(8.6, 5.2)
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1.1))
    data, images = top.subfigures(1, 2, width_ratios=(1, 1.6))
    labels, result = bottom.subfigures(1, 2, width_ratios=(1.25, 1.35))
    axis = data.subplots()
    draw_counts(axis, counts, list(map(str, range(counts.shape[1]))))
    data.colorbar(axis.images[0], ax=axis, label="images")
    data.suptitle("1  Clients hold few classes each", fontsize=10.5)
    history = synthetic.history
    picks = one_of_each(synthetic.labels[: history["frames"].shape[1]], 2)
    # The last frame is the result.
    chosen = torch.linspace(0, len(history["frame_at"]) - 2, 4).round().long().tolist()
    for row, pick in zip(images.subplots(2, 5), picks, strict=True):
        draw_image(row[-1], pixels(synthetic.pixels[pick], stats), synthetic.mask[pick])
        row[-1].set_title("result" if pick == picks[0] else "", fontsize=9)
        for axis, at in zip(row, chosen, strict=False):
            draw_image(axis, pixels(history["frames"][at, pick], stats), history["frame_masks"][at, pick])
            title = f"iteration {int(history['frame_at'][at])}"
            axis.set_title(title if pick == picks[0] else "", fontsize=9)
    images.suptitle("2  Server: images emerge, low-information patches stop", fontsize=10.5)
    image, tokens = labels.subplots(1, 2)
    draw_image(image, pixels(synthetic.pixels[picks[0]], stats), synthetic.mask[picks[0]])
    _draw_tokens(tokens, targets[picks[0]], synthetic.mask[picks[0]])
    image.set_title(f"made for a {int(synthetic.labels[picks[0]])}")
    tokens.set_title("label of each patch")
    labels.suptitle("3  Pseudo-label inside, soft label outside", fontsize=10.5)
    draw_bars(result.subplots(), scores, 1 / counts.shape[1])
    result.suptitle("4  One global model", fontsize=10.5)
    return figure
