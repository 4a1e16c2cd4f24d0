"""The published loop of sparse model inversion (SMI, Hu et al. 2024), written plainly, to measure against.

Independent of the package: only torch and timm. It does what the authors' public code does at each
iteration, and no more: the whole image is jittered, embedded, regularised and clipped, every block computes
its attention weights, the teacher's parameters keep `requires_grad`, and the loss is read back to Python.
"""

import random

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor


def attention(layer: torch.nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return the output (B, L, d) and weights (B, heads, L, L) of attention over tokens (B, L, d)."""
    batch, length, width = tokens.shape
    qkv = layer.qkv(tokens).reshape(batch, length, 3, layer.num_heads, -1).permute(2, 0, 3, 1, 4)
    query, key, value = qkv.unbind(0)
    weights = (query @ key.transpose(-2, -1) * layer.scale).softmax(dim=-1)
    return layer.proj((weights @ value).transpose(1, 2).reshape(batch, length, width)), weights


def forward(vit: VisionTransformer, images: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits from patches `keep` (B, M) of images (B, ch, H, W), and the last attention weights."""
    tokens = vit.patch_embed(images) + vit.pos_embed[:, 1:]
    tokens = tokens.gather(1, keep[:, :, None].expand(-1, -1, tokens.shape[-1]))
    cls = (vit.cls_token + vit.pos_embed[:, :1]).expand(len(images), -1, -1)
    tokens = torch.cat([cls, tokens], dim=1)
    for block in vit.blocks:
        mixed, weights = attention(block.attn, block.norm1(tokens))
        tokens = tokens + mixed
        tokens = tokens + block.mlp(block.norm2(tokens))
    return vit.head(vit.norm(tokens)[:, 0]), weights


def jitter(images: Tensor, keep: Tensor, patch: int, limit: int) -> tuple[Tensor, Tensor]:
    """Roll all images by random pixels and perhaps mirror them; kept patches move along by whole patches."""
    side = images.shape[-1] // patch
    down, right = random.randint(-limit, limit), random.randint(-limit, limit)
    images = torch.roll(images, (down, right), dims=(2, 3))
    rows = (keep // side + round(down / patch)) % side
    columns = (keep % side + round(right / patch)) % side
    if random.random() < 0.5:
        images, columns = images.flip(3), side - 1 - columns
    return images, rows * side + columns


def total_variation(images: Tensor) -> Tensor:
    """Return the norms of differences of neighbours, of the whole batch, added up over four directions."""
    right = images[..., :-1] - images[..., 1:]
    down = images[:, :, :-1] - images[:, :, 1:]
    rising = images[:, :, 1:, :-1] - images[:, :, :-1, 1:]
    falling = images[:, :, :-1, :-1] - images[:, :, 1:, 1:]
    return right.norm() + down.norm() + rising.norm() + falling.norm()


def clip(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    """Clip normalised images to black and white, channel by channel, in place."""
    for channel, (m, s) in enumerate(zip(mean, std, strict=True)):
        images[:, channel].clamp_(-m / s, (1 - m) / s)


def invert_plainly(
    vit: VisionTransformer,
    labels: Tensor,
    iterations: int,
    stop_at: tuple[int, ...],
    stop_ratio: tuple[float, ...],
    *,
    lr: float = 0.25,
    tv: float = 1e-4,
    share: float = 1 / 8,
    on_iteration=lambda step: None,
) -> tuple[Tensor, Tensor]:
    """Invert labels (B,) with one teacher: return images (B, ch, H, W) and the patches (B, M) kept."""
    patch, size = vit.patch_embed.patch_size[0], vit.patch_embed.img_size[0]
    images = torch.randn(len(labels), vit.patch_embed.proj.in_channels, size, size, requires_grad=True)
    optimizer = torch.optim.Adam([images], lr, betas=(0.5, 0.99))
    keep = torch.arange(vit.patch_embed.num_patches).repeat(len(labels), 1)
    best, best_loss = images.data, float("inf")
    stops = dict(zip(stop_at, stop_ratio, strict=True))
    for step in range(iterations):
        if step in stops:
            _, weights = forward(vit, images, keep)
            importance = weights.mean(dim=1)[:, 0, 1:]
            stay = importance.topk(int(keep.shape[1] * (1 - stops[step])), dim=1).indices
            keep = keep.gather(1, stay)
        view, view_keep = jitter(images, keep, patch, round(share * size))
        logits, _ = forward(vit, view, view_keep)
        loss = F.cross_entropy(logits, labels) + tv * total_variation(images)
        if loss.item() < best_loss:
            best, best_loss = images.data, loss.item()  # the live tensor, as published
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        clip(images.data, vit.pretrained_cfg["mean"], vit.pretrained_cfg["std"])
        on_iteration(step)
    return best, keep
