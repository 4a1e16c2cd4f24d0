"""Random views: the same geometry for pixels and for patch masks."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .scenes import random_affine


def random_maps(n: int, strength: float, rng: torch.Generator) -> Tensor:
    """Affine maps (n, 2, 3).

    At strength 1: scale 0.75 to 1.25, rotation to 20°, shift to a fifth of the side, shear to 0.2.
    """
    return random_affine(
        n,
        rng,
        scale=(1 - 0.25 * strength, 1 + 0.25 * strength),
        degrees=20 * strength,
        shift=0.4 * strength,
        shear=0.2 * strength,
    )


def warp(images: Tensor, maps: Tensor) -> Tensor:
    """Images (B, ch, H, W) through affine maps (B, 2, 3); what comes into view mirrors the border."""
    grid = F.affine_grid(maps.to(images), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def warp_mask(mask: Tensor, maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """Patch masks (B, N) through the same maps: true where at least half of the new patch was true."""
    return warp_coverage(mask, maps, grid) >= 0.5


def warp_coverage(mask: Tensor, maps: Tensor, grid: tuple[int, int], cell: int = 4) -> Tensor:
    """Share (B, N) of each patch that patch masks (B, N) cover after these maps, on `cell`×`cell` points."""
    fine = mask.view(-1, 1, *grid).float().repeat_interleave(cell, 2).repeat_interleave(cell, 3)
    return F.avg_pool2d(warp(fine, maps), cell).flatten(1)
