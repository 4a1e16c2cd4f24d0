"""mended: sums that images could have, out of noisy ones."""

import pytest
import torch
from helpers import make_upload, random_features, with_statistics
from hypothesis import given
from hypothesis import strategies as st

import fedmitr as fm
from fedmitr.client.noise import noisy
from fedmitr.core.rng import make_rng
from fedmitr.server.statistics import RAISE, lda, mended, ncm, ridge, total_statistics
from fedmitr.upload import Noise, Statistics
from fedmitr.upload.privacy import SumsNoise, sums_noise

COUNTS, WIDTH = (30, 0, 20, 50), 6


@pytest.fixture(scope="module")
def exact():
    features, labels = random_features(COUNTS, WIDTH, seed=0)
    return Statistics.of(features, labels, len(COUNTS))


@given(seed=st.integers(0, 10_000), multiplier=st.floats(1e-3, 1e3), clients=st.integers(1, 9))
def test_every_solver_is_well_posed_whatever_the_noise(seed, multiplier, clients, exact):
    noise = Noise(clip=4.0, multiplier=multiplier)
    found = mended(noisy(exact, noise, make_rng(seed)), sums_noise(noise), clients)
    found.checked("mended", len(COUNTS), WIDTH, found.size)  # what exact sums must be
    least = RAISE * sums_noise(noise).gram * (2 * clients * WIDTH) ** 0.5
    assert torch.linalg.eigvalsh(found.scatter)[0] >= 0.99 * least - 1e-6
    for head in (ridge(found, 1.0), lda(found, 0.1), ncm(found)):
        assert all(part.isfinite().all() for part in head)


def test_the_scatter_is_the_nearest_without_negative_eigenvalues_and_then_raised(exact):
    """Every other positive semi-definite matrix is farther, as many random ones are."""
    noise = SumsNoise(1.0, 3.0, 60.0)
    rng = make_rng(3)
    z = torch.randn(WIDTH, WIDTH, generator=rng, dtype=torch.double)
    noisy_sums = Statistics(exact.counts, exact.sums, exact.gram + 60.0 * (z + z.T) / 2)
    found = mended(noisy_sums, noise, 1)
    assert torch.linalg.eigvalsh(noisy_sums.scatter)[0] < 0
    level = RAISE * 60.0 * (2 * WIDTH) ** 0.5
    nearest = found.scatter - level * torch.eye(WIDTH).double()
    gap = (nearest - noisy_sums.scatter).norm()
    for _ in range(200):
        step = 5 * torch.randn(WIDTH, WIDTH, generator=rng, dtype=torch.double)
        values, vectors = torch.linalg.eigh(nearest + step + step.T)
        other = (vectors * values.clamp(min=0)) @ vectors.T
        assert (other - noisy_sums.scatter).norm() >= gap - 1e-9


def test_hardly_any_noise_changes_hardly_anything(exact):
    noise = Noise(clip=4.0, multiplier=1e-9)
    found = mended(noisy(exact, noise, make_rng(0)), sums_noise(noise), 3)
    assert torch.equal(found.counts, exact.counts)
    torch.testing.assert_close(found.gram, exact.gram, rtol=0, atol=1e-5)
    torch.testing.assert_close(ridge(found, 1.0)[0], ridge(exact, 1.0)[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "counts, clients, wanted",
    [
        ((30, -4, 3, 50), 1, (30, 0, 0, 50)),  # a noise of 5 images
        ((30, -4, 7, 50), 1, (30, 0, 7, 50)),
        ((30, -4, 7, 50), 4, (30, 0, 0, 50)),  # of four clients together 10
        ((-9, 2, -1, 0), 1, (0, 2, 0, 0)),
        ((-9, -2, -1, -3), 1, (1, 0, 0, 0)),
    ],
)
def test_classes_within_the_noise_of_their_count_are_left_out(counts, clients, wanted, exact):
    sums = Statistics(torch.tensor(counts), torch.ones(4, WIDTH).double(), exact.gram)
    found = mended(sums, SumsNoise(5.0, 1.0, 1.0), clients)
    assert tuple(found.counts.tolist()) == wanted
    assert torch.equal(found.sums.any(1), torch.tensor(wanted) > 0)


def test_a_total_is_mended_where_its_uploads_declare_noise_and_only_there():
    plain = [with_statistics(make_upload(k, (9, 8, 7, 0, 0, 0, 0, 0, 0, 0))) for k in range(2)]
    exact = total_statistics(plain)
    noise = Noise(clip=10.0, multiplier=0.5)
    private = [
        u.with_statistics(
            noisy(u.statistics, noise, make_rng(u.client)), u.features.model_copy(update={"noise": noise})
        )
        for u in plain
    ]
    added = private[0].statistics + private[1].statistics
    found, wanted = total_statistics(private), mended(added, sums_noise(noise), 2)
    assert torch.equal(exact.gram, plain[0].statistics.gram + plain[1].statistics.gram)
    assert torch.equal(found.gram, wanted.gram) and torch.equal(found.counts, wanted.counts)
    with pytest.raises(fm.BadInput, match="do not add"):
        total_statistics([private[0], plain[1]])
