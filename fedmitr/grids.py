"""One image on two patch grids: what a teacher with other patches than the student's makes of it.

The images and masks of inversion and distillation lie on the student's grid. A client whose ViT cuts the
same image into other patches gets its own cut of what is kept, and its answers a patch are brought back.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .pixels import Shape
from .vit import gather_tokens, patchify, unpatchify

Seen = tuple[Tensor, Tensor]


def regrid(patches: Tensor, position: Tensor, own: Shape, other: Shape) -> Seen:
    """Patches (B, M, ch·p·p) at positions (B, M), or (1, M) for all, cut anew on another grid of N'.

    All patches stay all. Of a subset, as large a share of the other grid's patches is taken, M'/N' = M/N:
    those that the kept ones cover most; what was left out is grey (zero) in them.
    """
    batch = len(patches)
    everywhere = position.expand(batch, -1)[:, :, None]
    whole = patches.new_zeros(batch, own.patches, patches.shape[2])
    whole = whole.scatter(1, everywhere.expand(-1, -1, patches.shape[2]), patches)
    cut = patchify(unpatchify(whole, own.patch, own.size), other.patch)
    if position.shape[1] == own.patches:
        return cut, torch.arange(other.patches, device=patches.device)[None]
    kept = patches.new_zeros(batch, own.patches).scatter(1, everywhere[:, :, 0], 1.0)
    count = max(1, round(other.patches * position.shape[1] / own.patches))
    keep = share_of_area(kept, own, other).topk(count, dim=1).indices.sort(dim=1).values
    return gather_tokens(cut, keep), keep


def regrid_importance(importance: Tensor, seen: Tensor, other: Shape, position: Tensor, own: Shape) -> Tensor:
    """Importance (B, M') of the other grid's patches `seen`, (B, M') or (1, M'), for patches `position`.

    position is (B, M) or (1, M); returns (B, M).

    A patch's importance is spread evenly over its pixels, and a patch of ours sums what lies in it; so
    nothing is lost where all are seen.
    """
    batch = len(importance)
    whole = importance.new_zeros(batch, other.patches).scatter(1, seen.expand(batch, -1), importance)
    per_patch = other.patch[0] * other.patch[1] / (own.patch[0] * own.patch[1])
    ours = share_of_area(whole, other, own) / per_patch
    return ours.gather(1, position.expand(batch, -1))


def share_of_area(values: Tensor, grid: Shape, other: Shape) -> Tensor:
    """Values (B, N) of a grid's patches as means over the patches of another grid, by area: (B, N')."""
    pixels = values.view(-1, 1, *grid.grid)
    pixels = pixels.repeat_interleave(grid.patch[0], 2).repeat_interleave(grid.patch[1], 3)
    return F.avg_pool2d(pixels, other.patch).flatten(1)


def regrid_tokens(values: Tensor, other: Shape, own: Shape) -> Tensor:
    """Token logits (B, N', C) of the other grid, bilinearly interpolated to ours: (B, N, C)."""
    image = values.transpose(1, 2).unflatten(2, other.grid)
    image = F.interpolate(image, size=own.grid, mode="bilinear", align_corners=False)
    return image.flatten(2).transpose(1, 2)
