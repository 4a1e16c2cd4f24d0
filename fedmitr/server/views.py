"""Images as flat pixels: which of them a patch holds, and which a jittered view shows at its place.

A view is the image rolled by some pixels and perhaps mirrored, and the kept set moves with it. Of the
view only the patches at the moved places are cut out; `move` gives the places. After a shift that is no
multiple of the patch, the window at such a place also shows a few pixels of its neighbours; where those
have stopped, they are shown as they are and still get no update.
"""

import itertools
import math
from collections.abc import Callable, Iterator

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from ..settings.schema import DistillSettings
from ..vision.augment import random_maps, texture, warp, warp_mask
from ..vision.patches import PatchGrid, grid_size, pixel_mask
from ..vision.vit import normalisation
from .synthetic import SyntheticSet

Shift = tuple[int, int]
Batch = tuple[Tensor, ...]


def random_move(grid: PatchGrid, jitter: float, flip: bool, rng: torch.Generator) -> tuple[Shift, bool]:
    """One random shift of up to `jitter` of each side, in pixels, and whether to mirror (as SMI)."""
    limits = [round(jitter * side) for side in grid.size]
    shift = tuple(int(torch.randint(-n, n + 1, (1,), generator=rng)) for n in limits)
    return shift, flip and bool(torch.rand(1, generator=rng) < 0.5)


def windows(keep: Tensor, shift: Shift, flip: bool, grid: PatchGrid) -> tuple[Tensor, Tensor]:
    """What a view shows at the moved places of kept patches (B, M): flat pixels (B, M·ch·p·p), and places."""
    place = move(keep, shift, flip, grid.shape, grid.patch)
    row, column = _corners(place, grid)
    row = row + torch.arange(grid.patch[0], device=keep.device) - shift[0]
    column = column + torch.arange(grid.patch[1], device=keep.device)
    column = (grid.size[1] - 1 - column if flip else column) - shift[1]
    return _flat(row % grid.size[0], column % grid.size[1], grid).flatten(1), place


def halo(keep: Tensor, grid: PatchGrid) -> Tensor:
    """Flat pixels (B, M, ch, p + 2, p + 2) of patches (B, M) and around them; border pixels repeat."""
    row, column = _corners(keep, grid)
    row = row + torch.arange(-1, grid.patch[0] + 1, device=keep.device)
    column = column + torch.arange(-1, grid.patch[1] + 1, device=keep.device)
    return _flat(row.clamp(0, grid.size[0] - 1), column.clamp(0, grid.size[1] - 1), grid)


def _corners(place: Tensor, grid: PatchGrid) -> tuple[Tensor, Tensor]:
    """Row and column (B, M, 1) of each patch's first pixel."""
    across = grid.shape[1]
    return (place // across * grid.patch[0])[:, :, None], (place % across * grid.patch[1])[:, :, None]


def _flat(row: Tensor, column: Tensor, grid: PatchGrid) -> Tensor:
    """Rows (B, M, a) and columns (B, M, b) as indices (B, M, ch, a, b) into flat images (B, ch·H·W)."""
    channel = torch.arange(grid.channels, device=row.device)[:, None, None] * (grid.size[0] * grid.size[1])
    return channel + row[:, :, None, :, None] * grid.size[1] + column[:, :, None, None, :]


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


def view(
    student: VisionTransformer,
    synthetic: SyntheticSet,
    pick: Tensor,
    settings: DistillSettings,
    rng: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """A random view of images `pick` (B,): pixels (B, ch, H, W) and patch mask (B, N), moved together.

    With background=texture the low-information patches show a fresh texture in every view, so that
    the student cannot learn from what surrounded the foreground.
    """
    images, mask = synthetic.pixels[pick], synthetic.mask[pick]
    grid = grid_size(student)
    if settings.augment:
        maps = random_maps(len(pick), settings.augment, rng)
        images, mask = warp(images, maps), warp_mask(mask, maps, grid)
    if settings.background == "texture" and not mask.all():  # dense inversion has no background
        foreground = pixel_mask(mask, grid, images.shape[-2:])
        images = torch.where(foreground, images, random_textures(student, images, rng))
    return images, mask


def random_textures(student: VisionTransformer, like: Tensor, rng: torch.Generator) -> Tensor:
    """Smooth random textures of random contrast, normalised and shaped as `like` (B, ch, H, W)."""
    batch, channels, side, _ = like.shape
    contrast = torch.rand(batch, 1, 1, 1, generator=rng)
    mean, std = (s.to(like) for s in normalisation(student))
    smooth = contrast * texture(batch * channels, side, rng).view(batch, channels, side, side)
    return (smooth.to(like) - mean) / std


def draw_views(
    fresh: Callable[[Tensor], Batch], count: int, views: int, rng: torch.Generator, batch_size: int
) -> Batch:
    """`views` random views of each of `count` images: columns of rows.

    `fresh` draws and labels batch_size of them together.
    """
    drawn = zip(*map(fresh, epochs(count, batch_size, rng, views)), strict=True)
    return tuple(map(torch.cat, drawn))


def rows_of(columns: Batch) -> Callable[[Tensor], Batch]:
    """A function from indices (B,) to those rows of every column."""
    return lambda pick: tuple(column[pick] for column in columns)


def epochs(count: int, batch_size: int, rng: torch.Generator, times: int | None = None) -> Iterator[Tensor]:
    """Indices of batch after batch, each of `count` once an epoch, for ever or `times` epochs."""
    for _ in itertools.count() if times is None else range(times):
        yield from torch.randperm(count, generator=rng).split(batch_size)


Batch = tuple[Tensor, ...]
