"""Predictions of models, their accuracy in all and for each class, and how clients' classes differ."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..core.progress import progress
from ..data.tasks import Split
from ..server.ensemble import Ensemble
from ..vision.tokens import images_at_once


def predict(model: nn.Module, images: Tensor, batch_size: int | None = None) -> Tensor:
    """Return class probabilities (n, C) on the CPU; the model may return logits or log-probabilities.

    batch_size: by default `vision.tokens.images_at_once`.
    """
    return _in_batches(model, model, images, batch_size)


def predict_with_members(ensemble: Ensemble, images: Tensor) -> Tensor:
    """Return class probabilities (1 + K, n, C) of the ensemble and then of its K members.

    Every member runs once on every image.
    """

    def forward(batch: Tensor) -> Tensor:
        member_logits = ensemble.logits(batch)  # (K, B, C)
        return torch.cat([ensemble.combine(member_logits)[None], member_logits])

    return _in_batches(forward, ensemble, images)


@torch.inference_mode()
def _in_batches(
    forward: Callable[[Tensor], Tensor], model: nn.Module, images: Tensor, batch_size: int | None = None
) -> Tensor:
    """Return probabilities (..., n, C) on the CPU, from `forward` of each batch on the model's device."""
    at = next((p.device for p in model.parameters()), images.device)
    parts = []
    with progress(len(images), "evaluation", "image", delay=1) as bar:
        for batch in images.split(batch_size or images_at_once(model)):
            parts.append(forward(batch.to(at)).softmax(dim=-1).cpu())
            bar.update(len(batch))
    return torch.cat(parts, dim=-2)


def predicted_classes(models: Sequence[nn.Module], images: Tensor) -> Tensor:
    """Return the class (models, n) that each model finds most probable for each image."""
    return torch.stack([predict(model, images).argmax(-1) for model in models])


def share_correct(predicted: Tensor, labels: Tensor) -> Tensor:
    """Return the share of predicted classes (..., n) that equal the labels (n,), in [0, 1]."""
    return (predicted == labels).double().mean(-1)


def recall(predicted: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Return the recall of each class (C,) from predicted classes (n,); NaN for a class without a label."""
    hit = (predicted == labels).double()
    total = torch.bincount(labels, minlength=num_classes)
    return torch.bincount(labels, weights=hit, minlength=num_classes) / total


def accuracy(model: nn.Module, split: Split) -> float:
    """Return the share of the split's images that the model classifies correctly, in [0, 1]."""
    return share_correct(predicted_classes([model], split.images)[0], split.labels).item()


def accuracy_per_class(model: nn.Module, split: Split, num_classes: int) -> Tensor:
    """Return the recall of each class (C,); NaN for a class that the split does not hold."""
    return recall(predicted_classes([model], split.images)[0], split.labels, num_classes)


ERRORS = ("right", "another class of the same client", "a class of another client")


def error_kinds(predicted: Tensor, labels: Tensor, counts: Tensor) -> dict[str, float]:
    """Return the share of images of each kind of `ERRORS`, from predicted classes and labels (n,).

    A class is of the client that holds most images of it, of counts (K, C). Errors of the second kind lie
    between classes that one client has seen side by side, those of the third between clients.
    """
    holder = counts.argmax(0)  # (C,)
    right, same = predicted == labels, holder[predicted] == holder[labels]  # (n,)
    parts = (right, same & ~right, ~same)
    return {name: part.double().mean().item() for name, part in zip(ERRORS, parts, strict=True)}


def label_skew(counts: Tensor) -> Tensor:
    """Return how far each client's class distribution is from all clients' together, (K,) from counts (K, C).

    Total variation distance, ½ Σ_c |p_k(c) − p(c)|: 0 where both agree, near 1 where they share no class.
    """
    own, common = counts / counts.sum(1, keepdim=True), counts.sum(0) / counts.sum()
    return (own - common).abs().sum(1) / 2
