"""noise.py: the sensitivity of sums by brute force, the noise's deviations, and smallest counts."""

import dataclasses
import math

import pytest
import torch
from helpers import loud, make_upload, random_features, with_statistics
from hypothesis import given, settings
from hypothesis import strategies as st

import fedmitr as fm
from fedmitr.client import statistics as module
from fedmitr.client.noise import clipped, large_classes, noisy, told_counts, without_small_classes
from fedmitr.client.statistics import feature_statistics, sent_statistics
from fedmitr.core.rng import make_rng
from fedmitr.data.tasks import Split
from fedmitr.upload import Features, ModelShape, Noise, Statistics
from fedmitr.upload.privacy import sums_noise

NOISE = Noise(clip=3.0, multiplier=1.7)


@pytest.fixture(scope="module")
def vit():
    return loud(fm.create_vit("vit_micro", 10, image_size=12), seed=3)


@pytest.fixture(scope="module")
def shard():
    rng = torch.Generator().manual_seed(1)
    return Split(torch.randn(12, 1, 12, 12, generator=rng), torch.randint(4, (12,), generator=rng))


@pytest.fixture(scope="module")
def features(vit):
    return Features(shape=ModelShape.of("vit_micro", vit), weights="w", tokens="cls")


def distance(one, other, noise=NOISE):
    """How far two sums lie apart in units of their noise, all that is sent as one vector.

    The noise on the Gram matrix is a vector of independent entries: those of the diagonal, and above it √2
    times each.
    """
    at = sums_noise(noise)
    above = torch.triu(torch.ones_like(one.gram), 1).bool()
    gram = one.gram - other.gram
    parts = [
        (one.counts - other.counts).double() / at.counts,
        (one.sums - other.sums).flatten() / at.sums,
        gram.diagonal() / at.gram,
        gram[above] * math.sqrt(2) / at.gram,
    ]
    return float(torch.cat(parts).norm())


@settings(max_examples=20)
@given(
    held=st.lists(st.integers(0, 11), min_size=2, max_size=12, unique=True),
    clip=st.floats(0.1, 30.0),
    views=st.integers(0, 2),
)
def test_no_neighbouring_shards_lie_farther_apart_than_the_noise_is_for(held, clip, views, vit, shard):
    """Each shard against itself without one of its images, which counts with all its copies."""
    noise = Noise(clip=clip, multiplier=1.7)
    whole = feature_statistics([vit], shard.subset(torch.tensor(held)), "cls", views, clip)
    less = feature_statistics([vit], shard.subset(torch.tensor(held[1:])), "cls", views, clip)
    assert distance(whole, less, noise) <= (1 + 1e-9) / 1.7


def test_the_sensitivity_is_reached(vit, shard):
    """So no smaller noise would do: an image with features of norm C or more moves the sums as far."""
    clip = 0.5  # all features here are longer
    whole = feature_statistics([vit], shard, "cls", clip=clip)
    less = feature_statistics([vit], shard.subset(torch.arange(11)), "cls", clip=clip)
    assert distance(whole, less, Noise(clip=clip, multiplier=1.7)) == pytest.approx(1 / 1.7, rel=1e-9)


def test_features_are_scaled_down_and_never_up():
    rows = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0], [-6.0, 8.0]], dtype=torch.double)
    wanted = torch.tensor([[0.6, 0.8], [0.3, 0.4], [0.0, 0.0], [-0.6, 0.8]], dtype=torch.double)
    torch.testing.assert_close(clipped(rows, 1.0), wanted)


def test_sums_without_a_clip_are_those_with_one_that_nothing_reaches(vit, shard):
    plain, other = (feature_statistics([vit], shard, "cls", 2, clip) for clip in (None, 1e9))
    for name in vars(plain):
        assert torch.equal(getattr(plain, name), getattr(other, name))


def test_noise_has_the_declared_deviations():
    """By the means of 200 draws: a deviation from n draws is off by 1/√(2n), of which four are allowed."""
    zero = Statistics.of(torch.zeros(1, 8), torch.tensor([0]), 5)
    zero = dataclasses.replace(zero, counts=torch.zeros(5, dtype=torch.int64))
    drawn = [noisy(zero, NOISE, make_rng(seed)) for seed in range(200)]
    above = torch.triu(torch.ones(8, 8), 1).bool()
    at = sums_noise(NOISE)
    found = {
        "sums": (torch.stack([d.sums for d in drawn]), at.sums),
        "diagonal": (torch.stack([d.gram.diagonal() for d in drawn]), at.gram),
        "above": (torch.stack([d.gram[above] for d in drawn]), at.gram / math.sqrt(2)),
        "counts": (
            torch.stack([d.counts for d in drawn]).double(),
            math.hypot(at.counts, 1 / math.sqrt(12)),  # rounded
        ),
    }
    for name, (values, deviation) in found.items():
        count = values.numel()
        assert abs(values.std() / deviation - 1) < 4 / math.sqrt(2 * count), name
        assert abs(values.mean()) < 4 * deviation / math.sqrt(count), name
    assert all(torch.equal(d.gram, d.gram.T) for d in drawn)


def test_the_same_stream_draws_the_same_noise_and_another_one_other_noise(vit, shard, features):
    private = features.model_copy(update={"noise": NOISE})
    one, same, other = (sent_statistics(vit, shard, private, make_rng(seed)) for seed in (0, 0, 1))
    assert torch.equal(one.gram, same.gram) and not torch.equal(one.gram, other.gram)
    far = one.gram - feature_statistics([vit], shard, "cls", clip=NOISE.clip).gram
    assert far.std() == pytest.approx(sums_noise(NOISE).gram / math.sqrt(2), rel=0.1)


def test_without_noise_what_is_sent_are_the_sums_themselves(vit, shard, features):
    found, wanted = sent_statistics(vit, shard, features, None), feature_statistics([vit], shard, "cls")
    for name in vars(wanted):
        assert torch.equal(getattr(found, name), getattr(wanted, name))


# Smallest counts.


@pytest.mark.parametrize("smallest", [1, 3, 4])
def test_small_classes_are_left_out_of_every_sum(smallest, vit, shard, features):
    counts = shard.labels.bincount()
    large = [c for c, n in enumerate(counts.tolist()) if n >= smallest]
    rows = torch.tensor([i for i, label in enumerate(shard.labels.tolist()) if label in large])
    found = sent_statistics(vit, shard, features.model_copy(update={"smallest": smallest}), None)
    wanted = feature_statistics([vit], shard.subset(rows), "cls")
    assert torch.equal(found.counts, wanted.counts) and torch.equal(found.gram, wanted.gram)
    assert set(found.counts.nonzero()[:, 0].tolist()) == set(large)


def test_a_client_of_small_classes_alone_is_one_line(shard, one_line):
    with pytest.raises(fm.BadInput) as error:
        large_classes(shard, 100, "client 3")
    one_line(error.value, "statistics.smallest=100", "client 3")


def test_with_noise_the_noisy_counts_decide(vit, shard, features, monkeypatch):
    """Whether a class is sent must not hang on one image: the true counts decide nothing."""
    monkeypatch.setattr(module, "large_classes", None)
    private = features.model_copy(update={"noise": NOISE, "smallest": 4})
    found = sent_statistics(vit, shard, private, make_rng(0))
    bare = sent_statistics(vit, shard, private.model_copy(update={"smallest": 0}), make_rng(0))
    kept = bare.counts >= 4
    assert kept.any() and not kept.all()
    assert torch.equal(found.counts, bare.counts * kept) and torch.equal(found.gram, bare.gram)
    assert torch.equal(found.sums, bare.sums * kept[:, None])


def test_a_small_class_keeps_neither_count_nor_sum():
    features, labels = random_features((2, 5), 3, seed=0)
    found = without_small_classes(Statistics.of(features, labels, 2), 3)
    assert found.counts.tolist() == [0, 5] and not found.sums[0].any() and found.sums[1].any()


@pytest.mark.parametrize("counted", [True, False])
def test_the_histogram_and_the_size_leave_small_classes_out(counted):
    upload = make_upload(1, (0, 2, 0, 4, 6, 8, 0, 0, 0, 0))
    sent = told_counts(upload, counted, smallest=5)
    assert sent.class_counts == ((0, 0, 0, 0, 6, 8, 0, 0, 0, 0) if counted else None)
    assert sent.size == (14 if counted else 20) and sent.checked()
    assert told_counts(upload, True, 0) is upload


def test_beside_noisy_sums_the_histogram_is_that_of_the_noisy_counts():
    upload = with_statistics(make_upload(1, (0, 2, 0, 4, 6, 8, 0, 0, 0, 0)))
    noise = Noise(clip=10.0, multiplier=3.0)
    sums = noisy(upload.statistics, noise, make_rng(2))
    assert (sums.counts < 0).any()
    private = upload.with_statistics(sums, upload.features.model_copy(update={"noise": noise}))
    sent = told_counts(private, True, 0)
    assert sent.class_counts == tuple(max(0, c) for c in sums.counts.tolist()) and sent.checked()
    assert told_counts(private, False, 0).class_counts is None
