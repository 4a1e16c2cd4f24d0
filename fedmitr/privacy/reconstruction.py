"""Reconstruction: synthetic images beside the images they may resemble, and an image from its features.

An inverted image may look like a training image because the model remembers that one, or because both are of
one class. Test images are the control: no client has them, so what is as near to them is of the class alone.
It is an illustration. No distance bounds what another inversion would find.
"""

import copy
from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from ..core.errors import BadInput
from ..core.machine import device
from ..core.rng import make_rng
from ..data.tasks import Split
from ..server.synthetic import SyntheticSet
from ..settings.schema import FeatureTokens
from ..vision.features import image_features

Stats = tuple[Tensor, Tensor]


def bright(images: Tensor, stats: Stats) -> Tensor:
    """Return the brightness in [0, 1] of images (n, ch, H, W) that were normalised with stats."""
    mean, std = stats
    return (images.detach().cpu() * std + mean).clamp(0, 1)


def psnr(image: Tensor, other: Tensor) -> float:
    """Compute the peak signal-to-noise ratio in dB of images (ch, H, W) in [0, 1]; equal ones have ∞."""
    if torch.equal(image, other):
        return float("inf")
    return float(peak_signal_noise_ratio(image.double().numpy(), other.double().numpy(), data_range=1.0))


def ssim(image: Tensor, other: Tensor) -> float:
    """Compute structural similarity, at most 1, of images (ch, H, W) in [0, 1] (Wang et al. 2004)."""
    pair = (image.double().numpy(), other.double().numpy())
    return float(structural_similarity(*pair, data_range=1.0, channel_axis=0))


def nearest(queries: Tensor, pool: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each query (m, d) the index (m,) of the nearest row of pool (n, d), and its distance."""
    distance, index = torch.cdist(queries.double(), pool.double()).min(dim=1)
    return index, distance


def same_size(first: Split, second: Split, seed: int) -> tuple[Split, Split]:
    """Return both splits with equally many images of each class, drawn by the seed.

    The nearest of many is nearer than the nearest of few, so pools of different size cannot be compared.
    Raises BadInput where they have no class in common.
    """
    rng, rows = make_rng(seed, "pools"), ([], [])
    for label in first.labels.unique():
        members = [(split.labels == label).nonzero()[:, 0] for split in (first, second)]
        count = min(map(len, members))
        for own, taken in zip(members, rows, strict=True):
            taken.append(own[torch.randperm(len(own), generator=rng)[:count]].sort().values)
    if not sum(map(len, rows[0])):
        raise BadInput("the two pools of images have no class in common")
    return first.subset(torch.cat(rows[0])), second.subset(torch.cat(rows[1]))


def neighbours(
    made: SyntheticSet, pools: dict[str, Split], features: Callable[[Tensor], Tensor], stats: Stats
) -> pd.DataFrame:
    """Find for each made image the nearest image of its class in each pool, in pixels and in features.

    One row for each made image whose class all pools hold, pool and space: `image`, `label`, `pool`, `space`,
    `index` in the pool, `distance`, `psnr` and `ssim` of the pair. features: from images (n, ch, H, W) to
    (n, D). Raises BadInput where no made image has a class that all pools hold.
    """
    rows = []
    shown, made_features = bright(made.pixels, stats), features(made.pixels)
    for pool, split in pools.items():
        images = split.images[:]
        spaces = {
            "pixels": (shown.flatten(1), bright(images, stats).flatten(1)),
            "features": (made_features, features(images)),
        }
        for label in made.labels.unique().tolist():
            queries = (made.labels == label).nonzero()[:, 0]
            among = (split.labels == label).nonzero()[:, 0]
            if not all((other.labels == label).any() for other in pools.values()):
                continue
            for space, (own, theirs) in spaces.items():
                index, distance = nearest(own[queries.to(own.device)].cpu(), theirs[among].cpu())
                for query, found, far in zip(queries.tolist(), among[index].tolist(), distance, strict=True):
                    pair = shown[query], bright(images[found : found + 1], stats)[0]
                    told = {"image": query, "label": label, "pool": pool, "space": space, "index": found}
                    rows.append(told | {"distance": float(far), "psnr": psnr(*pair), "ssim": ssim(*pair)})
    if not rows:
        raise BadInput("no synthetic image has a class that every pool of images holds")
    return pd.DataFrame(rows)


def nearer_share(table: pd.DataFrame, first: str, second: str) -> pd.DataFrame:
    """Return one row a space: the share of made images that lie nearer to pool `first` than to `second`.

    One half says that they are as near to either. With it the mean PSNR and SSIM of the nearest in each pool.
    """
    wide = table.pivot(index=["space", "image"], columns="pool")
    rows = {}
    for space, own in wide.groupby(level="space"):
        far = own["distance"][first].to_numpy(), own["distance"][second].to_numpy()
        share = float(np.mean(far[0] < far[1]) + np.mean(far[0] == far[1]) / 2)
        means = {
            f"{name}, {pool}": own[name][pool].mean() for name in ("psnr", "ssim") for pool in (first, second)
        }
        rows[space] = {f"nearer to {first}": share} | means
    return pd.DataFrame(rows).T


def invert_features(
    vit: VisionTransformer,
    wanted: Tensor,
    tokens: FeatureTokens,
    start: Tensor,
    *,
    steps: int = 400,
    lr: float = 0.02,
    tv: float = 0.3,
) -> Tensor:
    """Search for images (n, ch, H, W) with the features wanted (n, D) under a ViT.

        min_x |f(x) − f|² / D + tv · mean squared difference of neighbouring pixels

    by Adam, with a learning rate that falls to 0. It is what a server may do with a feature that a sum gives
    away (Mahendran & Vedaldi, CVPR 2015). start (n, ch, H, W): images of the server's own; from noise the
    search ends in images that only the model finds alike.
    """
    frozen = copy.deepcopy(vit).to(device()).eval().requires_grad_(False)
    images = start.clone().to(device()).requires_grad_()
    optimizer = torch.optim.Adam([images], lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    target = wanted.to(images)
    for _ in range(steps):
        apart = (image_features(frozen, images, tokens) - target).square().mean(1)  # (n,)
        down, across = images.diff(dim=2).square(), images.diff(dim=3).square()
        rough = down.mean((1, 2, 3)) + across.mean((1, 2, 3))  # (n,)
        optimizer.zero_grad(set_to_none=True)
        (apart + tv * rough).sum().backward()  # images do not depend on each other
        optimizer.step()
        schedule.step()
    return images.detach().cpu()
