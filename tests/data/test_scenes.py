"""scenes.py: digits on texture, and their true foreground."""

import pytest
import torch
from photo_files import parts

import fedmitr as fm
from fedmitr.data.scenes import compose
from fedmitr.settings.schema import TaskSettings

STATS = (torch.zeros(1, 1, 1), torch.ones(1, 1, 1))  # pixels as they are, in [0, 1]


def load(seed=0, size=24, stats=STATS, **options):
    return fm.load_task(TaskSettings(**options), seed, size, stats)


@pytest.fixture(scope="module")
def plain():
    return load(name="digits-plain")


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


def test_compose_blends_linearly():
    ink = torch.tensor([0.0, 0.5, 1.0]).view(1, 1, 1, 3)
    mixed = compose(ink, torch.full((1, 1, 1, 3), 0.2), torch.full((1, 1, 1, 1), 0.9))
    assert mixed.flatten().tolist() == pytest.approx([0.2, 0.55, 0.9])
