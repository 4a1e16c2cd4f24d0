"""foreground.py against loops, timm's own tokens, and scenes whose foreground is known."""

import pytest
import torch

import fedmitr as fm
from fedmitr.evaluation.foreground import (
    estimated_cover,
    foreground_kept,
    kept_share,
    surviving_patches,
    token_features,
)
from fedmitr.settings.schema import EnsembleSettings
from fedmitr.vision.patches import patch_share
from fedmitr.vision.tokens import cls_attention


def test_surviving_patches_are_found_stop_by_stop(uploads):
    teacher = fm.Ensemble(uploads[:2], EnsembleSettings(mode="mean_probs"))
    images = torch.randn(3, 1, 24, 24, generator=torch.Generator().manual_seed(2))
    found = surviving_patches(teacher, images, (0.3, 0.5))
    for b in range(3):
        live = list(range(36))
        for left in (25, 13):  # 36 · 0.7 and 25 · 0.5, rounded
            keep = torch.tensor([live])
            attention = sum(cls_attention(m, images[b : b + 1], keep)[0] for m in teacher.members)
            live = [live[i] for i in attention.argsort(descending=True)[:left]]
        assert sorted(live) == torch.nonzero(found[b])[:, 0].tolist()
    assert surviving_patches(teacher, images, ()).all()


def test_foreground_kept_by_loops():
    rng = torch.Generator().manual_seed(0)
    foreground = (torch.rand(4, 1, 24, 24, generator=rng) < 0.3).float()
    mask = torch.rand(4, 36, generator=rng) < 0.4
    found = foreground_kept(foreground, mask, 4)
    for b in range(4):
        inside = total = 0
        for y in range(24):
            for x in range(24):
                total += foreground[b, 0, y, x].item()
                inside += foreground[b, 0, y, x].item() * mask[b, y // 4 * 6 + x // 4].item()
        assert found[b].item() == pytest.approx(inside / total)
    assert torch.equal(foreground_kept(foreground, torch.ones(4, 36, dtype=torch.bool), 4), torch.ones(4))


def test_token_features_are_timms_output_tokens(micro, images):
    found = token_features(micro, images)
    torch.testing.assert_close(
        torch.from_numpy(found), micro.forward_features(images)[:, 1:], rtol=1e-4, atol=1e-4
    )


def test_the_estimated_foreground_is_found_where_it_truly_is(micro, task):
    """On real scenes taken for synthetic ones, whose foreground is known."""
    real, other = task.train.subset(torch.arange(100)), task.test.subset(torch.arange(60))
    covered, cover = patch_share(other.foreground, 4), estimated_cover(micro, real, other.images)
    assert cover.shape == (60, 36) and cover.min() >= 0 and cover.max() <= 1

    def estimate(mask):
        return (kept_share(cover, mask).mean() / mask.double().mean()).item()

    most = torch.zeros(60, 36, dtype=torch.bool).scatter(1, covered.topk(9, dim=1).indices, True)
    anywhere = torch.rand(60, 36, generator=torch.Generator().manual_seed(0)).argsort(1) < 9
    assert estimate(most) > 1.8 and 0.85 < estimate(anywhere) < 1.15 and estimate(~most) < 0.8
