"""Scenes: glyphs at random scale, rotation and position on random texture, with their true foreground."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..settings.schema import TaskSettings
from ..vision.augment import random_affine, texture


def digit_scenes(
    digits: np.ndarray, size: int, settings: TaskSettings, clutter: float, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Place digits (n, 8, 8) with values 0 to 16 in scenes, one each.

    Returns scenes (n, 1, size, size) in [0, 1] and their foreground, as large, in {0, 1}: the pixels of which
    ink covers at least half. clutter: brightness of the background texture at most, in [0, 1].
    """
    n = len(digits)
    glyphs = torch.tensor(digits / 16, dtype=torch.float32)[:, None]
    glyphs = F.interpolate(glyphs, scale_factor=4, mode="bicubic").clamp(0, 1)  # (n, 1, 32, 32)
    shift = max(0.0, 1 - settings.scale[1])  # so the largest digit stays inside
    maps = random_affine(n, rng, scale=settings.scale, degrees=settings.degrees, shift=shift)  # (n, 2, 3)
    ink = place(glyphs, size, maps)
    brightness = 0.8 + 0.2 * torch.rand(n, 1, 1, 1, generator=rng)
    scenes = compose(ink, clutter * texture(n, size, rng), brightness)
    return scenes, (ink >= 0.5).float()


def place(glyphs: Tensor, size: int, maps: Tensor) -> Tensor:
    """Draw glyphs (n, 1, h, w) as affine maps (n, 2, 3) place them: ink (n, 1, size, size), both in [0, 1].

    A map takes a point of the scene to one of the glyph, both in [-1, 1]².
    """
    grid = F.affine_grid(maps, [len(glyphs), 1, size, size], align_corners=False)
    return F.grid_sample(glyphs, grid, align_corners=False)


def compose(ink: Tensor, background: Tensor, brightness: Tensor) -> Tensor:
    """Blend ink (n, 1, H, W) of a brightness (n, 1, 1, 1) over a background (n, 1, H, W)."""
    return background * (1 - ink) + brightness * ink
