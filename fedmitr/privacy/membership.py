"""Membership attacks, as functions of scores that many runs gave to the same records.

A run is a training on a random half of the records, so each record is a member of about half of the runs.
Every run in turn is the target, and all others are its shadow runs: what is known of a record's scores with
and without it comes from them. Arrays: scores φ (R, n, Q) of R runs, n records and Q queries for each (the
image and moved copies of it); member (R, n), true where a record was in a run's data. Every attack returns
(R, n), the higher the more surely a member.

LiRA: Carlini et al., "Membership inference attacks from first principles", IEEE S&P 2022, arXiv 2112.03570.
RMIA: Zarifzadeh, Liu & Shokri, "Low-cost high-power membership inference attacks", ICML 2024, arXiv
2312.03262.
"""

import numpy as np
from scipy.special import expit
from scipy.stats import norm

from ..core.errors import BadInput
from ..core.rng import derive_seed

FLOOR = 1e-6  # least standard deviation of scores: those of a model that was not trained do not vary at all
OWN_VARIANCE = 64  # runs from which on each record has a variance of its own, as Carlini et al. advise
# RMIA: by how much a record must be likelier than one of the population. 2 in the code of its paper
# (privacytrustlab/ml_privacy_meter, research/2023_rmia); the authors' later tool has 1.
GAMMA = 2.0
# RMIA: a, by which p_in ≈ a·p_out + 1 − a. That code has 0.33 for CIFAR-10, 0.6 for CIFAR-100; the tool 0.3.
OFFLINE = 0.3


def lira(scores: np.ndarray, member: np.ndarray, online: bool = True) -> np.ndarray:
    """Compute the likelihood-ratio attack (R, n), the mean over queries of

        online:  log N(φ; μ_in, σ_in²) − log N(φ; μ_out, σ_out²)
        offline: (φ − μ_out) / σ_out

    with μ and σ of a record's scores in the shadow runs with it (in) and without (out). For one query the
    offline score orders records as the paper's one-sided test does, Pr[N(μ_out, σ_out²) < φ]. With fewer than
    `OWN_VARIANCE` runs, σ is pooled over records. The authors' code (tensorflow/privacy,
    research/mi_lira_2021) differs: medians for μ, its pooled σ holds the spread between records too, and its
    offline score is log N(φ; μ_out, σ_out²), which is two-sided. Raises BadInput where a record has too few
    runs.
    """
    check(scores, member)
    mean_out, std_out = _moments(scores, ~member)
    if not online:
        return ((scores - mean_out) / std_out).mean(-1)
    mean_in, std_in = _moments(scores, member)
    ratio = norm.logpdf(scores, mean_in, std_in) - norm.logpdf(scores, mean_out, std_out)  # (R, n, Q)
    return ratio.mean(-1)


def _moments(scores: np.ndarray, side: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation (R, n, Q) of each record's scores in the other runs of a side.

    side (R, n): true for the runs that count. Row r of the result leaves run r out.
    """
    centre = scores.mean(0)  # taken away first: squares then lose no digits
    weight, own = side[..., None].astype(float), scores - centre
    left = weight.sum(0) - weight  # (R, n, 1)
    mean = ((weight * own).sum(0) - weight * own) / left
    second = ((weight * own**2).sum(0) - weight * own**2) / left
    squares = left * np.maximum(second - mean**2, 0)  # (R, n, Q), sums of squared deviations
    if len(scores) < OWN_VARIANCE:
        squares, left = squares.sum(1, keepdims=True), (left - 1).sum(1, keepdims=True)
    else:
        left = left - 1
    return mean + centre, np.sqrt(squares / left + FLOOR**2)


def predicted(
    scores: np.ndarray, member: np.ndarray, draws: int = 20, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Return the online attack's scores on runs that are as LiRA supposes, and who is a member of them.

    Each record's scores are drawn from its two Gaussians, N(μ_in, σ_in²) in the runs with it and
    N(μ_out, σ_out²) in the others, and the whole audit is attacked, `draws` times: as many runs, so the same
    error of μ and σ. It is what the method predicts for scores that are Gaussian. scores (R, n): one query,
    as queries of a record depend on each other. Both arrays returned are (draws·R, n).
    """
    check(scores[..., None], member)
    sides = []
    for side in (member, ~member):
        count = side.sum(0)  # (n,)
        mean = (scores * side).sum(0) / count
        squares = (np.square(scores - mean) * side).sum(0)
        pooled = len(scores) < OWN_VARIANCE
        variance = squares.sum() / (count - 1).sum() if pooled else squares / (count - 1)
        sides.append((mean, np.sqrt(variance)))
    rng, attacked = np.random.default_rng(derive_seed(seed, "predicted")), []
    for _ in range(draws):
        into, out = (mean + std * rng.standard_normal(scores.shape) for mean, std in sides)
        attacked.append(lira(np.where(member, into, out)[..., None], member))
    return np.concatenate(attacked), np.tile(member, (draws, 1))


def rmia(scores: np.ndarray, population: np.ndarray, member: np.ndarray) -> np.ndarray:
    """Compute the robust membership attack (R, n), offline: the mean over queries of

        Pr_z[ratio(x) ≥ γ ratio(z)],   ratio(x) = p(x) / ½((1 + a) p_out(x) + 1 − a)

    p(x) = 1/(1 + e^−φ), the probability of x's label under the target; p_out its mean over the shadow runs
    without x; z is drawn from a population that no run was trained on. scores and population (R, m, Q) must
    be `margins`; γ and a are `GAMMA` and `OFFLINE`. p is the plain softmax, as in the authors' later tool;
    the code of the paper has a Taylor softmax of tempered logits and a trimmed mean.
    """
    check(scores, member)
    ratio = _ratio(scores, ~member)
    other = np.sort(_ratio(population, np.ones(population.shape[:2], bool)), axis=1)  # (R, m, Q)
    runs, _, queries = scores.shape
    below = np.empty_like(scores)
    for run in range(runs):
        for query in range(queries):
            bound = ratio[run, :, query] / GAMMA
            below[run, :, query] = np.searchsorted(other[run, :, query], bound, side="right")
    return below.mean(-1) / other.shape[1]


def _ratio(scores: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Return p(x) / Pr(x) (R, n, Q), Pr(x) from the other runs of which x was out (R, n)."""
    p, weight = expit(scores), out[..., None]
    p_out = ((weight * p).sum(0) - weight * p) / (weight.sum(0) - weight)
    return p / (((1 + OFFLINE) * p_out + 1 - OFFLINE) / 2)


def check(scores: np.ndarray, member: np.ndarray) -> None:
    """Raise BadInput unless every record has three runs with it and three without it, and scores finite."""
    fewest = min(member.sum(0).min(), (~member).sum(0).min())
    if fewest < 3:
        raise BadInput(
            f"runs={len(member)}: a record is in {member.sum(0).min()} of them at least and out of "
            f"{(~member).sum(0).min()}: allowed are 3 and more of each"
        )
    if not np.isfinite(scores).all():
        raise BadInput("scores of the attacked runs hold NaN or Inf: allowed are finite numbers")
