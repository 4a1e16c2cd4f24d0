"""Co-Boosting (Dai et al., ICLR 2024): hard samples and ensemble weights that improve each other.

Each round, with ensemble A_w(x) = softmax Σ_k w_k z_k(x):

    1. generator and noise    min (1 − p_y)^h·CE(A_w(x), y) − λ·KL(A_w(x)^(1/T) ‖ student(x)^(1/T))
    2. ensemble weights       w ← clip(w − μ·decay^round·sign ∂CE(A_w(x), y)/∂w, 0, 1), batch by batch
    3. distillation on all images so far, each moved by ε·sign ∂(u·softmax(z_A(x)/4))/∂x, u ~ U(−1, 1)

Published: h = 1, T = 3, λ = 1, ε = 8/255, μ = 0.01, decay 0.99, 200 rounds of 30 generator steps on
128 images, w from 1/K.

What changes here: no batch normalisation in a ViT, so no L_BN. w starts from the run's ensemble
weights, one per client or, with `ensemble.mode=class`, one per client and class; with few rounds it is
moved once per batch of stored views, from the first round on. A view is moved (3.) when it is drawn,
with the weights of that round.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..blocks import CoBoostingSettings
from ..distill import epochs
from ..ensemble import Ensemble, combine, held_classes
from ..inversion import balanced_labels
from ..runtime import device, generator, progress, timed
from ..settings import Settings
from ..store import Store
from ..upload import Upload
from .generator import divergence, learned_batch
from .outcome import Outcome
from .rounds import Student, budget, portions, stored

ODS_TEMPERATURE = 4.0  # of the prediction that the perturbation moves, as published
ON = "mean_logits"  # the weights combine logits


def co_boosting(uploads: Sequence[Upload], settings: Settings, store: Store) -> Outcome:
    """Uploads to one global model, by rounds of generation, reweighting and distillation."""
    return stored("co_boosting", uploads, settings, store, partial(_rounds, uploads, settings))


def _rounds(uploads: Sequence[Upload], settings: Settings) -> Outcome:
    own, seconds = settings.co_boosting, {}
    images, steps = budget(settings, own)
    rng = generator(settings.seed, "co_boosting")
    student = Student(uploads, settings, "co_boosting", steps, partial(perturb, settings=own, rng=rng))
    teacher = student.ensemble
    teacher.mode = ON
    held = held_classes(uploads)
    targets = held[balanced_labels(images, len(held), rng)]
    rounds = min(own.rounds, images)
    with progress(rounds * own.generator_steps + steps, "Co-Boosting", "step") as bar:
        shares = zip(targets.split(portions(images, rounds)), portions(steps, rounds), strict=True)
        for index, (labels, share) in enumerate(shares):
            labels = labels.to(device())
            with timed(seconds, "generation"):
                loss = partial(generator_loss, teacher, student.logits, own)
                made = learned_batch(student.vit, labels, loss, own, rng, bar.update)
                student.add(made, labels)
                rate = own.weight_step * own.weight_decay**index
                teacher.weights = reweigh(teacher.weights, student, rate, settings.distill.batch_size, rng)
            with timed(seconds, "distillation"):
                student.learn(share, lambda logits, _: teacher.combine(logits), bar.update)
    return Outcome([student.vit], seconds, student.images, steps)


def generator_loss(
    ensemble: Ensemble,
    student: Callable[[Tensor], Tensor],
    settings: CoBoostingSettings,
    images: Tensor,
    labels: Tensor,
) -> Tensor:
    """Hard-sample-weighted cross-entropy less λ·mean T²·KL(A_w ‖ student)."""
    teacher, of_student = ensemble(images), student(images)
    gap = divergence(teacher, of_student, settings.temperature).mean()
    return hard_loss(teacher, labels, settings.hardness) - settings.disagreement * gap


def hard_loss(log_probs: Tensor, labels: Tensor, hardness: float) -> Tensor:
    """Mean of (1 − p_y)^h·CE: samples the ensemble finds easy count little; the factor has no gradient."""
    loss = F.nll_loss(log_probs, labels, reduction="none")
    return ((1 - (-loss.detach()).exp()) ** hardness * loss).mean()


def perturb(ensemble: Ensemble, images: Tensor, settings: CoBoostingSettings, rng: torch.Generator) -> Tensor:
    """Images (B, ch, H, W) moved by ε, of full brightness, where the ensemble's output changes most.

    The output is weighed by a random direction, so that the moved samples differ (Tashiro et al. 2020).
    """
    if not settings.perturbation:
        return images
    scale = ensemble.stats[1].to(images)  # std of the pixels: ε is in full brightness
    images = images.detach().requires_grad_(True)
    probabilities = (ensemble(images) / ODS_TEMPERATURE).softmax(dim=1)
    direction = 2 * torch.rand(probabilities.shape, generator=rng) - 1
    (gradient,) = torch.autograd.grad((direction.to(probabilities) * probabilities).sum(), images)
    return (images + settings.perturbation / scale * gradient.sign()).detach()


def reweigh(weights: Tensor, student: Student, rate: float, batch_size: int, rng: torch.Generator) -> Tensor:
    """The ensemble's weights after one signed step per batch of the pool."""
    _, labels, logits = student.pool()
    for pick in epochs(len(labels), batch_size, rng, times=1):
        weights = weight_step(weights, logits[pick].transpose(0, 1), labels[pick], rate)
    return weights


def weight_step(weights: Tensor, logits: Tensor, labels: Tensor, rate: float) -> Tensor:
    """w ← clip(w − rate·sign ∂CE(A_w, y)/∂w, 0, 1); weights (K, 1) or (K, C), logits (K, B, C)."""
    weights = weights.detach().requires_grad_(True)
    loss = F.nll_loss(combine(logits, weights, ON), labels)
    (gradient,) = torch.autograd.grad(loss, weights)
    return (weights.detach() - rate * gradient.sign()).clamp(0, 1)
