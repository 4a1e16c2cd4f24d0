"""What is measured: accuracy, per class too, calibration, and how much true foreground the stops keep."""

from collections.abc import Sequence

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from .ensemble import Ensemble
from .inversion import remaining
from .runtime import device
from .scenes import patch_share
from .tasks import Split
from .vit import gather_tokens, kept_patches


@torch.inference_mode()
def predict(model: nn.Module, images: Tensor, batch_size: int = 256) -> Tensor:
    """Class probabilities (n, C) on the CPU; the model may return logits or log-probabilities."""
    at = device()
    return torch.cat([model(part.to(at)).softmax(dim=-1).cpu() for part in images.split(batch_size)])


def accuracy(model: nn.Module, split: Split) -> float:
    """Share of the split's images named right, in [0, 1]."""
    return (predict(model, split.images).argmax(1) == split.labels).double().mean().item()


def accuracy_per_class(model: nn.Module, split: Split, num_classes: int) -> Tensor:
    """Recall of each class (C,), NaN for a class that the split does not hold."""
    hit = (predict(model, split.images).argmax(1) == split.labels).double()
    total = torch.bincount(split.labels, minlength=num_classes)
    return torch.bincount(split.labels, weights=hit, minlength=num_classes) / total


@torch.inference_mode()
def surviving_patches(ensemble: Ensemble, images: Tensor, ratios: Sequence[float]) -> Tensor:
    """Mask (n, N) of the patches that stops of these ratios would leave on given images.

    The stops of inversion, applied to still images: at each, the ensemble's CLS attention is
    computed anew on the patches that are left.
    """
    parts = []
    for batch in images.split(256):
        patches, keep = kept_patches(ensemble.members[0], batch.to(device()), None)
        mask = torch.zeros(keep.shape, dtype=torch.bool)
        for ratio in ratios:
            rows = ensemble.importance(patches, keep).topk(remaining(keep.shape[1], [ratio]), dim=1).indices
            patches, keep = gather_tokens(patches, rows), keep.gather(1, rows)
        parts.append(mask.scatter(1, keep.cpu(), True))
    return torch.cat(parts)


def foreground_kept(foreground: Tensor, mask: Tensor, patch: int) -> Tensor:
    """Share of each image's true foreground area (n, 1, H, W) that lies in surviving patches (n, N): (n,)."""
    area = patch_share(foreground, patch)
    return (area * mask).sum(1) / area.sum(1).clamp(min=1e-9)


def label_skew(counts: Tensor) -> Tensor:
    """How far each client's class mix is from everyone's (K,), from class counts (K, C).

    Total variation distance: 0 where the mixes agree, near 1 where they share no class.
    """
    own, common = counts / counts.sum(1, keepdim=True), counts.sum(0) / counts.sum()
    return (own - common).abs().sum(1) / 2


def forward_flops(vit: VisionTransformer, patches: int) -> int:
    """Floating-point operations of one image's forward pass on that many patches.

    Matrix products only, a multiply-add as two: embedding, the blocks' linear layers, and attention,
    which grows with the square of the tokens.
    """
    tokens, width = patches + vit.num_prefix_tokens, vit.embed_dim
    linear = sum(m.weight.numel() for m in vit.blocks.modules() if isinstance(m, nn.Linear))
    attention = 2 * tokens * tokens * width * len(vit.blocks)
    return 2 * (patches * vit.patch_embed.proj.weight.numel() + tokens * linear + attention)
