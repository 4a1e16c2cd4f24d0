"""Random affine views of images and of patch masks, with one geometry for both, and two kinds of texture."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def random_maps(n: int, strength: float, rng: torch.Generator) -> Tensor:
    """Draw affine maps (n, 2, 3) as `random_affine` does, in ranges that grow with the strength.

    At strength 1: scale 0.75 to 1.25, rotation up to 20°, shift up to a fifth of the side, shear up to 0.2.
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
    """Warp images (B, ch, H, W) by affine maps (B, 2, 3); beyond their border they are mirrored."""
    grid = F.affine_grid(maps.to(images), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def warp_mask(mask: Tensor, maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """Warp patch masks (B, N) by affine maps (B, 2, 3): true where half of the new patch or more is."""
    return warp_coverage(mask, maps, grid) >= 0.5


def warp_coverage(mask: Tensor, maps: Tensor, grid: tuple[int, int], cell: int = 4) -> Tensor:
    """Compute the share (B, N), in [0, 1], of each patch that patch masks (B, N) cover after affine maps.

    Each patch is sampled at `cell`×`cell` points.
    """
    fine = mask.view(-1, 1, *grid).float().repeat_interleave(cell, 2).repeat_interleave(cell, 3)
    return F.avg_pool2d(warp(fine, maps), cell).flatten(1)


def random_affine(
    n: int,
    rng: torch.Generator,
    *,
    scale: tuple[float, float],
    degrees: float,
    shift: float,
    shear: float = 0.0,
) -> Tensor:
    """Draw maps (n, 2, 3) from output to input coordinates, as torch's `affine_grid` takes them.

    scale: range of the object's size relative to the frame; degrees: largest rotation;
    shift: largest displacement of the centre, in half frames; shear: largest shear.
    """

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, generator=rng)

    size, angle = uniform(*scale), uniform(-degrees, degrees) * math.pi / 180
    slant, dx, dy = uniform(-shear, shear), uniform(-shift, shift), uniform(-shift, shift)
    cos, sin = angle.cos() / size, angle.sin() / size
    # rotation by −angle over size, times the shear [[1, slant], [0, 1]]
    linear = torch.stack([cos, sin + slant * cos, -sin, cos - slant * sin], 1).view(n, 2, 2)
    centre = -(linear @ torch.stack([dx, dy], 1)[:, :, None])  # (n, 2, 1): output (dx, dy) shows the middle
    return torch.cat([linear, centre], dim=2)


def texture(n: int, size: int, rng: torch.Generator) -> Tensor:
    """Draw smooth random textures (n, 1, size, size) in [0, 1]: blurred noise at two scales, added."""
    total = torch.zeros(n, 1, size, size)
    for cells, weight in ((3, 0.65), (6, 0.35)):
        noise = torch.rand(n, 1, cells, cells, generator=rng)
        total += weight * F.interpolate(noise, size=size, mode="bicubic", align_corners=True)
    return total.clamp(0, 1)


def pink_noise(n: int, size: Sequence[int], rng: torch.Generator) -> Tensor:
    """Draw noise (n, 1, H, W) whose amplitude falls as 1/f with spatial frequency f, each in [0, 1].

    It has the spectrum of natural images (Field 1987) and random phases. size: (H, W).
    """
    height, width = size
    white = torch.fft.rfft2(torch.randn(n, 1, height, width, generator=rng))  # (n, 1, H, W // 2 + 1)
    frequency = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width))
    frequency[0, 0] = math.inf  # the mean stays out
    noise = torch.fft.irfft2(white / frequency, s=(height, width))
    low, high = noise.amin((2, 3), keepdim=True), noise.amax((2, 3), keepdim=True)
    return (noise - low) / (high - low).clamp(min=torch.finfo(noise.dtype).tiny)
