"""features.py against timm's own forward pass, and linear heads against plain products."""

import pytest
import torch
import torch.nn.functional as F
from helpers import loud
from timm.models.vision_transformer import VisionTransformer

import fedmitr as fm
from fedmitr.vision.features import FeatureClassifier, feature_width, image_features
from fedmitr.vision.tokens import class_logits, forward_tokens, kept_patches

VARIANTS = {
    "vit_micro": dict(),
    "norm before the blocks": dict(pre_norm=True),
    "registers without position": dict(reg_tokens=3, no_embed_class=True),
    "mean of the tokens": dict(global_pool="avg"),
}


@pytest.fixture(scope="module", params=VARIANTS)
def vit(request):
    if request.param == "vit_micro":
        return loud(fm.create_vit("vit_micro", 10), seed=3).requires_grad_(False)
    shape = dict(img_size=24, patch_size=6, embed_dim=48, depth=3, num_heads=4, in_chans=1, num_classes=10)
    return loud(VisionTransformer(**shape, **VARIANTS[request.param]), seed=3).requires_grad_(False)


def picked(tokens: torch.Tensor, prefix: int, which: str) -> torch.Tensor:
    """Features of output tokens (B, P + M, d): CLS is the first, the patches those after the prefix."""
    cls, mean = tokens[:, 0], tokens[:, prefix:].mean(1)
    return {"cls": cls, "patches": mean, "both": torch.cat([cls, mean], 1)}[which]


@pytest.mark.parametrize("which", ["cls", "patches", "both"])
def test_features_are_those_of_timms_forward_pass(which, vit, images):
    found = image_features(vit, images, which)
    torch.testing.assert_close(
        found, picked(vit.forward_features(images), vit.num_prefix_tokens, which), rtol=1e-4, atol=1e-5
    )
    assert found.shape == (3, feature_width(vit, which))


@pytest.mark.parametrize("which", ["cls", "patches", "both"])
def test_of_kept_patches_they_are_those_of_a_pass_without_the_others(which, vit, images):
    """The tokens of the others are taken out after timm's embedding, before the first block."""
    prefix, kept = vit.num_prefix_tokens, 5
    rng = torch.Generator().manual_seed(5)
    keep = torch.stack([torch.randperm(16, generator=rng)[:kept] for _ in images])
    tokens = vit._pos_embed(vit.patch_embed(images))  # (B, P + N, d)
    rows = torch.cat([torch.arange(prefix).expand(3, -1), keep + prefix], 1)
    left = vit.norm_pre(torch.stack([own[pick] for own, pick in zip(tokens, rows, strict=True)]))
    left = vit.norm(vit.blocks(left))
    found = image_features(vit, images, which, keep)
    torch.testing.assert_close(found, picked(left, prefix, which), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, image_features(vit, images, which), atol=1e-3)


# A linear head on them.


def head(classes: int, width: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(classes, width, generator=rng).double(), torch.randn(classes, generator=rng).double()


@pytest.mark.parametrize("which", ["cls", "patches", "both"])
def test_scores_are_a_product_and_a_sum(which, vit, images):
    weight, bias = head(4, feature_width(vit, which))
    found = FeatureClassifier([vit], which, weight, bias)(images)
    features = picked(vit.forward_features(images), vit.num_prefix_tokens, which)
    for row, f in zip(found, features.double(), strict=True):
        wanted = torch.stack([(w * f).sum() + b for w, b in zip(weight, bias, strict=True)])
        torch.testing.assert_close(row.double(), wanted, rtol=1e-3, atol=1e-3)


def test_several_vits_stand_side_by_side_in_their_order(images):
    """Of other widths, depths and patches."""
    vits = [
        loud(fm.create_vit(name, 10), seed=k)
        for k, name in enumerate(("vit_micro", "vit_micro_deep", "vit_micro_patch6"))
    ]
    weight, bias = head(10, 96 + 64 + 96)
    found = FeatureClassifier(vits, "cls", weight, bias)(images)
    parts = weight.float().split([96, 64, 96], 1)
    wanted = bias.float() + sum(
        vit.forward_features(images)[:, 0] @ w.T for vit, w in zip(vits, parts, strict=True)
    )
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


def test_only_the_kept_patches_tell(vit, images):
    weight, bias = head(3, feature_width(vit, "both"))
    classifier = FeatureClassifier([vit], "both", weight, bias)
    keep = torch.tensor([[0, 1, 2], [3, 4, 5], [1, 0, 2]])
    side, hidden = vit.patch_embed.patch_size[0], images.clone()
    columns = images.shape[-1] // side
    for image, own in zip(hidden, keep.tolist(), strict=True):
        for patch in set(range(columns**2)) - set(own):
            row, column = divmod(patch, columns)
            image[:, row * side : (row + 1) * side, column * side : (column + 1) * side] = 9.0
    torch.testing.assert_close(classifier(images, keep), classifier(hidden, keep))
    assert not torch.allclose(classifier(images, keep), classifier(images), atol=1e-2)


def test_a_classifier_is_frozen_and_all_of_it_is_in_its_state(vit):
    classifier = FeatureClassifier([vit], "cls", *head(4, feature_width(vit, "cls")))
    assert not classifier.training and not any(p.requires_grad for p in classifier.parameters())
    assert classifier.head.weight.dtype == torch.float32
    state = {f"vits.0.{name}" for name in vit.state_dict()} | {"head.weight", "head.bias"}
    assert set(classifier.state_dict()) == state


def test_gradients_reach_the_pixels_through_it(vit, images):
    """As a teacher it may be inverted; its weights stay."""
    classifier = FeatureClassifier([vit], "both", *head(4, feature_width(vit, "both")))
    pixels = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(classifier(pixels)[:, 1].sum(), pixels)
    assert gradient.isfinite().all() and gradient.abs().sum() > 0


# Regions: CLS and the mean of each quarter, after each of the last two blocks.


def after_blocks(vit, images):
    """Tokens after each of the last two blocks, from timm's own blocks."""
    tokens, outputs = vit.norm_pre(vit._pos_embed(vit.patch_embed(images))), []
    for block in vit.blocks:
        tokens = block(tokens)
        outputs.append(vit.norm(tokens))
    return outputs[-2:]


def quarters(out, prefix, grid):
    """Means of the quarters (B, 4·d) of output tokens, by torch's adaptive pooling."""
    maps = out[:, prefix:].transpose(1, 2).unflatten(2, grid)  # (B, d, h, w)
    return F.adaptive_avg_pool2d(maps, 2).flatten(2).transpose(1, 2).flatten(1)


def test_regions_are_those_of_adaptive_pooling(vit, images):
    grid, prefix = vit.patch_embed.grid_size, vit.num_prefix_tokens
    parts = [(out[:, 0], quarters(out, prefix, grid)) for out in after_blocks(vit, images)]
    found = image_features(vit, images, "regions")
    wanted = torch.cat([part for pair in parts for part in pair], 1)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert found.shape == (3, feature_width(vit, "regions")) == (3, 10 * vit.embed_dim)


@pytest.mark.parametrize("side", [6, 9, 3])
def test_an_odd_grid_shares_its_middle(side):
    vit = VisionTransformer(
        img_size=2 * side, patch_size=2, embed_dim=8, depth=2, num_heads=2, in_chans=1, num_classes=3
    )
    vit = loud(vit, seed=1).requires_grad_(False)
    images = torch.randn(2, 1, 2 * side, 2 * side, generator=torch.Generator().manual_seed(0))
    found = image_features(vit, images, "regions")
    for first, out in zip((0, 40), after_blocks(vit, images), strict=True):
        wanted = quarters(out, 1, (side, side))
        torch.testing.assert_close(found[:, first + 8 : first + 40], wanted, rtol=1e-4, atol=1e-5)


def test_one_block_has_one_set_of_regions(images):
    vit = VisionTransformer(
        img_size=24, patch_size=6, embed_dim=8, depth=1, num_heads=2, in_chans=1, num_classes=3
    ).requires_grad_(False)
    assert image_features(vit, images, "regions").shape == (3, 40) == (3, feature_width(vit, "regions"))


def test_a_region_without_patches_has_the_mean_of_all_that_are_shown(vit, images):
    """The first row and the next, all in the upper half: the two lower quarters are empty."""
    keep = torch.arange(2 * vit.patch_embed.grid_size[1]).expand(3, -1)
    found = image_features(vit, images, "regions", keep)
    d = vit.embed_dim
    for first in (0, 5 * d):
        upper, lower = found[:, first + d : first + 3 * d], found[:, first + 3 * d : first + 5 * d]
        mean = upper.unflatten(1, (2, d)).mean(1)  # quarters of equally many patches
        torch.testing.assert_close(lower.unflatten(1, (2, d)), mean[:, None].expand(-1, 2, -1))


# As a student.


@pytest.mark.parametrize("which", ["patches", "both", "regions"])
def test_logits_are_the_mean_of_what_patches_add(which, vit, images):
    classifier = FeatureClassifier([vit], which, *head(4, feature_width(vit, which)))
    logits, tokens = classifier.forward_tokens(images)
    assert tokens.shape == (3, vit.patch_embed.num_patches, 4)
    torch.testing.assert_close(logits, classifier(images), rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(tokens.mean(1), classifier(images), rtol=1e-3, atol=1e-2)


def test_on_cls_alone_tokens_go_through_the_head_as_a_vits_do(vit, images):
    if vit.global_pool != "token":
        pytest.skip("its head reads the mean of the tokens")
    vit.head.weight.data[:] = torch.randn(10, vit.embed_dim, generator=torch.Generator().manual_seed(2))
    classifier = FeatureClassifier([vit], "cls", vit.head.weight.double(), vit.head.bias.double())
    for found, wanted in zip(classifier.forward_tokens(images), forward_tokens(vit, images), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("which", ["cls", "both", "regions"])
def test_patches_of_the_whole_image_give_the_logits_of_the_image(which, vit, images):
    classifier = FeatureClassifier([vit], which, *head(4, feature_width(vit, which)))
    found = class_logits(classifier, *kept_patches(vit, images))
    torch.testing.assert_close(found, classifier(images))
