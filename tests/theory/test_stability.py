"""stability.py: closed forms of gradient descent on a linear model, brute force, and the recursion."""

import copy

import numpy as np
import pytest
import torch
from theory_tables import squared
from torch import nn

from fedmitr.theory.stability import (
    curvature,
    descend,
    distance,
    predicted_distance,
    replace_sample,
    slope,
)

RATE, STEPS = 0.05, 30


def hessian(x):
    return x.T @ x / len(x)


def closed_form(start, x, y, rate, steps):
    """θ_T = θ* + (I − αH)^T (θ_0 − θ*) of gradient descent on the mean of ½(θᵀx − y)²."""
    best = torch.linalg.solve(x.T @ x, x.T @ y)
    shrink = torch.linalg.matrix_power(torch.eye(x.shape[1]).double() - rate * hessian(x), steps)
    return best + shrink @ (start - best)


def test_stability_on_a_linear_model_is_its_closed_form(linear, points):
    start = linear.weight[0].detach().clone()
    other = (torch.full((1, 5), 3.0).double(), torch.tensor([-4.0]).double())
    sets = points, replace_sample(points, torch.arange(40), 7, other)
    ends = [descend(copy.deepcopy(linear), squared, [rows] * STEPS, RATE) for rows in sets]
    formulas = [closed_form(start, *rows, RATE, STEPS) for rows in sets]
    for end, formula in zip(ends, formulas, strict=True):
        assert torch.allclose(end.weight[0], formula, atol=1e-10)
    apart = (formulas[0] - formulas[1]).norm().item()
    assert np.isclose(distance(*ends), apart, rtol=1e-8) and apart > 0.01


def test_students_of_the_same_set_do_not_drift_apart(linear, points):
    ends = [descend(copy.deepcopy(linear), squared, [points] * 3, RATE) for _ in range(2)]
    assert distance(*ends) == 0.0


def test_one_step_of_single_samples_is_the_bound_with_equality(linear, points):
    """With one sample a step and one step, the students differ by α‖g(ξ) − g(ξ')‖ where ξ was drawn."""
    x, y = points
    one, two = (copy.deepcopy(linear) for _ in range(2))
    descend(one, squared, [(x[:1], y[:1])], RATE)
    descend(two, squared, [(x[1:2], y[1:2])], RATE)
    gradients = (x @ linear.weight[0] - y)[:, None] * x  # (40, 5)
    assert np.isclose(distance(one, two), RATE * (gradients[0] - gradients[1]).norm().item())


def test_the_mean_difference_of_independent_gradients_is_twice_the_variance(linear, points):
    """What the bound takes for E‖g(ξ) − g(ξ')‖² of two independent draws: 2σ², over all pairs of points."""
    x, y = points
    gradients = ((x @ linear.weight[0] - y)[:, None] * x).detach()
    apart = torch.cdist(gradients, gradients).square().mean().item()
    assert np.isclose(apart, 2 * gradients.var(dim=0, correction=0).sum().item())


def test_the_convex_bound_holds_on_average_on_a_linear_model(linear):
    """SGD on single samples, each replaced in turn by an independent one, against the bound."""
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(2 * 20, 5, generator=rng).double(), torch.randn(2 * 20, generator=rng).double()
    count, rate = 20, 0.02  # α ≤ 2/β for every sample: none has ‖x‖² above 100
    order = torch.randint(count, (60,), generator=rng)
    drifts, variance = [], []
    base = copy.deepcopy(linear)
    for step in [None, *order.tolist()]:
        if step is not None:
            descend(base, squared, [(x[step : step + 1], y[step : step + 1])], rate)
        gradients = ((x @ base.weight[0] - y)[:, None] * x).detach()
        variance.append(gradients.var(dim=0).sum().item())
    for index in range(count):
        changed = x.clone(), y.clone()
        for column in changed:
            column[index] = column[count + index]
        other = copy.deepcopy(linear)
        descend(other, squared, [tuple(c[i : i + 1] for c in changed) for i in order.tolist()], rate)
        drifts.append(distance(base, other))
    bound = predicted_distance(range(61), variance, count, rate)[-1]
    assert 0.05 * bound < np.mean(drifts) < bound


@pytest.mark.parametrize("seed", [0, 1])
def test_curvature_is_the_largest_eigenvalue(linear, points, seed):
    largest = torch.linalg.eigvalsh(hessian(points[0])).max().item()
    found = curvature(linear, squared, points, iterations=60, seed=seed)
    assert np.isclose(found, largest, rtol=1e-3)
    assert curvature(linear, squared, points, iterations=3, seed=seed) <= largest * (1 + 1e-9)


def test_a_flat_loss_has_no_curvature(linear, points):
    assert curvature(linear, lambda model, x, y: model(x).mean(), points) == 0.0


def test_the_recursion_by_hand():
    steps, variance, beta, count, rate = (0, 2, 4), (8.0, 2.0, 2.0), (1.0, 3.0, 3.0), 10, 0.1
    sigma = [np.sqrt(8.0), (np.sqrt(8.0) + np.sqrt(2.0)) / 2, np.sqrt(2.0), np.sqrt(2.0)]  # interpolated
    growth = [1.1, 1.2, 1.3, 1.3]
    plain, smooth = [0.0], [0.0]
    for s, factor in zip(sigma, growth, strict=True):
        added = rate * np.sqrt(2) * s / count
        plain.append(plain[-1] + added)
        smooth.append(factor * smooth[-1] + added)
    assert np.allclose(predicted_distance(steps, variance, count, rate), [plain[i] for i in steps])
    assert np.allclose(predicted_distance(steps, variance, count, rate, beta), [smooth[i] for i in steps])


def test_the_bound_is_of_order_one_over_n_and_linear_in_time_and_in_sigma():
    bound = predicted_distance((0, 50, 100), (4.0, 4.0, 4.0), 100, 0.01)
    assert np.allclose(bound, 0.01 * np.sqrt(2) * 2 / 100 * np.array([0, 50, 100]))
    assert np.allclose(predicted_distance((0, 50, 100), (4.0,) * 3, 25, 0.01), 4 * bound)
    assert np.isclose(slope((0, 50, 100), bound), 1.0)


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_slope_finds_the_exponent(exponent):
    steps = np.array([0, 1, 4, 9, 30])
    assert np.isclose(slope(steps, 3 * steps**exponent), exponent)
    assert np.isnan(slope([0, 5], [0.0, 1.0]))  # one point has no slope


def test_a_sample_is_replaced_in_all_of_its_rows():
    samples = torch.tensor([2, 0, 1, 0])
    pool = torch.arange(8.0).view(4, 2), torch.arange(4)
    other = torch.full((2, 2), -1.0), torch.tensor([7, 8])
    images, labels = replace_sample(pool, samples, 0, other)
    assert images[:, 0].tolist() == [0.0, -1.0, 4.0, -1.0] and labels.tolist() == [0, 7, 2, 8]
    assert pool[1].tolist() == [0, 1, 2, 3]  # left as it was


def test_frozen_weights_stay(points):
    model = nn.Sequential(nn.Linear(5, 5, bias=False), nn.Linear(5, 1)).double()
    model[0].requires_grad_(False)
    before = copy.deepcopy(model)
    descend(model, squared, [points] * 2, RATE)
    assert torch.equal(model[0].weight, before[0].weight)
    assert not torch.equal(model[1].weight, before[1].weight)
