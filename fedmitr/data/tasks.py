"""Tasks: images, labels and, where it is known, the true foreground, split for training and measuring."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from ..core.errors import BadInput
from ..core.rng import derive_seed, make_rng
from ..settings.schema import TASKS, TaskSettings
from .image_sets import IMAGE_SETS
from .photos import Photos, load_photos
from .scenes import digit_scenes


@dataclass(frozen=True)
class Split:
    """Some images of a task, with what is known of each.

    images (n, ch, H, W), normalised for the model: a tensor, or `Photos`, which are read from disk when they
    are indexed. labels (n,). foreground (n, 1, H, W) in {0, 1} and domains (n,): None where not known.
    """

    images: Tensor | Photos
    labels: Tensor
    foreground: Tensor | None = None
    domains: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, index: Tensor) -> "Split":
        """Return the images of these indices, in this order; `Photos` stay unread."""
        images = self.images.take(index) if isinstance(self.images, Photos) else self.images[index]
        others = (None if column is None else column[index] for column in (self.foreground, self.domains))
        return Split(images, self.labels[index], *others)

    @staticmethod
    def concat(parts: Sequence["Split"]) -> "Split":
        """Join splits of a task, one after the other; their images are tensors."""
        columns = zip(*((p.images, p.labels, p.foreground, p.domains) for p in parts), strict=True)
        return Split(*(None if c[0] is None else torch.cat(c) for c in columns))


@dataclass(frozen=True)
class Task:
    """The training, validation and test images of one task.

    classes: their names. stats: mean and standard deviation, each (ch, 1, 1), that normalised the pixels.
    digest: a hash that changes with the files that the images were read from; None where there are none.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    validation: Split
    test: Split
    stats: tuple[Tensor, Tensor]
    digest: str | None = None


def load_task(
    settings: TaskSettings,
    seed: int,
    image_size: int,
    stats: tuple[Tensor, Tensor],
    cache: Path | None = None,
) -> Task:
    """Load a task's images at image_size × image_size pixels, normalised with stats.

    stats: mean and standard deviation, each (ch, 1, 1). digits are scikit-learn's 1,797 handwritten digits,
    each placed at random scale, rotation and position on smooth random texture (`digit_scenes`): once for
    training, `task.scenes` times for validation and test. The seed fixes this and the stratified split.
    Every other task is read from files, which are decoded once into the folder `cache` (default: a temporary
    one of this process); its test images are the task's own test part, where it has one. Raises BadInput for
    an unknown task, and for files that are missing or unreadable.
    """
    if settings.name not in TASKS:
        raise BadInput(f"task.name={settings.name!r} is unknown: allowed are {', '.join(TASKS)}")
    if settings.name in IMAGE_SETS:
        return _photo_task(settings, seed, image_size, stats, cache)
    digits = load_digits()
    parts = stratified_split(digits.target, settings.validation, settings.test, seed)
    scenes = [_scenes(settings, image_size, seed, index, stats) for index in range(settings.scenes)]
    train, *held = _splits(scenes[0], parts, settings, seed)
    held = [
        Split.concat([split, *(scene.subset(torch.from_numpy(part)) for scene in scenes[1:])])
        for split, part in zip(held, parts[1:], strict=True)
    ]
    return Task(settings.name, tuple(map(str, digits.target_names)), train, *held, stats)


def _scenes(
    settings: TaskSettings, image_size: int, seed: int, index: int, stats: tuple[Tensor, Tensor]
) -> Split:
    """Place every digit in its scene of this index, normalised with stats."""
    mean, std = stats
    images, labels, foreground = _drawn(settings.model_copy(update={"scenes": 1}), image_size, seed, index)
    return Split(((images - mean) / std).contiguous(), labels, foreground)


@lru_cache(maxsize=8)  # two seeds of a study: many runs have the same scenes one after the other
def _drawn(settings: TaskSettings, image_size: int, seed: int, index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw scenes (n, 1, size, size) in [0, 1], labels (n,) and foreground of all digits, once each."""
    digits, stream = load_digits(), [index] if index else []
    clutter = 0.0 if settings.name == "digits-plain" else settings.clutter
    scenes, foreground = digit_scenes(
        digits.images, image_size, settings, clutter, make_rng(seed, "scenes", *stream)
    )
    return scenes, torch.tensor(digits.target), foreground


def _photo_task(
    settings: TaskSettings, seed: int, image_size: int, stats: tuple[Tensor, Tensor], cache: Path | None
) -> Task:
    """Load a task of image files; raise BadInput where training or test would have no image of a class."""
    album = load_photos(settings, image_size, stats, cache)
    held = None if album.held is None else np.flatnonzero(album.held.numpy())
    parts = stratified_split(album.labels.numpy(), settings.validation, settings.test, seed, held)
    for title, part in (("training", parts[0]), ("test", parts[2])):
        if lacking := sorted(set(range(len(album.classes))) - set(album.labels[part].tolist())):
            raise BadInput(
                f"task.data_dir={settings.data_dir!r} has no {title} image of class "
                f"{album.classes[lacking[0]]!r}: each class needs one at least in training and test"
            )
    whole = Split(album.images, album.labels, domains=album.domains)
    return Task(settings.name, album.classes, *_splits(whole, parts, settings, seed), stats, album.digest)


def _splits(whole: Split, parts: tuple[np.ndarray, ...], settings: TaskSettings, seed: int) -> list[Split]:
    """Return the splits of training, validation and test indices.

    Of the training images, at most task.limit of each class are drawn, where it is set.
    """
    train, *others = parts
    if settings.limit:
        shuffled = np.random.default_rng(derive_seed(seed, "limit")).permutation(train)
        labels = whole.labels.numpy()[shuffled]
        train = np.sort(np.concatenate([shuffled[labels == c][: settings.limit] for c in np.unique(labels)]))
    return [whole.subset(torch.from_numpy(part)) for part in (train, *others)]


def stratified_split(
    labels: np.ndarray, validation: float, test: float, seed: int, held: np.ndarray | None = None
) -> tuple[np.ndarray, ...]:
    """Split images with labels (n,) into training, validation and test images, each with all classes' shares.

    Returns three arrays of sorted indices. held: the indices of the test images where these are given;
    validation is then a share of the others. Raises BadInput for shares that leave a part without a class.
    """
    given = f"task.validation={validation}"
    if held is None:
        given += f" and task.test={test}"
        if validation + test >= 1:
            raise BadInput(f"{given} leave no training images: sum below 1")
    everything = np.arange(len(labels))
    try:
        if held is None:
            rest, held = train_test_split(everything, test_size=test, stratify=labels, random_state=seed)
        else:
            test, rest = 0.0, np.setdiff1d(everything, held)
        train, val = train_test_split(
            rest, test_size=validation / (1 - test), stratify=labels[rest], random_state=seed
        )
    except ValueError as error:
        raise BadInput(f"{given}: {' '.join(str(error).split())}") from None
    return np.sort(train), np.sort(val), np.sort(held)
