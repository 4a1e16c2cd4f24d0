"""roc.py: rates against scikit-learn, intervals against what they must contain."""

import numpy as np
import pytest
from scipy.stats import norm
from sklearn.metrics import roc_auc_score, roc_curve

from fedmitr.privacy.roc import LEVELS, _weighted, auc, measures, thinned, tpr_at


def tied(seed=0, size=400):
    rng = np.random.default_rng(seed)
    truth = rng.random(size) < 0.5
    return np.round(rng.standard_normal(size) + truth, 1), truth, rng


def test_tpr_at_a_level_is_the_best_threshold_by_hand():
    scores, truth, _ = tied()
    for level in (0.0, 0.01, 0.1, 0.5):
        best = 0.0
        for threshold in np.unique(scores):
            said = scores >= threshold
            if said[~truth].mean() <= level:
                best = max(best, said[truth].mean())
        assert tpr_at(scores, truth, level) == pytest.approx(best)


def test_a_bootstrap_draw_is_scikit_learns_weighted_roc():
    scores, truth, rng = tied()
    weight = rng.integers(0, 4, len(scores))
    order = np.argsort(-scores, kind="stable")
    flat = scores[order]
    ends = np.append(np.flatnonzero(np.diff(flat)), len(flat) - 1)
    hits = np.where(truth[order], weight[order], 0)
    found = _weighted(np.cumsum(hits)[ends], np.cumsum(weight[order] - hits)[ends])
    assert found[0] == pytest.approx(roc_auc_score(truth, scores, sample_weight=weight))
    fpr, tpr, _ = roc_curve(truth, scores, sample_weight=weight, drop_intermediate=False)
    assert found[1:] == pytest.approx([tpr[fpr <= level].max() for level in LEVELS])


def test_intervals_hold_the_truth_and_shrink_with_more_runs(gaussian):
    wanted, widths = norm.cdf(1 / np.sqrt(2)), []
    for runs in (16, 128):
        scores, member = gaussian(1.0, runs=runs, records=100)
        scores = (scores - scores.mean(0))[..., 0]  # each record's own level away
        found = measures(scores, member)
        assert found["auc"] == auc(scores, member)
        assert found["auc_low"] <= found["auc"] <= found["auc_high"]
        assert found["auc_low"] - 0.01 <= wanted <= found["auc_high"] + 0.01
        widths.append(found["auc_high"] - found["auc_low"])
    assert widths[1] < widths[0]
    assert measures(scores, member) == measures(scores, member)


def test_records_that_depend_on_each_other_widen_the_interval():
    member = np.random.default_rng(0).random((8, 400)) < 0.5
    member[:, 0], member[:, 1] = True, False
    alike = np.random.default_rng(1).standard_normal((8, 1)) + 0.5 * member  # a level for each run
    widths = []
    for noise in (alike, np.random.default_rng(2).standard_normal((8, 400)) + 0.5 * member):
        found = measures(noise, member)
        widths.append(found["auc_high"] - found["auc_low"])
    assert widths[0] > 2 * widths[1]


def test_a_thinned_curve_lies_on_the_full_one():
    scores, truth, _ = tied()
    levels, tpr = thinned(scores, truth)
    assert levels[0] == pytest.approx(1e-4) and levels[-1] == 1 and tpr[-1] == 1
    assert tpr == pytest.approx([tpr_at(scores, truth, level) for level in levels])
