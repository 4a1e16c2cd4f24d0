"""What the pages on theory share: a linear model, and points for it."""

import pytest
import torch
from torch import nn


@pytest.fixture
def linear():
    """A linear model of five inputs in double precision, without bias."""
    model = nn.Linear(5, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.5, -1.0, 2.0, 0.0, 0.25]]))
    return model


@pytest.fixture
def points():
    """Forty points x (40, 5) and y (40,)."""
    rng = torch.Generator().manual_seed(3)
    return torch.randn(40, 5, generator=rng).double(), torch.randn(40, generator=rng).double()
