"""What is learnt: images, labels, splits and, where the task knows it, the true foreground."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from .errors import BadInput
from .runtime import generator
from .scenes import compose, place, random_affine, texture
from .settings import TASKS, TaskSettings


@dataclass(frozen=True)
class Split:
    """Images (n, ch, H, W), normalised for the model; labels (n,); true foreground (n, 1, H, W) in {0, 1}.

    Where the foreground is not known it is None.
    """

    images: Tensor
    labels: Tensor
    foreground: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, index: Tensor) -> "Split":
        known = self.foreground is not None
        return Split(self.images[index], self.labels[index], self.foreground[index] if known else None)


@dataclass(frozen=True)
class Task:
    """Train, validation and test split of one task, with the statistics that normalised its pixels."""

    name: str
    classes: tuple[str, ...]
    train: Split
    validation: Split
    test: Split
    stats: tuple[Tensor, Tensor]


def load_task(settings: TaskSettings, seed: int, image_size: int, stats: tuple[Tensor, Tensor]) -> Task:
    """The task's scenes at image_size pixels, normalised with stats = mean and std, each (ch, 1, 1).

    scikit-learn's 1,797 handwritten digits, each up-sampled and placed once at random scale, rotation
    and position on smooth random texture. The seed fixes placement, texture and the stratified split.
    """
    if settings.name not in TASKS:
        raise BadInput(f"task.name={settings.name!r} is unknown: allowed are {', '.join(TASKS)}")
    digits = load_digits()
    labels = torch.tensor(digits.target)
    clutter = 0.0 if settings.name == "digits-plain" else settings.clutter
    scenes, foreground = digit_scenes(digits.images, image_size, settings, clutter, generator(seed, "scenes"))
    mean, std = stats
    whole = Split(((scenes - mean) / std).contiguous(), labels, foreground)
    train, validation, test = stratified_split(digits.target, settings.validation, settings.test, seed)
    splits = (whole.subset(torch.from_numpy(part)) for part in (train, validation, test))
    return Task(settings.name, tuple(map(str, digits.target_names)), *splits, stats)


def digit_scenes(
    digits: np.ndarray, size: int, settings: TaskSettings, clutter: float, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """8x8 digits (n, 8, 8) in 0..16 -> scenes (n, 1, size, size) in [0, 1] and their true foreground.

    A pixel is foreground where the digit's ink covers at least half of it.
    """
    n = len(digits)
    glyphs = torch.tensor(digits / 16, dtype=torch.float32)[:, None]
    glyphs = F.interpolate(glyphs, scale_factor=4, mode="bicubic").clamp(0, 1)
    largest = settings.scale[1]
    maps = random_affine(n, rng, scale=settings.scale, degrees=settings.degrees, shift=max(0.0, 1 - largest))
    ink = place(glyphs, size, maps)
    brightness = 0.8 + 0.2 * torch.rand(n, 1, 1, 1, generator=rng)
    scenes = compose(ink, clutter * texture(n, size, rng), brightness)
    return scenes, (ink >= 0.5).float()


def stratified_split(labels: np.ndarray, validation: float, test: float, seed: int) -> tuple[np.ndarray, ...]:
    """Sorted indices of train, validation and test, each with the classes in equal proportion."""
    if validation + test >= 1:
        raise BadInput(
            f"task.validation={validation} and task.test={test} leave no training images: sum below 1"
        )
    everything = np.arange(len(labels))
    try:
        rest, held = train_test_split(everything, test_size=test, stratify=labels, random_state=seed)
        train, val = train_test_split(
            rest, test_size=validation / (1 - test), stratify=labels[rest], random_state=seed
        )
    except ValueError as error:
        raise BadInput(f"task.validation={validation} and task.test={test}: {error}") from None
    return np.sort(train), np.sort(val), np.sort(held)
