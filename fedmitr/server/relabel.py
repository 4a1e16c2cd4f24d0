"""Token relabel: the label that each patch token learns (method step 4).

High-information patches, those that survived the stops, carry the pseudo-label that their image was
inverted for; low-information patches carry the ensemble's soft label.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..settings.schema import RelabelSettings
from ..vision.tokens import images_at_once
from .ensemble import CombinedModels
from .synthetic import SyntheticSet


def token_targets(labels: Tensor, mask: Tensor, soft: Tensor, settings: RelabelSettings) -> Tensor:
    """Return each patch's target ℓ_i (B, N, C): (1 − β)·one-hot y + β·soft_i where mask is true, else soft_i.

    labels y (B,); mask (B, N); soft (B, N, C) probabilities; β = `foreground_soft`, 0 in the paper. Mode
    `pseudo` takes the first case for every patch, mode `soft` the second.
    """
    if settings.mode == "soft":
        return soft
    hard = F.one_hot(labels, soft.shape[-1]).to(soft)[:, None]  # (B, 1, C)
    hard = torch.lerp(hard.expand_as(soft), soft, settings.foreground_soft)  # (B, N, C)
    return hard if settings.mode == "pseudo" else torch.where(mask[:, :, None], hard, soft)


@torch.inference_mode()
def background_labels(ensemble: CombinedModels, synthetic: SyntheticSet, temperature: float) -> Tensor:
    """Return the CLS prediction (n, C) on each image's low-information patches alone.

    temperature softens it. Images without such patches (dense inversion) get that of the whole image; it is
    never used.
    """
    stopped = ~synthetic.mask
    count = int(stopped[0].sum())
    keep = stopped.int().topk(count, dim=1).indices.sort(dim=1).values if count else None  # (n, count)
    parts = [
        ensemble(synthetic.pixels[i], None if keep is None else keep[i], temperature).exp()
        for i in torch.arange(len(synthetic)).split(images_at_once(ensemble))
    ]
    return torch.cat(parts)


def relabel_tokens(ensemble: CombinedModels, synthetic: SyntheticSet, settings: RelabelSettings) -> Tensor:
    """Return the token targets (n, N, C) of a whole synthetic set, each image as it is.

    Distillation makes them view by view, with the calibrated ensemble (`distill.calibrated`).
    """
    background = background_labels(ensemble, synthetic, settings.temperature)
    parts = []
    for i in torch.arange(len(synthetic)).split(images_at_once(ensemble)):
        soft = soft_token_labels(ensemble, synthetic.pixels[i], background[i], settings)[1]
        parts.append(token_targets(synthetic.labels[i], synthetic.mask[i], soft, settings))
    return torch.cat(parts)


@torch.no_grad()  # not inference_mode: the labels enter a loss that is differentiated
def soft_token_labels(
    ensemble: CombinedModels, images: Tensor, background: Tensor | None, settings: RelabelSettings
) -> tuple[Tensor, Tensor]:
    """Return the ensemble's CLS log-probabilities (B, C) at T = 1, and soft labels of the patches (B, N, C).

    Soft labels are softmax(A^i(x) / T) of the token log-probabilities A^i or, with source=background_cls, the
    `background_labels` (B, C) of these images for every patch; background may be None where it is not used.
    """
    cls_log_probs, token_log_probs = ensemble.forward_tokens(images)
    if settings.source == "background_cls":
        soft = background[:, None].expand(-1, token_log_probs.shape[1], -1)
    else:
        soft = tempered(token_log_probs, settings.temperature)
    return cls_log_probs, soft


def tempered(log_probs: Tensor, temperature: float) -> Tensor:
    """Return probabilities ∝ p^(1/T) from log p."""
    return (log_probs / temperature).softmax(dim=-1)
