"""Gradients of single samples: their variance, and what images and labels contribute to it.

The variance of the gradient g(θ; ξ) over samples ξ is the trace of its covariance,

    σ²(θ) = E‖g(θ; ξ) − E g(θ; ξ)‖².

It enters data-dependent stability bounds (Kuzborskij & Lampert 2018). Functions take any module and any loss;
`fedmitr.server.distill.distill_loss` is the one that is measured.
"""

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core import gradients
from ..core.gradients import Loss
from ..server.relabel import tempered
from ..server.views import Batch

# torch maps the KL divergence over samples one by one, and says so; it is a small part of the work.
warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
FEW = 32  # samples that are transformed at once


def sample_losses(model: nn.Module, loss: Loss, rows: Batch) -> Tensor:
    """Return the loss (B,) of each sample; rows: columns of B samples each."""
    return torch.cat([gradients.sample_losses(model, loss, part) for part in _in_parts(rows)])


def sample_gradients(model: nn.Module, loss: Loss, rows: Batch) -> Tensor:
    """Return the gradient (B, P) of each sample's loss at the P weights that train."""
    parts = (gradients.sample_gradients(model, loss, part) for part in _in_parts(rows))
    return torch.cat([torch.cat([g.flatten(1) for g in part.values()], dim=1) for part in parts])


def deviations(vectors: Tensor) -> Tensor:
    """Return the squared distance (B,) of each of B ≥ 2 vectors (B, P) from their mean, times B/(B − 1).

    Its mean is the trace of the covariance, unbiased.
    """
    count = len(vectors)
    apart = vectors - vectors.mean(dim=0, dtype=torch.double).to(vectors)
    return apart.square().sum(dim=1, dtype=torch.double) * (count / (count - 1))


@dataclass(frozen=True)
class GradientNoise:
    """The variance σ² of a gradient over samples, and the squared length of its mean (signal).

    error: the standard error of the variance, as a mean over samples. images: the variance if every sample
    had the mean label; labels: that of what the sample's own label adds. variance = images + labels + joint,
    where joint is twice the covariance of the two. signal is unbiased, so it may be below zero.
    """

    variance: float
    error: float
    signal: float
    images: float
    labels: float

    @property
    def joint(self) -> float:
        """Twice the covariance of what images and labels contribute; negative where they cancel."""
        return self.variance - self.images - self.labels


def gradient_noise(model: nn.Module, loss: Loss, rows: Batch, averaged: Batch) -> GradientNoise:
    """Measure the gradient's variance over samples and split it into what images and labels contribute.

    rows: columns of B ≥ 2 samples; averaged: the same with the mean label, as `average_labels` returns them.
    The losses here are linear in the label ℓ, so the gradient is a sum: g(x, ℓ) = g(x, ℓ̄) + g(x, ℓ − ℓ̄).
    The gradients of all B samples are held at once.
    """
    own, same = (sample_gradients(model, loss, r) for r in (rows, averaged))  # (B, P) each
    apart, count = deviations(own), len(own)
    variance = apart.mean().item()
    length = own.mean(dim=0, dtype=torch.double).square().sum().item()
    return GradientNoise(
        variance=variance,
        error=apart.std().item() / count**0.5,
        signal=length - variance / count,
        images=deviations(same).mean().item(),
        labels=deviations(own - same).mean().item(),
    )


def average_labels(rows: Batch, temperature: float) -> Batch:
    """Return rows of distillation in which all samples have the mean of the labels.

    rows: images (B, ch, H, W), log A (B, C), labels (B,), token targets (B, N, C). The mean is that of the
    probabilities A_T which the loss compares with, so the teacher's column becomes T·log mean A_T; token
    targets are averaged position by position. The label y itself stays: it enters λ_ce alone.
    """
    images, log_probs, labels, tokens = rows
    mean = tempered(log_probs, temperature).mean(dim=0)  # (C,)
    return images, (temperature * mean.log()).expand_as(log_probs), labels, tokens.mean(0).expand_as(tokens)


def _in_parts(rows: Batch) -> list[Batch]:
    """Cut the columns of a batch into parts of `FEW` samples."""
    return list(zip(*(column.split(FEW) for column in rows), strict=True))
