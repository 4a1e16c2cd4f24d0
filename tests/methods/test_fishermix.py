"""fishermix.py: features drawn around class means, and a head that decides nearly as LDA does."""

import numpy as np
import pytest
import torch
from helpers import random_features

from fedmitr.core.rng import make_rng
from fedmitr.methods.fishermix import FishermixSettings, draw_features, train_head
from fedmitr.server.statistics import NEVER, lda
from fedmitr.upload import Statistics

COUNTS = (40, 40, 0, 40, 40)  # nobody holds class 2


def data(seed=0, width=12):
    """Features and labels of well separated Gaussians that share a covariance."""
    features, labels = random_features(COUNTS, width, seed)
    mix = (
        torch.eye(width).double()
        + torch.randn(width, width, generator=torch.Generator().manual_seed(9)).double() / 4
    )
    return features @ mix + 2, labels


@pytest.fixture(scope="module")
def statistics():
    return Statistics.of(*data(), len(COUNTS))


def test_drawn_features_have_the_means_and_the_spread_of_the_classes():
    means = torch.tensor([[3.0, -2.0, 0.0], [0.0, 5.0, 1.0]]).double()
    how = FishermixSettings(per_class=20_000, spread=0.7)
    drawn, labels = draw_features(means, how, make_rng(0))
    assert torch.bincount(labels).tolist() == [20_000, 20_000]
    for y in (0, 1):
        own = drawn[labels == y].numpy()
        np.testing.assert_allclose(own.mean(0), means[y], atol=0.02)
        np.testing.assert_allclose(np.cov(own.T), 0.49 * np.eye(3), atol=0.02)


def test_its_decisions_are_nearly_those_of_lda(statistics):
    how = FishermixSettings(per_class=200, epochs=40, batch_size=100, lr=1e-2, spread=1.0)
    weight, bias = train_head(statistics, how, make_rng(0))
    fresh, labels = data(seed=5)
    found = (fresh @ weight.T + bias).argmax(1)
    other, offset = lda(statistics, how.shrinkage)
    wanted = (fresh @ other.T + offset).argmax(1)
    assert (found == wanted).double().mean() >= 0.98
    assert (found == labels).double().mean() >= 0.95 and len(found.unique()) == 4


def test_it_learns_what_an_untrained_head_does_not_know(statistics):
    """More passes fit the drawn features better."""
    features, labels = data()
    losses = []
    for epochs in (1, 5, 25):
        how = FishermixSettings(per_class=50, epochs=epochs, batch_size=50, lr=5e-3)
        weight, bias = train_head(statistics, how, make_rng(0))
        losses.append(torch.nn.functional.cross_entropy(features @ weight.T + bias, labels).item())
    assert losses[0] > losses[1] > losses[2]


def test_weights_lie_in_the_fisher_subspace_and_absent_classes_are_never_predicted(statistics):
    how = FishermixSettings(per_class=20, epochs=2)
    weight, bias = train_head(statistics, how, make_rng(0))
    assert torch.linalg.matrix_rank(weight, tol=1e-10) <= 3  # four classes differ in three directions
    assert not weight[2].any() and bias[2] == NEVER
    assert weight.dtype == bias.dtype == torch.double and not weight.requires_grad


def test_the_seed_fixes_draws_and_batches(statistics):
    how = FishermixSettings(per_class=20, epochs=2, batch_size=16)
    first, again, other = (train_head(statistics, how, make_rng(seed))[0] for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_one_image_a_class_and_one_class_are_finite():
    for counts in ((1, 1, 1), (0, 5, 0), (0, 0, 1)):
        features, labels = random_features(counts, 30, seed=0)
        found = train_head(
            Statistics.of(features, labels, 3), FishermixSettings(per_class=5, epochs=1), make_rng(0)
        )
        assert all(part.isfinite().all() for part in found)
        scores = features @ found[0].T + found[1]
        assert set(scores.argmax(1).tolist()) <= {y for y, n in enumerate(counts) if n}
