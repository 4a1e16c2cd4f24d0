"""privacy.py: ε against Opacus' own accountant and the exact Gaussian mechanism, and noise on the card."""

import dataclasses
import json
import math
import sys

import pytest
import torch
from helpers import with_statistics
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy.stats import norm

import fedmitr as fm
from fedmitr.client.noise import noisy
from fedmitr.core.rng import make_rng
from fedmitr.settings.schema import ClientSettings, StatisticsSettings
from fedmitr.upload import CARD, Features, Noise, Statistics, Upload, check_noise
from fedmitr.upload.privacy import epsilon, noise_multiplier, sums_noise, sums_sensitivity

opacus = pytest.importorskip("opacus.accountants")
DELTA = 1e-5


def by_stepping(noises, delta):
    """ε of Opacus' accountant that is told of every step on its own."""
    accountant = opacus.RDPAccountant()
    for noise in noises:
        for _ in range(noise.steps):
            accountant.step(noise_multiplier=noise.multiplier, sample_rate=noise.sample_rate)
    return accountant.get_epsilon(delta)


SUMS = Noise(clip=7.0, multiplier=1.3)
STEPS = Noise(clip=1.0, multiplier=1.1, sample_rate=0.2, steps=40)


@pytest.mark.parametrize("noises", [[SUMS], [STEPS], [STEPS, SUMS]], ids=["sums", "steps", "both"])
@pytest.mark.parametrize("delta", [1e-5, 1e-3])
def test_epsilon_is_that_of_opacus_accountant(noises, delta):
    assert epsilon(noises, delta) == pytest.approx(by_stepping(noises, delta), rel=1e-12)


def test_two_releases_spend_more_than_one_and_nothing_spends_nothing():
    both = epsilon([STEPS, SUMS], DELTA)
    assert max(epsilon([STEPS], DELTA), epsilon([SUMS], DELTA)) < both
    assert both < epsilon([STEPS], DELTA) + epsilon([SUMS], DELTA)
    assert epsilon([], DELTA) == 0


@given(st.floats(0.3, 50.0), st.sampled_from([(1.0, 1), (0.13, 60), (1.0, 15)]))
def test_calibrated_noise_spends_what_was_asked_for_and_not_more(target, how):
    rate, steps = how
    found = noise_multiplier("client.dp_epsilon", target, DELTA, rate, steps)
    spent = epsilon([Noise(clip=1.0, multiplier=found, sample_rate=rate, steps=steps)], DELTA)
    assert 0.999 * target - 1e-9 <= spent <= target


@given(st.floats(0.3, 50.0))
def test_noise_of_sums_holds_in_the_exact_gaussian_mechanism(target):
    """δ(ε) = Φ(1/2z − εz) − e^ε Φ(−1/2z − εz) at noise multiplier z (Balle & Wang, ICML 2018)."""
    z = noise_multiplier("statistics.dp_epsilon", target, DELTA)
    exact = norm.cdf(0.5 / z - target * z) - math.exp(target + norm.logcdf(-0.5 / z - target * z))
    assert exact <= DELTA


def test_an_epsilon_that_no_noise_reaches_is_one_line(one_line):
    with pytest.raises(fm.BadInput) as error:
        noise_multiplier("client.dp_epsilon", 1e-6, DELTA)
    one_line(error.value, "client.dp_epsilon=1e-06", "too small")


def test_without_opacus_one_line_says_what_to_install(monkeypatch, one_line):
    monkeypatch.setitem(sys.modules, "opacus.accountants", None)
    noise_multiplier.cache_clear()
    for ask in (lambda: epsilon([SUMS], DELTA), lambda: noise_multiplier("client.dp_epsilon", 3.0, DELTA)):
        with pytest.raises(fm.BadInput) as error:
            ask()
        one_line(error.value, "pip install 'fedmitr[privacy]'")
    one_line(error.value, "client.dp_epsilon=3.0")


@pytest.mark.parametrize(
    "fields",
    [{"clip": 0.0}, {"multiplier": -1.0}, {"multiplier": math.nan}, {"sample_rate": 1.5}, {"steps": 0}],
    ids=str,
)
def test_noise_out_of_range_is_refused(fields):
    with pytest.raises(ValidationError):
        Noise(**{"clip": 1.0, "multiplier": 1.0} | fields)


# On the card.


@pytest.fixture
def plain(uploads):
    return with_statistics(uploads[0], "cls")


@pytest.fixture
def protected(plain):
    """An upload of weights and sums with noise on both, and no true counts."""
    noise = Noise(clip=10.0, multiplier=0.7)
    sums = noisy(plain.statistics, noise, make_rng(0, "noise"))
    told = tuple(sums.counts.clamp(min=0).tolist())
    upload = plain.with_statistics(sums, plain.features.model_copy(update={"noise": noise}))
    return dataclasses.replace(upload, class_counts=told, training=STEPS)


def test_noise_travels_with_the_upload(protected, tmp_path):
    protected.save(tmp_path)
    again = Upload.load(tmp_path, protected.shape, protected.features)
    assert again.noises == [STEPS, protected.features.noise] and again.digest == protected.digest
    assert torch.equal(again.statistics.counts, protected.statistics.counts)
    assert again.class_counts == protected.class_counts


def test_a_card_without_protection_is_that_of_before(plain, tmp_path):
    plain.save(tmp_path)
    card = json.loads((tmp_path / CARD).read_text())
    assert set(card) == {"client", "size", "shape", "class_counts", "features", "sha256"}
    assert set(card["features"]) == {"shape", "weights", "tokens"} and plain.noises == []


def test_features_under_settings_have_noise_of_the_wanted_epsilon(plain):
    settings = StatisticsSettings(tokens="cls", dp_epsilon=3.0, dp_clip=0.5, smallest=4)
    found = Features.under(plain.features.shape, "w", settings)
    assert found.noise.clip == 0.5 * 96**0.5 and found.smallest == 4
    assert 2.997 <= by_stepping([found.noise], DELTA) <= 3.0
    assert "dp" not in Features.under(plain.features.shape, "w", StatisticsSettings()).model_dump_json()


# What the server asks of noisy sums.


def test_noise_that_is_not_declared_is_refused(protected, one_line):
    hidden = protected.features.model_copy(update={"noise": None})
    with pytest.raises(fm.BadInput) as error:
        dataclasses.replace(protected, class_counts=None, features=hidden).checked()
    one_line(error.value, "client 0", "statistics")


@pytest.mark.parametrize("seed", range(20))
def test_honest_noisy_sums_are_admitted(plain, seed):
    noise = Noise(clip=10.0, multiplier=2.0)
    sums = noisy(plain.statistics, noise, make_rng(seed))
    assert sums.checked_noisy("client 0", 10, 96, plain.size, noise) is sums


def moved(counts=0, gram=0.0):
    """What makes sums of others: so many more images of class 0, or so much more on the Gram's diagonal."""

    def change(sums: Statistics) -> Statistics:
        more = torch.zeros_like(sums.counts)
        more[0] = counts
        return Statistics(sums.counts + more, sums.sums, sums.gram + gram * torch.eye(96).double())

    return change


@pytest.mark.parametrize(
    "change, words",
    [
        (moved(counts=10_000), "beyond its size"),
        (moved(counts=-10_000), "beyond its size"),
        (moved(gram=1e6), "longer"),
        (moved(gram=-1e6), "positive semi-definite"),
        (moved(gram=math.nan), "NaN"),
    ],
)
def test_sums_that_declared_noise_cannot_explain_are_one_line(protected, change, words, one_line):
    with pytest.raises(fm.BadInput) as error:
        protected.with_statistics(change(protected.statistics), protected.features).checked()
    one_line(error.value, "client 0", words)


def test_the_server_asks_for_the_noise_that_the_settings_ask_for(plain, protected, one_line):
    spent = epsilon([STEPS], DELTA)
    check_noise([plain], "client", ClientSettings())
    check_noise([protected], "client", ClientSettings(dp_epsilon=spent))
    wrong = [
        (plain, "client", ClientSettings(dp_epsilon=3.0), "declares no noise"),
        (protected, "client", ClientSettings(), "declares noise"),
        (protected, "client", ClientSettings(dp_epsilon=0.9 * spent), "more noise"),
        (plain, "statistics", StatisticsSettings(dp_epsilon=3.0), "declares no noise"),
        (protected, "statistics", StatisticsSettings(dp_epsilon=0.1), "more noise"),
    ]
    for upload, block, settings, words in wrong:
        with pytest.raises(fm.BadInput) as error:
            check_noise([upload], block, settings)
        one_line(error.value, "client 0", f"{block}.dp_epsilon", words)


def test_deviations_are_the_multiplier_times_the_sensitivity_in_units_of_each_part():
    """In their units one record moves the sums by 1 / multiplier at most, all parts together."""
    at = sums_noise(SUMS)
    assert math.hypot(1 / at.counts, SUMS.clip / at.sums, SUMS.clip**2 / at.gram) == pytest.approx(1 / 1.3)
    assert sums_sensitivity() > 1
