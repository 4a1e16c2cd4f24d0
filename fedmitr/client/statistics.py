"""Sums of features: what a client sends of its images where closed-form heads are wanted (method step 1)."""

import copy
from collections.abc import Sequence

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from ..core.errors import BadInput
from ..core.machine import device
from ..core.progress import timed
from ..core.rng import make_rng
from ..data.tasks import Split
from ..settings.schema import FeatureTokens
from ..upload import Features, ModelShape, Statistics, Upload, add_up, check_arrays
from ..vision.augment import random_maps, warp
from ..vision.features import image_features
from ..vision.tokens import images_at_once
from .noise import clipped, large_classes, noisy, without_small_classes

VIEW_STRENGTH = 0.5  # of the moves of an image's copies: what `client.augment` has by default


@torch.no_grad()
def feature_statistics(
    vits: Sequence[VisionTransformer],
    shard: Split,
    tokens: FeatureTokens,
    views: int = 0,
    clip: float | None = None,
) -> Statistics:
    """Sum the features of a shard's images under frozen ViTs, side by side where there are several.

    Nothing is trained. Models and sums are float64, so that sums of clients agree with those of all images
    to 1e-9 however images are batched. With `views`, f and f fᵀ are averaged over the image and so many moved
    copies (`view_maps`) before they are added; counts do not change. clip: the norm that the features of
    each copy are scaled down to where they are longer; by default none are. Raises BadInput for a shard
    without images.
    """
    if not len(shard):
        raise BadInput("statistics of 0 images: a client needs at least 1 image")
    maps = view_maps(views)
    frozen = [copy.deepcopy(vit).to(device()).double().eval() for vit in vits]

    def of(rows: Tensor) -> Statistics:
        images = shard.images[rows].to(device()).double()  # (B, ch, H, W)
        shown = [images, *(warp(images, m.expand(len(images), -1, -1)) for m in maps)]
        return mean_over_views([summed(view, shard.labels[rows]) for view in shown])

    def summed(images: Tensor, labels: Tensor) -> Statistics:
        features = torch.cat([image_features(vit, images, tokens) for vit in frozen], dim=1)  # (B, D)
        features = features if clip is None else clipped(features, clip)
        return Statistics.of(features.cpu(), labels, vits[0].num_classes)

    return add_up(map(of, torch.arange(len(shard)).split(min(map(images_at_once, vits)))))


def sent_statistics(
    vit: VisionTransformer, shard: Split, features: Features, rng: torch.Generator, who: str = "the client"
) -> Statistics:
    """Return what a client sends of its shard: the sums that `features` declares, with its noise.

    Without noise, small classes are left out before anything is summed. With noise, every image counts and
    noisy counts decide which classes are left out: else one image could bring a whole class in. rng draws the
    noise. Raises BadInput, naming the client, where nothing is left.
    """
    noise, smallest = features.noise, features.smallest
    if noise is None:
        shard = large_classes(shard, smallest, who) if smallest else shard
        return feature_statistics([vit], shard, features.tokens, features.views)
    sums = feature_statistics([vit], shard, features.tokens, features.views, noise.clip)
    return without_small_classes(noisy(sums, noise, rng), smallest) if smallest else noisy(sums, noise, rng)


def view_maps(views: int) -> Tensor:
    """Return the affine maps (views, 2, 3) of the moved copies: one list for all images of all clients.

    So sums over clients are still those of all images in one place. Training draws moves of its own.
    """
    return random_maps(views, VIEW_STRENGTH, make_rng(0, "views of statistics"))


def mean_over_views(parts: Sequence[Statistics]) -> Statistics:
    """Average sums of the same images, once for each view; every image counts once."""
    total = add_up(parts)
    return Statistics(parts[0].counts, total.sums / len(parts), total.gram / len(parts))


class StatisticsClient:
    """A client of two exchanges: its upload first, then sums of features of the models that it is sent."""

    def __init__(self, upload: Upload, shared: VisionTransformer, shard: Split) -> None:
        """Keep the upload, the shared model that it started from, and the shard; nothing is computed yet."""
        self.upload, self.shared, self._shard = upload, shared.state_dict(), shard
        self.seconds = 0.0  # of the sums that were asked for last

    def statistics(
        self, models: Sequence[tuple[ModelShape, dict[str, Tensor]]], tokens: FeatureTokens, views: int = 0
    ) -> Statistics:
        """Return the sums of the models' features, side by side; BadInput for a model that does not fit."""
        vits, timer = [], {}
        with timed(timer, "statistics"):
            for shape, weights in models:
                check_arrays(f"message of the server to client {self.upload.client}", weights, shape.arrays())
                vits.append(shape.build())
                vits[-1].load_state_dict(weights)
            sums = feature_statistics(vits, self._shard, tokens, views)
        self.seconds = timer["statistics"]
        return sums
