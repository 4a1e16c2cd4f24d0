"""Photos on disk: the paper's tasks and folders of your own, decoded once and then read batch by batch.

An image is decoded, brought to a square and kept as bytes in one memory-mapped array of the run store.
`Photos` stands where a tensor of images stands in a `Split` and reads only what it is asked for, so a
task may be larger than memory.
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from .blocks import TASKS, TaskSettings
from .errors import BadInput
from .paths import home
from .runtime import progress
from .store import Store, write_json

CPU = torch.device("cpu")
FORMAT = 1  # raised when the same files give other bytes
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
DOMAINS = ("Art", "Clipart", "Product", "Real World")
# Where all images have one side they are kept at it, and resized when read; else at the model's side.
NATIVE = {"cifar10": 32, "cifar100": 32, "svhn": 32, "tiny-imagenet": 64}
# name -> torchvision's loader, and what it looks for in its folder
TORCHVISION = {
    "cifar10": ("CIFAR10", "cifar-10-batches-py/ (from cifar-10-python.tar.gz)"),
    "cifar100": ("CIFAR100", "cifar-100-python/ (from cifar-100-python.tar.gz)"),
    "svhn": ("SVHN", "train_32x32.mat and test_32x32.mat"),
}
LAYOUTS = {
    "image-folder": "<class>/*.jpg of two classes or more, or train/<class>/*.jpg with test/<class>/*.jpg",
    "tiny-imagenet": "train/<wnid>/images/*.JPEG, val/images/*.JPEG, val/val_annotations.txt and words.txt, "
    "as tiny-imagenet-200.zip unpacks to tiny-imagenet-200",
    "mini-imagenet": "<wnid>/*.jpg of 100 classes, or the same below train/, val/ and test/",
    "office-home": "<domain>/<class>/*.jpg, domains Art, Clipart, Product and 'Real World', "
    "as OfficeHomeDataset_10072016.zip unpacks",
}
PHOTO_TASKS = (*TORCHVISION, *LAYOUTS)


@dataclass(frozen=True, eq=False)
class Photos:
    """Images (n, ch, size, size), normalised for the model, that are read when they are asked for.

    pixels (N, side, side, ch) uint8, memory-mapped; index (n,): which of its rows these images are. Indexed
    or split, Photos gives float32 tensors on its device, like a tensor of images; `take` reads nothing.
    """

    pixels: np.ndarray
    index: Tensor
    size: int
    stats: tuple[Tensor, Tensor]
    device: torch.device = CPU

    def __len__(self) -> int:
        return len(self.index)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self), self.pixels.shape[-1], self.size, self.size))

    def to(self, device: torch.device | str) -> "Photos":
        """The same images, whose batches go to that device."""
        return replace(self, device=torch.device(device))

    def take(self, index: Tensor) -> "Photos":
        """Some of the images, still unread."""
        return replace(self, index=self.index[index])

    def split(self, batch_size: int) -> Iterator[Tensor]:
        return (self[start : start + batch_size] for start in range(0, len(self), batch_size))

    def __getitem__(self, index: int | slice | list[int] | Tensor) -> Tensor:
        """Images (b, ch, size, size), or (ch, size, size) for a single number, as for a tensor."""
        rows = self.index[index.cpu() if isinstance(index, Tensor) else index]
        read = torch.from_numpy(self.pixels[rows.flatten().numpy()]).to(self.device)
        images = read.permute(0, 3, 1, 2).contiguous().float() / 255
        if images.shape[-1] != self.size:
            images = F.interpolate(images, (self.size, self.size), mode="bilinear", antialias=True)
        mean, std = (s.to(self.device) for s in self.stats)
        images = (images - mean) / std
        return images if rows.ndim else images[0]


class Album(NamedTuple):
    """All readable images of a task: labels (n,), whether each is of the task's own test part, domains.

    `held` and `domains` are None where the task has no test part or no domains; digest stands for the data.
    """

    images: Photos
    labels: Tensor
    held: Tensor | None
    domains: Tensor | None
    classes: tuple[str, ...]
    digest: str


class Listing(NamedTuple):
    """What there is to read, one entry per image, before any is opened."""

    classes: list[str]
    names: list[str]
    labels: list[int]
    held: list[bool] | None
    domains: list[int] | None
    open: Callable[[int], Image.Image]


def num_classes(settings: TaskSettings) -> int:
    """How many classes a task has; counted in the folder, and checked, where it is a folder of images."""
    return len(class_folders(settings)) if settings.name in LAYOUTS else TASKS[settings.name]


def load_photos(
    settings: TaskSettings, size: int, stats: tuple[Tensor, Tensor], folder: Path | None = None
) -> Album:
    """The task's images at size pixels, decoded into a folder (default: one that this process removes).

    stats = mean and std, each (ch, 1, 1): one channel makes the images grey. A file that is no readable
    image is left out, and named on stderr. Raises BadInput, one line, for data that is not there or does
    not have the layout of its task.
    """
    name, side, channels = settings.name, NATIVE.get(settings.name, size), len(stats[0])
    listing, digest = (None, checksums(name)) if name in TORCHVISION else list_folders(settings)
    store, key = Store(folder or _scratch().name), _hash([FORMAT, digest, side, channels])[:16]
    if not store.has(name, key):
        listing = listing or list_torchvision(settings)
        try:
            store.put(name, key, partial(decode, settings, listing, side, channels))
        except OSError as error:
            need = len(listing.names) * side * side * channels / 1e9
            raise BadInput(
                f"store={str(store.root)!r}: {need:.1f} GB of decoded images cannot be written: "
                f"{error.strerror or error}"
            ) from None

    def read(at: Path) -> Album:
        index = json.loads((at / "index.json").read_text())
        rows = [row for row in range(len(index["labels"])) if str(row) not in index["broken"]]
        columns = (index[column] for column in ("labels", "held", "domains"))
        pixels = np.load(at / "pixels.npy", mmap_mode="r")
        return Album(
            Photos(pixels, torch.tensor(rows), size, stats),
            *(None if column is None else torch.tensor(column)[rows] for column in columns),
            tuple(index["classes"]),
            digest,
        )

    return store.read(name, key, read)


@cache
def _scratch() -> TemporaryDirectory:
    """A folder that lives as long as the process."""
    return TemporaryDirectory(prefix="fedmitr-")


def _hash(parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


# --- decoding ---------------------------------------------------------------------------------------


def decode(settings: TaskSettings, listing: Listing, side: int, channels: int, folder: Path) -> None:
    """Write pixels.npy (n, side, side, ch) uint8 and index.json, one image in memory at a time.

    Rows of broken images stay black and are listed. Raises BadInput where a class has no readable image.
    """
    shape, broken = (len(listing.names), side, side, channels), {}
    with (
        (folder / "pixels.npy").open("wb") as file,
        progress(len(listing.names), f"decoding {settings.name}", "image") as bar,
    ):
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for row, name in enumerate(listing.names):
            try:
                with listing.open(row) as image:
                    pixels = squared(image, side, channels)
            except Exception:  # each format has its own ways to be broken
                broken[row], pixels = name, np.zeros(shape[1:], np.uint8)
            file.write(pixels.tobytes())
            bar.update(1)
    groups = list(zip(listing.labels, listing.held or [False] * len(listing.names), strict=True))
    if lost := sorted(set(groups) - {group for row, group in enumerate(groups) if row not in broken}):
        label, held = lost[0]
        part = "test images" if held else "images"
        raise refusal(settings, f"holds no readable {part} of class {listing.classes[label]!r}")
    if broken:
        first = ", ".join(list(broken.values())[:3]) + (", …" if len(broken) > 3 else "")
        said = f"{len(broken)} of {len(groups)} images cannot be read and are left out: {first}"
        print(f"{settings.name}: {said}", file=sys.stderr)
    facts = {name: getattr(listing, name) for name in ("classes", "labels", "held", "domains")}
    write_json(folder / "index.json", facts | {"broken": broken})


def squared(image: Image.Image, side: int, channels: int) -> np.ndarray:
    """The image upright, its shorter side resized to `side`, its centre cut out: (side, side, ch) uint8."""
    image = ImageOps.exif_transpose(image).convert("RGB" if channels == 3 else "L")
    image = ImageOps.fit(image, (side, side), Image.Resampling.BILINEAR)
    return np.asarray(image).reshape(side, side, channels)


# --- torchvision's tasks ----------------------------------------------------------------------------


def checksums(name: str) -> str:
    """What the data are: torchvision's published checksums, which its loaders hold the files against."""
    loader = _loader(name)
    return _hash([name, loader.split_list if name == "svhn" else [loader.train_list, loader.test_list]])


def _loader(name: str) -> type:
    import torchvision.datasets  # slow to import, and only these tasks need it

    return getattr(torchvision.datasets, TORCHVISION[name][0])


def list_torchvision(settings: TaskSettings) -> Listing:
    """Train and test part as torchvision reads them from task.data_dir, downloaded if that is allowed."""
    name, folder = settings.name, settings.data_dir or str(home() / "data" / "downloads")
    files = TORCHVISION[name][1]
    parts = ({"split": "train"}, {"split": "test"}) if name == "svhn" else ({"train": True}, {"train": False})
    try:
        with redirect_stdout(sys.stderr):
            sets = [_loader(name)(folder, download=settings.download, **part) for part in parts]
    except Exception as error:  # no network, no space, another checksum
        said = next(iter(str(error).splitlines()), type(error).__name__)
        raise BadInput(
            f"task.download=true: {name} could not be downloaded ({said}): put {files} in "
            f"task.data_dir={folder!r}"
            if settings.download
            else f"task.name={name!r}: {files} not found, or not as published, in task.data_dir={folder!r}: "
            "put it there, or set task.download=true"
        ) from None
    labels = [[int(y) for y in (s.labels if name == "svhn" else s.targets)] for s in sets]
    held = [False] * len(sets[0]) + [True] * len(sets[1])
    both = torch.utils.data.ConcatDataset(sets)
    return Listing(
        list(getattr(sets[0], "classes", "0123456789")),
        [f"image {row}" for row in range(len(both))],
        labels[0] + labels[1],
        held,
        None,
        lambda row: both[row][0],
    )


# --- plain folders ----------------------------------------------------------------------------------


def refusal(settings: TaskSettings, problem: str) -> BadInput:
    """What is wrong with the folder of a task, and what it should hold."""
    name = settings.name
    return BadInput(f"task.data_dir={settings.data_dir!r} {problem}: {name} is a folder of {LAYOUTS[name]}")


def places(settings: TaskSettings) -> list[tuple[Path, bool | None, int | None]]:
    """The folders that hold class folders: each with whether it is the test part, and its domain."""
    root, name = Path(settings.data_dir or "").expanduser(), settings.name
    if not settings.data_dir or not root.is_dir() or not os.access(root, os.R_OK | os.X_OK):
        raise refusal(settings, "is no folder that can be read" if settings.data_dir else "is not set")
    if name == "office-home":
        found = [(domain, None, k) for k, domain in enumerate(DOMAINS)]
    elif name == "tiny-imagenet":
        found = [("train", False, None)]  # its test images lie in one folder: `tiny_test`
    elif name == "mini-imagenet":  # the few-shot parts hold different classes: together they are the task
        found = [(part, None, None) for part in ("train", "val", "test") if subfolders(root / part)]
    elif subfolders(root / "train"):
        found = [("train", False, None), ("test", True, None)]
    else:
        found = []
    for part, *_ in found:
        if not (root / part).is_dir():
            raise refusal(settings, f"has no {part}/")
    return [(root / part, *rest) for part, *rest in found or [(".", None, None)]]


def subfolders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def class_folders(settings: TaskSettings) -> list[str]:
    """Names of the class folders, sorted: the order of torchvision's ImageFolder."""
    names = {f.name for place, held, _ in places(settings) if not held for f in subfolders(place)}
    expected = TASKS[settings.name]
    if len(names) < 2 or expected not in (None, len(names)):
        raise refusal(
            settings, f"holds {len(names)} class folders" + (f", not {expected}" if expected else "")
        )
    return sorted(names)


def image_files(folder: Path) -> list[Path]:
    """Image files in a folder and below, in ImageFolder's order."""
    walk = sorted(os.walk(folder, followlinks=True))
    paths = (Path(at) / name for at, _, names in walk for name in sorted(names) if name[0] != ".")
    return [p for p in paths if p.suffix.lower() in SUFFIXES]


def list_folders(settings: TaskSettings) -> tuple[Listing, str]:
    """The images of a task of plain folders, and a digest of their names, sizes and times."""
    root, classes = Path(settings.data_dir or "").expanduser(), class_folders(settings)
    number = {name: k for k, name in enumerate(classes)}
    rows: list[tuple[Path, str, bool | None, int | None]] = []
    for place, held, domain in places(settings):
        for folder in subfolders(place):
            files = image_files(folder)
            if not files:
                raise refusal(settings, f"holds no image in {folder.relative_to(root)}/")
            rows += [(file, folder.name, held, domain) for file in files]
    if settings.name == "tiny-imagenet":
        rows += [(file, wnid, True, None) for file, wnid in tiny_test(settings, root)]
        classes = tiny_names(root, classes)
    if unknown := [name for _, name, *_ in rows if name not in number]:
        raise refusal(settings, f"has test images of class {unknown[0]!r}, which is not in train/")
    paths, labels, held, domains = (list(column) for column in zip(*rows, strict=True))
    labels, names = [number[name] for name in labels], [p.relative_to(root).as_posix() for p in paths]
    files = [_stamp(path) for path in paths]
    listing = Listing(
        classes,
        names,
        labels,
        None if held[0] is None else held,
        None if domains[0] is None else domains,
        lambda row: Image.open(paths[row]),
    )
    return listing, _hash([settings.name, classes, names, labels, held, domains, files])


def _stamp(path: Path) -> tuple[int, int]:
    """Size and time of change; a file that is not there is found out when it is opened."""
    try:
        facts = path.stat()
    except OSError:
        return 0, 0
    return facts.st_size, facts.st_mtime_ns


def tiny_test(settings: TaskSettings, root: Path) -> list[tuple[Path, str]]:
    """Tiny-ImageNet's labelled validation images: the test part, since its own test labels are not public."""
    table = root / "val" / "val_annotations.txt"
    if not table.is_file():
        raise refusal(settings, "has no val/val_annotations.txt")
    rows = [line.split("\t") for line in table.read_text().splitlines()]
    return [(root / "val" / "images" / row[0], row[1]) for row in rows if len(row) > 1]


def tiny_names(root: Path, wnids: list[str]) -> list[str]:
    """The first name of each class in words.txt; its number where there is none."""
    table = root / "words.txt"
    rows = [line.split("\t") for line in table.read_text().splitlines()] if table.is_file() else []
    names = {row[0]: row[1].split(",")[0] for row in rows if len(row) > 1}
    return [names.get(wnid, wnid) for wnid in wnids]


def own_images(
    folder: str, classes: Sequence[str], size: int, stats: tuple[Tensor, Tensor]
) -> tuple[Photos, Tensor]:
    """All readable images of folder/<class>/ and their labels, numbered as in classes, kept in memory.

    A client may hold any of the classes, one too. Raises BadInput for other folders and where no image is.
    """
    root, pixels, labels = Path(folder).expanduser(), [], []
    for place in subfolders(root):
        if place.name not in classes:
            raise BadInput(f"data-dir={folder!r}: {place.name!r} is not among classes={','.join(classes)}")
        for path in image_files(place):
            try:
                with Image.open(path) as image:
                    pixels.append(squared(image, size, len(stats[0])))
                labels.append(classes.index(place.name))
            except Exception:  # each format has its own ways to be broken
                print(f"{path.relative_to(root)} cannot be read and is left out", file=sys.stderr)
    if not labels:
        raise BadInput(f"data-dir={folder!r} holds no readable image <class>/*.jpg")
    return Photos(np.stack(pixels), torch.arange(len(labels)), size, stats), torch.tensor(labels)
