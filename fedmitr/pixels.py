"""Images as flat pixels: which of them a patch holds, and which a jittered view shows at its place.

A view is the image rolled by some pixels and perhaps mirrored, and the kept set moves with it. Of the
view only the patches at the moved places are cut out; `move` gives the places. After a shift that is no
multiple of the patch, the window at such a place also shows a few pixels of its neighbours; where those
have stopped, they are shown as they are and still get no update.
"""

import math
from dataclasses import dataclass

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from .vit import grid_size

Shift = tuple[int, int]


@dataclass(frozen=True)
class Shape:
    """Of images: channels, sides in pixels, sides of a patch, patches down and across."""

    channels: int
    size: tuple[int, int]
    patch: tuple[int, int]
    grid: tuple[int, int]

    @classmethod
    def of(cls, vit: VisionTransformer) -> "Shape":
        embed = vit.patch_embed
        return cls(embed.proj.in_channels, embed.img_size, embed.patch_size, grid_size(vit))

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def image(self) -> tuple[int, int, int]:
        return (self.channels, *self.size)


def random_move(shape: Shape, jitter: float, flip: bool, rng: torch.Generator) -> tuple[Shift, bool]:
    """One random shift of up to `jitter` of each side, in pixels, and whether to mirror (as SMI)."""
    limits = [round(jitter * side) for side in shape.size]
    shift = tuple(int(torch.randint(-n, n + 1, (1,), generator=rng)) for n in limits)
    return shift, flip and bool(torch.rand(1, generator=rng) < 0.5)


def windows(keep: Tensor, shift: Shift, flip: bool, shape: Shape) -> tuple[Tensor, Tensor]:
    """What a view shows at the moved places of kept patches (B, M): flat pixels (B, M·ch·p·p), and places."""
    place = move(keep, shift, flip, shape.grid, shape.patch)
    row, column = _corners(place, shape)
    row = row + torch.arange(shape.patch[0], device=keep.device) - shift[0]
    column = column + torch.arange(shape.patch[1], device=keep.device)
    column = (shape.size[1] - 1 - column if flip else column) - shift[1]
    return _flat(row % shape.size[0], column % shape.size[1], shape).flatten(1), place


def halo(keep: Tensor, shape: Shape) -> Tensor:
    """Flat pixels (B, M, ch, p + 2, p + 2) of patches (B, M) and around them; border pixels repeat."""
    row, column = _corners(keep, shape)
    row = row + torch.arange(-1, shape.patch[0] + 1, device=keep.device)
    column = column + torch.arange(-1, shape.patch[1] + 1, device=keep.device)
    return _flat(row.clamp(0, shape.size[0] - 1), column.clamp(0, shape.size[1] - 1), shape)


def _corners(place: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    """Row and column (B, M, 1) of each patch's first pixel."""
    across = shape.grid[1]
    return (place // across * shape.patch[0])[:, :, None], (place % across * shape.patch[1])[:, :, None]


def _flat(row: Tensor, column: Tensor, shape: Shape) -> Tensor:
    """Rows (B, M, a) and columns (B, M, b) as indices (B, M, ch, a, b) into flat images (B, ch·H·W)."""
    channel = torch.arange(shape.channels, device=row.device)[:, None, None] * (shape.size[0] * shape.size[1])
    return channel + row[:, :, None, :, None] * shape.size[1] + column[:, :, None, None, :]


def move(index: Tensor, shift: Shift, flip: bool, grid: tuple[int, int], patch: tuple[int, int]) -> Tensor:
    """Where patches (B, M) stand after rolling the image by shift pixels, then mirroring it.

    Rolling by whole patches moves each patch to exactly one place; a remainder of up to half a patch
    leaves it at the place that its centre lies in.
    """
    rows, columns = grid
    down, right = (math.floor(s / p + 0.5) for s, p in zip(shift, patch, strict=True))
    row = (index // columns + down) % rows
    column = (index % columns + right) % columns
    return row * columns + (columns - 1 - column if flip else column)


def total_variation(images: Tensor) -> Tensor:
    """L2 total variation (B,) of images (B, ch, H, W): sum of squared differences of neighbouring pixels."""
    return images.diff(dim=2).square_().sum(dim=(1, 2, 3)) + images.diff(dim=3).square_().sum(dim=(1, 2, 3))


def total_variation_gradient(around: Tensor) -> Tensor:
    """Gradient of `total_variation` at patches, from their pixels and those around them.

    around (B, M, ch, p + 2, p + 2), as `halo` lays them out; returns (B, M·ch·p·p).
    """
    middle = around[..., 1:-1, 1:-1]
    neighbours = around[..., :-2, 1:-1] + around[..., 2:, 1:-1]
    neighbours += around[..., 1:-1, :-2]
    neighbours += around[..., 1:-1, 2:]
    return torch.sub(4 * middle, neighbours).mul_(2).flatten(1)
