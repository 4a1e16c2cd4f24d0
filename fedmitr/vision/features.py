"""Features of whole images from a frozen ViT, and a classifier that is linear on them."""

import math
from collections.abc import Sequence

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..settings.schema import FeatureTokens
from .tokens import kept_patches, patch_features


def feature_width(vit: VisionTransformer, tokens: FeatureTokens) -> int:
    """Return D, the number of features of one image: the ViT's width, or twice that for "both"."""
    return vit.embed_dim * (2 if tokens == "both" else 1)


def image_features(
    vit: VisionTransformer, images: Tensor, tokens: FeatureTokens, keep: Tensor | None = None
) -> Tensor:
    """Compute features (B, D) of images (B, ch, H, W): CLS, the patches' mean, or both, after the norm.

    keep (B, M): the patches that are shown, by default all.
    """
    rows = 1 if tokens == "cls" else None
    out = patch_features(vit, *kept_patches(vit, images, keep), rows)  # (B, P + M, d)
    cls = out[:, 0]  # (B, d)
    if tokens == "cls":
        return cls
    mean = out[:, vit.num_prefix_tokens :].mean(dim=1)  # (B, d)
    return mean if tokens == "patches" else torch.cat([cls, mean], dim=1)


def largest_feature(vit: VisionTransformer, tokens: FeatureTokens) -> float:
    """Return a bound on |f|² of any image; infinite for a ViT whose tokens no LayerNorm bounds.

    LayerNorm's output γ ⊙ u + β has |u|² ≤ d, so |f| ≤ max|γ|·√d + |β|, and so has a mean of such tokens.
    """
    if not isinstance(norm := vit.norm, nn.LayerNorm) or not norm.elementwise_affine:
        return math.inf
    offset = 0.0 if norm.bias is None else float(norm.bias.detach().norm())
    longest = float(norm.weight.detach().abs().max()) * math.sqrt(vit.embed_dim) + offset
    return longest**2 * (2 if tokens == "both" else 1)


class FeatureClassifier(nn.Module):
    """Frozen ViTs and one linear layer on their features, side by side: logits W f(x) + b.

    One ViT is a single model; with K of them every prediction runs all.
    """

    def __init__(
        self, vits: Sequence[VisionTransformer], tokens: FeatureTokens, weight: Tensor, bias: Tensor
    ) -> None:
        """Take W (C, D) and b (C,); D is the sum of the ViTs' `feature_width`."""
        super().__init__()
        self.vits, self.tokens = nn.ModuleList(vits), tokens
        self.head = nn.Linear(weight.shape[1], len(weight), device=weight.device)
        self.head.load_state_dict({"weight": weight.float(), "bias": bias.float()})
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """Return logits (B, C) of images (B, ch, H, W), from the kept patches (B, M) alone."""
        features = [image_features(vit, images, self.tokens, keep) for vit in self.vits]
        return self.head(torch.cat(features, dim=1))
