"""Token relabel: the label that each patch token learns (method step 4).

High-information patches (those that survived the stops) carry the pseudo-label the image was
generated for; low-information patches carry the ensemble's own soft label.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..settings.schema import RelabelSettings
from ..vision.tokens import images_at_once
from .ensemble import Ensemble
from .synthetic import SyntheticSet


def token_targets(labels: Tensor, mask: Tensor, soft: Tensor, settings: RelabelSettings) -> Tensor:
    """Per-patch target ℓ_i (B, N, C): one-hot y where mask is true, else the soft label.

    labels (B,); mask (B, N); soft (B, N, C) probabilities. `pseudo` labels every patch y, `soft`
    none; `foreground_soft` mixes that share of the soft label into y.
    """
    if settings.mode == "soft":
        return soft
    hard = F.one_hot(labels, soft.shape[-1]).to(soft)[:, None]
    hard = torch.lerp(hard.expand_as(soft), soft, settings.foreground_soft)
    return hard if settings.mode == "pseudo" else torch.where(mask[:, :, None], hard, soft)


@torch.inference_mode()
def background_labels(ensemble: Ensemble, synthetic: SyntheticSet, temperature: float) -> Tensor:
    """Soft label (n, C) of each image's low-information patches alone, read off CLS.

    Images without such patches (dense inversion) get the label of the whole image; it is never used.
    """
    stopped = ~synthetic.mask
    count = int(stopped[0].sum())
    keep = stopped.int().topk(count, dim=1).indices.sort(dim=1).values if count else None
    parts = [
        ensemble(synthetic.pixels[i], None if keep is None else keep[i], temperature).exp()
        for i in torch.arange(len(synthetic)).split(images_at_once(ensemble))
    ]
    return torch.cat(parts)


def relabel_tokens(ensemble: Ensemble, synthetic: SyntheticSet, settings: RelabelSettings) -> Tensor:
    """Token targets (n, N, C) of a whole synthetic set, as distillation draws them view by view.

    Distillation itself asks the calibrated ensemble (`distill.calibrated`).
    """
    of_background = background_labels(ensemble, synthetic, settings.temperature)
    parts = []
    for i in torch.arange(len(synthetic)).split(images_at_once(ensemble)):
        soft = soft_token_labels(ensemble, synthetic.pixels[i], of_background[i], settings)[1]
        parts.append(token_targets(synthetic.labels[i], synthetic.mask[i], soft, settings))
    return torch.cat(parts)


@torch.no_grad()  # not inference_mode: the labels enter a loss that is differentiated
def soft_token_labels(
    ensemble: Ensemble, images: Tensor, of_background: Tensor | None, settings: RelabelSettings
) -> tuple[Tensor, Tensor]:
    """The ensemble's log-probabilities for CLS (B, C) at T = 1, and soft labels of the patches (B, N, C).

    Soft labels come from the clients' token logits, softmax(A^i(x) / T), or are the CLS prediction
    on the background alone, `of_background` (B, C), for every patch; it may be None where it is not used.
    """
    of_cls, of_tokens = ensemble.forward_tokens(images)
    if settings.source == "background_cls":
        soft = of_background[:, None].expand(-1, of_tokens.shape[1], -1)
    else:
        soft = tempered(of_tokens, settings.temperature)
    return of_cls, soft


def tempered(log_probs: Tensor, temperature: float) -> Tensor:
    """Probabilities ∝ p^(1/T) from log p."""
    return (log_probs / temperature).softmax(dim=-1)
