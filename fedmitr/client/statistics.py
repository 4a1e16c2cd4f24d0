"""Sums of features: what a client sends of its images where closed-form heads are wanted (method step 1)."""

import copy
from collections.abc import Sequence

import torch
from timm.models.vision_transformer import VisionTransformer

from ..core.machine import device
from ..data.tasks import Split
from ..settings.schema import FeatureTokens
from ..upload import Statistics, add_up
from ..vision.features import image_features
from ..vision.tokens import images_at_once


@torch.no_grad()
def feature_statistics(vits: Sequence[VisionTransformer], shard: Split, tokens: FeatureTokens) -> Statistics:
    """Sum the features of a shard's images under frozen ViTs, side by side where there are several.

    Nothing is trained. Models and sums are float64, so that sums of clients agree with those of all images
    to 1e-9 however images are batched.
    """
    frozen = [copy.deepcopy(vit).to(device()).double().eval() for vit in vits]
    parts = []
    for rows in torch.arange(len(shard)).split(min(map(images_at_once, vits))):
        images = shard.images[rows].to(device()).double()  # (B, ch, H, W)
        features = torch.cat([image_features(vit, images, tokens) for vit in frozen], dim=1)  # (B, D)
        parts.append(Statistics.of(features.cpu(), shard.labels[rows], vits[0].num_classes))
    return add_up(parts)
