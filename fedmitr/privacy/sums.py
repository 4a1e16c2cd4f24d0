"""What sums of features (`upload.Statistics`) give away: who was added up, and the features of few images.

A client sends n_y, s_y = Σ f over its images of class y, and G = Σ f fᵀ over all. With as many features as
images or more, G names its images outright; how much it tells beyond is `log_leverage`.
"""

import copy
from collections.abc import Sequence

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from ..client.noise import in_large_classes
from ..client.statistics import view_maps
from ..core.errors import BadInput
from ..core.machine import device
from ..data.tasks import Split
from ..server.statistics import class_gaussians
from ..settings.schema import FeatureTokens
from ..upload import Statistics
from ..vision.augment import warp
from ..vision.features import image_features
from ..vision.tokens import images_at_once

SHRINKAGE = 0.1  # of the covariance of the attacker's own images, of which there are few
SMALLEST = 1e-9  # least eigenvalue of G, as a share of their mean: directions that no image has


@torch.no_grad()
def view_features(vit: VisionTransformer, split: Split, tokens: FeatureTokens, views: int = 0) -> Tensor:
    """Compute the features (n, 1 + V, D) that `feature_statistics` adds up: of each image and moved copy.

    float64, on the CPU, as in the sums themselves.
    """
    maps, frozen, parts = view_maps(views), copy.deepcopy(vit).to(device()).double().eval(), []
    for rows in torch.arange(len(split)).split(images_at_once(vit)):
        images = split.images[rows].to(device()).double()  # (B, ch, H, W)
        shown = [images, *(warp(images, m.expand(len(images), -1, -1)) for m in maps)]
        parts.append(torch.stack([image_features(frozen, view, tokens) for view in shown], dim=1).cpu())
    return torch.cat(parts)


def trace_score(
    statistics: Statistics, features: Tensor, labels: Tensor, means: Tensor, covariance: Tensor
) -> Tensor:
    """Compute how far a class sum leans towards each record (n,), the higher the likelier a member:

        (f − μ_y)ᵀ Σ⁻¹ (s_y − n_y μ_y)

    It is the linear part of the likelihood ratio between "f is one of the n_y" and "it is not", for features
    of a class that are Gaussian (Homer et al. 2008; Dwork et al., FOCS 2015). features (n, D): means over
    views; labels (n,). means (C, D) and covariance (D, D): what the attacker believes of such images.
    """
    residual = statistics.sums - statistics.counts.double()[:, None] * means  # (C, D)
    pulled = torch.cholesky_solve(residual.T, torch.linalg.cholesky(covariance))  # (D, C)
    return ((features - means[labels]) * pulled.T[labels]).sum(1)


def believed(features: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Estimate means (C, D) and covariance (D, D) from features (m, D) of images of the attacker's own."""
    return class_gaussians(Statistics.of(features, labels, classes), SHRINKAGE)


def log_leverage(gram: Tensor, features: Tensor) -> Tensor:
    """Compute log tr(G⁺ M) (n,), M the mean over 1 + V views of f fᵀ: small for whoever is in the sum.

    Were M in the sum, G − M would be a sum of squares too. So tr(G⁺ M) is at most the rank of M: 1 for an
    image alone, 1 + V with its moved copies. Whoever is not in it has more where G has no image in f's
    direction: with fewer images than features nearly everyone. gram (D, D), features (n, 1 + V, D).
    Eigenvalues are raised to `SMALLEST` of their mean, or to the size of the most negative one, which only
    noise makes.
    """
    values, vectors = torch.linalg.eigh(gram)
    floor = torch.maximum(SMALLEST * values.mean().abs(), -values.min()).clamp(min=1e-300)
    along = (features @ vectors).square().mean(1)  # (n, D), squared lengths along eigenvectors
    return (along / values.clamp(min=floor)).sum(1).log()


def single_features(statistics: Statistics) -> dict[int, Tensor]:
    """Return label -> feature (D,) of every class that a client holds a single image of: Σ f is f itself."""
    alone = (statistics.counts == 1).nonzero()[:, 0].tolist()
    return {label: statistics.sums[label] for label in alone}


def two_features(statistics: Statistics) -> tuple[Tensor, Tensor]:
    """Recover the features of a client of two images, from their sum s and G = f₁f₁ᵀ + f₂f₂ᵀ.

        G − ½ s sᵀ = ½ (f₁ − f₂)(f₁ − f₂)ᵀ,   so f₁, f₂ = ½ (s ± d)

    with d = √(2λ) v of the one eigenvalue λ that is not 0. Which of the two is f₁ is not told. Raises
    BadInput for another number of images.
    """
    if statistics.size != 2:
        raise BadInput(f"statistics of {statistics.size} images: allowed are 2")
    total = statistics.sums.sum(0)  # (D,)
    values, vectors = torch.linalg.eigh(statistics.gram - total[:, None] * total / 2)
    apart = (2 * values[-1].clamp(min=0)).sqrt() * vectors[:, -1]
    return (total + apart) / 2, (total - apart) / 2


def sums_of_large_classes(
    features: Tensor, labels: Tensor, shards: Sequence[Tensor], least: int, classes: int
) -> tuple[Statistics, int]:
    """Add up what clients send who leave out classes of which they hold fewer than `least` images.

    features (n, D) and labels (n,) of all training images; shards: index tensors, one per client. Returns the
    sums of all clients and the number of images left out. Raises BadInput where nothing is left.
    """
    rows = torch.cat([shard[in_large_classes(labels[shard], least)] for shard in shards])
    if not len(rows):
        raise BadInput(f"least={least}: no client holds as many images of a class")
    return Statistics.of(features[rows], labels[rows], classes), sum(map(len, shards)) - len(rows)
