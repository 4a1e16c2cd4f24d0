"""Scenes: glyphs placed at random on smooth background texture, with their true foreground.

The federated task (digits) and the pretraining of the shared model (letters) are rendered by the
same code, as photographs of ImageNet and of the task share one kind of camera.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def texture(n: int, size: int, generator: torch.Generator) -> Tensor:
    """Smooth random textures (n, 1, size, size) in [0, 1]: a sum of blurred noise at two scales."""
    total = torch.zeros(n, 1, size, size)
    for cells, weight in ((3, 0.65), (6, 0.35)):
        noise = torch.rand(n, 1, cells, cells, generator=generator)
        total += weight * F.interpolate(noise, size=size, mode="bicubic", align_corners=True)
    return total.clamp(0, 1)


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


def place(glyphs: Tensor, size: int, maps: Tensor) -> Tensor:
    """Glyphs (n, 1, h, w) in [0, 1] seen through affine maps (n, 2, 3): (n, 1, size, size)."""
    grid = F.affine_grid(maps, [len(glyphs), 1, size, size], align_corners=False)
    return F.grid_sample(glyphs, grid, align_corners=False)


def compose(ink: Tensor, background: Tensor, brightness: Tensor) -> Tensor:
    """Alpha-blend ink (n, 1, H, W) of a brightness (n, 1, 1, 1) over a background."""
    return background * (1 - ink) + brightness * ink


def patch_share(mask: Tensor, patch: int) -> Tensor:
    """Share of each patch's area that a pixel mask (n, 1, H, W) covers: (n, N) in [0, 1]."""
    return F.avg_pool2d(mask, patch).flatten(1)
