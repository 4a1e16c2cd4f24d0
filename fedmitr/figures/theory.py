"""What the theory claims, as measured: gradient variance, patch gradients, stability, generalisation gap."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from ..theory.gradients import GradientNoise
from ..theory.patches import GROUPS
from .style import BLACK, BLUE, GREEN, ORANGE, SKY, VERMILLION, new_figure, styled

_COLORS = {"distillation": BLACK, "pseudo-label tokens": VERMILLION, "relabel": BLUE}  # by labels
_LINES = {"sparse": "-", "dense": "--"}  # by inversion
_PATCHES = dict(zip(GROUPS, (GREEN, ORANGE), strict=True))
_BOUNDS = {"convex": ":", "smooth": "-."}


@styled
def variances(students: pd.DataFrame, optimizer: str = "sgd") -> Figure:
    """Draw the variance of the student's gradient along training, a panel a start: means over seeds.

    students: the table of results/theory.csv. The colour is the labels', dashed lines are dense inversion.
    """
    rows = _largest(students[students["optimizer"] == optimizer])
    starts = list(rows["start"].unique())
    figure = new_figure(4.2 * len(starts) + 1.2, 3.6)
    axes = figure.subplots(1, len(starts), squeeze=False)[0]
    for axis, start in zip(axes, starts, strict=True):
        for (inversion, labels), run in rows[rows["start"] == start].groupby(["inversion", "labels"]):
            mean = np.exp(np.log(run.set_index("step")["variance"]).groupby("step").mean())
            axis.plot(mean.index, mean, _LINES[inversion] + "o", ms=3, lw=1.4, color=_COLORS[labels])
        axis.set(yscale="log", title=start, xlabel="step of the student")
        axis.grid(axis="y", which="both", alpha=0.2)
    axes[0].set_ylabel("gradient variance σ² (geometric mean over seeds)")
    _draw_key(figure)
    return figure


@styled
def gradient_lengths(gradients: Tensor) -> Figure:
    """Draw the length of each sample's gradient (B, P) as a bar, longest first, and that of their mean."""
    lengths = gradients.double().norm(dim=1).sort(descending=True).values.cpu()
    mean = gradients.double().mean(dim=0).norm().item()
    figure = new_figure(6.4, 2.8)
    axis = figure.subplots()
    axis.bar(range(1, len(lengths) + 1), lengths, color=SKY, label="one sample")
    axis.axhline(mean, color=VERMILLION, lw=1.6, label="their mean")
    axis.set(xlabel="samples, longest gradient first", ylabel="length of the gradient")
    axis.legend(loc="upper right")
    return figure


@styled
def noise_parts(noises: Mapping[str, GradientNoise]) -> Figure:
    """Draw each variance as bars: in all, what images and labels contribute, and what they share.

    The last is twice their covariance; it is negative where they cancel.
    """
    parts = {"in all": BLACK, "images": SKY, "labels": ORANGE, "images and labels together": "#999999"}
    figure = new_figure(8, 0.9 + 0.72 * len(noises))
    axis = figure.subplots()
    for row, noise in enumerate(noises.values()):
        values = (noise.variance, noise.images, noise.labels, noise.joint)
        heights = row + 0.2 * (np.arange(len(values)) - 1.5)
        axis.barh(heights, values, height=0.18, color=list(parts.values()))
    axis.set_yticks(range(len(noises)), list(noises))
    axis.invert_yaxis()
    axis.axvline(0, color=BLACK, lw=0.8)
    axis.set_xlabel("gradient variance σ²")
    handles = [Line2D([], [], color=color, lw=6, label=name) for name, color in parts.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(parts))
    return figure


@styled
def patch_gradients(inversions: pd.DataFrame) -> Figure:
    """Draw size and sign agreement of the inversion's gradient by iteration, a column a start and inversion.

    inversions: rows as `theory.patches.PatchGradients.curves` returns them, with start, seed and inversion.
    Lines are means over seeds, bands reach from the lowest to the highest seed.
    """
    columns = list(inversions[["start", "inversion"]].drop_duplicates().itertuples(index=False, name=None))
    figure = new_figure(2.7 * len(columns) + 0.8, 4.6)
    axes = figure.subplots(2, len(columns), squeeze=False, sharex="col", sharey="row")
    for column, (start, inversion) in enumerate(columns):
        rows = inversions[(inversions["start"] == start) & (inversions["inversion"] == inversion)]
        for axis, name in zip(axes[:, column], ("norm", "agreement"), strict=True):
            for group, color in _PATCHES.items():
                _draw_band(axis, rows[rows["patches"] == group], name, color)
        axes[0, column].set_title(f"{start}\n{inversion}")
        axes[1, column].axhline(0.5, color=BLACK, lw=0.8, ls=":")
        axes[1, column].set_xlabel("iteration")
    axes[0, 0].set(yscale="log", ylabel="‖g‖ of a patch")
    axes[1, 0].set_ylabel("share of pixels whose\nsign stays (dotted: noise)")
    handles = [Line2D([], [], color=c, label=f"patches that {name}") for name, c in _PATCHES.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=2)
    return figure


def _draw_band(axis: Axes, rows: pd.DataFrame, name: str, color: str) -> None:
    """Draw the mean over seeds by iteration, and the band between the lowest and the highest."""
    seeds = rows.pivot(index="iteration", columns="seed", values=name).dropna(how="all")
    axis.plot(seeds.index, seeds.mean(axis=1), color=color, lw=1.4)
    axis.fill_between(seeds.index, seeds.min(axis=1), seeds.max(axis=1), color=color, alpha=0.2, lw=0)


@styled
def drift(students: pd.DataFrame) -> Figure:
    """Draw how far SGD's students drift apart, and their losses, on logarithmic axes, a column a start.

    students: what `theory.verdicts.with_bounds` returns. Lines are geometric means over seeds, by labels and
    inversion; the grey ones are the bounds, of the cell with the largest convex bound.
    """
    rows = _largest(students)
    rows = rows[rows["step"] > 0]
    starts = list(rows["start"].unique())
    figure = new_figure(4.2 * len(starts) + 1.2, 6.0)
    axes = figure.subplots(2, len(starts), squeeze=False, sharex=True, sharey="row")
    for column, start in enumerate(starts):
        own = rows[rows["start"] == start]
        for axis, name in zip(axes[:, column], ("distance", "loss_distance"), strict=True):
            for (inversion, labels), run in own.groupby(["inversion", "labels"]):
                mean = _geometric(run, name)
                axis.plot(mean.index, mean, _LINES[inversion] + "o", ms=3, lw=1.4, color=_COLORS[labels])
            axis.set(xscale="log", yscale="log")
            axis.grid(which="both", alpha=0.2)
        worst = own.loc[own["convex"].idxmax(), ["inversion", "labels"]]
        run = own[(own["inversion"] == worst["inversion"]) & (own["labels"] == worst["labels"])]
        for axis, name, line in (
            *((axes[0, column], name, line) for name, line in _BOUNDS.items()),
            (axes[1, column], "convex_loss", _BOUNDS["convex"]),
        ):
            mean = _geometric(run, name)
            axis.plot(mean.index, mean, line, color="#777777", lw=1.6)
        axes[0, column].set_title(start)
        axes[1, column].set_xlabel("step t of SGD")
    axes[0, 0].set_ylabel("‖θ − θ′‖")
    axes[1, 0].set_ylabel("mean |ℓ(θ; ξ) − ℓ(θ′; ξ)|,\nheld-out images ξ")
    more = [Line2D([], [], color="#777777", ls=line, label=f"{name} bound") for name, line in _BOUNDS.items()]
    _draw_key(figure, more)
    return figure


@styled
def gaps(students: pd.DataFrame) -> Figure:
    """Draw generalisation gaps of finished students against their gradient's variance, a point a student.

    students: the table of results/theory.csv, all starts, seeds, cells and optimisers. Gaps are differences
    of the distillation loss: synthetic held-out minus train, and real test minus synthetic held-out.
    """
    last = students[students["step"] == students["step"].max()]
    panels = {
        "synthetic images: held out − train": last["held_out_kd"] - last["train_kd"],
        "real test − synthetic held out": last["test_kd"] - last["held_out_kd"],
    }
    figure = new_figure(9.6, 4.2)
    axes = figure.subplots(1, 2)
    for axis, (title, gap) in zip(axes, panels.items(), strict=True):
        for (start, inversion, labels), run in last.groupby(["start", "inversion", "labels"]):
            filled = _COLORS[labels] if inversion == "sparse" else "none"
            marker = "o" if start == last["start"].iloc[0] else "s"
            looks = {"marker": marker, "ls": "", "ms": 4.5, "mec": _COLORS[labels], "mfc": filled}
            axis.plot(run["variance"], gap[run.index], **looks)
        axis.axhline(0, color=BLACK, lw=0.8)
        axis.set(xscale="log", title=title, xlabel="gradient variance σ² at the last step")
        axis.grid(alpha=0.2)
    axes[0].set_ylabel("difference of the distillation loss")
    handles = [Line2D([], [], ls="", marker="o", color=color, label=name) for name, color in _COLORS.items()]
    handles += [
        Line2D([], [], ls="", marker=marker, mec="#777777", mfc="none", label=start)
        for marker, start in zip("os", last["start"].unique(), strict=False)
    ]
    handles.append(Line2D([], [], ls="", marker="o", mec="#777777", mfc="none", label="hollow: dense"))
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))
    return figure


def _largest(students: pd.DataFrame) -> pd.DataFrame:
    """Return the students that learned from all images."""
    return students[students["images"] == students["images"].max()]


def _geometric(run: pd.DataFrame, name: str) -> pd.Series:
    """Return the geometric mean over seeds at each step; steps with a value of zero are left out."""
    known = run[run[name] > 0]
    return np.exp(np.log(known.set_index("step")[name]).groupby("step").mean())


def _draw_key(figure: Figure, more: list[Line2D] | None = None) -> None:
    """Name colours and lines above a figure."""
    handles = [Line2D([], [], color=color, label=name) for name, color in _COLORS.items()]
    handles += [Line2D([], [], color="#777777", ls=line, label=name) for name, line in _LINES.items()]
    figure.legend(handles=handles + (more or []), loc="outside upper center", ncols=4)
