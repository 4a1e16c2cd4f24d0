"""gradients.py: losses and gradients of samples against closed forms; frozen weights; dropout."""

import torch
import torch.nn.functional as F
from torch import nn

from fedmitr.core.gradients import loss_at, sample_gradients, sample_losses, trained


def half_squares(model, x, y):
    return 0.5 * (model(x)[:, 0] - y).square().mean()


def problem():
    rng = torch.Generator().manual_seed(0)
    model = nn.Linear(3, 1).double()
    return model, torch.randn(6, 3, generator=rng).double(), torch.randn(6, generator=rng).double()


def test_a_linear_model_has_its_closed_form():
    model, x, y = problem()
    residual = (model(x)[:, 0] - y).detach()
    found = sample_gradients(model, half_squares, (x, y))
    assert torch.allclose(found["weight"][:, 0], residual[:, None] * x)
    assert torch.allclose(found["bias"][:, 0], residual)
    assert torch.allclose(sample_losses(model, half_squares, (x, y)), residual.square() / 2)
    at_zero = loss_at(model, half_squares)({n: torch.zeros_like(w) for n, w in trained(model).items()}, x, y)
    assert torch.allclose(at_zero, y.square().mean() / 2)


def test_frozen_weights_have_no_gradient():
    model, x, y = problem()
    model.bias.requires_grad_(False)
    assert set(sample_gradients(model, half_squares, (x, y))) == {"weight"} == set(trained(model))


def test_dropout_differs_between_samples():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(40, 2)).train()
    rows = torch.ones(4, 40), torch.zeros(4, dtype=torch.long)
    found = sample_gradients(model, lambda m, x, y: F.cross_entropy(m(x), y), rows)["1.weight"]
    dropped = found[:, 0] == 0  # (4, 40), where an input was left out
    assert dropped.any() and not dropped[0].equal(dropped[1])
