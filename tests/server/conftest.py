"""What tests of inversion share: a teacher of two clients, a sparse run, double precision."""

import pytest
import torch
from helpers import inverted

import fedmitr as fm
from fedmitr.settings.schema import EnsembleSettings


@pytest.fixture(scope="package")
def teacher(uploads):
    return fm.Ensemble(uploads[:2], EnsembleSettings(mode="mean_probs"))


@pytest.fixture(scope="package")
def sparse(teacher):
    """A run with two stops, moving views and total variation."""
    return inverted(teacher, jitter=0.125, flip=True, tv=1e-4)


@pytest.fixture
def double():
    """Double precision for everything made inside, so that two paths can agree closely."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
