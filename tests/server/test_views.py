"""pixels.py: the geometry of views, and total variation with its gradient."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedmitr.core.rng import make_rng
from fedmitr.server.views import halo, move, random_move, total_variation, total_variation_gradient, windows
from fedmitr.vision.patches import PatchGrid, patchify

GRID = (6, 6)

# Geometry: a view is a roll and a flip of the image, and the kept set goes with it.


def seen(image, shift, flip):
    """Images (..., H, W) rolled by pixels, then mirrored."""
    rolled = torch.roll(image, shift, dims=(-2, -1))
    return rolled.flip(-1) if flip else rolled


@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 5),
    patch=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    shift=st.tuples(st.integers(-20, 20), st.integers(-20, 20)),
    flip=st.booleans(),
)
def test_each_patch_moves_to_the_place_that_shows_most_of_it(rows, columns, patch, shift, flip):
    numbers = torch.arange(rows * columns)
    painted = numbers.view(1, 1, rows, columns).repeat_interleave(patch[0], 2).repeat_interleave(patch[1], 3)
    places = patchify(seen(painted, shift, flip).float(), patch)[0]  # which patch each pixel of a place shows
    found = move(numbers[None], shift, flip, (rows, columns), patch)[0]
    for number, place in enumerate(found.tolist()):
        shown = (places == number).sum(dim=1)
        assert shown[place] == shown.max()
    assert sorted(found.tolist()) == numbers.tolist()


@given(down=st.integers(-7, 7), right=st.integers(-7, 7), flip=st.booleans())
def test_a_shift_by_whole_patches_is_roll_and_flip_of_the_grid(down, right, flip):
    numbers = torch.arange(36)
    grid = seen(numbers.view(6, 6), (down, right), flip).flatten().tolist()
    found = move(numbers[None], (4 * down, 4 * right), flip, GRID, (4, 4))[0].tolist()
    assert found == [grid.index(number) for number in range(36)]


SHAPE = PatchGrid(2, (24, 24), (4, 4), GRID)


def cut(images, index, places):
    """What `windows` shows of images (B, ch, H, W), as patches (B, M, d)."""
    return images.flatten(1).gather(1, index.expand(len(images), -1)).view(len(images), places.shape[1], -1)


@pytest.mark.parametrize("jitter, flip", [(0.0, False), (0.125, False), (0.0, True), (0.2, True)])
def test_a_view_is_the_rolled_and_flipped_image_at_the_moved_places(jitter, flip):
    rng = torch.Generator().manual_seed(0)
    images = torch.randn(3, 2, 24, 24, generator=rng)
    far, drawn = round(jitter * 24), set()
    for seed in range(40):
        shift, mirror = random_move(SHAPE, jitter, flip, make_rng(seed))
        drawn.add((shift, mirror))
        view = patchify(seen(images, shift, mirror), (4, 4))
        some = torch.rand(3, 36, generator=rng).argsort(1)[:, :10]
        for keep in (some, torch.arange(36)[None]):
            index, places = windows(keep, shift, mirror, SHAPE)
            assert torch.equal(places, move(keep, shift, mirror, GRID, (4, 4)))
            wanted = view.gather(1, places.expand(3, -1)[:, :, None].expand(-1, -1, 32))
            assert torch.equal(cut(images, index, places), wanted)
    for axis in range(2):
        assert {shift[axis] for shift, _ in drawn} >= {-far, far}
    assert {mirror for _, mirror in drawn} == ({False, True} if flip else {False})


def test_without_a_move_the_windows_are_the_patches():
    images, keep = torch.randn(3, 2, 24, 24), torch.arange(36)[None]
    assert torch.equal(cut(images, *windows(keep, (0, 0), False, SHAPE)), patchify(images, (4, 4)))


@given(seed=st.integers(0, 99), kept=st.integers(1, 6))
def test_the_gradient_of_total_variation_at_patches_is_autograds(seed, kept):
    rng = torch.Generator().manual_seed(seed)
    shape = PatchGrid(2, (6, 8), (3, 4), (2, 2))
    images = torch.randn(3, 2, 6, 8, generator=rng, dtype=torch.float64).requires_grad_()
    (wanted,) = torch.autograd.grad(total_variation(images).sum(), images)
    keep = torch.rand(3, 4, generator=rng).argsort(1)[:, :kept]
    around = halo(keep, shape)
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
