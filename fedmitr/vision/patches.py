"""Patch geometry: images cut into patches and put together, patch masks, and patches of another grid.

Patches are numbered row by row. `keep` (B, M) says which of the N patches of an image are taken; `positions`
(B, M), or (1, M) where all images share them, says where on the grid given patches stand. A model with
patches of another size is given the same pixels cut anew (`regrid`); its results for its own patches are
carried back by area (`regrid_importance`) or by interpolation (`regrid_tokens`).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor


@dataclass(frozen=True)
class PatchGrid:
    """The patch grid of a ViT.

    channels, image sides `size` in pixels, sides of one `patch` in pixels, and `shape`: patches down and
    across.
    """

    channels: int
    size: tuple[int, int]
    patch: tuple[int, int]
    shape: tuple[int, int]

    @classmethod
    def of(cls, vit: VisionTransformer) -> "PatchGrid":
        """Read the grid off a ViT."""
        embed = vit.patch_embed
        return cls(embed.proj.in_channels, embed.img_size, embed.patch_size, grid_size(vit))

    @property
    def patches(self) -> int:
        """The number of patches N."""
        return self.shape[0] * self.shape[1]

    @property
    def image(self) -> tuple[int, int, int]:
        """The shape (ch, H, W) of an image."""
        return (self.channels, *self.size)


def grid_size(vit: VisionTransformer) -> tuple[int, int]:
    """Return the patches down and across of a ViT; N is their product."""
    return vit.patch_embed.grid_size


def patchify(images: Tensor, patch: tuple[int, int]) -> Tensor:
    """Cut images (B, ch, H, W) into patches (B, N, ch·p·p), numbered row by row."""
    batch, channels, height, width = images.shape
    rows, columns = height // patch[0], width // patch[1]
    cut = images.reshape(batch, channels, rows, patch[0], columns, patch[1])
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, -1)


def unpatchify(patches: Tensor, patch: tuple[int, int], image_size: tuple[int, int]) -> Tensor:
    """Put patches (B, N, ch·p·p) together to images (B, ch, H, W): the inverse of `patchify`."""
    rows, columns = image_size[0] // patch[0], image_size[1] // patch[1]
    cut = patches.reshape(len(patches), rows, columns, -1, *patch)
    return cut.permute(0, 3, 1, 4, 2, 5).reshape(len(patches), -1, *image_size)


def gather_tokens(tokens: Tensor, keep: Tensor) -> Tensor:
    """Pick the rows `keep` (B, M) of tokens (B, N, d): (B, M, d)."""
    return tokens.gather(1, keep[:, :, None].expand(-1, -1, tokens.shape[-1]))


def cut_patches(images: Tensor, patch: tuple[int, int], keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Cut the patches `keep` (B, M) out of images (B, ch, H, W), by default all N.

    Returns patches (B, M, ch·p·p) and their positions (B, M); (1, N) for all.
    """
    patches = patchify(images, patch)
    if keep is None:
        return patches, torch.arange(patches.shape[1], device=images.device)[None]
    return gather_tokens(patches, keep), keep


def patch_share(mask: Tensor, patch: int) -> Tensor:
    """Compute the share (n, N), in [0, 1], of each patch's area that a pixel mask (n, 1, H, W) covers."""
    return F.avg_pool2d(mask, patch).flatten(1)


def pixel_mask(mask: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Spread a patch mask (B, N) over the pixels of its patches: (B, 1, H, W)."""
    height, width = size[0] // grid[0], size[1] // grid[1]
    return mask.view(-1, 1, *grid).repeat_interleave(height, 2).repeat_interleave(width, 3)


def regrid(patches: Tensor, positions: Tensor, own: PatchGrid, other: PatchGrid) -> tuple[Tensor, Tensor]:
    """Cut patches (B, M, ch·p·p) at positions (B, M) or (1, M) anew, on another grid of N' patches.

    Of all N patches all N' are made. Of a subset as large a share of the other grid is made, M'/N' = M/N:
    the patches that the given ones cover most, with zero (grey) where nothing was given. Returns patches
    (B, M', ch·p'·p') and their positions (B, M'); (1, N') for all.
    """
    batch = len(patches)
    at = positions.expand(batch, -1)  # (B, M)
    whole = patches.new_zeros(batch, own.patches, patches.shape[2])
    whole = whole.scatter(1, at[:, :, None].expand(-1, -1, patches.shape[2]), patches)  # (B, N, ch·p·p)
    cut = patchify(unpatchify(whole, own.patch, own.size), other.patch)  # (B, N', ch·p'·p')
    if positions.shape[1] == own.patches:
        return cut, torch.arange(other.patches, device=patches.device)[None]
    given = patches.new_zeros(batch, own.patches).scatter(1, at, 1.0)  # (B, N), 1 where a patch was given
    count = max(1, round(other.patches * positions.shape[1] / own.patches))  # M'
    keep = share_of_area(given, own, other).topk(count, dim=1).indices.sort(dim=1).values  # (B, M')
    return gather_tokens(cut, keep), keep


def regrid_importance(
    importance: Tensor, other_positions: Tensor, other: PatchGrid, positions: Tensor, own: PatchGrid
) -> Tensor:
    """Carry importance (B, M') of another grid's patches back to patches at `positions`, (B, M) or (1, M).

    other_positions, (B, M') or (1, M'), are those of the other grid's patches. A patch's importance is
    spread evenly over its pixels, and an own patch sums what lies in it; so where all patches are given
    none is lost. Returns (B, M).
    """
    batch = len(importance)
    whole = importance.new_zeros(batch, other.patches)
    whole = whole.scatter(1, other_positions.expand(batch, -1), importance)  # (B, N')
    per_patch = other.patch[0] * other.patch[1] / (own.patch[0] * own.patch[1])
    sums = share_of_area(whole, other, own) / per_patch  # mean over pixels -> sum over the patch, (B, N)
    return sums.gather(1, positions.expand(batch, -1))


def share_of_area(values: Tensor, grid: PatchGrid, other: PatchGrid) -> Tensor:
    """Average values (B, N) of a grid's patches over the patches of another grid, by area: (B, N')."""
    pixels = values.view(-1, 1, *grid.shape)
    pixels = pixels.repeat_interleave(grid.patch[0], 2).repeat_interleave(grid.patch[1], 3)
    return F.avg_pool2d(pixels, other.patch).flatten(1)


def regrid_tokens(logits: Tensor, other: PatchGrid, own: PatchGrid) -> Tensor:
    """Interpolate token logits (B, N', C) of another grid bilinearly to the own one: (B, N, C)."""
    image = logits.transpose(1, 2).unflatten(2, other.shape)  # (B, C, rows', columns')
    image = F.interpolate(image, size=own.shape, mode="bilinear", align_corners=False)
    return image.flatten(2).transpose(1, 2)
