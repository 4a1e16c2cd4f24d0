"""The model: a timm Vision Transformer seen token by token, on any subset of its patches.

Every function takes a plain timm `VisionTransformer`; nothing of timm is copied or subclassed.
A subset is given by patch indices in row-major order of the patch grid. Patches that are left
out cost nothing: they are neither embedded nor attended to.
"""

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from .attention import attention_weights, run_blocks
from .patches import cut_patches

PATCHES_IN_TRAINING = 64 * 64  # one backward pass on a CPU holds no more: 64 images of 32x32 cut by four
MODELS_AT_ONCE = 10  # of more, less is held for each
AT_ONCE = 256  # images in a batch that no gradient is taken of, where they are small:
PATCHES_AT_ONCE = AT_ONCE * 64  # a batch holds no more patches than so many images of 32x32 cut by four


def images_at_once(model: nn.Module) -> int:
    """How many images to put through a model, or several in one, together where no gradient is wanted.

    Memory grows with the patches: 256 images of 24x24 pixels cut by four, 83 of 224x224 cut by sixteen; and
    with the answers where there are many models: of 100 a tenth as many images.
    """
    counts = [m.num_patches for m in model.modules() if isinstance(m, PatchEmbed)] or [1]
    return max(
        1, min(AT_ONCE, PATCHES_AT_ONCE // max(counts)) * MODELS_AT_ONCE // max(MODELS_AT_ONCE, len(counts))
    )


def images_in_training(vit: VisionTransformer) -> int:
    """How many images to hold in one backward pass: 113 of 24x24 pixels cut by four, 20 of 224x224 by 16."""
    return max(1, PATCHES_IN_TRAINING // vit.patch_embed.num_patches)


def embed_patches(vit: VisionTransformer, patches: Tensor, position: Tensor) -> Tensor:
    """Patches (B, M, ch·p·p) at grid positions (B, M), or (1, M) for all -> the blocks' input (B, P + M, d).

    P prefix tokens (CLS first) come before the patches, as in timm.
    """
    convolution = vit.patch_embed.proj
    tokens = F.linear(patches, convolution.weight.flatten(1), convolution.bias)
    tokens = vit.patch_embed.norm(tokens)
    names = ("cls_token", "dist_token", "reg_token")  # timm's order
    prefix = [getattr(vit, n) for n in names if getattr(vit, n, None) is not None]
    prefix = torch.cat(prefix, dim=1)
    at_patches = vit.pos_embed
    if not vit.no_embed_class:
        prefix = prefix + vit.pos_embed[:, : prefix.shape[1]]
        at_patches = vit.pos_embed[:, prefix.shape[1] :]
    tokens = tokens + at_patches[0][position]
    tokens = torch.cat([prefix.expand(len(tokens), -1, -1), tokens], dim=1)
    return vit.norm_pre(vit.pos_drop(tokens))


def patch_features(
    vit: VisionTransformer, patches: Tensor, position: Tensor, rows: int | None = None
) -> Tensor:
    """Normalised output tokens (B, P + M, d) of patches (B, M, ch·p·p) at positions (B, M) or (1, M).

    rows: only the first so many tokens, (B, rows, d); the last block then computes no others.
    """
    return vit.norm(run_blocks(vit.blocks, embed_patches(vit, patches, position), rows))


def class_logits(vit: VisionTransformer, patches: Tensor, position: Tensor) -> Tensor:
    """Class logits z^0 (B, C) of patches (B, M, ch·p·p) at positions (B, M), or (1, M) for all images."""
    return vit.forward_head(patch_features(vit, patches, position, read_by_head(vit)))


def image_logits(vit: VisionTransformer, images: Tensor) -> Tensor:
    """Class logits z^0 (B, C) of whole images (B, ch, H, W): timm's forward, with less work."""
    return class_logits(vit, *kept_patches(vit, images))


def read_by_head(vit: VisionTransformer) -> int | None:
    """How many tokens the class logits depend on: the prefix, or all (None) where the head pools patches."""
    return vit.num_prefix_tokens if vit.attn_pool is None and vit.global_pool == "token" else None


def forward_tokens(
    vit: VisionTransformer, images: Tensor, keep: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Class logits z^0 (B, C) and token logits z^i (B, M, C) of images (B, ch, H, W).

    keep (B, M): patch indices in [0, N), default all. z^i = h(norm(token_i)).
    """
    features = patch_features(vit, *kept_patches(vit, images, keep))
    return vit.forward_head(features), token_logits(vit, features)


def token_logits(vit: VisionTransformer, features: Tensor) -> Tensor:
    """The classifier head on every patch token: (B, P + M, d) -> (B, M, C)."""
    return vit.head(vit.fc_norm(features[:, vit.num_prefix_tokens :]))


def kept_patches(vit: VisionTransformer, images: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The kept patches (B, M, ch·p·p) of images and their positions (B, M); without `keep` (1, N), all."""
    return cut_patches(images, vit.patch_embed.patch_size, keep)


def cls_attention(vit: VisionTransformer, images: Tensor, keep: Tensor | None = None) -> Tensor:
    """Attention of CLS to each patch in the last block, mean over heads (SMI's importance).

    images (B, ch, H, W); keep (B, M) patch indices in [0, N), default all.
    Returns (B, M); rows sum to less than one: CLS attends to itself too.
    """
    return patch_importance(vit, *kept_patches(vit, images, keep))


def patch_importance(vit: VisionTransformer, patches: Tensor, position: Tensor) -> Tensor:
    """`cls_attention` for patches (B, M, ch·p·p) at grid positions (B, M)."""
    tokens = run_blocks(vit.blocks[:-1], embed_patches(vit, patches, position))
    last = vit.blocks[-1]
    weights, _ = attention_weights(last.attn, last.norm1(tokens), rows=1)
    return weights[:, :, 0, vit.num_prefix_tokens :].mean(dim=1)
