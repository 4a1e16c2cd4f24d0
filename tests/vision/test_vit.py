"""vit.py against timm's own forward, a brute-force softmax and the arithmetic of tokens left out."""

import pytest
import timm
import torch
from helpers import loud
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fedmitr as fm
from fedmitr.vision.patches import patchify, unpatchify
from fedmitr.vision.tokens import cls_attention, forward_tokens, images_at_once
from fedmitr.vision.vit import normalisation

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
    of_cls, of_tokens = forward_tokens(vit, images, keep)
    features = timm_tokens(vit, images, keep)
    close(of_cls, vit.forward_head(features))
    close(of_tokens, vit.head(vit.fc_norm(features[:, vit.num_prefix_tokens :])))


def test_token_logits_are_the_head_on_each_token(micro, images):
    of_tokens = forward_tokens(micro, images)[1]
    features = micro.forward_features(images)
    for i in range(36):
        close(of_tokens[:, i], micro.head(features[:, 1 + i]))


def test_a_permutation_of_keep_permutes_the_token_outputs(micro, images):
    keep = random_keep(3, 36, 12)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(6))
    of_cls, of_tokens = forward_tokens(micro, images, keep)
    again, permuted = forward_tokens(micro, images, keep[:, order])
    close(again, of_cls)
    close(permuted, of_tokens[:, order])


def test_pixels_of_left_out_patches_do_not_matter(micro, images):
    keep = random_keep(3, 36, 9)
    patches = patchify(images, (4, 4))
    left_out = torch.ones(3, 36, dtype=torch.bool).scatter(1, keep, False)
    patches[left_out] = torch.nan
    spoilt = unpatchify(patches, (4, 4), (24, 24))
    assert torch.equal(forward_tokens(micro, images, keep)[0], forward_tokens(micro, spoilt, keep)[0])


def test_blocks_see_only_kept_tokens_and_the_full_embedding_is_never_run(micro, images):
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
            of_cls, of_all = last.attn.q_norm(query[:, :1, part]), last.attn.k_norm(key[:, :, part])
            scores = (of_cls @ of_all.transpose(1, 2))[:, 0] / wide**0.5
            total += scores.exp() / scores.exp().sum(dim=1, keepdim=True)
        brute = (total / heads)[:, vit.num_prefix_tokens :]
        found = cls_attention(vit, images, keep)
        close(found, brute)
        assert (found > 0).all() and (found.sum(dim=1) < 1).all()


@given(
    batch=st.integers(1, 3),
    channels=st.integers(1, 3),
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
    patch=st.tuples(st.integers(1, 4), st.integers(1, 4)),
)
def test_patchify_cuts_and_unpatchify_puts_back(batch, channels, rows, columns, patch):
    high, wide = patch
    images = torch.randn(batch, channels, rows * high, columns * wide)
    patches = patchify(images, patch)
    assert patches.shape == (batch, rows * columns, channels * high * wide)
    for i in range(rows * columns):
        top, left = i // columns * high, i % columns * wide
        cut = images[:, :, top : top + high, left : left + wide]
        assert torch.equal(patches[:, i], cut.flatten(1))
    assert torch.equal(unpatchify(patches, patch, images.shape[-2:]), images)


def test_normalisation_is_the_models_own():
    mean, std = normalisation(fm.create_vit("deit_tiny_patch16_224"))
    assert mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert std.flatten().tolist() == pytest.approx([0.229, 0.224, 0.225])
    assert all(s.shape == (1, 1, 1) for s in normalisation(fm.create_vit("vit_micro")))


def test_a_fresh_model_is_the_same_in_every_call_and_leaves_the_random_state_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = fm.create_vit("vit_micro", 5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    for name, value in fm.create_vit("vit_micro", 5).state_dict().items():
        assert torch.equal(value, first.state_dict()[name]), name


def test_channels_and_size_can_be_chosen():
    vit = fm.create_vit("vit_micro", 4, image_size=40, in_chans=3)
    assert vit(torch.zeros(1, 3, 40, 40)).shape == (1, 4)
    assert vit.patch_embed.grid_size == (10, 10)
    assert len(normalisation(vit)[0]) == 3


# What cannot be: one line each.


@pytest.mark.parametrize(
    "name, options",
    [
        ("no_such_model", {}),
        ("resnet18", {}),
        ("resnet18", {"image_size": 64}),
        ("swin_tiny_patch4_window7_224", {}),
        ("vit_wee_patch16_reg1_gap_256", {}),  # averages its tokens: no CLS
        ("vit_tiny_r_s16_p8_224", {}),  # patches are cut by a convolutional network
        ("vit_small_patch16_18x2_224", {}),  # two attentions in parallel in every block
        ("deit_tiny_patch16_224.no_such_tag", {}),
    ],
)
def test_a_model_that_cannot_be_used_is_one_line_naming_model_name(name, options, one_line):
    with pytest.raises(fm.BadInput) as error:
        fm.create_vit(name, **options)
    one_line(error.value, "model.name", repr(name))


@pytest.mark.parametrize(
    "name, size", [("vit_micro", 25), ("deit_tiny_patch16_224", 100), ("test_vit", 50), ("vit_micro", 2)]
)
def test_an_image_size_that_is_no_multiple_of_the_patch(name, size, one_line):
    with pytest.raises(fm.BadInput) as error:
        fm.create_vit(name, image_size=size)
    one_line(error.value, f"model.image_size={size}", "multiple")


def test_a_failed_download_is_one_line_naming_the_checkpoint(monkeypatch, one_line):
    from huggingface_hub.errors import LocalEntryNotFoundError

    def no_network(*_, **__):
        raise LocalEntryNotFoundError("Cannot find the requested files\nin the cache.")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", no_network)
    with pytest.raises(fm.BadInput) as error:
        fm.create_vit("deit_tiny_patch16_224", pretrained=True)
    one_line(error.value, "model.pretrained", "deit_tiny_patch16_224", "model.checkpoint")


# Weights from files.


def state(vit):
    return {k: v.detach().clone() for k, v in vit.state_dict().items()}


@pytest.fixture
def checkpoint(tmp_path, micro):
    path = tmp_path / "weights.safetensors"
    save_file(state(micro), path)
    return path


def test_a_checkpoint_comes_back_bit_for_bit(checkpoint, micro):
    again = fm.create_vit("vit_micro", 10, checkpoint=checkpoint)
    for name, value in micro.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_a_checkpoint_of_other_class_count_keeps_all_but_the_head(checkpoint, micro):
    other = fm.create_vit("vit_micro", 3, checkpoint=checkpoint)
    twin = fm.create_vit("vit_micro", 3, checkpoint=checkpoint)
    assert other.head.weight.shape == (3, 96)
    for name, value in other.state_dict().items():
        wanted = twin if name.startswith("head") else micro
        assert torch.equal(value, wanted.state_dict()[name]), name


def test_a_checkpoint_at_another_image_size_resamples_positions_as_timm_does(checkpoint, micro):
    from timm.layers import resample_abs_pos_embed

    larger = fm.create_vit("vit_micro", 10, checkpoint=checkpoint, image_size=32)
    wanted = resample_abs_pos_embed(micro.pos_embed, new_size=(8, 8), num_prefix_tokens=1)
    close(larger.pos_embed, wanted, 1e-6)
    assert torch.equal(larger.blocks[0].attn.qkv.weight, micro.blocks[0].attn.qkv.weight)


def spoilt_missing(path):
    path.unlink()


def spoilt_truncated(path):
    path.write_bytes(path.read_bytes()[:5000])


def spoilt_text(path):
    path.write_text("not weights")


def respell(change):
    """Rewrites a checkpoint's tensors; fed by the cases below."""

    def rewrite(path):
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return rewrite


MISFITS = {
    "missing": spoilt_missing,
    "truncated": spoilt_truncated,
    "text": spoilt_text,
    "empty": respell(dict.clear),
    "lacks a block": respell(lambda t: t.pop("blocks.2.mlp.fc1.weight")),
    "unknown tensor": respell(lambda t: t.update(extra=torch.zeros(1))),
    "unknown head": respell(lambda t: t.update({"head_dist.weight": torch.zeros(10, 96)})),
    "wide": respell(lambda t: t.update({"blocks.0.attn.qkv.weight": torch.zeros(3, 3)})),
    "flat positions": respell(lambda t: t.update(pos_embed=torch.zeros(96))),
    "odd positions": respell(lambda t: t.update(pos_embed=torch.zeros(1, 31, 96))),
    "three channels": respell(lambda t: t.update({"patch_embed.proj.weight": torch.zeros(96, 3, 4, 4)})),
}


@pytest.mark.parametrize("spoil", MISFITS.values(), ids=MISFITS.keys())
def test_a_checkpoint_that_does_not_fit_is_one_line(checkpoint, spoil, one_line):
    spoil(checkpoint)
    with pytest.raises(fm.BadInput) as error:
        fm.create_vit("vit_micro", 10, checkpoint=checkpoint)
    one_line(error.value, "model.checkpoint")


def test_pretrained_timm_weights_go_through_timms_own_loader(tmp_path, monkeypatch):
    """As after a download, but from a file made here; another class count brings a fresh head."""
    name, path = "deit_tiny_patch16_224", tmp_path / "published.safetensors"
    source = loud(timm.create_model(name), seed=7, scale=0.05)
    save_file(state(source), path)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *_, **__: load_file(path))
    vit = fm.create_vit(name, 10, pretrained=True)
    for key, value in vit.state_dict().items():
        if not key.startswith("head"):
            assert torch.equal(value, source.state_dict()[key]), key
    assert vit.head.weight.shape == (10, 192)
    assert torch.equal(vit.head.weight, fm.create_vit(name, 10, pretrained=True).head.weight)
    offline = fm.create_vit(name, 10, checkpoint=path)
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(8))
    close(offline.forward_features(images), source.forward_features(images))


def test_a_checkpoint_spares_the_download(checkpoint, monkeypatch, micro, tmp_path):
    def no_network(*_, **__):
        raise AssertionError("downloaded")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", no_network)
    path = tmp_path / "deit.safetensors"
    save_file(state(timm.create_model("test_vit")), path)
    fm.create_vit("test_vit", 10, pretrained=True, checkpoint=path)
    loaded = fm.create_vit("vit_micro", 10, pretrained=True, checkpoint=checkpoint)
    assert torch.equal(loaded.pos_embed, micro.pos_embed)


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
