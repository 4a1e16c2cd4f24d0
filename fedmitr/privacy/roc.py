"""How well an attack does: its ROC curve, TPR at a small FPR, AUC, and intervals for them.

An attack that is right on average says little; one that is sure of a few records does harm. So TPR is read
at a FPR of 1 % and 0.1 % (Carlini et al. 2022; arXiv 2502.12976). All runs of an audit are targets, and their
scores are put into one ROC.
"""

import numpy as np
from sklearn.metrics import auc as area_under
from sklearn.metrics import roc_auc_score, roc_curve

from ..core.rng import derive_seed

LEVELS = (0.001, 0.01)  # of the FPR
DRAWS = 400  # of the bootstrap
SMALLEST = 1e-4  # FPR at which a thinned curve begins


def curve(scores: np.ndarray, member: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return FPR and TPR at every threshold, both rising from 0 to 1; arrays of any one shape."""
    fpr, tpr, _ = roc_curve(member.ravel(), scores.ravel(), drop_intermediate=False)
    return fpr, tpr


def tpr_at(scores: np.ndarray, member: np.ndarray, level: float) -> float:
    """Return the largest TPR of a threshold whose FPR is at most `level`.

    With fewer than 1/level non-members that is the TPR without any false positive.
    """
    fpr, tpr = curve(scores, member)
    return float(tpr[fpr <= level].max())


def auc(scores: np.ndarray, member: np.ndarray) -> float:
    """Return the area under the ROC: 0.5 for guessing, equal scores counted half."""
    return float(roc_auc_score(member.ravel(), scores.ravel()))


def thinned(scores: np.ndarray, member: np.ndarray, points: int = 61) -> tuple[np.ndarray, np.ndarray]:
    """Return FPR (points,), evenly spaced on a log scale from `SMALLEST` to 1, and TPR at each (`tpr_at`)."""
    fpr, tpr = curve(scores, member)
    levels = np.geomspace(SMALLEST, 1, points)
    levels[-1] = 1.0
    return levels, tpr[np.searchsorted(fpr, levels, side="right") - 1]


def measures(scores: np.ndarray, member: np.ndarray, seed: int = 0) -> dict[str, float]:
    """Return AUC and TPR at `LEVELS`, each with its 95 % interval, from scores and member (R, n).

    Keys: `auc`, `auc_low`, `auc_high`, `tpr_0.001` and so on. The interval is the bootstrap's over runs and
    over records at once (the pigeonhole bootstrap, Owen 2007): the scores of a run, and those of a record,
    depend on each other, for which an interval of a binomial share would be too narrow.
    """
    values = [auc(scores, member), *(tpr_at(scores, member, level) for level in LEVELS)]
    order = np.argsort(-scores, axis=None, kind="stable")
    flat, truth = scores.ravel()[order], member.ravel()[order]
    ends = np.append(np.flatnonzero(np.diff(flat)), len(flat) - 1)  # last of each group of equal scores
    rng, (runs, records) = np.random.default_rng(derive_seed(seed, "bootstrap")), scores.shape
    drawn = []
    for _ in range(DRAWS):
        weight = np.outer(_resampled(rng, runs), _resampled(rng, records)).ravel()[order]
        hits = np.where(truth, weight, 0)
        if 0 < hits.sum() < weight.sum():
            drawn.append(_weighted(np.cumsum(hits)[ends], np.cumsum(weight - hits)[ends]))
    low, high = np.quantile(np.array(drawn), [0.025, 0.975], axis=0)
    found: dict[str, float] = {}
    for name, *numbers in zip(("auc", *(f"tpr_{level}" for level in LEVELS)), values, low, high, strict=True):
        found |= dict(zip((name, f"{name}_low", f"{name}_high"), map(float, numbers), strict=True))
    return found


def _resampled(rng: np.random.Generator, count: int) -> np.ndarray:
    """Return how often each of `count` items is drawn in `count` draws with replacement."""
    return np.bincount(rng.integers(count, size=count), minlength=count)


def _weighted(true: np.ndarray, false: np.ndarray) -> list[float]:
    """Return AUC and TPR at `LEVELS` from cumulated weights of members and of non-members."""
    tpr, fpr = np.append(0, true / true[-1]), np.append(0, false / false[-1])
    return [
        float(area_under(fpr, tpr)),
        *(float(tpr[np.searchsorted(fpr, level, side="right") - 1]) for level in LEVELS),
    ]
