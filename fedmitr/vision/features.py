"""Features of whole images from a ViT, and a classifier that is linear on them."""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..settings.schema import FeatureTokens
from .attention import run_blocks
from .patches import grid_size
from .tokens import embed_patches, kept_patches, patch_features

SIDES = 2  # regions down and across: an image has four
LAST_BLOCKS = 2  # blocks after which "regions" are read


def feature_width(vit: VisionTransformer, tokens: FeatureTokens) -> int:
    """Return D, the number of features of one image: a multiple of the ViT's width."""
    return vit.embed_dim * feature_parts(vit, tokens)


def feature_parts(vit: VisionTransformer, tokens: FeatureTokens) -> int:
    """Return how many vectors of the ViT's width are set side by side to features."""
    if tokens == "regions":
        return (1 + SIDES**2) * min(LAST_BLOCKS, len(vit.blocks))
    return 2 if tokens == "both" else 1


def image_features(
    vit: VisionTransformer, images: Tensor, tokens: FeatureTokens, keep: Tensor | None = None
) -> Tensor:
    """Compute features (B, D) of images (B, ch, H, W): means of output tokens, side by side.

    tokens: "cls", CLS; "patches", the mean of the patches; "both" of them, all after the last block;
    "regions": CLS and the mean of each quarter of the image, after each of the last two blocks. All go
    through the norm.
    keep (B, M): the patches that are shown, by default all. A region without any has the mean of all shown.
    """
    return features_of_patches(vit, *kept_patches(vit, images, keep), tokens)


def features_of_patches(
    vit: VisionTransformer, patches: Tensor, positions: Tensor, tokens: FeatureTokens
) -> Tensor:
    """Compute `image_features` (B, D) from patches (B, M, ch·p·p) at positions (B, M), or (1, M) for all."""
    if tokens == "cls":
        return patch_features(vit, patches, positions, 1)[:, 0]
    if tokens == "regions":
        shares = region_shares(vit, positions)  # (B or 1, R, M)
        parts = []
        for out in last_outputs(vit, patches, positions):
            parts += [out[:, 0], (shares @ out[:, vit.num_prefix_tokens :]).flatten(1)]  # (B, d), (B, R·d)
        return torch.cat(parts, dim=1)
    out = patch_features(vit, patches, positions)  # (B, P + M, d)
    mean = out[:, vit.num_prefix_tokens :].mean(dim=1)  # (B, d)
    return mean if tokens == "patches" else torch.cat([out[:, 0], mean], dim=1)


def last_outputs(vit: VisionTransformer, patches: Tensor, positions: Tensor) -> list[Tensor]:
    """Compute the tokens (B, P + M, d) after each of the last `LAST_BLOCKS` blocks, each under the norm."""
    early = max(0, len(vit.blocks) - LAST_BLOCKS)
    tokens = run_blocks(vit.blocks[:early], embed_patches(vit, patches, positions))
    outputs = []
    for block in vit.blocks[early:]:
        tokens = run_blocks([block], tokens)
        outputs.append(vit.norm(tokens))
    return outputs


def region_shares(vit: VisionTransformer, positions: Tensor) -> Tensor:
    """Return each patch's share of the mean of each region, (B, R, M) for positions (B, M); rows sum to one.

    Regions are the cells of a 2×2 grid. Where the patch grid has an odd side, the middle belongs to both
    halves, as in torch's adaptive pooling. A region without patches takes the mean of all.
    """
    member = region_members(*grid_size(vit)).to(positions.device)[:, positions]  # (R, B, M)
    member = member.transpose(0, 1).to(vit.pos_embed)  # (B, R, M)
    member = torch.where(member.any(dim=2, keepdim=True), member, torch.ones_like(member))
    return member / member.sum(dim=2, keepdim=True)


@lru_cache(maxsize=32)
def region_members(rows: int, columns: int) -> Tensor:
    """Return which patches of a grid, numbered row by row, each region holds: (R, rows·columns) of bool."""
    down, across = (_halves(side) for side in (rows, columns))  # (SIDES, side)
    return (down[:, None, :, None] & across[None, :, None, :]).reshape(SIDES**2, rows * columns)


def _halves(side: int) -> Tensor:
    """Return which of `side` rows each of `SIDES` parts holds: (SIDES, side) of bool."""
    row = torch.arange(side)
    bounds = [(i * side // SIDES, -(-(i + 1) * side // SIDES)) for i in range(SIDES)]
    return torch.stack([(row >= first) & (row < end) for first, end in bounds])


def largest_feature(vit: VisionTransformer, tokens: FeatureTokens) -> float:
    """Return a bound on |f|² of any image; infinite for a ViT whose tokens no LayerNorm bounds.

    LayerNorm's output γ ⊙ u + β has |u|² ≤ d, so |f| ≤ max|γ|·√d + |β|, and so has a mean of such tokens.
    """
    if not isinstance(norm := vit.norm, nn.LayerNorm) or not norm.elementwise_affine:
        return math.inf
    offset = 0.0 if norm.bias is None else float(norm.bias.detach().norm())
    longest = float(norm.weight.detach().abs().max()) * math.sqrt(vit.embed_dim) + offset
    return longest**2 * feature_parts(vit, tokens)


class FeatureClassifier(nn.Module):
    """ViTs and one linear layer on their features, side by side: logits W f(x) + b.

    One ViT is a single model; with K of them every prediction runs all. It is frozen when it is made. With
    one ViT it can be a student, as a ViT can: it has a patch grid, a head, and logits of patches.
    """

    def __init__(
        self, vits: Sequence[VisionTransformer], tokens: FeatureTokens, weight: Tensor, bias: Tensor
    ) -> None:
        """Take W (C, D) and b (C,); D is the sum of the ViTs' `feature_width`."""
        super().__init__()
        self.vits, self.tokens = nn.ModuleList(vits), tokens
        self.head = nn.Linear(weight.shape[1], len(weight), device=weight.device)
        self.head.load_state_dict({"weight": weight.float(), "bias": bias.float()})
        self.eval().requires_grad_(False)

    @property
    def patch_embed(self) -> PatchEmbed:
        """The first ViT's patch embedding, which has the grid."""
        return self.vits[0].patch_embed

    @property
    def num_classes(self) -> int:
        """The number of classes C."""
        return self.head.out_features

    @property
    def pretrained_cfg(self) -> dict:
        """The first ViT's configuration, which has the pixels' normalisation."""
        return self.vits[0].pretrained_cfg

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """Return logits (B, C) of images (B, ch, H, W), from the kept patches (B, M) alone."""
        features = [image_features(vit, images, self.tokens, keep) for vit in self.vits]
        return self.head(torch.cat(features, dim=1))

    def patch_logits(self, patches: Tensor, positions: Tensor) -> Tensor:
        """Return logits (B, C) of patches (B, M, ch·p·p) at positions (B, M); ViTs are of one patch grid."""
        features = [features_of_patches(vit, patches, positions, self.tokens) for vit in self.vits]
        return self.head(torch.cat(features, dim=1))

    def forward_tokens(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (B, C) of images, and of every patch token (B, N, C); for one ViT.

        Except with "cls", the logits of the image are the mean over its N patches of

            z^i = b + Σ_blocks (W_cls f_cls + N Σ_g s_gi W_g f_i),

        s_gi the share of patch i in the mean of region g; "patches" and "both" have one block and one region,
        "patches" no W_cls. With "cls" no patch is read: z^i is the head on the patch's token.
        """
        (vit,) = self.vits
        patches, positions = kept_patches(vit, images)
        if self.tokens == "cls":
            out = patch_features(vit, patches, positions)  # (B, P + N, d)
            return self.head(out[:, 0]), self.head(out[:, vit.num_prefix_tokens :])
        weight = self.head.weight.unflatten(1, (-1, vit.embed_dim))  # (C, parts, d)
        if self.tokens == "regions":
            outputs, shares = last_outputs(vit, patches, positions), region_shares(vit, positions)
        else:
            outputs = [patch_features(vit, patches, positions)]
            shares = torch.full((1, 1, patches.shape[1]), 1 / patches.shape[1], device=images.device)
        with_cls = self.tokens != "patches"
        logits = self.head.bias.expand(len(images), patches.shape[1], -1)  # (B, N, C)
        for out, own in zip(outputs, weight.chunk(len(outputs), dim=1), strict=True):
            if with_cls:
                logits = logits + (out[:, 0] @ own[:, 0].T)[:, None]
            # tokens (B, N, d) times, for each patch, the mixture of the regions' weights that it counts in
            mixed = torch.einsum("grn,crd->ncd", shares, own[:, int(with_cls) :])  # (N, C, d)
            logits = logits + patches.shape[1] * torch.einsum(
                "bnd,ncd->bnc", out[:, vit.num_prefix_tokens :], mixed
            )
        return logits.mean(dim=1), logits
