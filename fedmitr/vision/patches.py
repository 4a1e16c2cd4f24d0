"""Images as flat pixels: which of them a patch holds, and which a jittered view shows at its place.

A view is the image rolled by some pixels and perhaps mirrored, and the kept set moves with it. Of the
view only the patches at the moved places are cut out; `move` gives the places. After a shift that is no
multiple of the patch, the window at such a place also shows a few pixels of its neighbours; where those
have stopped, they are shown as they are and still get no update.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor


@dataclass(frozen=True)
class PatchGrid:
    """Of images: channels, sides in pixels, sides of a patch, patches down and across."""

    channels: int
    size: tuple[int, int]
    patch: tuple[int, int]
    shape: tuple[int, int]

    @classmethod
    def of(cls, vit: VisionTransformer) -> "PatchGrid":
        embed = vit.patch_embed
        return cls(embed.proj.in_channels, embed.img_size, embed.patch_size, grid_size(vit))

    @property
    def patches(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def image(self) -> tuple[int, int, int]:
        return (self.channels, *self.size)


def grid_size(vit: VisionTransformer) -> tuple[int, int]:
    """Rows and columns of the patch grid; N is their product."""
    return vit.patch_embed.grid_size


def patchify(images: Tensor, patch: tuple[int, int]) -> Tensor:
    """Images (B, ch, H, W) cut into patches (B, N, ch·p·p), row-major."""
    batch, channels, height, width = images.shape
    rows, columns = height // patch[0], width // patch[1]
    cut = images.reshape(batch, channels, rows, patch[0], columns, patch[1])
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, -1)


def unpatchify(patches: Tensor, patch: tuple[int, int], image_size: tuple[int, int]) -> Tensor:
    """The inverse of `patchify`: (B, N, ch·p·p) back to images (B, ch, H, W)."""
    rows, columns = image_size[0] // patch[0], image_size[1] // patch[1]
    cut = patches.reshape(len(patches), rows, columns, -1, *patch)
    return cut.permute(0, 3, 1, 4, 2, 5).reshape(len(patches), -1, *image_size)


def gather_tokens(tokens: Tensor, index: Tensor) -> Tensor:
    """Rows `index` (B, M) of tokens (B, N, d): (B, M, d)."""
    return tokens.gather(1, index[:, :, None].expand(-1, -1, tokens.shape[-1]))


def cut_patches(images: Tensor, patch: tuple[int, int], keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`kept_patches` of any model with patches of this size."""
    patches = patchify(images, patch)
    if keep is None:
        return patches, torch.arange(patches.shape[1], device=images.device)[None]
    return gather_tokens(patches, keep), keep


def patch_share(mask: Tensor, patch: int) -> Tensor:
    """Share of each patch's area that a pixel mask (n, 1, H, W) covers: (n, N) in [0, 1]."""
    return F.avg_pool2d(mask, patch).flatten(1)


def pixel_mask(mask: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """A patch mask (B, N) as pixels (B, 1, H, W)."""
    height, width = size[0] // grid[0], size[1] // grid[1]
    return mask.view(-1, 1, *grid).repeat_interleave(height, 2).repeat_interleave(width, 3)


Seen = tuple[Tensor, Tensor]


def regrid(patches: Tensor, position: Tensor, own: PatchGrid, other: PatchGrid) -> Seen:
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


def regrid_importance(
    importance: Tensor, seen: Tensor, other: PatchGrid, position: Tensor, own: PatchGrid
) -> Tensor:
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


def share_of_area(values: Tensor, grid: PatchGrid, other: PatchGrid) -> Tensor:
    """Values (B, N) of a grid's patches as means over the patches of another grid, by area: (B, N')."""
    pixels = values.view(-1, 1, *grid.shape)
    pixels = pixels.repeat_interleave(grid.patch[0], 2).repeat_interleave(grid.patch[1], 3)
    return F.avg_pool2d(pixels, other.patch).flatten(1)


def regrid_tokens(values: Tensor, other: PatchGrid, own: PatchGrid) -> Tensor:
    """Token logits (B, N', C) of the other grid, bilinearly interpolated to ours: (B, N, C)."""
    image = values.transpose(1, 2).unflatten(2, other.shape)
    image = F.interpolate(image, size=own.shape, mode="bilinear", align_corners=False)
    return image.flatten(2).transpose(1, 2)
