"""Co-Boosting (Dai et al., ICLR 2024): hard samples and ensemble weights that improve each other.

Each round, with ensemble A_w(x) = softmax(Σ_k w_k z_k(x) / Σ_k w_k):

    1. generator and noise    min (1 − p_y)^h·CE(A_w(x), y) − λ·T²·KL(A_w(x)^(1/T) ‖ student(x)^(1/T))
    2. ensemble weights       w ← clip(w − μ·decay^round·sign ∂CE(A_w(x), y)/∂w, 0, 1), batch by batch of the
                              views of all images so far, without what 3. adds to them
    3. distillation of A_w, at temperature 4, on all images so far, each moved by
                              ε·sign ∂(u·softmax(z_A(x)/4))/∂x, u ~ U(−1, 1)

Published: h = 1, T = 3, λ = 1, ε = 8/255, μ = 0.01, decay 0.99, 200 rounds of 30 generator steps (Adam, 1e-3)
on 128 images, w from 1/K, and one pass over the images in every 2. and 3.

What changes here: no batch normalisation in a ViT, so no L_BN. w starts from the run's ensemble weights,
one per client or, with `ensemble.mode=class`, one per client and class (its sum then is by class). In 2.
one view of each image is shown, from the first round on and with that round's images; the authors' code
starts with the second round and the images before it. A view is moved (3.) when it is drawn, with the
weights of that round. ε is of full brightness, as in the paper; the authors' code takes it of normalised
pixels, half of that.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.machine import device
from ..core.store import Store
from ..server.ensemble import Ensemble, combine
from ..server.views import Batch, epochs
from ..settings import Settings
from ..settings.schema import NotNegative, Share, setting
from ..upload import Upload
from ._generator import (
    balanced_targets,
    distil_generated,
    divergence,
    generator_search,
    generator_work,
    learned_batch,
)
from ._method import Method, Outcome, Work
from ._student import Generation, Images, Student
from .dense import DenseSettings

ODS_TEMPERATURE = 4.0  # of the prediction that the perturbation moves, as published
MODE = "mean_logits"  # the weights combine logits


class CoBoostingSettings(DenseSettings):
    """Co-Boosting: DENSE on hard samples, with an ensemble whose weights are learned."""

    hardness: NotNegative = setting(1.0, "exponent of (1 − p_y) in the hard-sample loss", "Co-Boosting")
    perturbation: NotNegative = setting(
        8 / 255, "step of the adversarial perturbation, of full brightness", "Co-Boosting"
    )
    weight_step: NotNegative = setting(
        0.002, "step μ of the ensemble's weights; 0: they stay", "choice; Co-Boosting: 0.01"
    )
    weight_decay: Share = setting(0.99, "factor of μ from round to round", "Co-Boosting")


def co_boosting(uploads: Sequence[Upload], settings: Settings, store: Store) -> Outcome:
    """Turn uploads into one global model, by rounds of generation, reweighting and distillation."""
    return distil_generated("co_boosting", uploads, settings, store, partial(_begin, uploads, settings))


def _begin(
    uploads: Sequence[Upload],
    settings: Settings,
    student: Student,
    counts: Sequence[int],
    rng: torch.Generator,
    progress: Callable[[int], object],
) -> Generation:
    """Prepare a run; counts holds the number of images of each round."""
    own, batch_size = settings.co_boosting, settings.distill.batch_size
    teacher, weights = student.ensemble, student.ensemble.weights  # w before it is divided by its sum
    teacher.mode = MODE
    student.change = partial(perturb, settings=own, rng=rng)
    targets = balanced_targets(uploads, counts, rng)
    loss = partial(generator_loss, teacher, student.logits, own)

    def make(index: int) -> Images:
        labels = targets[index].to(device())  # (n,)
        return [(learned_batch(student.vit, labels, loss, own, rng, progress), labels)]

    def boost(index: int) -> None:
        nonlocal weights
        rate = own.weight_step * own.weight_decay**index
        weights = reweigh(weights, student.unchanged_views(), rate, batch_size, rng)
        teacher.weights = shares(weights)

    return Generation(make, before_learning=boost)


def generator_loss(
    ensemble: Ensemble,
    student: Callable[[Tensor], Tensor],
    settings: CoBoostingSettings,
    images: Tensor,
    labels: Tensor,
) -> Tensor:
    """Compute the hard-sample loss less λ·mean T²·KL(A_w ‖ student) (equation 1 above).

    student: a function from images (B, ch, H, W) to logits (B, C); labels (B,).
    """
    teacher, student_logits = ensemble(images), student(images)  # (B, C) each
    gap = divergence(teacher, student_logits, settings.temperature).mean()
    return hard_loss(teacher, labels, settings.hardness) - settings.disagreement * gap


def hard_loss(log_probs: Tensor, labels: Tensor, hardness: float) -> Tensor:
    """Compute the mean of (1 − p_y)^h·CE, in which easy samples count little; the factor has no gradient.

    log_probs (B, C) of the ensemble; labels (B,).
    """
    loss = F.nll_loss(log_probs, labels, reduction="none")
    return ((1 - (-loss.detach()).exp()) ** hardness * loss).mean()


def perturb(ensemble: Ensemble, images: Tensor, settings: CoBoostingSettings, rng: torch.Generator) -> Tensor:
    """Move images (B, ch, H, W) by ε, of full brightness, where the ensemble's output changes most.

    The output is weighted by a random direction, so that the moved samples differ (Tashiro et al. 2020).
    """
    if not settings.perturbation:
        return images
    scale = ensemble.stats[1].to(images)  # std of the pixels: ε is in full brightness
    images = images.detach().requires_grad_(True)
    probabilities = (ensemble(images) / ODS_TEMPERATURE).softmax(dim=1)  # (B, C)
    direction = 2 * torch.rand(probabilities.shape, generator=rng) - 1  # u ~ U(−1, 1)
    (gradient,) = torch.autograd.grad((direction.to(probabilities) * probabilities).sum(), images)
    return (images + settings.perturbation / scale * gradient.sign()).detach()


def reweigh(weights: Tensor, pool: Batch, rate: float, batch_size: int, rng: torch.Generator) -> Tensor:
    """Return w after one signed step for each batch of the pool: views, labels (V,), logits (V, K, C).

    Ridge scores, where the pool has them, are not read: the weights are those of the ensemble alone.
    """
    _, labels, logits, *_ = pool
    for pick in epochs(len(labels), batch_size, rng, times=1) if rate else ():
        weights = weight_step(weights, logits[pick].transpose(0, 1), labels[pick], rate)
    return weights


def weight_step(weights: Tensor, logits: Tensor, labels: Tensor, rate: float) -> Tensor:
    """Return clip(w − rate·sign ∂CE(A_w, y)/∂w, 0, 1) for w (K, 1) or (K, C) and logits (K, B, C)."""
    weights = weights.detach().requires_grad_(True)
    loss = F.nll_loss(combine(logits, shares(weights), MODE), labels)
    (gradient,) = torch.autograd.grad(loss, weights)
    return (weights.detach() - rate * gradient.sign()).clamp(0, 1)


def shares(weights: Tensor) -> Tensor:
    """Return w (K, 1) or (K, C) divided by its sum over the clients; zeros where that is zero."""
    return weights / weights.sum(dim=0).clamp_min(1e-6)


def _work(settings: Settings) -> Work:
    """Count also the gradient that moves each view, and a view of all images so far in every round."""
    own, work = settings.co_boosting, generator_work(settings, settings.co_boosting)
    shown = work.images * (min(own.rounds, work.images) + 1) // 2 if own.weight_step else 0
    return replace(work, perturbed=own.perturbation > 0, reweighing=shown)


METHOD = Method(
    name="co_boosting",
    run=co_boosting,
    label="Co-Boosting",
    citation="Dai et al., ICLR 2024",
    settings=CoBoostingSettings,
    search={
        **generator_search("co_boosting"),
        "ensemble.mode": ("mean_logits", "size", "class"),  # the weights combine logits in each
        "co_boosting.disagreement": (0.0, 0.3, 1.0, 3.0, 10.0),
        "co_boosting.hardness": (0.0, 0.5, 1.0, 2.0),
        "co_boosting.perturbation": (0.0, 4 / 255, 8 / 255, 16 / 255),
        "co_boosting.weight_step": (0.0, 0.002, 0.01, 0.05),
    },
    work=_work,
)
