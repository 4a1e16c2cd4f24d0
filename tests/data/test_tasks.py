"""tasks.py and scenes.py: splits, scenes and their true foreground."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

import fedmitr as fm
from fedmitr.data.scenes import compose
from fedmitr.data.tasks import stratified_split
from fedmitr.settings.schema import TaskSettings
from fedmitr.vision.augment import random_affine, texture
from fedmitr.vision.patches import patch_share

STATS = (torch.zeros(1, 1, 1), torch.ones(1, 1, 1))  # pixels as they are, in [0, 1]


def load(seed=0, size=24, stats=STATS, **options):
    return fm.load_task(TaskSettings(**options), seed, size, stats)


def parts(task):
    return (task.train, task.validation, task.test)


@pytest.fixture(scope="module")
def plain():
    return load(name="digits-plain")


def test_every_digit_is_in_one_split_and_none_twice():
    labels = load_digits().target
    splits = stratified_split(labels, 0.1, 0.25, seed=3)
    assert sorted(np.concatenate(splits)) == list(range(1797))
    assert [len(s) for s in splits] == [1797 - 180 - 450, 180, 450]


def test_splits_are_stratified():
    labels = load_digits().target
    whole = np.bincount(labels) / len(labels)
    for part in stratified_split(labels, 0.2, 0.3, seed=1):
        assert np.abs(np.bincount(labels[part]) - whole * len(part)).max() <= 2


def test_a_split_that_leaves_no_training_images_is_one_line(one_line):
    with pytest.raises(fm.BadInput) as error:
        load(validation=0.5, test=0.5)
    one_line(error.value, "task.validation=0.5", "task.test=0.5")


def test_the_seed_fixes_everything_and_another_changes_it():
    one, again, other = load(seed=4), load(seed=4), load(seed=5)
    for a, b, c in zip(parts(one), parts(again), parts(other), strict=True):
        assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)
        assert torch.equal(a.foreground, b.foreground)
        assert a.images.shape == c.images.shape and not torch.equal(a.images, c.images)
        assert not torch.equal(a.labels, c.labels)


def test_all_1797_digits_are_there_with_their_labels(plain):
    labels = torch.cat([p.labels for p in parts(plain)])
    assert len(labels) == 1797
    assert torch.bincount(labels).tolist() == np.bincount(load_digits().target).tolist()
    assert plain.classes == tuple("0123456789")


def test_labels_belong_to_their_images(plain):
    """Rendered digits look like the mean image of their own class more than of any other."""
    images = torch.cat([p.images for p in parts(plain)]).flatten(1)
    labels = torch.cat([p.labels for p in parts(plain)])
    means = torch.stack([images[labels == c].mean(0) for c in range(10)])
    nearest = torch.cdist(images, means).argmin(dim=1)
    assert (nearest == labels).double().mean() > 0.35  # chance 0.1


def test_foreground_is_where_a_clutter_free_image_is_bright(plain):
    for part in parts(plain):
        # ink·brightness, ink at least 1/2 on the foreground, brightness 0.8 to 1
        inside = part.foreground.bool()
        assert (part.images[inside] >= 0.4 - 1e-6).all()
        assert (part.images[~inside] <= 0.5).all()
        brightest = part.images.amax(dim=(1, 2, 3))
        assert ((brightest >= 0.7) & (brightest <= 1 + 1e-6)).all()


def test_the_plain_task_has_a_black_background_and_the_other_has_not(plain):
    corner = plain.train.images[..., 0, 0]
    assert (corner == 0).double().mean() > 0.99
    cluttered = load().train
    assert (cluttered.images[..., 0, 0] == 0).double().mean() < 0.1
    assert cluttered.images[..., 0, 0].max() <= 0.5 + 1e-6


def test_both_tasks_place_the_same_digits(plain):
    cluttered = load()
    assert torch.equal(cluttered.train.foreground, plain.train.foreground)
    assert torch.equal(cluttered.train.labels, plain.train.labels)


def test_every_digit_shows(plain):
    for part in parts(plain):
        assert (part.foreground.sum(dim=(1, 2, 3)) >= 10).all()
        assert set(part.foreground.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("size, channels", [(24, 3), (32, 1), (40, 3)])
def test_other_sizes_and_three_channels(size, channels):
    stats = (torch.linspace(0.1, 0.5, channels).view(-1, 1, 1), torch.full((channels, 1, 1), 0.25))
    task = load(size=size, stats=stats)
    assert task.test.images.shape == (450, channels, size, size)
    assert task.test.foreground.shape == (450, 1, size, size)
    grey = task.test.images * stats[1] + stats[0]
    assert grey.min() >= -1e-5 and grey.max() <= 1 + 1e-5
    assert torch.allclose(grey, grey[:, :1].expand_as(grey), atol=1e-5)


def test_a_subset_keeps_columns_together(plain):
    index = torch.tensor([5, 2, 2])
    few = plain.test.subset(index)
    assert len(few) == 3
    for column in ("images", "labels", "foreground"):
        assert torch.equal(getattr(few, column), getattr(plain.test, column)[index])


def test_an_unknown_task_is_one_line(one_line):
    with pytest.raises(fm.BadInput) as error:
        load(name="cifar")
    one_line(error.value, "task.name='cifar'", "digits")


def test_patch_share_against_a_loop():
    mask = (torch.rand(3, 1, 12, 8, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    brute = [
        [image[0, r : r + 4, c : c + 4].sum().item() / 16 for r in range(0, 12, 4) for c in range(0, 8, 4)]
        for image in mask
    ]
    assert torch.allclose(patch_share(mask, 4), torch.tensor(brute))


def test_texture_is_smooth_and_in_range():
    smooth = texture(50, 24, torch.Generator().manual_seed(0))
    assert smooth.shape == (50, 1, 24, 24) and smooth.min() >= 0 and smooth.max() <= 1
    steps = (smooth[..., 1:] - smooth[..., :-1]).abs()
    assert steps.max() < 0.25 and smooth.std() > 0.1


def test_compose_blends_linearly():
    ink = torch.tensor([0.0, 0.5, 1.0]).view(1, 1, 1, 3)
    mixed = compose(ink, torch.full((1, 1, 1, 3), 0.2), torch.full((1, 1, 1, 1), 0.9))
    assert mixed.flatten().tolist() == pytest.approx([0.2, 0.55, 0.9])


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
    centre = torch.linalg.solve(linear, -offset)  # output point that looks at the glyph's centre
    assert centre.abs().max() <= 0.3 + 1e-5 and centre.std() > 0.05
