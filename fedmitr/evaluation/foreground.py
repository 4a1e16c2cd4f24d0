"""What is measured: accuracy, per class too, calibration, and how much true foreground the stops keep."""

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
from ..server.synthetic import SyntheticSet
from ..vision.patches import gather_tokens, patch_share
from ..vision.tokens import images_at_once, kept_patches, patch_features


@torch.inference_mode()
def surviving_patches(ensemble: Ensemble, images: Tensor, ratios: Sequence[float]) -> Tensor:
    """Mask (n, N) of the patches that stops of these ratios would leave on given images.

    The stops of inversion, applied to still images: at each, the ensemble's CLS attention is
    computed anew on the patches that are left.
    """
    parts = []
    for batch in images.split(images_at_once(ensemble)):
        patches, keep = ensemble.cut(batch.to(device()))
        keep = keep.expand(len(batch), -1)
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


@torch.inference_mode()
def token_features(vit: VisionTransformer, images: Tensor) -> np.ndarray:
    """Output tokens (n, N, d) of whole images, on the CPU."""
    vit = copy.deepcopy(vit).to(device()).eval()
    batches = images.split(images_at_once(vit))
    parts = [patch_features(vit, *kept_patches(vit, batch.to(device()))) for batch in batches]
    return torch.cat(parts)[:, vit.num_prefix_tokens :].cpu().numpy()


def estimated_foreground(
    vit: VisionTransformer, real: Split, synthetic: SyntheticSet
) -> tuple[Tensor, float]:
    """Share of the estimated foreground of synthetic images that the surviving patches hold, and chance.

    Inverted images have no true foreground. A logistic probe learns it on real scenes, where it is
    known: from a patch's output token to whether digit covers a quarter of the patch. Its
    probabilities on the synthetic patches are summed over the survivors: share (n,), chance is the
    share of patches that survive. vit should be a model that took no part in the inversion.
    """
    covered = patch_share(real.foreground, vit.patch_embed.patch_size[0]) >= 0.25
    features = token_features(vit, real.images)
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=500))
    probe.fit(features.reshape(-1, features.shape[-1]), covered.flatten().numpy())
    patches = token_features(vit, synthetic.pixels)
    belief = probe.predict_proba(patches.reshape(-1, patches.shape[-1]))[:, 1]
    belief, mask = torch.from_numpy(belief).view(len(synthetic), -1), synthetic.mask.cpu()
    return (belief * mask).sum(1) / belief.sum(1), mask.double().mean().item()
