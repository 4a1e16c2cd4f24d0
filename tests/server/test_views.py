"""views.py: the geometry of views, total variation with its gradient, and views for the student."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import inversion_settings
from hypothesis import given
from hypothesis import strategies as st

import fedmitr as fm
from fedmitr.core.rng import make_rng
from fedmitr.server.views import (
    batch_variation,
    batch_variation_gradient,
    epochs,
    halo,
    move,
    random_move,
    random_textures,
    random_view,
    total_variation,
    total_variation_gradient,
    view,
    windows,
)
from fedmitr.settings.schema import DistillSettings
from fedmitr.vision.augment import pink_noise, random_maps
from fedmitr.vision.patches import PatchGrid, patchify, pixel_mask

GRID = (6, 6)

# Geometry: a view is a roll and a flip of the image, and the kept set goes with it.


def moved(image, shift, flip):
    """Return images (..., H, W) rolled by pixels, then mirrored."""
    rolled = torch.roll(image, shift, dims=(-2, -1))
    return rolled.flip(-1) if flip else rolled


@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 5),
    patch=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    shift=st.tuples(st.integers(-20, 20), st.integers(-20, 20)),
    flip=st.booleans(),
)
def test_each_patch_moves_to_the_position_that_shows_most_of_it(rows, columns, patch, shift, flip):
    numbers = torch.arange(rows * columns)
    painted = numbers.view(1, 1, rows, columns).repeat_interleave(patch[0], 2).repeat_interleave(patch[1], 3)
    shows = patchify(moved(painted, shift, flip).float(), patch)[0]  # the patch that each pixel comes from
    found = move(numbers[None], shift, flip, (rows, columns), patch)[0]
    for number, position in enumerate(found.tolist()):
        shown = (shows == number).sum(dim=1)
        assert shown[position] == shown.max()
    assert sorted(found.tolist()) == numbers.tolist()


@given(down=st.integers(-7, 7), right=st.integers(-7, 7), flip=st.booleans())
def test_a_shift_by_whole_patches_is_roll_and_flip_of_the_grid(down, right, flip):
    numbers = torch.arange(36)
    grid = moved(numbers.view(6, 6), (down, right), flip).flatten().tolist()
    found = move(numbers[None], (4 * down, 4 * right), flip, GRID, (4, 4))[0].tolist()
    assert found == [grid.index(number) for number in range(36)]


PATCHES = PatchGrid(2, (24, 24), (4, 4), GRID)


def cut(images, index, positions):
    """Return what `windows` shows of images (B, ch, H, W), as patches (B, M, d)."""
    pixels = images.flatten(1).gather(1, index.expand(len(images), -1))
    return pixels.view(len(images), positions.shape[1], -1)


@pytest.mark.parametrize("jitter, flip", [(0.0, False), (0.125, False), (0.0, True), (0.2, True)])
def test_a_view_is_the_rolled_and_flipped_image_at_the_moved_positions(jitter, flip):
    rng = torch.Generator().manual_seed(0)
    images = torch.randn(3, 2, 24, 24, generator=rng)
    far, drawn = round(jitter * 24), set()
    for seed in range(40):
        shift, mirror = random_move(PATCHES, jitter, flip, make_rng(seed))
        drawn.add((shift, mirror))
        view = patchify(moved(images, shift, mirror), (4, 4))
        some = torch.rand(3, 36, generator=rng).argsort(1)[:, :10]
        for keep in (some, torch.arange(36)[None]):
            index, positions = windows(keep, shift, mirror, PATCHES)
            assert torch.equal(positions, move(keep, shift, mirror, GRID, (4, 4)))
            wanted = view.gather(1, positions.expand(3, -1)[:, :, None].expand(-1, -1, 32))
            assert torch.equal(cut(images, index, positions), wanted)
    for axis in range(2):
        assert {shift[axis] for shift, _ in drawn} >= {-far, far}
    assert {mirror for _, mirror in drawn} == ({False, True} if flip else {False})


def test_without_a_move_the_windows_are_the_patches():
    images, keep = torch.randn(3, 2, 24, 24), torch.arange(36)[None]
    assert torch.equal(cut(images, *windows(keep, (0, 0), False, PATCHES)), patchify(images, (4, 4)))


@given(seed=st.integers(0, 99), kept=st.integers(1, 6))
def test_the_gradient_of_total_variation_at_patches_is_autograds(seed, kept):
    rng = torch.Generator().manual_seed(seed)
    grid = PatchGrid(2, (6, 8), (3, 4), (2, 2))
    images = torch.randn(3, 2, 6, 8, generator=rng, dtype=torch.float64).requires_grad_()
    (wanted,) = torch.autograd.grad(total_variation(images).sum(), images)
    keep = torch.rand(3, 4, generator=rng).argsort(1)[:, :kept]
    around = halo(keep, grid)
    found = total_variation_gradient(
        images.detach().flatten(1).gather(1, around.flatten(1)).view(around.shape)
    )
    torch.testing.assert_close(
        found, patchify(wanted, (3, 4)).gather(1, keep[:, :, None].expand(-1, -1, 24)).flatten(1)
    )


def test_total_variation_against_a_loop():
    images = torch.randn(2, 2, 4, 5, generator=torch.Generator().manual_seed(0))
    for image, found in zip(images, total_variation(images), strict=True):
        brute = 0.0
        for c, y, x in itertools.product(range(2), range(4), range(5)):
            brute += (image[c, y + 1, x] - image[c, y, x]).item() ** 2 if y < 3 else 0
            brute += (image[c, y, x + 1] - image[c, y, x]).item() ** 2 if x < 4 else 0
        assert found.item() == pytest.approx(brute, rel=1e-5)


def brute_norms(images):
    """The norms of SMI's four differences of neighbours, each over all images, added up; by a loop."""
    squares = [0.0] * 4
    count, channels, height, width = images.shape
    for b, c, y, x in itertools.product(range(count), range(channels), range(height), range(width)):
        for d, (down, right) in enumerate(((0, 1), (1, 0), (1, 1), (1, -1))):
            if y + down < height and 0 <= x + right < width:
                squares[d] += (images[b, c, y + down, x + right] - images[b, c, y, x]).item() ** 2
    return sum(map(math.sqrt, squares))


@given(seed=st.integers(0, 99), size=st.tuples(st.integers(1, 5), st.integers(1, 5)))
def test_the_variation_of_a_batch_is_the_norms_of_four_directions(seed, size):
    rng = torch.Generator().manual_seed(seed)
    images = torch.randn(2, 2, *size, generator=rng, dtype=torch.float64)
    assert batch_variation(images).item() == pytest.approx(brute_norms(images), rel=1e-9)
    leaf = images.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(batch_variation(leaf), leaf)
    torch.testing.assert_close(batch_variation_gradient(images), wanted)


def test_a_batch_without_variation_has_no_gradient_of_it():
    even = torch.full((2, 3, 4, 4), 0.7)
    assert batch_variation(even) == 0 and not batch_variation_gradient(even).any()
    step = even.clone()
    step[0, 1, :, :2] = 0.2  # differs to the right and on both diagonals, not downwards
    gradient = batch_variation_gradient(step)
    assert gradient.isfinite().all() and not gradient[1].any() and gradient[0, 1, :, 1:3].all()


@pytest.mark.parametrize("kept", [36, 12])
@pytest.mark.parametrize("flip", [False, True])
def test_an_augmented_view_is_the_warped_image_where_most_of_the_kept_patches_shows(kept, flip, double):
    rng = torch.Generator().manual_seed(3)
    grid, how = PATCHES, inversion_settings(augment=0.7, flip=flip, jitter=0.125)
    image = torch.randn(5, 2 * 24 * 24, generator=rng)
    keep = torch.arange(36)[None] if kept == 36 else torch.rand(5, 36, generator=rng).argsort(1)[:, :kept]
    mirrored = set()
    for seed in range(6):
        view, positions, grad_to_image = random_view(image, keep, grid, how, make_rng(seed))
        again = make_rng(seed)
        _, turned = random_move(grid, 0.125, flip, again)
        maps = random_maps(5, 0.7, again).to(image)
        mirrored.add(turned)
        x = image.clone().requires_grad_()
        base = F.affine_grid(maps, [5, 2, 24, 24], align_corners=False)
        if turned:
            base = base.flip(2)  # what a map shows at the right now stands at the left
        whole = F.grid_sample(x.view(5, 2, 24, 24), base, padding_mode="reflection", align_corners=False)
        positions = positions.expand(5, -1)
        wanted = patchify(whole, (4, 4)).gather(1, positions[:, :, None].expand(-1, -1, 32))
        torch.testing.assert_close(view, wanted)
        grad_view = torch.randn(view.shape, generator=rng)
        torch.testing.assert_close(grad_to_image(grad_view), torch.autograd.grad(wanted, x, grad_view)[0])
        mask = torch.zeros(5, 1, 6, 6).view(5, 36).scatter(1, keep.expand(5, -1), 1.0).view(5, 1, 6, 6)
        shown = F.grid_sample(
            mask.repeat_interleave(4, 2).repeat_interleave(4, 3), base, padding_mode="reflection",
            align_corners=False,
        )  # fmt: skip
        for row, at in zip(patchify(shown, (4, 4)).mean(-1), positions, strict=True):
            assert row[at].min() >= row.topk(kept).values.min() - 1e-9
    assert mirrored == ({False, True} if flip else {False})


# Views for the student.


def student_view(student, synthetic, pick=None, seed=5, **options):
    settings = DistillSettings(**(dict(augment=0.0, background="keep") | options))
    pick = torch.arange(len(synthetic)) if pick is None else pick
    return view(student, synthetic, pick, settings, make_rng(seed))


@pytest.fixture(scope="module")
def marked(synthetic):
    """A synthetic set whose pixels are its mask."""
    pixels = pixel_mask(synthetic.mask, GRID, (24, 24)).float()
    return fm.SyntheticSet(pixels, synthetic.labels, synthetic.mask, synthetic.loss)


def test_without_augmentation_a_view_is_the_picked_images(micro, synthetic):
    pick = torch.tensor([7, 2, 2])
    images, mask = student_view(micro, synthetic, pick)
    assert torch.equal(images, synthetic.pixels[pick]) and torch.equal(mask, synthetic.mask[pick])


def test_pixels_and_mask_of_a_view_move_together(micro, marked):
    images, mask = student_view(micro, marked, augment=1.0)
    share = F.avg_pool2d(images, 4).flatten(1)
    clear = (share - 0.5).abs() > 1e-3
    assert torch.equal(mask[clear], share[clear] > 0.5) and not torch.equal(mask, marked.mask)


def test_texture_replaces_only_the_low_density_patches(micro, marked):
    images, mask = student_view(micro, marked, background="texture")
    on = pixel_mask(mask, GRID, (24, 24))
    assert torch.equal(mask, marked.mask) and (images[on] == 1).all()
    assert (images[~on] != 0).double().mean() > 0.99
    again, _ = student_view(micro, marked, background="texture")
    other, _ = student_view(micro, marked, background="texture", seed=6)
    assert torch.equal(images, again) and not torch.equal(images, other)


def test_textures_are_pink_noise_of_every_contrast_in_the_range_of_the_models_pixels(micro):
    made = random_textures(micro, torch.zeros(400, 2, 24, 20), make_rng(0))
    assert made.shape == (400, 2, 24, 20)
    assert made.min() >= -2 - 1e-4 and made.max() <= 2 + 1e-4  # [0, 1] in units of 0.25 around 0.5
    low, high = made.amin((2, 3)), made.amax((2, 3))  # (400, 2): channels share range, not noise
    torch.testing.assert_close(low[:, 0], low[:, 1])
    torch.testing.assert_close(high[:, 0], high[:, 1])
    contrast = (high - low)[:, 0] / 4
    assert np.allclose(contrast.quantile(torch.tensor([0.1, 0.5, 0.9])), [0.1, 0.5, 0.9], atol=0.07)
    assert made.mean().abs() < 0.1  # as often bright as dark: the task's background is dark
    even = (made - low[:, :, None, None]) / (high - low)[:, :, None, None]
    assert (even[:, 0] - even[:, 1]).abs().mean() > 0.1
    rng = make_rng(0)
    torch.rand(2, 400, generator=rng)  # contrasts and darkest pixels come first
    torch.testing.assert_close(even.flatten(0, 1), pink_noise(800, (24, 20), rng)[:, 0], atol=1e-3, rtol=0)


def test_a_dense_set_has_no_background_to_replace(micro, synthetic):
    everything = torch.ones_like(synthetic.mask)
    dense = fm.SyntheticSet(synthetic.pixels, synthetic.labels, everything, synthetic.loss)
    images, mask = student_view(micro, dense, background="texture")
    assert torch.equal(images, synthetic.pixels) and mask.all()


def test_views_leave_the_synthetic_set_alone(micro, synthetic):
    before = [t.clone() for t in (synthetic.pixels, synthetic.mask, synthetic.labels)]
    student_view(micro, synthetic, augment=1.0, background="texture")
    student_view(micro, synthetic, background="texture")
    after = (synthetic.pixels, synthetic.mask, synthetic.labels)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@given(count=st.integers(1, 30), batch=st.integers(1, 12), times=st.integers(0, 4))
def test_every_image_comes_once_an_epoch(count, batch, times):
    batches = list(epochs(count, batch, make_rng(0), times))
    assert len(batches) == times * math.ceil(count / batch)
    drawn = torch.cat([torch.empty(0, dtype=torch.int64), *batches])
    for epoch in range(times):
        part = drawn[epoch * count : (epoch + 1) * count]
        assert sorted(part.tolist()) == list(range(count))
