"""sums.py: what is recovered from sums is what was added up."""

import pytest
import torch
from helpers import random_features

from fedmitr import BadInput
from fedmitr.client.statistics import feature_statistics
from fedmitr.privacy.sums import (
    believed,
    log_leverage,
    single_features,
    sums_of_large_classes,
    trace_score,
    two_features,
    view_features,
)
from fedmitr.server.statistics import class_gaussians
from fedmitr.upload import Statistics


@pytest.mark.parametrize(("tokens", "views"), [("both", 0), ("regions", 2)])
def test_features_of_records_are_those_that_clients_add_up(micro, task, tokens, views):
    split = task.train.subset(torch.arange(20))
    sums = feature_statistics([micro], split, tokens, views)
    found = view_features(micro, split, tokens, views)
    assert found.shape == (20, 1 + views, sums.width)
    own = Statistics.of(found.mean(1), split.labels, 10)
    assert torch.allclose(own.sums, sums.sums, atol=1e-9)
    gram = torch.einsum("nvd,nve->de", found, found) / (1 + views)
    assert torch.allclose(gram, sums.gram, atol=1e-8)


def test_a_member_adds_its_own_length_to_the_trace_score():
    features, labels = random_features((8, 7), 5, seed=0)
    means, covariance = believed(features, labels, 2)
    extra, label = torch.randn(1, 5, generator=torch.Generator().manual_seed(1)).double(), torch.tensor([1])
    without = Statistics.of(features, labels, 2)
    within = without + Statistics.of(extra, label, 2)
    gain = [trace_score(s, extra, label, means, covariance) for s in (within, without)]
    away = extra - means[label]
    assert float(gain[0] - gain[1]) == pytest.approx(float(away @ covariance.inverse() @ away.T))


def test_the_trace_score_is_the_linear_part_of_the_likelihood_ratio():
    features, labels = random_features((9, 6), 4, seed=2)
    means, covariance = class_gaussians(Statistics.of(features, labels, 2), 0.1)
    sums, count = Statistics.of(features, labels, 2), 9
    records = features[:3]

    def log_density(total, mean, times):  # of a sum of `times` images of class 0
        return torch.distributions.MultivariateNormal(mean, times * covariance).log_prob(total)

    slope = []
    for record in records:
        ratio = [
            log_density(sums.sums[0] + step, record + (count - 1) * means[0], count)
            - log_density(sums.sums[0] + step, count * means[0], count)
            for step in (torch.zeros(4).double(), 1e-3 * torch.ones(4).double())
        ]
        slope.append(count * (ratio[1] - ratio[0]) / 1e-3)
    shifted = Statistics(sums.counts, sums.sums + torch.eye(2)[:, :1] * torch.ones(4), sums.gram)
    score = [trace_score(s, records, labels[:3], means, covariance) for s in (shifted, sums)]
    assert torch.allclose(score[0] - score[1], torch.stack(slope), atol=1e-4)


def test_members_have_a_leverage_of_one_at_most_and_others_far_more_where_images_are_few():
    features, labels = random_features((30, 30), 80, seed=0)
    gram = Statistics.of(features[::2], labels[::2], 2).gram
    found = log_leverage(gram, features[:, None])
    assert (found[::2] < 1e-4).all() and (found[1::2] > 5).all()


def test_members_have_a_leverage_of_their_number_of_views_at_most():
    """G is a sum of means over views, so a member's part of it has the rank of its views."""
    features = torch.randn(6, 3, 40, generator=torch.Generator().manual_seed(0)).double()  # three views each
    gram = torch.einsum("nvd,nve->de", features[:5], features[:5]) / 3
    found = log_leverage(gram, features).exp()
    assert torch.allclose(found[:5], torch.full((5,), 3.0).double(), rtol=1e-3)  # 15 < 40: the bound is met
    assert found[5] > 100


def test_leverage_is_the_hat_value_of_least_squares_where_images_are_many():
    features, _ = random_features((40, 60), 8, seed=0)
    hat = features @ torch.linalg.inv(features.T @ features) @ features.T
    found = log_leverage(features.T @ features, features[:, None]).exp()
    assert torch.allclose(found, hat.diagonal(), rtol=1e-6)


def test_noise_that_makes_eigenvalues_negative_is_survived():
    features, _ = random_features((10, 10), 30, seed=0)
    noise = torch.randn(30, 30, generator=torch.Generator().manual_seed(0)).double()
    assert torch.isfinite(log_leverage(features.T @ features + noise + noise.T, features[:, None])).all()


def test_a_single_image_of_a_class_is_told_outright():
    features, labels = random_features((4, 1, 3, 1), 6, seed=0)
    found = single_features(Statistics.of(features, labels, 4))
    assert sorted(found) == [1, 3]
    assert all(torch.equal(found[y], features[labels == y][0]) for y in found)


@pytest.mark.parametrize("labels", [[0, 0], [0, 1]])
def test_two_images_are_told_outright(labels):
    features, _ = random_features((2, 0), 6, seed=3)
    found = torch.stack(two_features(Statistics.of(features, torch.tensor(labels), 2)))
    order = [0, 1] if torch.allclose(found[0], features[0], atol=1e-6) else [1, 0]
    assert torch.allclose(found[order], features, atol=1e-6)
    with pytest.raises(BadInput, match="allowed are 2"):
        two_features(Statistics.of(features[:1], torch.tensor([0]), 2))


def test_classes_below_the_smallest_count_are_left_out_of_the_sums():
    features, labels = random_features((5, 2, 9), 3, seed=0)
    shards = [torch.tensor([0, 1, 5, 7, 8]), torch.tensor([2, 3, 4, 6, 9, 10, 11, 12, 13, 14, 15])]
    sums, left_out = sums_of_large_classes(features, labels, shards, 3, 3)
    rows = [i for shard in shards for i in shard.tolist() if sum(labels[shard] == labels[i]) >= 3]
    assert left_out == len(labels) - len(rows) == 6
    assert torch.equal(sums.counts, torch.bincount(labels[rows], minlength=3))
    assert torch.allclose(sums.sums.sum(0), features[rows].sum(0))
    assert sums_of_large_classes(features, labels, shards, 1, 3)[1] == 0
    with pytest.raises(BadInput, match="least=99"):
        sums_of_large_classes(features, labels, shards, 99, 3)
