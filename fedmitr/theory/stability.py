"""Stability of SGD: how far students drift apart that were trained on sets which differ in one sample.

S and S' differ in one of n samples; θ_t and θ'_t are SGD's iterates on them, with the same order of samples.
For a loss whose gradient changes by at most β for a step of length one, Hardt, Recht & Singer (2016) bound

    δ_{t+1} ≤ (1 + α_t β) δ_t + α_t E‖g(θ_t; ξ) − g(θ_t; ξ')‖ / n,      δ_t = E‖θ_t − θ'_t‖,

where ξ and ξ' are the samples that differ: a step contains one of them with probability 1/n. A convex loss
with α_t ≤ 2/β has 1 in place of 1 + α_t β. They bound the last term by 2L/n with a Lipschitz constant L. Of
independent samples it is at most √2 σ(θ_t) / n (`gradients`), which is used here. Kuzborskij & Lampert (2018)
prove data-dependent bounds: for convex losses with the gradient's variance and the risk at the start, for
others with the expected curvature around the start.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import grad, jvp

from ..core.gradients import Loss, loss_at, trained
from ..core.rng import make_rng
from ..server.views import Batch


def descend(model: nn.Module, loss: Loss, batches: Iterable[Batch], rate: float) -> nn.Module:
    """Take one step of plain SGD on each batch, in place: no momentum, no decay, no clipping."""
    weights = list(trained(model).values())
    for rows in batches:
        gradients = torch.autograd.grad(loss(model, *rows), weights, allow_unused=True)
        with torch.no_grad():
            for weight, gradient in zip(weights, gradients, strict=True):
                if gradient is not None:
                    weight.sub_(gradient, alpha=rate)
    return model


def replace_sample(pool: Batch, samples: Tensor, index: int, other: Batch) -> Batch:
    """Return a pool with the rows of one sample replaced by `other`, which has as many rows.

    samples (n,): the sample that each row of the pool belongs to.
    """
    rows = (samples == index).nonzero()[:, 0]
    return tuple(column.index_copy(0, rows, new) for column, new in zip(pool, other, strict=True))


def distance(one: nn.Module, other: nn.Module) -> float:
    """Return ‖θ − θ'‖, over all weights of two models of the same shape."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return sum((a.double() - b.double()).square().sum().item() for a, b in pairs) ** 0.5


def curvature(model: nn.Module, loss: Loss, rows: Batch, iterations: int = 10, seed: int = 0) -> float:
    """Estimate β at a model: the largest absolute eigenvalue of the Hessian of the loss of these rows.

    By power iteration, each a product of the Hessian with a vector; the estimate is from below.
    """
    weights = {name: w.detach() for name, w in trained(model).items()}
    of = loss_at(model, loss)
    gradient = grad(lambda w: of(w, *rows))
    rng = make_rng(seed, "curvature")
    vector = {name: torch.randn(w.shape, generator=rng).to(w) for name, w in weights.items()}
    length = 0.0
    for _ in range(iterations):
        scale = _length(vector)
        if scale == 0:  # a flat loss
            return 0.0
        vector = {name: v / scale for name, v in vector.items()}
        vector = jvp(gradient, (weights,), (vector,))[1]
        length = _length(vector)
    return length


def _length(vector: dict[str, Tensor]) -> float:
    return sum(v.double().square().sum().item() for v in vector.values()) ** 0.5


def predicted_distance(
    steps: Sequence[int],
    variance: Sequence[float],
    count: int,
    rate: float,
    curvature: Sequence[float] | None = None,
) -> np.ndarray:
    """Return the bound on E‖θ_t − θ'_t‖ after these steps, from measured variances.

    steps: rising, from 0; variance, curvature: σ² and β as measured there, interpolated between. count: n.
    The recursion is δ_{t+1} = (1 + α β_t) δ_t + α √2 σ_t / n or, without curvature, the convex one, with 1 in
    place of 1 + α β_t.
    """
    times = np.arange(steps[-1])
    noise = rate * np.sqrt(2) * np.interp(times, steps, np.sqrt(variance)) / count
    growth = np.ones(len(times)) if curvature is None else 1 + rate * np.interp(times, steps, curvature)
    distances = [0.0]
    for factor, added in zip(growth, noise, strict=True):
        distances.append(factor * distances[-1] + added)
    return np.array(distances)[list(steps)]


def slope(steps: Sequence[int], values: Sequence[float]) -> float:
    """Return s of values ∝ t^s, for steps t above 0: the least-squares slope on logarithmic axes."""
    points = [(np.log(t), np.log(v)) for t, v in zip(steps, values, strict=True) if t > 0 and v > 0]
    return float(np.polyfit(*zip(*points, strict=True), deg=1)[0]) if len(points) > 1 else float("nan")
