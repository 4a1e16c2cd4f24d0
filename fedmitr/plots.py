"""Every figure, one function each: tensors in, a matplotlib Figure out. `save` writes and shows it."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from IPython.display import Image
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from .canvas import (
    BLACK,
    BLUE,
    ORANGE,
    SKY,
    VERMILLION,
    draw_bars,
    draw_costs,
    draw_counts,
    draw_image,
    draw_method_key,
    draw_tokens,
    frame_title,
    method_marker,
    name_rows,
    new_figure,
    one_of_each,
    picture_grid,
    pixels,
    show,
    square,
    styled,
    write_cells,
)
from .compare import NAMES
from .inversion import SyntheticSet
from .paths import output_folder
from .scenes import patch_share
from .tasks import Split


def save(figure: Figure, name: str, profile: str) -> Image:
    """Write figures/NAME.png (figures/PROFILE/NAME.png but for laptop) and return it for display."""
    image = show(figure)
    (output_folder("figures", profile) / f"{name}.png").write_bytes(image.data)
    return image


# --- data -----------------------------------------------------------------------------------------


@styled
def scenes(split: Split, stats: tuple[Tensor, Tensor], picks: Sequence[int], patch: int) -> Figure:
    """Scenes, their true foreground, and the share of it in every patch.

    split.images (n, ch, H, W) and foreground (n, 1, H, W); picks: which to show; patch: side in pixels.
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
def shards(counts: Tensor, classes: Sequence[str], title: str = "") -> Figure:
    """Who holds what: counts (K, C), one row per client."""
    figure = new_figure(7, 1.2 + 0.34 * len(counts))
    axis = figure.subplots()
    draw_counts(axis, counts, classes, numbers=True)
    axis.set(title=title)
    figure.colorbar(axis.images[0], ax=axis, label="images")
    return figure


@styled
def shard_grid(panels: Mapping[str, Tensor], classes: Sequence[str]) -> Figure:
    """Several partitions side by side: title -> counts (K, C), one colour scale for all."""
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
    """Label skew against α: values (A, S) for A alphas and S draws of the partition."""
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


# --- accuracies -----------------------------------------------------------------------------------


@styled
def bars(scores: Mapping[str, float], title: str = "", chance: float | None = 0.1) -> Figure:
    """Test accuracies in [0, 1] by name, with the accuracy of guessing as a line."""
    figure = new_figure(7, 0.9 + 0.34 * len(scores))
    draw_bars(figure.subplots(), scores, chance)
    figure.axes[0].set(title=title)
    return figure


@styled
def per_class(
    rows: Mapping[str, Tensor], classes: Sequence[str], title: str = "", outlined: Tensor | None = None
) -> Figure:
    """Accuracy of each class, name -> (C,), in per cent; outlined (rows, C) puts a line around cells."""
    figure = new_figure(7.5, 1.2 + 0.34 * len(rows))
    axis = figure.subplots()
    values = 100 * torch.stack(list(rows.values())).numpy()
    axis.imshow(values, vmin=0, vmax=100, aspect="auto")
    write_cells(axis, values, [f"{v:.0f}" for v in values.flat], high=100)
    if outlined is not None:
        for row, column in outlined.nonzero().tolist():
            box = (column - 0.45, row - 0.43), 0.9, 0.86
            axis.add_patch(Rectangle(*box, fill=False, edgecolor=VERMILLION, linewidth=1.6))
    axis.set_xticks(range(len(classes)), classes)
    axis.set_yticks(range(len(rows)), rows)
    axis.set(xlabel="class", title=title)
    figure.colorbar(axis.images[0], ax=axis, label="accuracy (%)")
    return figure


@styled
def confidence(seen: Tensor, unseen: Tensor) -> Figure:
    """Mean confidence of every client (K,) on test images of classes it holds and of classes it never saw."""
    figure = new_figure(7, 2.8)
    axis, at = figure.subplots(), np.arange(len(seen))
    axis.bar(at - 0.2, seen, 0.38, color=BLUE, label="classes in its shard")
    axis.bar(at + 0.2, unseen, 0.38, color=ORANGE, label="classes it never saw: every answer is wrong")
    axis.set_xticks(at, map(str, at))
    axis.set(xlabel="client", ylabel="mean confidence", ylim=(0, 1.3), yticks=[0, 0.5, 1])
    axis.legend(loc="upper center", ncols=2)
    return figure


@styled
def comparison(table: pd.DataFrame) -> Figure:
    """Runs with columns method, task, alpha, clients, seed, accuracy: seeds as dots, mean ± std.

    The dots of a method climb from its first seed to its last, so that none hides another.
    """
    settings = list(table.groupby(["task", "alpha", "clients"]))
    figure = new_figure(8, 0.9 + len(settings) * (0.6 + 0.36 * table["method"].nunique()))
    axes = figure.subplots(len(settings), 1, squeeze=False, sharex=True)[:, 0]
    for axis, ((task, alpha, clients), runs) in zip(axes, settings, strict=True):
        scores = (
            runs.groupby("method", sort=False)["accuracy"].agg(["mean", "std", "size"]).sort_values("mean")
        )
        for row, (method, score) in enumerate(scores.iterrows()):
            dots = runs[runs["method"] == method].sort_values("seed")["accuracy"]
            climb = row + np.linspace(0.2, 0.5, len(dots))
            axis.plot(dots, climb, "o", color=SKY, ms=5, mec="white", mew=0.5, clip_on=False)
            bar = method_marker(method)
            axis.errorbar(score["mean"], row, xerr=score["std"], capsize=3, markersize=5, **bar)
        axis.set_yticks(range(len(scores)), [NAMES.get(name, name) for name in scores.index])
        count = scores["size"].max()
        seeds = "one seed" if count == 1 else f"{count} seeds"
        axis.set(title=f"{task}, {clients} clients, α = {alpha:g}: {seeds}")
        axis.set(xlim=(0, 1), ylim=(-0.5, len(scores) - 0.3))
    axes[-1].set_xlabel("test accuracy: each seed (dots), mean ± standard deviation")
    draw_method_key(figure)
    return figure


@styled
def panels(table: pd.DataFrame) -> Figure:
    """Runs with columns panel, cell, seed, accuracy: each cell's seeds as dots, mean ± std, panel by panel.

    A dashed line marks the mean of a panel's first cell, with which the others are compared.
    """
    parts = list(table.groupby("panel", sort=False))
    counts = [runs["cell"].nunique() for _, runs in parts]
    figure = new_figure(8, 0.6 + sum(0.5 + 0.3 * n for n in counts))
    axes = figure.subplots(len(parts), 1, squeeze=False, sharex=True, height_ratios=[n + 0.6 for n in counts])
    for axis, (panel, runs) in zip(axes[:, 0], parts, strict=True):
        names = list(dict.fromkeys(runs["cell"]))
        for row, name in enumerate(reversed(names)):
            values = runs[runs["cell"] == name].sort_values("seed")["accuracy"]
            climb = row + np.linspace(0.1, 0.4, len(values))
            axis.plot(values, climb, "o", color=SKY, ms=4.5, mec="white", mew=0.5)
            color = VERMILLION if name == names[0] else BLACK
            axis.errorbar(values.mean(), row, xerr=values.std(), capsize=3, marker="o", ms=5, color=color)
        first = runs[runs["cell"] == names[0]]["accuracy"].mean()
        axis.axvline(first, color=VERMILLION, lw=0.8, ls="--", zorder=0)
        axis.set_yticks(range(len(names)), list(reversed(names)))
        axis.set(title=panel, ylim=(-0.5, len(names) - 0.4))
    axes[-1, 0].set_xlabel("test accuracy: each seed (dots), mean ± standard deviation")
    return figure


@styled
def costs(runs: pd.DataFrame, seconds: pd.DataFrame) -> Figure:
    """Mean accuracy ± std over seeds against the server's seconds and all bytes, one point a method.

    runs and seconds are the two files that `compare` writes.
    """
    scores = runs.groupby("method")["accuracy"].agg(["mean", "std"])
    total = runs.assign(cost=(runs["upload_bytes"] + runs["download_bytes"]) / 1e6)
    panels = {
        "server's work (s)": seconds.groupby("method")["server_seconds"].mean(),
        "all messages, up and down (MB)": total.groupby("method")["cost"].mean(),
    }
    figure = new_figure(9, 4.4)
    axes = figure.subplots(1, 2, sharey=True)
    lowest = (scores["mean"] - scores["std"].fillna(0)).min()
    axes[0].set(ylim=(max(0, math.floor(10 * lowest - 1) / 10), 1.05))
    for axis, (label, cost) in zip(axes, panels.items(), strict=True):
        draw_costs(axis, scores, cost)
        axis.set(xlabel=label)
    axes[0].set(ylabel="test accuracy, mean ± std", title="What the server computes")
    axes[1].set(title="What crosses the wire")
    draw_method_key(figure)
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


@styled
def weights(panels: Mapping[str, Tensor], classes: Sequence[str]) -> Figure:
    """Weights of clients for classes in an ensemble, title -> (K, C) in [0, 1], as per cent."""
    figure = new_figure(9, 1.3 + 0.3 * len(next(iter(panels.values()))))
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (title, values) in zip(axes, panels.items(), strict=True):
        percent = 100 * values.cpu()
        draw_counts(axis, percent, classes, most=100)
        write_cells(axis, percent.numpy(), [f"{v:.0f}" for v in percent.flatten()], high=100)
        axis.set(title=title, ylabel="client" if axis is axes[0] else "")
    figure.colorbar(axes[-1].images[0], ax=axes, label="weight (%)")
    return figure


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


# --- token labels ---------------------------------------------------------------------------------


@styled
def token_labels(
    synthetic: SyntheticSet, targets: Mapping[str, Tensor], stats: tuple[Tensor, Tensor], picks: Sequence[int]
) -> Figure:
    """Images with their survivors, and below them each patch's label: name -> (n, N, C) probabilities.

    Colour and number give the likeliest class, strength of the colour its probability.
    """
    figure, axes = picture_grid(1 + len(targets), len(picks), cell=1.32, left=0.9)
    for column, pick in enumerate(picks):
        draw_image(axes[0, column], pixels(synthetic.pixels[pick], stats), synthetic.mask[pick])
        axes[0, column].set_title(f"target {int(synthetic.labels[pick])}")
        for axis, of_tokens in zip(axes[1:, column], targets.values(), strict=True):
            draw_tokens(axis, of_tokens[pick], synthetic.mask[pick])
    name_rows(axes, ["image", *targets])
    return figure


@styled
def overview(
    counts: Tensor,
    synthetic: SyntheticSet,
    targets: Tensor,
    scores: Mapping[str, float],
    stats: tuple[Tensor, Tensor],
) -> Figure:
    """The whole way in one picture: shards (K, C), noise to images, token targets (n, N, C), accuracies."""
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
    chosen = torch.linspace(0, len(history["frame_at"]) - 1, 5).round().long().tolist()
    for row, pick in zip(images.subplots(2, 5), picks, strict=True):
        for axis, at in zip(row, chosen, strict=True):
            draw_image(axis, pixels(history["frames"][at, pick], stats), history["frame_masks"][at, pick])
            axis.set_title(
                f"iteration {int(history['frame_at'][at])}" if pick == picks[0] else "", fontsize=9
            )
    images.suptitle("2  Server: images emerge, low-information patches stop", fontsize=10.5)
    image, tokens = labels.subplots(1, 2)
    draw_image(image, pixels(synthetic.pixels[picks[0]], stats), synthetic.mask[picks[0]])
    draw_tokens(tokens, targets[picks[0]], synthetic.mask[picks[0]])
    image.set_title(f"made for a {int(synthetic.labels[picks[0]])}")
    tokens.set_title("label of each patch")
    labels.suptitle("3  Pseudo-label inside, soft label outside", fontsize=10.5)
    draw_bars(result.subplots(), scores, 1 / counts.shape[1])
    result.suptitle("4  One global model", fontsize=10.5)
    return figure
