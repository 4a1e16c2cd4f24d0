"""Gradients of single samples: their variance, and what images and labels contribute to it.

The variance of the gradient g(θ; ξ) over samples ξ is the trace of its covariance,

    σ²(θ) = E‖g(θ; ξ) − E g(θ; ξ)‖².

It enters the data-dependent form of the stability bound (Kuzborskij & Lampert 2018). Functions take any
module and any loss; `fedmitr.server.distill.distill_loss` is the one that is measured.
"""

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from timm.layers import Attention
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from ..server.relabel import tempered
from ..server.views import Batch

# torch maps the KL divergence over samples one by one, and says so; it is a small part of the work.
warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
FEW = 32  # gradients that are held at once
Loss = Callable[..., Tensor]  # (model, *columns of a batch) -> the mean of the samples' losses, a scalar


class Evaluated(nn.Module):
    """A model with its loss, as one module: called with the columns of a batch it returns the loss."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model, self.loss = transformable(model), loss

    def forward(self, *rows: Tensor) -> Tensor:
        """Return the mean loss of the rows."""
        return self.loss(self.model, *rows)

    @property
    def weights(self) -> dict[str, Tensor]:
        """The weights that train, by name."""
        return {name: p.detach() for name, p in self.named_parameters() if p.requires_grad}

    def of_one(self, weights: dict[str, Tensor], *row: Tensor) -> Tensor:
        """Return the loss of one sample, given without the dimension of the batch, under these weights."""
        return functional_call(self, weights, tuple(column[None] for column in row))


def transformable(model: nn.Module) -> nn.Module:
    """Return a copy of a model that `torch.func` can transform: the same function of the same weights.

    Attention is computed by timm, in plain products: the package's faster one has no rule for `vmap`, and
    torch's fused kernel no second derivative.
    """
    copied = copy.deepcopy(model)
    for module in copied.modules():
        if isinstance(module, Attention):
            module.fused_attn = False
            module.q_norm = nn.Sequential(module.q_norm)  # vision.attention takes over nn.Identity alone
    return copied


def sample_losses(model: nn.Module, loss: Loss, rows: Batch) -> Tensor:
    """Return the loss (B,) of each sample; rows: columns of B samples each."""
    evaluated = Evaluated(model, loss)
    one = vmap(evaluated.of_one, in_dims=(None, *(0 for _ in rows)))
    with torch.no_grad():
        return torch.cat([one(evaluated.weights, *part) for part in _in_parts(rows)])


def sample_gradients(model: nn.Module, loss: Loss, rows: Batch) -> Tensor:
    """Return the gradient (B, P) of each sample's loss at the P weights that train."""
    evaluated = Evaluated(model, loss)
    one = vmap(grad(evaluated.of_one), in_dims=(None, *(0 for _ in rows)))
    return torch.cat([g.flatten(1) for g in one(evaluated.weights, *rows).values()], dim=1)


class Moments:
    """Sums over vectors that arrive in parts (B, P): their number, their sum and their squared lengths."""

    def __init__(self) -> None:
        self.count, self.total, self.squares = 0, torch.zeros(()), 0.0

    def add(self, vectors: Tensor) -> None:
        """Add vectors (B, P)."""
        self.count += len(vectors)
        self.total = self.total + vectors.double().sum(dim=0)
        self.squares += vectors.double().square().sum().item()

    @property
    def variance(self) -> float:
        """The trace of the covariance, unbiased: (Σ‖v‖² − n‖v̄‖²) / (n − 1)."""
        return (self.squares - self.total.square().sum().item() / self.count) / (self.count - 1)

    @property
    def signal(self) -> float:
        """The squared length of the expected vector, unbiased: ‖v̄‖² − variance / n; it may be below zero."""
        return self.total.square().sum().item() / self.count**2 - self.variance / self.count


@dataclass(frozen=True)
class GradientNoise:
    """The variance σ² of a gradient over samples, and the squared length of its mean (signal).

    images: the variance if every sample had the mean label; labels: that of what the sample's own label adds.
    variance = images + labels + joint, where joint is twice the covariance of the two.
    """

    variance: float
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
    """
    whole, images, labels = Moments(), Moments(), Moments()
    for part, plain in zip(_in_parts(rows), _in_parts(averaged), strict=True):
        own, same = sample_gradients(model, loss, part), sample_gradients(model, loss, plain)  # (b, P) each
        whole.add(own)
        images.add(same)
        labels.add(own - same)
    return GradientNoise(whole.variance, whole.signal, images.variance, labels.variance)


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
