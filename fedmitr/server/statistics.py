"""Linear heads in closed form, from sums of features alone (`Statistics`).

Each function returns W (C, D) and b (C,), float64: class y's score for features f is W_y f + b_y. A class
without images gets W = 0 and a bias below all others' scores could be, so that it is never predicted.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.linalg import solve_triangular

from ..core.errors import BadInput
from ..upload import Statistics, Upload, add_up, check_statistics
from ..upload.privacy import SumsNoise, sums_noise

Head = tuple[Tensor, Tensor]  # W (C, D), b (C,)
NEVER = -1e9  # bias of a class without images
RAISE = 0.5  # of the noise's largest eigenvalue: chosen on validation images of seeds 0 to 2


def total_statistics(uploads: Sequence[Upload]) -> Statistics:
    """Add up the statistics of all uploads; with declared noise the sums are `mended`.

    Raises BadInput for an upload without statistics, and for features of another model or other noise.
    """
    if not uploads:
        raise BadInput("uploads=[] is empty: at least one upload is needed")
    check_statistics(uploads)
    for upload in uploads:
        if upload.features != uploads[0].features:
            raise BadInput(
                f"upload of client {upload.client}: its statistics are of {upload.features}, "
                f"client {uploads[0].client}'s of {uploads[0].features}; these sums do not add"
            )
    total, features = add_up(u.statistics for u in uploads), uploads[0].features
    if features and features.noise:
        return mended(total, sums_noise(features.noise), len(uploads))
    return total


def mended(total: Statistics, noise: SumsNoise, clients: int) -> Statistics:
    """Return sums that images could have, near noisy sums over so many clients.

    A class whose count is below its noise, σ_n √K, or below 1, is left out; where all are, the largest stays.
    Of the scatter within classes, W = Σ f fᵀ − Σ_y s_y s_yᵀ / n_y, negative eigenvalues become zero: that is
    the nearest positive semi-definite matrix in the Frobenius norm (Higham 1988). Then `RAISE` of the largest
    eigenvalue that the noise alone would have, σ √(2 K D), is added to all: a penalty that no direction of
    noise is amplified above (as in AdaSSP, Wang, UAI 2018). So every solver below is well-posed. All of it is
    computed from what was sent, so it costs no privacy.
    """
    floor = max(1.0, noise.counts * clients**0.5)
    counts = total.counts.clamp(min=0)
    keep = counts >= floor
    if not keep.any():
        keep[counts.argmax()], counts = True, counts.clamp(min=1)
    counts, sums = counts.masked_fill(~keep, 0), total.sums.masked_fill(~keep[:, None], 0.0)
    between = sums.T @ (sums / counts.clamp(min=1)[:, None])  # (D, D)
    values, vectors = torch.linalg.eigh(total.gram - between)
    raised = values.clamp(min=0) + RAISE * noise.gram * (2 * clients * total.width) ** 0.5
    gram = (vectors * raised) @ vectors.T + between
    return Statistics(counts, sums, (gram + gram.T) / 2)


def ridge(statistics: Statistics, penalty: float) -> Head:
    """Solve ridge regression of one-hot labels on standardised features, with an intercept.

        W̃ = argmin Σ_i |W̃ f̃_i + b − onehot(y_i)|² + λ|W̃|²,   f̃ = (f − mean) / deviation

    A feature that is constant stays unscaled. W and b act on the features as they are. AFL and Fed3R do the
    same without standardising. penalty: λ > 0.
    """
    if not penalty > 0:
        raise BadInput(f"statistics.ridge={penalty!r} must be greater than 0")
    counts, n = statistics.counts.double(), statistics.size
    mean = statistics.sums.sum(0) / n  # (D,)
    covariance = statistics.gram / n - mean[:, None] * mean  # (D, D)
    scale = deviations(covariance, statistics.gram.diagonal() / n)  # (D,)
    gram = n * covariance / (scale[:, None] * scale)  # X̃ᵀ X̃
    cross = (statistics.sums - counts[:, None] * mean) / scale  # Yᵀ X̃ (C, D)
    # W̃ = Yᵀ X̃ (X̃ᵀ X̃ + λ I)⁻¹; the intercept is the classes' frequency, as X̃ has mean zero
    factor = cholesky(gram + penalty * torch.eye(len(gram), dtype=torch.double), "statistics.ridge")
    weight = torch.cholesky_solve(cross.T, factor).T / scale  # (C, D)
    return without_absent(weight, counts / n - weight @ mean, statistics.counts)


def deviations(covariance: Tensor, second_moment: Tensor) -> Tensor:
    """Return the features' standard deviations (D,); 1 for a feature that is constant up to rounding."""
    variance = covariance.diagonal()
    constant = variance <= 1e-12 * second_moment
    return torch.where(constant, torch.ones_like(variance), variance.clamp(min=0).sqrt())


def lda(statistics: Statistics, shrinkage: float) -> Head:
    """Fit linear discriminant analysis: Gaussians of one covariance, classes' frequencies as priors.

        W_y = Σ⁻¹ μ_y,   b_y = −½ μ_yᵀ Σ⁻¹ μ_y + log(n_y / n),   Σ = (1 − γ) S + γ tr(S)/D · I

    S is the scatter within classes over n; shrinkage: γ in (0, 1] (FedCGS, Guan et al., AAAI 2025).
    """
    means, covariance = class_gaussians(statistics, shrinkage)
    weight = torch.cholesky_solve(means.T, cholesky(covariance, "lda.shrinkage")).T  # (C, D)
    priors = (statistics.counts.double() / statistics.size).clamp(min=torch.finfo(torch.double).tiny)
    return without_absent(weight, priors.log() - (weight * means).sum(1) / 2, statistics.counts)


def ncm(statistics: Statistics) -> Head:
    """Return nearest class means as a head: W_y = μ_y, b_y = −|μ_y|²/2 (FedNCM, Legate et al. 2023)."""
    means = class_means(statistics)
    return without_absent(means, -means.square().sum(1) / 2, statistics.counts)


def class_means(statistics: Statistics) -> Tensor:
    """Return the mean features of each class (C, D), zero for a class without images."""
    return statistics.sums / statistics.counts.clamp(min=1)[:, None]


def class_gaussians(statistics: Statistics, shrinkage: float) -> tuple[Tensor, Tensor]:
    """Return class means (C, D) and the covariance (D, D) that the classes share, shrunk to a multiple of I.

    Where all images of every class are alike there is no scatter, and the covariance is I.
    """
    covariance = statistics.scatter / statistics.size
    level = covariance.diagonal().mean()
    identity = torch.eye(len(covariance), dtype=torch.double)
    if level <= 1e-12 * statistics.gram.diagonal().mean() / statistics.size:
        return class_means(statistics), identity
    return class_means(statistics), torch.lerp(covariance, level * identity, shrinkage)


def without_absent(weight: Tensor, bias: Tensor, counts: Tensor) -> Head:
    """Return the head with classes without images, counts (C,), at weight 0 and bias `NEVER`."""
    absent = counts == 0
    return weight.masked_fill(absent[:, None], 0.0), bias.masked_fill(absent, NEVER)


def fisher_directions(statistics: Statistics, covariance: Tensor, energy: float) -> Tensor:
    """Return directions V (D, k) in which classes differ most relative to their covariance, Vᵀ Σ V = I.

    They solve the generalised eigenproblem S_B v = λ Σ v, S_B the scatter of class means weighted by
    frequency; the first k that make up `energy` of Σ λ are kept, at least one (Fisher 1936).
    """
    shares = statistics.counts.double() / statistics.size
    centred = class_means(statistics) - statistics.sums.sum(0) / statistics.size  # (C, D)
    spread = (centred * shares.sqrt()[:, None]).T  # B (D, C), S_B = B Bᵀ
    factor = cholesky(covariance, "fishermix.shrinkage")  # L, Σ = L Lᵀ
    # with v = L⁻ᵀ u the problem is that of L⁻¹ B: u are its left singular vectors, λ its squared values
    vectors, values, _ = torch.linalg.svd(solve_triangular(factor, spread, upper=False), full_matrices=False)
    held = values.square().cumsum(0)
    enough = int((held >= energy * held[-1]).nonzero()[0])
    return solve_triangular(factor.T, vectors[:, : enough + 1], upper=True)


def cholesky(matrix: Tensor, setting: str) -> Tensor:
    """Return the Cholesky factor of a covariance (D, D), which `setting` has raised above zero.

    Raises BadInput where rounding, or a client that made its sums up, takes away more.
    """
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if failed:
        raise BadInput(f"{setting} is too small for these statistics: their covariance is not definite")
    return factor
