"""augment.py: pixels and patch masks that move together."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fedmitr.core.rng import make_rng
from fedmitr.vision.augment import pink_noise, random_affine, random_maps, texture, warp, warp_mask
from fedmitr.vision.patches import pixel_mask

GRID = (6, 6)


def spectral_slope(images) -> float:
    """Fit the power of spatial frequency as which the amplitude of images (n, H, W) falls; 1 to 8 cycles."""
    amplitude = np.sqrt((np.abs(np.fft.fft2(np.asarray(images, dtype=float))) ** 2).mean(0))  # (H, W)
    frequency = np.hypot(*np.meshgrid(*map(np.fft.fftfreq, images.shape[1:]), indexing="ij"))
    band = (frequency > 0) & (frequency <= 8 / max(images.shape[1:]))
    return np.polyfit(np.log(frequency[band]), np.log(amplitude[band]), 1)[0]


def masks(n, share=0.4, seed=0):
    return torch.rand(n, 36, generator=torch.Generator().manual_seed(seed)) < share


def affine(*rows):
    return torch.tensor([rows], dtype=torch.float32)


def test_identity_maps_change_nothing(images):
    identity = torch.eye(2, 3).expand(3, -1, -1)
    torch.testing.assert_close(warp(images, identity), images, rtol=1e-5, atol=1e-5)
    mask = masks(3)
    assert torch.equal(warp_mask(mask, identity, GRID), mask)
    assert torch.allclose(random_maps(3, 0.0, make_rng(0)), identity)


@pytest.mark.parametrize("down, right", [(0, 1), (2, 0), (-1, 3)])
def test_a_shift_by_whole_patches_moves_pixels_and_mask_alike(down, right):
    """A map takes an output point to the input 2·shift/cells further up or left of it."""
    maps = affine([1, 0, -2 * right / 6], [0, 1, -2 * down / 6]).expand(4, -1, -1)
    mask = masks(4)
    moved = warp_mask(mask, maps, GRID).view(4, 6, 6)
    rows = slice(max(0, down), 6 + min(0, down)), slice(max(0, -down), 6 - max(0, down))
    columns = slice(max(0, right), 6 + min(0, right)), slice(max(0, -right), 6 - max(0, right))
    assert torch.equal(moved[:, rows[0], columns[0]], mask.view(4, 6, 6)[:, rows[1], columns[1]])
    pixels = warp(pixel_mask(mask, GRID, (24, 24)).float(), maps)
    torch.testing.assert_close(
        pixels, pixel_mask(moved.flatten(1), GRID, (24, 24)).float(), atol=1e-4, rtol=0
    )


def test_a_quarter_turn_turns_pixels_and_mask_alike(images):
    quarter = affine([0, -1, 0], [1, 0, 0]).expand(3, -1, -1)
    turned = warp(images, quarter)
    by = 1 if torch.allclose(turned, images.rot90(1, (2, 3)), atol=1e-4) else -1
    torch.testing.assert_close(turned, images.rot90(by, (2, 3)), rtol=1e-4, atol=1e-4)
    mask = masks(3)
    assert torch.equal(warp_mask(mask, quarter, GRID).view(3, 6, 6), mask.view(3, 6, 6).rot90(by, (1, 2)))


def test_what_comes_into_view_mirrors_the_border():
    maps = random_maps(20, 1.0, make_rng(1))
    white = torch.ones(20, 1, 24, 24)
    torch.testing.assert_close(warp(white, maps), white, rtol=1e-5, atol=1e-5)
    assert warp_mask(torch.ones(20, 36, dtype=torch.bool), maps, GRID).all()


@pytest.mark.parametrize("patch", [4, 16])
def test_a_marker_painted_on_the_kept_patches_stays_on_them(patch):
    size = (6 * patch, 6 * patch)
    mask = masks(40)
    maps = random_maps(40, 1.0, make_rng(3))
    painted = warp(pixel_mask(mask, GRID, size).float(), maps)
    share = F.avg_pool2d(painted, patch).flatten(1)
    moved = warp_mask(mask, maps, GRID)
    clear = (share - 0.5).abs() > 0.1
    assert clear.double().mean() > 0.6 and torch.equal(moved[clear], share[clear] > 0.5)
    assert not torch.equal(moved, mask)


def test_strength_one_reaches_its_limits_and_no_further():
    maps = random_maps(4000, 1.0, make_rng(0)).double()
    area = torch.linalg.det(maps[:, :, :2]) ** -0.5
    assert 0.74 < area.min() < 0.78 and 1.22 < area.max() < 1.26
    centre = torch.linalg.solve(maps[:, :, :2], -maps[:, :, 2])
    assert 0.38 < centre.abs().max() <= 0.4 + 1e-6


def test_texture_is_smooth_and_in_range():
    smooth = texture(50, 24, torch.Generator().manual_seed(0))
    assert smooth.shape == (50, 1, 24, 24) and smooth.min() >= 0 and smooth.max() <= 1
    steps = (smooth[..., 1:] - smooth[..., :-1]).abs()
    assert steps.max() < 0.25 and smooth.std() > 0.1


def test_the_texture_of_the_tasks_scenes_stays_what_it_was():
    """Every digit of the task lies on it: other numbers here are another task."""
    found = texture(2, 24, make_rng(0))[:, 0, ::8, 5]
    wanted = torch.tensor([[0.85559005, 0.80077541, 0.56105930], [0.42297304, 0.60377747, 0.49527520]])
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [(24, 24), (33, 20)])
def test_the_amplitude_of_pink_noise_falls_as_one_over_frequency(size):
    noise = pink_noise(300, size, make_rng(0))
    assert noise.shape == (300, 1, *size)
    assert (noise.amin((1, 2, 3)) == 0).all() and torch.allclose(noise.amax((1, 2, 3)), torch.tensor(1.0))
    assert spectral_slope(noise[:, 0]) == pytest.approx(-1, abs=0.1)
    white = torch.randn(300, *size, generator=make_rng(1))
    assert spectral_slope(white) == pytest.approx(0, abs=0.1)  # the measure itself


def test_pink_noise_of_one_pixel_and_of_a_line_is_finite():
    for size in ((1, 1), (1, 7), (5, 1)):
        assert pink_noise(2, size, make_rng(0)).isfinite().all()


def test_an_affine_map_is_the_inverse_of_scale_then_rotate_then_shift():
    rng = torch.Generator().manual_seed(0)
    maps = random_affine(20, rng, scale=(0.5, 0.8), degrees=30, shift=0.3, shear=0.0).double()
    linear, offset = maps[:, :, :2], maps[:, :, 2]
    size = torch.linalg.det(linear) ** -0.5
    assert ((size >= 0.5 - 1e-5) & (size <= 0.8 + 1e-5)).all()
    rotation = linear * size[:, None, None]
    close = torch.allclose(
        rotation @ rotation.transpose(1, 2), torch.eye(2).double().expand(20, 2, 2), atol=1e-5
    )
    assert close
    angle = torch.atan2(rotation[:, 0, 1], rotation[:, 0, 0]).rad2deg()
    assert angle.abs().max() <= 30 + 1e-4 and angle.std() > 5
    centre = torch.linalg.solve(linear, -offset)  # output point that shows the glyph's centre
    assert centre.abs().max() <= 0.3 + 1e-5 and centre.std() > 0.05
