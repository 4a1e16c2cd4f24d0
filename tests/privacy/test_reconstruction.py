"""reconstruction.py: distances against closed forms, neighbours that were planted, images from features."""

import numpy as np
import pytest
import torch

import fedmitr as fm
from fedmitr import BadInput
from fedmitr.privacy.reconstruction import (
    bright,
    invert_features,
    nearer_share,
    nearest,
    neighbours,
    psnr,
    same_size,
    ssim,
)
from fedmitr.vision.features import image_features


@pytest.fixture(scope="module")
def pools(task):
    return dict(zip(("training", "test"), same_size(task.train, task.test, seed=0), strict=True))


def planted(split, rows):
    """Made images that are those of a split but for a little noise."""
    images = split.images[rows]
    images = images + 0.05 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(len(rows), 36, dtype=torch.bool)
    return fm.SyntheticSet(images, split.labels[rows], mask, torch.zeros(len(rows)))


def test_psnr_is_that_of_the_mean_squared_error():
    image, other = torch.rand(2, 1, 24, 24, generator=torch.Generator().manual_seed(0))
    assert psnr(image, other) == pytest.approx(-10 * np.log10(float((image - other).square().mean())))
    assert psnr(image, image) == float("inf") and ssim(image, image) == pytest.approx(1)
    assert ssim(image, other) < 0.3


def test_brightness_undoes_the_normalisation(task):
    mean, std = task.stats
    image = torch.rand(2, 1, 24, 24)
    assert torch.allclose(bright((image - mean) / std, task.stats), image, atol=1e-6)


def test_the_nearest_is_that_of_a_loop():
    queries, pool = torch.randn(4, 3), torch.randn(9, 3)
    index, distance = nearest(queries, pool)
    for query, found, far in zip(queries, index, distance, strict=True):
        every = [float((query - row).norm()) for row in pool]
        assert int(found) == int(np.argmin(every)) and float(far) == pytest.approx(min(every), rel=1e-5)


def test_pools_have_equally_many_images_of_each_class(task, pools):
    counts = [torch.bincount(split.labels, minlength=10) for split in pools.values()]
    whole = [torch.bincount(split.labels, minlength=10) for split in (task.train, task.test)]
    assert torch.equal(*counts) and torch.equal(counts[0], torch.minimum(*whole))
    ones = [task.train.subset((task.train.labels == label).nonzero()[:, 0]) for label in (0, 1)]
    with pytest.raises(BadInput, match="no class in common"):
        same_size(*ones, seed=0)


@pytest.mark.parametrize("source", ["training", "test"])
def test_images_that_copy_a_pool_are_found_in_it(micro, task, pools, source):
    rows = torch.arange(0, 60, 6)
    made = planted(pools[source], rows)
    table = neighbours(made, pools, lambda images: image_features(micro, images, "both"), task.stats)
    assert len(table) == len(rows) * 2 * 2
    found = table[(table["pool"] == source) & (table["space"] == "pixels")]
    assert found["index"].tolist() == rows.tolist() and (found["psnr"] > 25).all()
    labels = pools[source].labels[torch.tensor(table[table["pool"] == source]["index"].to_numpy())]
    assert labels.tolist() == table[table["pool"] == source]["label"].tolist()
    shares = nearer_share(table, "training", "test")
    assert shares.loc["pixels", "nearer to training"] == (source == "training")
    best = f"ssim, {source}"
    other = "ssim, test" if source == "training" else "ssim, training"
    assert shares.loc["pixels", best] > shares.loc["pixels", other]


def test_images_of_a_class_that_no_pool_has_are_refused(micro, task, pools):
    made = planted(pools["test"], torch.arange(3))
    only = {name: split.subset((split.labels == 9).nonzero()[:, 0]) for name, split in pools.items()}
    with pytest.raises(BadInput, match="no synthetic image"):
        neighbours(made, only, lambda images: images.flatten(1), task.stats)


def test_inverting_features_moves_an_image_of_ones_own_towards_the_one_that_has_them(task):
    vit = fm.create_vit("vit_micro", 10, pretrained=True).eval()
    images = task.train.images[:3]
    with torch.no_grad():
        wanted, own = (image_features(vit, x, "both") for x in (images, task.test.images))
    start = task.test.images[nearest(wanted, own)[0]]
    found = invert_features(vit, wanted, "both", start, steps=150)
    with torch.no_grad():
        near, far = ((image_features(vit, x, "both") - wanted).square().mean(1) for x in (found, start))
    assert found.shape == images.shape and (near < 0.2 * far).all()
    truth, after, before = (bright(x, task.stats) for x in (images, found, start))
    gained = [psnr(t, a) - psnr(t, b) for t, a, b in zip(truth, after, before, strict=True)]
    assert np.mean(gained) > 0.2
    assert torch.equal(found, invert_features(vit, wanted, "both", start, steps=150))
