"""A ViT's forward pass token by token: class logits, token logits and CLS attention of any subset of patches.

Every function takes a plain timm `VisionTransformer`. Patches that are left out cost nothing: they are
neither embedded nor attended to. Positions are (B, M), or (1, M) where all images share them. How many images
are run together is decided here too.
"""

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from .attention import attention_weights, run_blocks
from .patches import cut_patches

PATCHES_IN_TRAINING = 64 * 64  # one backward pass on a CPU holds no more: 64 images of 32x32 cut by four
MODELS_AT_ONCE = 10  # with more models, fewer images are run at once
# Without gradients a batch has at most so many images, or patches of as many images of 32x32 cut by four.
AT_ONCE = 256
PATCHES_AT_ONCE = AT_ONCE * 64


def images_at_once(model: nn.Module) -> int:
    """Compute how many images to run together through a model, or a module of several, without gradients.

    Memory grows with the patches: 256 images of 24x24 pixels cut by four, 83 of 224x224 cut by sixteen. It
    also grows with the outputs of many models: with 100 models it is a tenth as many images.
    """
    counts = [m.num_patches for m in model.modules() if isinstance(m, PatchEmbed)] or [1]
    return max(
        1, min(AT_ONCE, PATCHES_AT_ONCE // max(counts)) * MODELS_AT_ONCE // max(MODELS_AT_ONCE, len(counts))
    )


def images_in_training(vit: VisionTransformer) -> int:
    """Compute how many images one backward pass holds: 113 of 24x24 pixels cut by 4, 20 of 224x224 by 16."""
    return max(1, PATCHES_IN_TRAINING // vit.patch_embed.num_patches)


def embed_patches(vit: VisionTransformer, patches: Tensor, positions: Tensor) -> Tensor:
    """Embed patches (B, M, ch·p·p) at grid positions (B, M); return (B, P + M, d).

    The P prefix tokens, CLS first, come before the patches, as in timm.
    """
    convolution = vit.patch_embed.proj  # a convolution with stride p is a matrix product on each patch
    tokens = F.linear(patches, convolution.weight.flatten(1), convolution.bias)  # (B, M, d)
    tokens = vit.patch_embed.norm(tokens)
    names = ("cls_token", "dist_token", "reg_token")  # timm's order
    prefix = [getattr(vit, n) for n in names if getattr(vit, n, None) is not None]
    prefix = torch.cat(prefix, dim=1)  # (1, P, d)
    patch_embedding = vit.pos_embed
    if not vit.no_embed_class:
        prefix = prefix + vit.pos_embed[:, : prefix.shape[1]]
        patch_embedding = vit.pos_embed[:, prefix.shape[1] :]  # (1, N, d)
    tokens = tokens + patch_embedding[0][positions]
    tokens = torch.cat([prefix.expand(len(tokens), -1, -1), tokens], dim=1)
    return vit.norm_pre(vit.pos_drop(tokens))


def patch_features(
    vit: VisionTransformer, patches: Tensor, positions: Tensor, rows: int | None = None
) -> Tensor:
    """Compute normalised output tokens (B, P + M, d) of patches (B, M, ch·p·p) at positions (B, M).

    With `rows` only the first so many tokens, (B, rows, d); the last block then computes no others.
    """
    return vit.norm(run_blocks(vit.blocks, embed_patches(vit, patches, positions), rows))


def class_logits(vit: VisionTransformer, patches: Tensor, positions: Tensor) -> Tensor:
    """Compute class logits z^0 (B, C) of patches (B, M, ch·p·p) at positions (B, M).

    vit: a ViT, or a `features.FeatureClassifier`, whose head reads more than CLS.
    """
    if not isinstance(vit, VisionTransformer):
        return vit.patch_logits(patches, positions)
    return vit.forward_head(patch_features(vit, patches, positions, read_by_head(vit)))


def image_logits(vit: VisionTransformer, images: Tensor) -> Tensor:
    """Compute class logits z^0 (B, C) of whole images (B, ch, H, W): timm's forward, with less work."""
    return class_logits(vit, *kept_patches(vit, images))


def read_by_head(vit: VisionTransformer) -> int | None:
    """Return how many tokens the class logits depend on: the prefix, or None (all) for a pooling head."""
    return vit.num_prefix_tokens if vit.attn_pool is None and vit.global_pool == "token" else None


def forward_tokens(
    vit: VisionTransformer, images: Tensor, keep: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute class logits z^0 (B, C) and token logits z^i (B, M, C) of images (B, ch, H, W).

    keep (B, M): patch indices in [0, N), by default all. z^i = h(norm(token_i)) with the classifier h.
    """
    features = patch_features(vit, *kept_patches(vit, images, keep))
    return vit.forward_head(features), token_logits(vit, features)


def token_logits(vit: VisionTransformer, features: Tensor) -> Tensor:
    """Apply the classifier head to every patch token: (B, P + M, d) -> (B, M, C)."""
    return vit.head(vit.fc_norm(features[:, vit.num_prefix_tokens :]))


def kept_patches(vit: VisionTransformer, images: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Cut the patches `keep` (B, M) out of images as the ViT does: `cut_patches` with its patch size."""
    return cut_patches(images, vit.patch_embed.patch_size, keep)


def cls_attention(vit: VisionTransformer, images: Tensor, keep: Tensor | None = None) -> Tensor:
    """Compute the attention of CLS to each patch in the last block, mean over heads (SMI's importance).

    images (B, ch, H, W); keep (B, M) patch indices in [0, N), by default all.
    Returns (B, M); rows sum to less than one, since CLS attends to itself too.
    """
    return patch_importance(vit, *kept_patches(vit, images, keep))


def patch_importance(vit: VisionTransformer, patches: Tensor, positions: Tensor) -> Tensor:
    """Compute `cls_attention` (B, M) of patches (B, M, ch·p·p) at positions (B, M)."""
    tokens = run_blocks(vit.blocks[:-1], embed_patches(vit, patches, positions))
    last = vit.blocks[-1]
    weights, _ = attention_weights(last.attn, last.norm1(tokens), rows=1)  # (B, heads, 1, P + M)
    return weights[:, :, 0, vit.num_prefix_tokens :].mean(dim=1)
