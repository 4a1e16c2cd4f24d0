"""gradients.py: one backward a sample, closed forms on a linear model, the split into images and labels."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from theory_tables import squared

from fedmitr.server.distill import distill_loss
from fedmitr.settings.schema import DistillSettings, RelabelSettings
from fedmitr.theory.gradients import (
    FEW,
    average_labels,
    deviations,
    gradient_noise,
    sample_gradients,
    sample_losses,
)

HOW = DistillSettings(temperature=2.0, token_weight=0.3)


def rows_of_distillation(count, seed=0):
    rng = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 1, 24, 24, generator=rng)
    log_probs = (3 * torch.randn(count, 10, generator=rng)).log_softmax(-1)
    tokens = (3 * torch.randn(count, 36, 10, generator=rng)).softmax(-1)
    return images, log_probs, torch.arange(count) % 10, tokens


def one_backward_each(model, loss, rows):
    """The gradients (B, P), each by a call of autograd on one sample, as training computes it."""
    weights = [p for p in model.parameters() if p.requires_grad]
    found = []
    for i in range(len(rows[0])):
        gradients = torch.autograd.grad(loss(model, *(c[i : i + 1] for c in rows)), weights)
        found.append(torch.cat([g.flatten() for g in gradients]))
    return torch.stack(found)


@pytest.fixture
def student(micro):
    return copy.deepcopy(micro).requires_grad_(True)


@pytest.mark.parametrize("mode", ["none", "relabel"])
def test_sample_gradients_are_those_of_one_backward_each(micro, student, mode):
    loss, rows = (
        partial(distill_loss, settings=HOW, relabel=RelabelSettings(mode=mode)),
        rows_of_distillation(4),
    )
    found = sample_gradients(student, loss, rows)
    trained = micro.requires_grad_(True)  # with the package's own attention
    try:
        by_hand = one_backward_each(trained, loss, rows)
        losses = torch.stack([loss(trained, *(c[i : i + 1] for c in rows)) for i in range(4)]).detach()
    finally:
        micro.requires_grad_(False)
    assert found.shape == (4, sum(p.numel() for p in micro.parameters()))
    assert (found - by_hand).abs().max() < 1e-5 * by_hand.abs().max()
    noise = gradient_noise(student, loss, rows, average_labels(rows, HOW.temperature))
    brute = by_hand.double().var(dim=0).sum().item()  # the trace of the covariance
    assert abs(noise.variance - brute) < 1e-5 * brute
    assert torch.allclose(sample_losses(student, loss, rows), losses, atol=1e-5)


def test_the_parts_of_the_variance_are_those_of_their_gradients(student):
    loss, rows = partial(distill_loss, settings=HOW, relabel=RelabelSettings()), rows_of_distillation(5)
    averaged = average_labels(rows, HOW.temperature)
    noise = gradient_noise(student, loss, rows, averaged)
    own, same = (sample_gradients(student, loss, r).double() for r in (rows, averaged))
    images, labels = same - same.mean(0), (own - same) - (own - same).mean(0)
    assert np.isclose(noise.images, images.square().sum() / 4, rtol=1e-5)
    assert np.isclose(noise.labels, labels.square().sum() / 4, rtol=1e-5)
    assert np.isclose(noise.joint, 2 * (images * labels).sum() / 4, rtol=1e-4)
    assert abs(noise.joint) > 1e-3 * noise.variance  # else nothing was tested


def test_mean_labels_give_the_mean_gradient_over_labels(student):
    """The loss is linear in the label: averaging labels at one image averages its gradients."""
    rows = rows_of_distillation(6)
    same = (rows[0][:1].expand(6, -1, -1, -1), *rows[1:])  # one image under six labels
    loss = partial(distill_loss, settings=HOW, relabel=RelabelSettings())
    under_each = sample_gradients(student, loss, same)
    under_mean = sample_gradients(student, loss, average_labels(same, HOW.temperature))
    assert torch.allclose(under_mean, under_each.mean(0).expand_as(under_mean), atol=1e-4)
    noise = gradient_noise(student, loss, same, average_labels(same, HOW.temperature))
    assert noise.images < 1e-6 * noise.variance and np.isclose(noise.labels, noise.variance, rtol=1e-4)


def test_labels_that_agree_contribute_nothing(student):
    images, log_probs, labels, tokens = rows_of_distillation(4)
    rows = images, log_probs[:1].expand_as(log_probs), labels, tokens[:1].expand_as(tokens)
    loss = partial(distill_loss, settings=HOW, relabel=RelabelSettings())
    noise = gradient_noise(student, loss, rows, average_labels(rows, HOW.temperature))
    assert noise.labels < 1e-6 * noise.variance and np.isclose(noise.images, noise.variance, rtol=1e-4)


def test_a_linear_model_has_the_variance_of_its_closed_form(linear):
    """x ~ N(0, I_p), y = wᵀx + s·ε: E‖g‖² = (p + 2)‖d‖² + s²p and ‖E g‖² = ‖d‖², with d = θ − w."""
    rng, spread = torch.Generator().manual_seed(5), 0.7
    x = torch.randn(60_000, 5, generator=rng).double()
    truth = torch.tensor([1.0, 0.0, 1.5, -0.5, 0.0]).double()
    y = x @ truth + spread * torch.randn(len(x), generator=rng).double()
    gap = (linear.weight[0] - truth).square().sum().item()
    assert len(x) > FEW
    vectors = sample_gradients(linear, squared, (x, y)).detach()
    variance = deviations(vectors).mean().item()
    assert np.isclose(variance, (5 + 1) * gap + spread**2 * 5, rtol=0.03)
    noise = gradient_noise(linear, squared, (x, y), (x, torch.full_like(y, y.mean().item())))
    assert np.isclose(noise.variance, variance) and np.isclose(noise.signal, gap, rtol=0.03)


def test_the_standard_error_is_the_spread_of_estimates_from_other_samples():
    rng = torch.Generator().manual_seed(2)
    draws = torch.randn(2000, 50, 3, generator=rng).double()  # estimates, samples, weights
    estimates = torch.stack([deviations(draw).mean() for draw in draws])
    errors = torch.stack([deviations(draw).std() / 50**0.5 for draw in draws])
    assert np.isclose(estimates.mean(), 3.0, rtol=0.01)
    assert np.isclose(errors.mean(), estimates.std(), rtol=0.1)


def test_deviations_average_to_the_trace_of_the_covariance(points):
    vectors = points[0]
    assert np.isclose(deviations(vectors).mean(), vectors.var(dim=0).sum().item())
