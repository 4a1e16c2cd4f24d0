"""What is learnt: images, labels, splits and, where the task knows it, the true foreground."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..settings.schema import TaskSettings
from ..vision.augment import random_affine, texture


def digit_scenes(
    digits: np.ndarray, size: int, settings: TaskSettings, clutter: float, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """8x8 digits (n, 8, 8) in 0..16 -> scenes (n, 1, size, size) in [0, 1] and their true foreground.

    A pixel is foreground where the digit's ink covers at least half of it.
    """
    n = len(digits)
    glyphs = torch.tensor(digits / 16, dtype=torch.float32)[:, None]
    glyphs = F.interpolate(glyphs, scale_factor=4, mode="bicubic").clamp(0, 1)
    largest = settings.scale[1]
    maps = random_affine(n, rng, scale=settings.scale, degrees=settings.degrees, shift=max(0.0, 1 - largest))
    ink = place(glyphs, size, maps)
    brightness = 0.8 + 0.2 * torch.rand(n, 1, 1, 1, generator=rng)
    scenes = compose(ink, clutter * texture(n, size, rng), brightness)
    return scenes, (ink >= 0.5).float()


def place(glyphs: Tensor, size: int, maps: Tensor) -> Tensor:
    """Glyphs (n, 1, h, w) in [0, 1] seen through affine maps (n, 2, 3): (n, 1, size, size)."""
    grid = F.affine_grid(maps, [len(glyphs), 1, size, size], align_corners=False)
    return F.grid_sample(glyphs, grid, align_corners=False)


def compose(ink: Tensor, background: Tensor, brightness: Tensor) -> Tensor:
    """Alpha-blend ink (n, 1, H, W) of a brightness (n, 1, 1, 1) over a background."""
    return background * (1 - ink) + brightness * ink
