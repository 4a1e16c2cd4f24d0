"""Small image files in class folders, for the tests that read them."""

import numpy as np
import torch
from PIL import Image

import fedmitr as fm
from fedmitr.data import photos
from fedmitr.settings.schema import TaskSettings

RGB = (torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1), torch.tensor([0.2, 0.25, 0.3]).view(3, 1, 1))
GREY = (torch.tensor([0.5]).view(1, 1, 1), torch.tensor([0.25]).view(1, 1, 1))
SIZE = 8


def draw(path, seed, size=(10, 10)):
    """Write an image of smooth random colours, another for each seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(path)


def fill(root, classes=("bee", "ant", "cat"), each=10):
    """Write so many images of each class; return the folder."""
    for k, name in enumerate(classes):
        for i in range(each):
            draw(root / name / f"{i}.png", 1000 * k + i)
    return root


def load(root, name="image-folder", seed=0, size=SIZE, stats=RGB, cache=None, **options):
    """Load the task of a folder, with options of TaskSettings."""
    data_dir = None if root is None else str(root)
    return fm.load_task(TaskSettings(name=name, data_dir=data_dir, **options), seed, size, stats, cache)


def album(root, name="image-folder", size=SIZE, stats=RGB, cache=None, **options):
    """Load all images in the order of the files."""
    return photos.load_photos(TaskSettings(name=name, data_dir=str(root), **options), size, stats, cache)


def parts(task):
    return (task.train, task.validation, task.test)


def rows(split):
    return split.images.index.tolist()


def experiment(root, store, **more):
    """Make a small experiment of two clients on a folder."""
    given = {"task.name": "image-folder", "task.data_dir": str(root), "partition.clients": 2}
    given |= {"partition.min_size": 2, "client.epochs": 1} | more
    return fm.Experiment(fm.Settings.load("smoke", given), store)
