"""membership.py: LiRA and RMIA against loops, and against what Gaussians allow."""

import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import norm

from fedmitr import BadInput
from fedmitr.privacy.membership import GAMMA, OFFLINE, lira, predicted, rmia
from fedmitr.privacy.roc import auc, tpr_at


@pytest.mark.parametrize("online", [True, False])
def test_lira_is_the_papers_loop_over_targets_and_records(gaussian, online):
    scores, member = gaussian(1.0, runs=64, records=5, queries=2)
    found = lira(scores, member, online)
    for run, record in [(0, 0), (17, 3), (63, 4)]:
        others = np.arange(64) != run
        total = 0.0
        for query in range(2):
            own = scores[:, record, query]
            inside, outside = own[others & member[:, record]], own[others & ~member[:, record]]
            out = norm(outside.mean(), outside.std(ddof=1))
            if online:
                into = norm(inside.mean(), inside.std(ddof=1))
                total += into.logpdf(own[run]) - out.logpdf(own[run])
            else:
                total += (own[run] - out.mean()) / out.std()
        assert found[run, record] == pytest.approx(total / 2, rel=1e-6)


def test_with_few_runs_the_deviation_is_that_of_all_records(gaussian):
    scores, member = gaussian(1.0, runs=16, records=6)
    run, residuals, freedom = 3, [], 0
    for record in range(6):
        outside = np.delete(scores[:, record, 0], run)[~np.delete(member[:, record], run)]
        residuals.append(((outside - outside.mean()) ** 2).sum())
        freedom += len(outside) - 1
    outside = np.delete(scores[:, 2, 0], run)[~np.delete(member[:, 2], run)]
    wanted = (scores[run, 2, 0] - outside.mean()) / np.sqrt(sum(residuals) / freedom)
    assert lira(scores, member, online=False)[run, 2] == pytest.approx(wanted, rel=1e-6)


def test_lira_reaches_the_power_of_the_best_test_between_two_gaussians(gaussian):
    apart = 3.0
    scores, member = gaussian(apart, runs=128, records=200)
    best = norm.cdf(apart - norm.ppf(0.99))  # Neyman-Pearson: TPR at a FPR of 1 %
    assert tpr_at(lira(scores, member), member, 0.01) == pytest.approx(best, abs=0.05)
    alone = tpr_at(scores.mean(-1), member, 0.01)  # one threshold for records of different level
    assert alone < best - 0.3


def test_no_attack_beats_guessing_on_scores_that_say_nothing(gaussian):
    scores, member = gaussian(0.0, runs=64, records=200)
    population = np.random.default_rng(1).standard_normal((64, 30, 1))
    for found in (lira(scores, member), lira(scores, member, False), rmia(scores, population, member)):
        assert auc(found, member) == pytest.approx(0.5, abs=0.02)


def test_constant_scores_are_a_guess_without_an_error(gaussian):
    _, member = gaussian(0.0, runs=16, records=20)
    scores = np.random.default_rng(0).standard_normal((1, 20, 3)).repeat(16, axis=0)
    for online in (True, False):
        found = lira(scores, member, online)
        assert np.isfinite(found).all() and auc(found, member) == pytest.approx(0.5, abs=1e-9)


def test_the_predicted_attack_has_the_closed_form_of_equal_variances(gaussian):
    apart = 2.0
    scores, member = gaussian(apart, runs=400, records=50)
    drawn, truth = predicted(scores[..., 0], member, draws=4)
    assert drawn.shape == truth.shape == (1600, 50)
    for level in (0.01, 0.1):
        wanted = norm.cdf(apart - norm.ppf(1 - level))
        assert tpr_at(drawn, truth, level) == pytest.approx(wanted, abs=0.03)


def test_rmia_is_the_papers_loop(gaussian):
    scores, member = gaussian(2.0, runs=16, records=4, queries=2)
    population = np.random.default_rng(2).standard_normal((16, 9, 2))
    found = rmia(scores, population, member)

    def prior(p_out):
        return ((1 + OFFLINE) * p_out + 1 - OFFLINE) / 2

    for run, record in [(0, 0), (9, 3)]:
        others, total = np.arange(16) != run, 0.0
        for query in range(2):
            shadows = expit(scores[others & ~member[:, record], record, query])
            ratio = expit(scores[run, record, query]) / prior(shadows.mean())
            beaten = 0
            for z in range(9):
                other = expit(population[run, z, query]) / prior(expit(population[others, z, query]).mean())
                beaten += ratio >= GAMMA * other
            total += beaten / 9
        assert found[run, record] == pytest.approx(total / 2)


def test_rmia_finds_members_whose_probability_rises(gaussian):
    scores, member = gaussian(3.0, runs=32, records=200)
    population = np.random.default_rng(3).normal(0, 3, (1, 100, 1)) + np.zeros((32, 1, 1))
    assert auc(rmia(scores, population, member), member) > 0.7


def test_too_few_runs_and_broken_scores_are_refused(gaussian, one_line):
    scores, member = gaussian(1.0, runs=16, records=5)
    with pytest.raises(BadInput) as error:
        lira(scores[:4], np.array([[True] * 5] * 2 + [[False] * 5] * 2))
    one_line(error.value, "runs=4", "3 and more")
    scores[0, 0] = np.nan
    with pytest.raises(BadInput) as error:
        lira(scores, member)
    one_line(error.value, "NaN")
