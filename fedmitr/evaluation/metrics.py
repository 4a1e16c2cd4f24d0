"""What is measured: accuracy, per class too, calibration, and how much true foreground the stops keep."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..core.progress import progress
from ..data.tasks import Split
from ..server.ensemble import Ensemble
from ..vision.tokens import images_at_once


def predict(model: nn.Module, images: Tensor, batch_size: int | None = None) -> Tensor:
    """Class probabilities (n, C) on the CPU; the model may return logits or log-probabilities.

    batch_size: by default `vit.images_at_once`.
    """
    return _in_batches(model, model, images, batch_size)


def predict_with_members(ensemble: Ensemble, images: Tensor) -> Tensor:
    """Class probabilities (1 + K, n, C) of the ensemble and of its members, from one forward of each."""

    def everyone(batch: Tensor) -> Tensor:
        each = ensemble.logits(batch)
        return torch.cat([ensemble.combine(each)[None], each])

    return _in_batches(everyone, ensemble, images)


@torch.inference_mode()
def _in_batches(
    answer: Callable[[Tensor], Tensor], model: nn.Module, images: Tensor, batch_size: int | None = None
) -> Tensor:
    """Probabilities (..., n, C) on the CPU from what `answer` makes of each batch on the model's device."""
    at = next((p.device for p in model.parameters()), images.device)
    parts = []
    with progress(len(images), "evaluation", "image", delay=1) as bar:
        for batch in images.split(batch_size or images_at_once(model)):
            parts.append(answer(batch.to(at)).softmax(dim=-1).cpu())
            bar.update(len(batch))
    return torch.cat(parts, dim=-2)


def predicted_classes(models: Sequence[nn.Module], images: Tensor) -> Tensor:
    """The class (models, n) that each model names for each image."""
    return torch.stack([predict(model, images).argmax(-1) for model in models])


def share_correct(named: Tensor, labels: Tensor) -> Tensor:
    """Share of named classes (..., n) that are the labels (n,), in [0, 1]."""
    return (named == labels).double().mean(-1)


def recall(named: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Recall of each class (C,) by named classes (n,), NaN for a class that is no label."""
    hit = (named == labels).double()
    total = torch.bincount(labels, minlength=num_classes)
    return torch.bincount(labels, weights=hit, minlength=num_classes) / total


def accuracy(model: nn.Module, split: Split) -> float:
    """Share of the split's images named right, in [0, 1]."""
    return share_correct(predicted_classes([model], split.images)[0], split.labels).item()


def accuracy_per_class(model: nn.Module, split: Split, num_classes: int) -> Tensor:
    """Recall of each class (C,), NaN for a class that the split does not hold."""
    return recall(predicted_classes([model], split.images)[0], split.labels, num_classes)


def label_skew(counts: Tensor) -> Tensor:
    """How far each client's class mix is from everyone's (K,), from class counts (K, C).

    Total variation distance: 0 where the mixes agree, near 1 where they share no class.
    """
    own, common = counts / counts.sum(1, keepdim=True), counts.sum(0) / counts.sum()
    return (own - common).abs().sum(1) / 2
