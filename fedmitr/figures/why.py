"""What sums of features know that uploads do not: a toy in two dimensions, and kinds of errors."""

from collections.abc import Callable, Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from scipy.special import log_softmax
from sklearn.linear_model import Ridge
from sklearn.neural_network import MLPClassifier

from ..evaluation.metrics import ERRORS
from .style import BLUE, ORANGE, SKY, VERMILLION, bare, new_figure, styled

_COLORS = (BLUE, SKY, VERMILLION, ORANGE)  # blue: the first client's classes; red: the second's
_EDGE = 3.6  # the toy lies in [-_EDGE, _EDGE] × [-_EDGE/2, _EDGE/2]
_KINDS = dict(zip(ERRORS[1:], (SKY, VERMILLION), strict=True))  # the first is no error
Points = tuple[np.ndarray, np.ndarray]  # x (n, 2), y (n,)
Scores = Callable[[np.ndarray], np.ndarray]  # x (n, 2) to scores of the classes (n, 4)


def toy_points(count: int, seed: int) -> list[Points]:
    """Draw two clients' points, `count` of each class: a disc and the ring around it, left and right.

    The first client holds classes 0 and 1, the second 2 and 3.
    """
    rng = np.random.default_rng(seed)
    clients = []
    for client, centre in enumerate((-1.6, 1.6)):
        angle = rng.uniform(0, 2 * np.pi, 2 * count)
        radius = np.concatenate([np.full(count, 0.35), np.full(count, 1.15)]) + 0.17 * rng.normal(
            size=2 * count
        )
        x = np.stack([centre + radius * np.cos(angle), radius * np.sin(angle)], axis=1)
        clients.append((x, 2 * client + np.repeat([0, 1], count)))
    return clients


def toy_models(clients: list[Points], beta: float = 10.0, seed: int = 0) -> dict[str, Scores]:
    """Fit each client's network, their ensemble, ridge regression on all points' sums, and both together.

    Networks start from the same weights and have outputs for all four classes, of which a client sees two.
    The ensemble is the mean of their logits; ridge is linear in x, so it is what sums of x can give.
    """
    networks = [_network(*points, seed) for points in clients]
    x, y = (np.concatenate(part) for part in zip(*clients, strict=True))
    linear = Ridge(alpha=1.0).fit(x, np.eye(4)[y])

    def ensemble(points: np.ndarray) -> np.ndarray:
        return log_softmax(np.mean([net(points) for net in networks], axis=0), axis=1)

    return {
        "client 1": networks[0],
        "client 2": networks[1],
        "ensemble A": ensemble,
        "ridge r": linear.predict,
        "log A + β·r": lambda points: ensemble(points) + beta * linear.predict(points),
    }


def _network(x: np.ndarray, y: np.ndarray, seed: int) -> Scores:
    """Train a small network on one client's points; return its log-probabilities as a function."""
    network = MLPClassifier((32,), activation="tanh", learning_rate_init=0.01, random_state=seed)
    for _ in range(300):
        network.partial_fit(x, y, classes=range(4))
    return lambda points: np.log(network.predict_proba(points) + 1e-12)


@styled
def toy(seed: int = 0) -> Figure:
    """Draw the toy: what each model calls every place, with test points, and its accuracy on them."""
    models = toy_models(toy_points(200, seed))
    x, y = (np.concatenate(part) for part in zip(*toy_points(200, seed + 1), strict=True))
    figure = new_figure(9.6, 1.5)
    axes = figure.subplots(1, len(models))
    for axis, (name, scores) in zip(axes, models.items(), strict=True):
        _regions(axis, scores)
        axis.scatter(*x.T, s=4, c=[_COLORS[c] for c in y], edgecolors="white", linewidths=0.2)
        axis.set_title(f"{name}\n{(scores(x).argmax(1) == y).mean():.2f}")
        bare(axis)
    return figure


def _regions(axis: Axes, scores: Scores) -> None:
    """Colour every place by the class that a model gives it."""
    across, up = np.linspace(-_EDGE, _EDGE, 240), np.linspace(-_EDGE / 2, _EDGE / 2, 120)
    places = np.stack(np.meshgrid(across, up), axis=-1).reshape(-1, 2)
    classes = scores(places).argmax(1).reshape(120, 240)
    extent = (-_EDGE, _EDGE, -_EDGE / 2, _EDGE / 2)
    look = {"cmap": ListedColormap(_COLORS), "vmin": 0, "vmax": 3, "alpha": 0.35}
    axis.imshow(classes, origin="lower", extent=extent, interpolation="nearest", **look)


@styled
def errors(table: pd.DataFrame, starts: Mapping[str, str]) -> Figure:
    """Draw, for each start, the share of images that each model gets wrong, by kind of error.

    table: start, seed, model, and a column for each kind of `evaluation.metrics.error_kinds` but "right".
    starts: titles of the panels by the start's name.
    """
    figure = new_figure(8.6, 2.9)
    axes = figure.subplots(1, len(starts), sharey=True)
    names = list(dict.fromkeys(table["model"]))[::-1]
    for axis, (start, title) in zip(axes, starts.items(), strict=True):
        means = table[table["start"] == start].groupby("model")[list(_KINDS)].mean().loc[names]
        left = np.zeros(len(names))
        for kind, color in _KINDS.items():
            axis.barh(names, means[kind], left=left, color=color, label=kind, height=0.65)
            left += means[kind].to_numpy()
        for row, total in enumerate(left):
            axis.text(total + 0.008, row, f"{total:.3f}", va="center", fontsize=9)
        axis.set(title=title, xlim=(0, 0.8), xlabel="share of validation images that are wrong")
    axes[-1].legend(loc="lower right")
    return figure
