"""patches.py against loops over single pixels."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmitr.vision.patches import (
    PatchGrid,
    patch_share,
    patchify,
    pixel_mask,
    regrid,
    regrid_importance,
    regrid_tokens,
    share_of_area,
    unpatchify,
)

SIDE = 24
PATCHES = (2, 3, 4, 6, 8, 12, 24)


def square(patch, channels=1):
    return PatchGrid(channels, (SIDE, SIDE), (patch, patch), (SIDE // patch, SIDE // patch))


def pixel_owner(grid):
    """For every pixel the row-major number of its patch."""
    rows, columns = np.mgrid[:SIDE, :SIDE] // grid.patch[0]
    return rows * grid.shape[1] + columns


def random_keep(grid, batch, count, seed=0):
    order = torch.rand(batch, grid.patches, generator=torch.Generator().manual_seed(seed)).argsort(1)
    return order[:, :count].sort(1).values


# Images cut and put together, masks spread and measured.


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


def test_pixel_mask_by_loops():
    mask = torch.rand(2, 36, generator=torch.Generator().manual_seed(0)) < 0.4
    found = pixel_mask(mask, (6, 6), (12, 18))
    assert found.shape == (2, 1, 12, 18)
    for y in range(12):
        for x in range(18):
            assert torch.equal(found[:, 0, y, x], mask[:, y // 2 * 6 + x // 3])


def test_patch_share_against_a_loop():
    mask = (torch.rand(3, 1, 12, 8, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    brute = [
        [image[0, r : r + 4, c : c + 4].sum().item() / 16 for r in range(0, 12, 4) for c in range(0, 8, 4)]
        for image in mask
    ]
    assert torch.allclose(patch_share(mask, 4), torch.tensor(brute))


# Another grid.


@pytest.mark.parametrize("own, other", [(4, 6), (6, 4), (4, 4), (8, 3)])
def test_all_patches_are_the_same_image_cut_anew(own, other):
    images = torch.randn(2, 3, SIDE, SIDE)
    own, other = square(own, 3), square(other, 3)
    everywhere = torch.arange(own.patches)[None]
    patches, positions = regrid(patchify(images, own.patch), everywhere, own, other)
    assert torch.equal(patches, patchify(images, other.patch))
    assert torch.equal(positions, torch.arange(other.patches)[None])


@given(own=st.sampled_from(PATCHES), other=st.sampled_from(PATCHES), data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_subset_is_cut_where_it_covers_most(own, other, data):
    own, other = square(own), square(other)
    count = data.draw(st.integers(1, own.patches))
    keep = random_keep(own, 2, count, seed=data.draw(st.integers(0, 99)))
    images = torch.rand(2, 1, SIDE, SIDE) + 1
    kept = patchify(images, own.patch).gather(1, keep[:, :, None].expand(-1, -1, own.patch[0] ** 2))
    patches, positions = regrid(kept, keep, own, other)
    assert positions.shape[1] == max(1, round(other.patches * count / own.patches)) == patches.shape[1]
    own_number, other_number = pixel_owner(own), pixel_owner(other)
    for image, kept_now, seen, cut in zip(images, keep, positions.expand(2, -1), patches, strict=True):
        shown = np.isin(own_number, kept_now)
        covered = np.array([shown[other_number == p].mean() for p in range(other.patches)])
        assert sorted(covered[seen.numpy()].tolist()) == pytest.approx(sorted(covered.tolist())[-len(seen) :])
        for patch, pixels in zip(seen.tolist(), cut, strict=True):
            wanted = (image[0].numpy() * shown)[other_number == patch]  # what was left out is zero
            np.testing.assert_array_equal(pixels.numpy(), wanted)


def test_gradients_reach_what_is_kept_and_nothing_else():
    own, other = square(4), square(6)
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
    own, other = square(own), square(other)
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
    own, other = square(4), square(6)
    found = regrid_importance(torch.tensor([[9.0]]), torch.tensor([[0]]), other, torch.arange(36)[None], own)
    image = found.view(6, 6)
    assert found.sum().item() == pytest.approx(9.0)
    # the first 6×6 pixels: one whole patch of 4×4, half of two, a quarter of one
    assert torch.allclose(image[:2, :2], torch.tensor([[4.0, 2.0], [2.0, 1.0]]))
    assert image.sum() == image[:2, :2].sum()


def test_token_logits_are_interpolated_between_patch_centres():
    """A linear slope over the image stays that slope, away from the border where it is clamped."""
    own, other = square(4), square(3)
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
        found = share_of_area(values, square(4), square(patch))
        assert torch.allclose(found.mean(1), values.mean(1), atol=1e-5)
    image = unpatchify(values[:, :, None].expand(-1, -1, 16), (4, 4), (SIDE, SIDE))
    assert torch.allclose(share_of_area(values, square(4), square(6)), F.avg_pool2d(image, 6).flatten(1))
