"""Random views: the same geometry for pixels and for patch masks."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


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


def random_affine(
    n: int,
    generator: torch.Generator,
    *,
    scale: tuple[float, float],
    degrees: float,
    shift: float,
    shear: float = 0.0,
) -> Tensor:
    """Random maps (n, 2, 3) from output to input coordinates, as `affine_grid` takes them.

    scale: range of the object's size relative to the frame; degrees: largest rotation;
    shift: largest displacement of the centre, in half frames; shear: largest shear.
    """

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, generator=generator)

    size, angle = uniform(*scale), uniform(-degrees, degrees) * math.pi / 180
    slant, dx, dy = uniform(-shear, shear), uniform(-shift, shift), uniform(-shift, shift)
    cos, sin = angle.cos() / size, angle.sin() / size
    linear = torch.stack([cos, sin + slant * cos, -sin, cos - slant * sin], 1).view(n, 2, 2)
    centre = -(linear @ torch.stack([dx, dy], 1)[:, :, None])
    return torch.cat([linear, centre], dim=2)


def texture(n: int, size: int, generator: torch.Generator) -> Tensor:
    """Smooth random textures (n, 1, size, size) in [0, 1]: a sum of blurred noise at two scales."""
    total = torch.zeros(n, 1, size, size)
    for cells, weight in ((3, 0.65), (6, 0.35)):
        noise = torch.rand(n, 1, cells, cells, generator=generator)
        total += weight * F.interpolate(noise, size=size, mode="bicubic", align_corners=True)
    return total.clamp(0, 1)
