"""Random views of synthetic images, for inversion (step 3) and distillation (step 5), and total variation.

Inversion: a view is the image rolled by some pixels and perhaps mirrored, or warped by an affine map, and
the kept patches move with it (`random_view`). Only the patches at the moved positions are cut out. Images
are flat pixels (B, ch·H·W); `windows` says which of them a patch of the view shows, `move` at which position
it stands. After a shift that is no multiple of the patch, a window also shows a few pixels of neighbouring
patches; those of stopped patches are shown as they are and still get no update. The two forms of total
variation and their gradients are the regulariser of the same images.

Distillation: a view of a synthetic image is warped together with its patch mask, and its background may be
replaced by texture (`view`); views are drawn batch by batch in `epochs`.
"""

import itertools
import math
from collections.abc import Callable, Iterator

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from ..settings.schema import DistillSettings, InversionSettings
from ..vision.augment import pink_noise, random_maps, warp, warp_coverage, warp_mask
from ..vision.patches import PatchGrid, gather_tokens, grid_size, patchify, pixel_mask
from ..vision.vit import normalisation
from .synthetic import SyntheticSet

Shift = tuple[int, int]
Batch = tuple[Tensor, ...]  # columns of one batch; each function states their order
# patches (B, M, ch·p·p), positions (B, M), and the gradient's way back to images (B, ch·H·W)
PatchView = tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]

# Views of the images under inversion.


def random_view(
    image: Tensor, keep: Tensor, grid: PatchGrid, settings: InversionSettings, rng: torch.Generator
) -> PatchView:
    """Draw a view of flat images (B, ch·H·W), on as many patches as are kept, keep (B, M) or (1, M) for all.

    Images are rolled and mirrored; with `settings.augment` they go through affine maps instead, which also
    shift. Returns the view's patches (B, M, ch·p·p), which require a gradient, their positions (B, M) or
    (1, M), and a function that takes the gradient at these patches to the one at the images (B, ch·H·W).
    """
    shift, mirrored = random_move(grid, settings.jitter, settings.flip, rng)
    if settings.augment:
        maps = random_maps(len(image), settings.augment, rng)  # (B, 2, 3)
        maps[:, :, 0] *= -1 if mirrored else 1
        return warped_view(image, keep, grid, maps)
    index, positions = windows(keep, shift, mirrored, grid)
    index = index.expand(len(image), -1)  # one row while all images keep the same patches
    patches = image.gather(1, index).view(len(image), keep.shape[1], -1).requires_grad_()
    return patches, positions, lambda grad: torch.zeros_like(image).scatter_(1, index, grad.flatten(1))


def warped_view(image: Tensor, keep: Tensor, grid: PatchGrid, maps: Tensor) -> PatchView:
    """Return the `random_view` through affine maps (B, 2, 3).

    Its M positions are those that kept patches cover most after the maps.
    """
    whole = image.view(len(image), *grid.image).detach().requires_grad_()  # (B, ch, H, W)
    patches, positions = patchify(warp(whole, maps), grid.patch), keep  # (B, N, ch·p·p)
    if keep.shape[1] < grid.patches:
        coverage = warp_coverage(kept_mask(keep, grid, len(image)), maps, grid.shape)  # (B, N)
        positions = coverage.topk(keep.shape[1], dim=1).indices.sort(dim=1).values  # (B, M)
        patches = gather_tokens(patches, positions)  # (B, M, ch·p·p)
    shown = patches.detach().requires_grad_()
    return shown, positions, lambda grad: torch.autograd.grad(patches, whole, grad)[0].flatten(1)


def random_move(grid: PatchGrid, jitter: float, flip: bool, rng: torch.Generator) -> tuple[Shift, bool]:
    """Draw one shift of up to `jitter` of each side, in pixels, and whether to mirror (as SMI)."""
    limits = [round(jitter * side) for side in grid.size]
    shift = tuple(int(torch.randint(-n, n + 1, (1,), generator=rng)) for n in limits)
    return shift, flip and bool(torch.rand(1, generator=rng) < 0.5)


def windows(keep: Tensor, shift: Shift, flip: bool, grid: PatchGrid) -> tuple[Tensor, Tensor]:
    """Return pixel indices and positions of kept patches (B, M) in a rolled and mirrored view.

    The indices (B, M·ch·p·p) point into flat images (B, ch·H·W); positions are (B, M).
    """
    positions = move(keep, shift, flip, grid.shape, grid.patch)
    row, column = _corners(positions, grid)  # (B, M, 1)
    row = row + torch.arange(grid.patch[0], device=keep.device) - shift[0]
    column = column + torch.arange(grid.patch[1], device=keep.device)
    column = (grid.size[1] - 1 - column if flip else column) - shift[1]
    return _flat(row % grid.size[0], column % grid.size[1], grid).flatten(1), positions


def move(keep: Tensor, shift: Shift, flip: bool, grid: tuple[int, int], patch: tuple[int, int]) -> Tensor:
    """Return the positions (B, M) of patches (B, M) after the image is rolled by shift pixels, then mirrored.

    grid: patches down and across; patch: its sides in pixels. Rolling by whole patches moves each patch to
    exactly one position; a remainder of up to half a patch leaves it at the position of its centre.
    """
    rows, columns = grid
    down, right = (math.floor(s / p + 0.5) for s, p in zip(shift, patch, strict=True))
    row = (keep // columns + down) % rows
    column = (keep % columns + right) % columns
    return row * columns + (columns - 1 - column if flip else column)


def halo(keep: Tensor, grid: PatchGrid) -> Tensor:
    """Return flat pixels (B, M, ch, p + 2, p + 2) of patches (B, M) and around them; border pixels repeat."""
    row, column = _corners(keep, grid)  # (B, M, 1)
    row = row + torch.arange(-1, grid.patch[0] + 1, device=keep.device)
    column = column + torch.arange(-1, grid.patch[1] + 1, device=keep.device)
    return _flat(row.clamp(0, grid.size[0] - 1), column.clamp(0, grid.size[1] - 1), grid)


def kept_mask(keep: Tensor, grid: PatchGrid, batch: int) -> Tensor:
    """Return kept patches (B, M), or (1, M) for all, as a mask (B, N)."""
    empty = torch.zeros(batch, grid.patches, dtype=torch.bool, device=keep.device)
    return empty.scatter(1, keep.expand(batch, -1), True)


def _corners(positions: Tensor, grid: PatchGrid) -> tuple[Tensor, Tensor]:
    """Return row and column (B, M, 1) of the first pixel at each position (B, M)."""
    across = grid.shape[1]
    return (positions // across * grid.patch[0])[:, :, None], (positions % across * grid.patch[1])[:, :, None]


def _flat(row: Tensor, column: Tensor, grid: PatchGrid) -> Tensor:
    """Turn rows (B, M, a) and columns (B, M, b) into indices (B, M, ch, a, b) of flat images (B, ch·H·W)."""
    channel = torch.arange(grid.channels, device=row.device)[:, None, None] * (grid.size[0] * grid.size[1])
    return channel + row[:, :, None, :, None] * grid.size[1] + column[:, :, None, None, :]


# Total variation.


def total_variation(images: Tensor) -> Tensor:
    """Return the L2 total variation (B,) of images (B, ch, H, W): Σ (x_u − x_v)² over neighbours u, v."""
    return images.diff(dim=2).square_().sum(dim=(1, 2, 3)) + images.diff(dim=3).square_().sum(dim=(1, 2, 3))


def total_variation_gradient(around: Tensor) -> Tensor:
    """Return the gradient of `total_variation` at patches, 2 Σ_v (x_u − x_v): (B, M·ch·p·p).

    around (B, M, ch, p + 2, p + 2): the patches and the pixels around them, as `halo` lays them out.
    """
    middle = around[..., 1:-1, 1:-1]
    neighbours = around[..., :-2, 1:-1] + around[..., 2:, 1:-1]
    neighbours += around[..., 1:-1, :-2]
    neighbours += around[..., 1:-1, 2:]
    return torch.sub(4 * middle, neighbours).mul_(2).flatten(1)


ALL, BUT_LAST, BUT_FIRST = slice(None), slice(None, -1), slice(1, None)
# where pixels u stand in images, and their neighbours v: to the right, below, and on the two diagonals
NEIGHBOURS = (
    ((..., ALL, BUT_LAST), (..., ALL, BUT_FIRST)),
    ((..., BUT_LAST, ALL), (..., BUT_FIRST, ALL)),
    ((..., BUT_FIRST, BUT_LAST), (..., BUT_LAST, BUT_FIRST)),
    ((..., BUT_LAST, BUT_LAST), (..., BUT_FIRST, BUT_FIRST)),
)


def batch_variation(images: Tensor) -> Tensor:
    """Return the total variation of a batch (B, ch, H, W) as SMI's code has it: Σ_d ‖x_u − x_v‖.

    d runs over four directions, u and v over the neighbours in each, of all images of the batch together.
    """
    return sum(torch.linalg.vector_norm(images[u] - images[v]) for u, v in NEIGHBOURS)


def batch_variation_gradient(images: Tensor) -> Tensor:
    """Return the gradient of `batch_variation` (B, ch, H, W), Σ_d (x_u − x_v) / ‖x_u − x_v‖; 0 for 0 / 0."""
    gradient = torch.zeros_like(images)
    for u, v in NEIGHBOURS:
        difference = images[u] - images[v]
        difference /= torch.linalg.vector_norm(difference).clamp(min=torch.finfo(images.dtype).tiny)
        gradient[u] += difference
        gradient[v] -= difference
    return gradient


# Views of a synthetic set, for the student.


def view(
    vit: VisionTransformer,
    synthetic: SyntheticSet,
    pick: Tensor,
    settings: DistillSettings,
    rng: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Draw a view of images `pick` (B,): pixels (B, ch, H, W) and patch mask (B, N), moved together.

    vit gives the patch grid and the pixels' normalisation. With background=texture the low-information
    patches show a fresh texture in every view, so that the student cannot learn from what surrounded the
    foreground.
    """
    images, mask = synthetic.pixels[pick], synthetic.mask[pick]
    grid = grid_size(vit)
    if settings.augment:
        maps = random_maps(len(pick), settings.augment, rng)
        images, mask = warp(images, maps), warp_mask(mask, maps, grid)
    if settings.background == "texture" and not mask.all():  # dense inversion has no background
        foreground = pixel_mask(mask, grid, images.shape[-2:])  # (B, 1, H, W)
        images = torch.where(foreground, images, random_textures(vit, images, rng))
    return images, mask


def random_textures(vit: VisionTransformer, like: Tensor, rng: torch.Generator) -> Tensor:
    """Draw textures shaped as `like` (B, ch, H, W) and normalised for vit: pink noise of random contrast.

    Each has a contrast c in [0, 1] and pixels in [b, b + c], of a random darkest b in [0, 1 − c]. No task
    draws its background this way: a student that knows it knows nothing of the clients' images.
    """
    contrast, darkest = torch.rand(2, len(like), 1, 1, 1, generator=rng)
    noise = pink_noise(len(like) * like.shape[1], like.shape[-2:], rng).view(like.shape)
    mean, std = (s.to(like) for s in normalisation(vit))
    return (((1 - contrast) * darkest + contrast * noise).to(like) - mean) / std


def draw_views(
    draw: Callable[[Tensor], Batch], count: int, views: int, rng: torch.Generator, batch_size: int
) -> Batch:
    """Draw `views` views of each of `count` images, batch_size at a time.

    draw(indices (B,)) returns columns of B rows, such as a view's pixels and labels. Returns the columns of
    all batches joined, each of count·views rows, in the order drawn.
    """
    drawn = zip(*map(draw, epochs(count, batch_size, rng, views)), strict=True)
    return tuple(map(torch.cat, drawn))


def rows_of(columns: Batch) -> Callable[[Tensor], Batch]:
    """Return a function from indices (B,) to those rows of every column."""
    return lambda pick: tuple(column[pick] for column in columns)


def epochs(count: int, batch_size: int, rng: torch.Generator, times: int | None = None) -> Iterator[Tensor]:
    """Yield batches of indices, each of `count` once an epoch, for `times` epochs or, without, for ever."""
    for _ in itertools.count() if times is None else range(times):
        yield from torch.randperm(count, generator=rng).split(batch_size)
