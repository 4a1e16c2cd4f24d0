"""tokens.py against timm's own forward, a brute-force softmax and the arithmetic of patches left out."""

import pytest
import torch
from helpers import loud
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fedmitr as fm
from fedmitr.vision.patches import patchify, unpatchify
from fedmitr.vision.tokens import (
    class_logits,
    cls_attention,
    forward_tokens,
    image_logits,
    images_at_once,
    images_in_training,
    kept_patches,
)

VARIANTS = {  # what timm's families differ in, on a small scale
    "norm before the blocks": dict(pre_norm=True),
    "registers without position": dict(reg_tokens=3, no_embed_class=True),
    "query and key norm, layer scale": dict(qk_norm=True, init_values=0.1),
    "mean of the tokens": dict(global_pool="avg"),
}

MODELS = [
    ("vit_micro", None),
    ("vit_micro", 32),
    ("deit_tiny_patch16_224", 64),
    ("deit_tiny_patch16_224", None),
    ("deit_tiny_distilled_patch16_224", 64),
    ("vit_small_patch14_reg4_dinov2", 56),
    ("test_vit", None),
    *((name, 32) for name in VARIANTS),
]


def build(name, image_size, classes=7):
    if name in VARIANTS:
        shape = dict(img_size=image_size, patch_size=8, embed_dim=48, depth=3, num_heads=4)
        vit = loud(VisionTransformer(num_classes=classes, **shape, **VARIANTS[name]), seed=3)
    else:
        vit = loud(fm.create_vit(name, classes, image_size=image_size), seed=3, scale=0.05)
    channels, side = vit.patch_embed.proj.in_channels, vit.patch_embed.img_size[0]
    images = torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(4))
    return vit.requires_grad_(False), images


@pytest.fixture(scope="module", params=MODELS, ids=lambda m: f"{m[0]}-{m[1] or 'own'}")
def model(request):
    return build(*request.param)


def random_keep(batch, patches, kept, seed=5):
    rng = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(patches, generator=rng)[:kept] for _ in range(batch)])


def timm_tokens(vit, images, keep):
    """What timm's own blocks make of the kept tokens: its embedding, then gather, then its blocks."""
    x = vit._pos_embed(vit.patch_embed(images))
    prefix, patches = x[:, : vit.num_prefix_tokens], x[:, vit.num_prefix_tokens :]
    rows = torch.arange(len(images))[:, None]
    x = torch.cat([prefix, patches[rows, keep]], dim=1)
    return vit.norm(vit.blocks(vit.norm_pre(x)))


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * max(1.0, b.abs().max().item()))


def test_all_patches_give_timms_own_logits(model):
    vit, images = model
    close(forward_tokens(vit, images)[0], vit(images))


def test_a_subset_gives_what_timms_blocks_make_of_the_gathered_tokens(model):
    vit, images = model
    keep = random_keep(2, vit.patch_embed.num_patches, 5)
    cls_logits, patch_logits = forward_tokens(vit, images, keep)
    features = timm_tokens(vit, images, keep)
    close(cls_logits, vit.forward_head(features))
    close(patch_logits, vit.head(vit.fc_norm(features[:, vit.num_prefix_tokens :])))


def test_token_logits_are_the_head_on_each_token(micro, images):
    patch_logits = forward_tokens(micro, images)[1]
    features = micro.forward_features(images)
    for i in range(36):
        close(patch_logits[:, i], micro.head(features[:, 1 + i]))


def test_a_permutation_of_keep_permutes_the_token_outputs(micro, images):
    keep = random_keep(3, 36, 12)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(6))
    cls_logits, patch_logits = forward_tokens(micro, images, keep)
    again, permuted = forward_tokens(micro, images, keep[:, order])
    close(again, cls_logits)
    close(permuted, patch_logits[:, order])


def test_pixels_of_left_out_patches_do_not_matter(micro, images):
    keep = random_keep(3, 36, 9)
    patches = patchify(images, (4, 4))
    left_out = torch.ones(3, 36, dtype=torch.bool).scatter(1, keep, False)
    patches[left_out] = torch.nan
    spoilt = unpatchify(patches, (4, 4), (24, 24))
    assert torch.equal(forward_tokens(micro, images, keep)[0], forward_tokens(micro, spoilt, keep)[0])


def test_blocks_run_on_kept_tokens_alone_and_the_full_embedding_is_never_run(micro, images):
    lengths, embeddings = [], []
    hooks = [
        b.norm1.register_forward_hook(lambda m, a, out: lengths.append(a[0].shape[1])) for b in micro.blocks
    ]
    hooks.append(micro.patch_embed.proj.register_forward_hook(lambda *a: embeddings.append(a)))
    forward_tokens(micro, images, random_keep(3, 36, 9))
    for hook in hooks:
        hook.remove()
    assert lengths == [1 + 9] * len(micro.blocks) and not embeddings


def test_left_out_patches_cost_no_arithmetic(images):
    vit = fm.create_vit("vit_micro", 10)
    for block in vit.blocks:
        block.attn.fused_attn = False  # so that the counter sees the attention's products

    def flops(kept):
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            forward_tokens(vit, images, random_keep(3, 36, kept))
        return counter.get_total_flops()

    def expected(kept, batch=3, dim=96, hidden=192, pixels=16, classes=10, depth=4):
        tokens = kept + 1
        block = tokens * (4 * dim * dim + 2 * dim * hidden) + 2 * tokens * tokens * dim
        return 2 * batch * (kept * pixels * dim + depth * block + tokens * classes * dim)

    assert flops(9) == expected(9)
    assert flops(36) == expected(36)


def test_cls_attention_is_the_softmax_of_the_last_block(model):
    vit, images = model
    for keep in (None, random_keep(2, vit.patch_embed.num_patches, 6)):
        everything = torch.arange(vit.patch_embed.num_patches).expand(2, -1)
        x = vit._pos_embed(vit.patch_embed(images))
        index = everything if keep is None else keep
        rows = torch.arange(2)[:, None]
        x = torch.cat([x[:, : vit.num_prefix_tokens], x[:, vit.num_prefix_tokens :][rows, index]], dim=1)
        x = vit.norm_pre(x)
        for block in vit.blocks[:-1]:
            x = block(x)
        last = vit.blocks[-1]
        query, key, _ = last.attn.qkv(last.norm1(x)).chunk(3, dim=-1)
        heads, wide = last.attn.num_heads, x.shape[-1] // last.attn.num_heads
        total = torch.zeros(2, x.shape[1])
        for h in range(heads):
            part = slice(h * wide, (h + 1) * wide)
            q, k = last.attn.q_norm(query[:, :1, part]), last.attn.k_norm(key[:, :, part])
            scores = (q @ k.transpose(1, 2))[:, 0] / wide**0.5
            total += scores.exp() / scores.exp().sum(dim=1, keepdim=True)
        brute = (total / heads)[:, vit.num_prefix_tokens :]
        found = cls_attention(vit, images, keep)
        close(found, brute)
        assert (found > 0).all() and (found.sum(dim=1) < 1).all()


@pytest.mark.parametrize(
    "head",
    [
        dict(global_pool="token"),
        dict(global_pool="avg"),
        dict(global_pool="avg", fc_norm=False),
        dict(global_pool="max"),
        dict(global_pool="map"),
        dict(global_pool="token", reg_tokens=2, pre_norm=True),
    ],
    ids=str,
)
def test_cls_logitsare_timms_forward_whatever_its_head_reads(head):
    shape = dict(img_size=16, patch_size=4, embed_dim=24, depth=3, num_heads=4, num_classes=7)
    vit = loud(VisionTransformer(**shape, **head), seed=3).double()
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    found = []
    for logits in (image_logits, lambda v, x: class_logits(v, *kept_patches(v, x)), lambda v, x: v(x)):
        x = images.clone().requires_grad_()
        made = logits(vit, x)
        found.append((made, torch.autograd.grad((made * torch.arange(7.0)).sum(), x)[0]))
    for made, gradient in found[:2]:
        close(made, found[2][0], 1e-10)
        close(gradient, found[2][1], 1e-10)


# How many images are run together.


@pytest.mark.parametrize(
    "name, side", [("vit_micro", s) for s in (12, 24, 32, 48, 224)] + [("test_vit", 160)]
)
def test_batches_without_a_gradient_are_bounded_by_their_patches(name, side):
    model = fm.create_vit(name, image_size=side)
    found, patches = images_at_once(model), model.patch_embed.num_patches
    assert found == 256 if patches <= 64 else 1 <= found < 256
    assert found * patches <= 256 * 64 < (found + 1) * patches or found == 256
    assert images_at_once(nn.ModuleList([fm.create_vit("vit_micro"), model])) <= found


def test_batches_are_never_empty_and_models_without_patches_take_the_most():
    assert images_at_once(fm.create_vit("vit_micro", image_size=1024)) == 1
    assert images_at_once(nn.Linear(2, 2)) == 256


@pytest.mark.parametrize("name, side, images", [("vit_micro", 24, 113), ("deit_tiny_patch16_224", 224, 20)])
def test_a_backward_pass_holds_a_bounded_number_of_patches(name, side, images):
    model = fm.create_vit(name, image_size=side)
    assert images_in_training(model) == images
    assert images * model.patch_embed.num_patches <= 64 * 64 < (images + 1) * model.patch_embed.num_patches
    assert images_in_training(fm.create_vit("vit_micro", image_size=512)) == 1
