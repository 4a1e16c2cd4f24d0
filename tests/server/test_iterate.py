"""iterate.py: Adam on the live patches against torch's on whole images, and the best iterate."""

import pytest
import torch
import torch.nn.functional as F
from helpers import TARGETS, inverted

import fedmitr as fm
from fedmitr.settings.schema import EnsembleSettings
from fedmitr.vision.patches import patchify, unpatchify


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
@pytest.mark.parametrize("ce, tv, l2", [(1.0, 0.0, 0.0), (0.5, 1e-3, 1e-2)])
def test_dense_inversion_is_torchs_adam_on_the_pixels(uploads, double, ce, tv, l2, schedule):
    teacher = fm.Ensemble(uploads[:2], EnsembleSettings(mode="mean_probs")).double()
    options = dict(stop_at=(), stop_ratio=(), keep_best=False, ce=ce, tv=tv, l2=l2, schedule=schedule)
    made = inverted(teacher, lr=0.25, betas=(0.5, 0.99), **options)
    x = made.history["frames"][0].clone().requires_grad_(True)
    adam = torch.optim.Adam([x], lr=0.25, betas=(0.5, 0.99))
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(adam, T_max=8)
    for _ in range(8):
        probs = sum(m(x).softmax(-1) for m in teacher.members) / 2
        loss = ce * -probs[torch.arange(4), TARGETS].log().sum() + l2 * x.pow(2).sum()
        loss = loss + tv * (x.diff(dim=2).pow(2).sum() + x.diff(dim=3).pow(2).sum())
        adam.zero_grad()
        loss.backward()
        adam.step()
        if schedule == "cosine":
            falling.step()
    torch.testing.assert_close(made.pixels, x.detach(), rtol=1e-6, atol=1e-6)


def test_surviving_patches_keep_adams_moments_over_a_stop(uploads, double):
    """With one stop: Adam on all pixels, of which some get no gradient, agrees on the survivors."""
    teacher = fm.Ensemble(uploads[:1], EnsembleSettings(mode="mean_probs")).double()
    made = inverted(teacher, lr=0.25, stop_at=(3,), stop_ratio=(0.5,), keep_best=False)
    x = patchify(made.history["frames"][0], (4, 4)).clone().requires_grad_(True)
    adam = torch.optim.Adam([x], lr=0.25, betas=(0.5, 0.99))
    keep = torch.stack([torch.nonzero(row)[:, 0] for row in made.mask])
    for step in range(8):
        image = unpatchify(x, (4, 4), (24, 24))
        log_probs = teacher(image) if step < 3 else teacher(image, keep)
        adam.zero_grad()
        F.nll_loss(log_probs, TARGETS, reduction="sum").backward()
        adam.step()
    found = patchify(made.pixels, (4, 4))
    torch.testing.assert_close(found[made.mask], x.detach()[made.mask], rtol=1e-6, atol=1e-6)


def loss_of(teacher, made):
    """Return the cross-entropy (B,) of the returned pixels on their surviving patches."""
    keep = torch.stack([torch.nonzero(row)[:, 0] for row in made.mask])
    return F.nll_loss(teacher(made.pixels, keep), TARGETS, reduction="none")


@pytest.mark.parametrize("keep_best", [True, False])
def test_the_reported_loss_is_that_of_the_returned_pixels(teacher, keep_best):
    made = inverted(teacher, lr=2.0, keep_best=keep_best)
    torch.testing.assert_close(made.loss, loss_of(teacher, made), rtol=1e-4, atol=1e-5)


def test_the_best_iterate_is_each_images_least_loss_after_the_last_stop(teacher, monkeypatch):
    losses, real = [], teacher.forward_patches

    def record(patches, positions):
        log_probs = real(patches, positions)
        losses.append(-log_probs.detach()[torch.arange(4), TARGETS])
        return log_probs

    monkeypatch.setattr(teacher, "forward_patches", record)
    made = inverted(teacher, jitter=0.3, iterations=12)  # views move, so that the last is not always the best
    after = torch.stack(losses[5:12])
    best = 5 + after.argmin(0)
    assert torch.equal(made.loss, after.min(0).values) and (best < 11).any()
    assert made.history["frame_at"].tolist() == list(range(13))
    for b in range(4):
        assert torch.equal(made.pixels[b], made.history["frames"][best[b], b])


def test_without_keep_best_the_last_iterate_is_returned(teacher):
    made = inverted(teacher, keep_best=False)
    assert torch.equal(made.pixels, made.history["frames"][-1])
