"""The share of the foreground that the stops of sparse inversion keep: true on scenes, else estimated."""

import copy
from collections.abc import Sequence

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from ..core.machine import device
from ..data.tasks import Split
from ..server.ensemble import Ensemble
from ..server.inversion import remaining
from ..vision.patches import gather_tokens, patch_share
from ..vision.tokens import images_at_once, kept_patches, patch_features


@torch.inference_mode()
def surviving_patches(ensemble: Ensemble, images: Tensor, ratios: Sequence[float]) -> Tensor:
    """Return a mask (n, N) of the patches that stops with these ratios leave of given images (n, ch, H, W).

    The images do not change: at each stop the ensemble's CLS attention is computed anew on the patches that
    are left, and those with the least are dropped.
    """
    parts = []
    for batch in images.split(images_at_once(ensemble)):
        patches, keep = ensemble.cut(batch.to(device()))  # (B, N, ch·p·p), (1, N)
        keep = keep.expand(len(batch), -1)  # (B, M), M ≤ N: fewer after every stop
        mask = torch.zeros(keep.shape, dtype=torch.bool)
        for ratio in ratios:
            rows = ensemble.importance(patches, keep).topk(remaining(keep.shape[1], [ratio]), dim=1).indices
            patches, keep = gather_tokens(patches, rows), keep.gather(1, rows)
        parts.append(mask.scatter(1, keep.cpu(), True))
    return torch.cat(parts)


def foreground_kept(foreground: Tensor, mask: Tensor, patch: int) -> Tensor:
    """Return the share (n,) of each image's true foreground area that lies in surviving patches.

    foreground (n, 1, H, W) in [0, 1]; mask (n, N); patch: side in pixels.
    """
    return kept_share(patch_share(foreground, patch), mask)


def kept_share(cover: Tensor, mask: Tensor) -> Tensor:
    """Return the share (n,) of what covers an image's patches, cover (n, N) ≥ 0, that lies in mask (n, N)."""
    return (cover * mask).sum(1) / cover.sum(1).clamp(min=1e-9)


@torch.inference_mode()
def token_features(vit: VisionTransformer, images: Tensor) -> np.ndarray:
    """Return the output tokens (n, N, d) of whole images' patches, on the CPU."""
    vit = copy.deepcopy(vit).to(device()).eval()
    batches = images.split(images_at_once(vit))
    parts = [patch_features(vit, *kept_patches(vit, batch.to(device()))) for batch in batches]
    return torch.cat(parts)[:, vit.num_prefix_tokens :].cpu().numpy()


def estimated_cover(vit: VisionTransformer, real: Split, images: Tensor) -> Tensor:
    """Return the estimated probability (n, N) that the foreground covers a patch of images (n, ch, H, W).

    Inverted images have no true foreground. A logistic probe learns it on real scenes, where it is known:
    from a patch's output token to whether the digit covers at least a quarter of the patch. vit should be a
    model that took no part in the inversion.
    """
    covered = patch_share(real.foreground, vit.patch_embed.patch_size[0]) >= 0.25
    features = token_features(vit, real.images)
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=500))
    probe.fit(features.reshape(-1, features.shape[-1]), covered.flatten().numpy())
    patches = token_features(vit, images)
    covers = probe.predict_proba(patches.reshape(-1, patches.shape[-1]))[:, 1]
    return torch.from_numpy(covers).view(len(images), -1)
