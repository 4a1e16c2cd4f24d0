"""stages.py: ViTs cut into stages that are the whole model in a row, epochs divided, tokens fused."""

import itertools

import pytest
import torch
from helpers import loud
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer

import fedmitr as fm
from fedmitr.vision.stages import (
    average_adaptor,
    fuse_tokens,
    run_stage,
    stage_blocks,
    stage_epochs,
    stage_names,
)

TINY = dict(img_size=16, patch_size=4, num_classes=5, embed_dim=24, num_heads=2, class_token=True)


VITS = {
    "micro": lambda: fm.create_vit("vit_micro", 5),
    "test_vit": lambda: fm.create_vit("test_vit", 5, image_size=32),
    "registers": lambda: VisionTransformer(**TINY, depth=3, reg_tokens=4, init_values=1e-2),
    "norm before": lambda: VisionTransformer(**TINY, depth=2, pre_norm=True, no_embed_class=True),
    "mean of tokens": lambda: VisionTransformer(**TINY, depth=5, global_pool="avg", qk_norm=True),
    "distilled": lambda: VisionTransformerDistilled(**TINY, depth=4),
}


@pytest.fixture(scope="module", params=VITS.values(), ids=VITS.keys())
def any_vit(request):
    return loud(request.param(), seed=1).requires_grad_(False)


def counts_of(vit):
    return sorted({1, 2, 3, len(vit.blocks)} & set(range(1, len(vit.blocks) + 1)))


def test_all_stages_in_turn_are_timms_own_forward(any_vit):
    side, channels = any_vit.patch_embed.img_size[0], any_vit.patch_embed.proj.in_channels
    images = torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(1))
    for count in counts_of(any_vit):
        x = images
        for stage in range(count):
            x = run_stage(any_vit, x, stage, count)
        torch.testing.assert_close(x, any_vit(images), rtol=1e-4, atol=1e-4)


def test_every_entry_belongs_to_exactly_one_stage(any_vit):
    for count in counts_of(any_vit):
        stages = [stage_names(any_vit, count, stage) for stage in range(count)]
        assert sorted(itertools.chain(*stages)) == sorted(any_vit.state_dict())
        assert {"cls_token", "pos_embed", "patch_embed.proj.weight"} <= set(stages[0])
        ends = {name for name in any_vit.state_dict() if name.startswith(("head", "norm.", "fc_norm"))}
        assert ends and ends <= set(stages[-1])
        for stage, blocks in enumerate(stage_blocks(len(any_vit.blocks), count)):
            assert {f"blocks.{i}.norm1.weight" for i in blocks} <= set(stages[stage])


@pytest.mark.parametrize(
    "depth, count, sizes", [(4, 1, [4]), (4, 2, [2, 2]), (4, 3, [2, 1, 1]), (12, 5, [3, 3, 2, 2, 2])]
)
def test_stages_are_consecutive_and_as_equal_as_can_be(depth, count, sizes):
    blocks = stage_blocks(depth, count)
    assert [len(b) for b in blocks] == sizes
    assert list(itertools.chain(*blocks)) == list(range(depth))


@pytest.mark.parametrize("epochs, count, each", [(15, 2, [8, 7]), (4, 4, [1] * 4), (1, 3, [1] * 3)])
def test_local_epochs_are_divided_over_the_stages(epochs, count, each):
    assert stage_epochs(epochs, count) == each


def test_an_adaptor_is_one_matrix_on_the_members_tokens_side_by_side():
    rng = torch.Generator().manual_seed(0)
    tokens, adaptor = torch.randn(2, 3, 5, 4, generator=rng), average_adaptor(2, 4)
    with torch.no_grad():
        adaptor.weight.copy_(torch.randn(4, 8, generator=rng))
        adaptor.bias.copy_(torch.randn(4, generator=rng))
    found = fuse_tokens(tokens, adaptor)
    for b, t in itertools.product(range(3), range(5)):
        wanted = adaptor.weight @ torch.cat([tokens[0, b, t], tokens[1, b, t]]) + adaptor.bias
        torch.testing.assert_close(found[b, t], wanted, rtol=1e-4, atol=1e-5)
