"""grids.py against loops over single pixels."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmitr.vision.patches import (
    PatchGrid,
    patchify,
    regrid,
    regrid_importance,
    regrid_tokens,
    share_of_area,
    unpatchify,
)

SIDE = 24
PATCHES = (2, 3, 4, 6, 8, 12, 24)


def grid(patch, channels=1):
    return PatchGrid(channels, (SIDE, SIDE), (patch, patch), (SIDE // patch, SIDE // patch))


def pixel_owner(shape):
    """For every pixel the row-major number of its patch."""
    rows, columns = np.mgrid[:SIDE, :SIDE] // shape.patch[0]
    return rows * shape.grid[1] + columns


def random_keep(shape, batch, count, seed=0):
    order = torch.rand(batch, shape.patches, generator=torch.Generator().manual_seed(seed)).argsort(1)
    return order[:, :count].sort(1).values


@pytest.mark.parametrize("own, other", [(4, 6), (6, 4), (4, 4), (8, 3)])
def test_all_patches_are_the_same_image_cut_anew(own, other):
    images = torch.randn(2, 3, SIDE, SIDE)
    own, other = grid(own, 3), grid(other, 3)
    everywhere = torch.arange(own.patches)[None]
    patches, place = regrid(patchify(images, own.patch), everywhere, own, other)
    assert torch.equal(patches, patchify(images, other.patch))
    assert torch.equal(place, torch.arange(other.patches)[None])


@given(own=st.sampled_from(PATCHES), other=st.sampled_from(PATCHES), data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_subset_is_cut_where_it_covers_most(own, other, data):
    own, other = grid(own), grid(other)
    count = data.draw(st.integers(1, own.patches))
    keep = random_keep(own, 2, count, seed=data.draw(st.integers(0, 99)))
    images = torch.rand(2, 1, SIDE, SIDE) + 1
    kept = patchify(images, own.patch).gather(1, keep[:, :, None].expand(-1, -1, own.patch[0] ** 2))
    patches, place = regrid(kept, keep, own, other)
    assert place.shape[1] == max(1, round(other.patches * count / own.patches)) == patches.shape[1]
    of_own, of_other = pixel_owner(own), pixel_owner(other)
    for image, kept_now, seen, cut in zip(images, keep, place.expand(2, -1), patches, strict=True):
        shown = np.isin(of_own, kept_now)
        covered = np.array([shown[of_other == p].mean() for p in range(other.patches)])
        assert sorted(covered[seen.numpy()].tolist()) == pytest.approx(sorted(covered.tolist())[-len(seen) :])
        for patch, pixels in zip(seen.tolist(), cut, strict=True):
            wanted = (image[0].numpy() * shown)[of_other == patch]  # what was left out is zero
            np.testing.assert_array_equal(pixels.numpy(), wanted)


def test_gradients_reach_what_is_kept_and_nothing_else():
    own, other = grid(4), grid(6)
    keep = random_keep(own, 1, 9)
    patches = torch.randn(1, 9, 16, requires_grad=True)
    cut, _ = regrid(patches, keep, own, other)
    cut.sum().backward()
    seen = regrid(torch.ones(1, 9, 16), keep, own, other)[0].sum()
    assert patches.grad.sum() == seen  # each pixel that the other grid shows counts once
    assert set(patches.grad.unique().tolist()) <= {0.0, 1.0}


@given(own=st.sampled_from(PATCHES), other=st.sampled_from(PATCHES), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_importance_is_spread_over_pixels_and_summed(own, other, seed):
    own, other = grid(own), grid(other)
    rng = np.random.default_rng(seed)
    importance = rng.random((1, other.patches)).astype(np.float32)
    everywhere = torch.arange(own.patches)[None]
    seen = torch.arange(other.patches)[None]
    found = regrid_importance(torch.from_numpy(importance), seen, other, everywhere, own)[0]
    density = importance[0][pixel_owner(other)] / (other.patch[0] * other.patch[1])
    wanted = [density[pixel_owner(own) == p].sum() for p in range(own.patches)]
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-4)
    assert found.sum().item() == pytest.approx(importance.sum(), rel=1e-4)


def test_importance_of_a_subset_counts_nothing_elsewhere():
    own, other = grid(4), grid(6)
    found = regrid_importance(torch.tensor([[9.0]]), torch.tensor([[0]]), other, torch.arange(36)[None], own)
    image = found.view(6, 6)
    assert found.sum().item() == pytest.approx(9.0)
    # the first 6×6 pixels: one whole patch of 4×4, half of two, a quarter of one
    assert torch.allclose(image[:2, :2], torch.tensor([[4.0, 2.0], [2.0, 1.0]]))
    assert image.sum() == image[:2, :2].sum()


def test_token_logits_are_interpolated_between_patch_centres():
    """A linear slope over the image stays that slope, away from the border where it is clamped."""
    own, other = grid(4), grid(3)
    centres = (torch.arange(8) + 0.5) * 3
    slope = centres[None, :].expand(8, -1).reshape(1, 64, 1)
    found = regrid_tokens(slope, other, own)[0, :, 0].view(6, 6)
    wanted = (torch.arange(6) + 0.5) * 4
    assert torch.allclose(found[2], wanted, atol=1e-5)
    logits = torch.randn(2, 64, 5)
    same = regrid_tokens(logits, other, other)
    assert torch.allclose(same, logits, atol=1e-6)


def test_shares_of_area_keep_the_mean():
    values = torch.rand(3, 36)
    for patch in PATCHES:
        found = share_of_area(values, grid(4), grid(patch))
        assert torch.allclose(found.mean(1), values.mean(1), atol=1e-5)
    image = unpatchify(values[:, :, None].expand(-1, -1, 16), (4, 4), (SIDE, SIDE))
    assert torch.allclose(share_of_area(values, grid(4), grid(6)), F.avg_pool2d(image, 6).flatten(1))
