"""Data sets of image files: one record each, for torchvision's classes and for layouts of folders.

A record says what the data set is called, how many classes it has and how its files are listed; photos.py
decodes what is listed here. To add one, call `register`: `task.name`, the checks, the plan and the command
line then know it.
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from ..core.errors import BadInput
from ..core.paths import home
from ..core.processes import in_workers
from ..settings.schema import TASKS, TaskSettings

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
DOMAINS = ("Art", "Clipart", "Product", "Real World")


class Part(NamedTuple):
    """A folder of class folders: whether it is the test part (None: the task has none), and its domain."""

    folder: Path
    held: bool | None = None
    domain: int | None = None


class Listing(NamedTuple):
    """What there is to read, one entry per image, before any is opened."""

    classes: list[str]
    names: list[str]
    labels: list[int]
    held: list[bool] | None
    domains: list[int] | None
    open: Callable[[int], Image.Image]


@dataclass(frozen=True)
class TorchvisionSet:
    """A data set that one of torchvision's classes reads.

    name: as task.name. loader: the class in `torchvision.datasets`. classes: how many. side: of its images,
    pixels. images: all of them, and those of the test part. files: what the loader looks for in its folder.
    train, test: the loader's arguments for the two parts. labels: its attribute with the labels. facts: what
    stands for its files, such as the checksums that the loader holds them against.
    """

    name: str
    loader: str
    classes: int
    side: int
    images: tuple[int, int]
    files: str
    train: Mapping[str, Any]
    test: Mapping[str, Any]
    labels: str = "targets"
    facts: tuple[str, ...] = ("train_list", "test_list")

    def read_class(self) -> type:
        """Import torchvision's class."""
        import torchvision.datasets  # slow to import, and only these tasks need it

        return getattr(torchvision.datasets, self.loader)

    def digest(self) -> str:
        """Hash what the data are: torchvision's published checksums."""
        loader = self.read_class()
        facts = [getattr(loader, name) for name in self.facts]
        return hash_of([self.name, facts[0] if len(facts) == 1 else facts])

    def refusal(self, settings: TaskSettings, problem: str) -> BadInput:
        """Say what is wrong with the files."""
        return BadInput(f"task.data_dir={settings.data_dir!r} {problem}: {self.name} is {self.files}")

    def find(self, settings: TaskSettings) -> tuple[str, Callable[[], Listing]]:
        """Return what stands for the data, which needs no file, and how to list them."""
        return self.digest(), lambda: self.list_files(settings)

    def list_files(self, settings: TaskSettings) -> Listing:
        """List train and test part as torchvision reads them from task.data_dir, downloaded if allowed."""
        folder = settings.data_dir or str(home() / "data" / "downloads")
        try:
            with redirect_stdout(sys.stderr):
                sets = [
                    self.read_class()(folder, download=settings.download, **part)
                    for part in (self.train, self.test)
                ]
        except Exception as error:  # no network, no space, another checksum
            said = next(iter(str(error).splitlines()), type(error).__name__)
            raise BadInput(
                f"task.download=true: {self.name} could not be downloaded ({said}): put {self.files} in "
                f"task.data_dir={folder!r}"
                if settings.download
                else f"task.name={self.name!r}: {self.files} not found, or not as published, in "
                f"task.data_dir={folder!r}: put it there, or set task.download=true"
            ) from None
        labels = [[int(y) for y in getattr(s, self.labels)] for s in sets]
        held = [False] * len(sets[0]) + [True] * len(sets[1])
        both = torch.utils.data.ConcatDataset(sets)
        return Listing(
            list(getattr(sets[0], "classes", map(str, range(self.classes)))),
            [f"image {row}" for row in range(len(both))],
            labels[0] + labels[1],
            held,
            None,
            lambda row: both[row][0],
        )


@dataclass(frozen=True)
class FolderSet:
    """A data set that is a layout of folders of images, <class>/*.jpg at the bottom.

    name: as task.name. layout: what belongs where, as a line of text. classes: how many, None where they are
    counted. side: of the images where all have one, pixels. parts: from the root folder to the folders that
    hold class folders, by default the root itself. test: test images that lie elsewhere, as (file, class
    folder). names: from the root and the class folders to the classes' names.
    """

    name: str
    layout: str
    classes: int | None = None
    side: int | None = None
    parts: Callable[[Path], list[Part]] = lambda root: [Part(root)]
    test: Callable[["FolderSet", TaskSettings, Path], list[tuple[Path, str]]] | None = None
    names: Callable[[Path, list[str]], list[str]] = lambda root, folders: folders

    def refusal(self, settings: TaskSettings, problem: str) -> BadInput:
        """Say what is wrong with the folder, and what it should hold."""
        return BadInput(
            f"task.data_dir={settings.data_dir!r} {problem}: {self.name} is a folder of {self.layout}"
        )

    def root(self, settings: TaskSettings) -> Path:
        """The folder of the data; BadInput where it cannot be read."""
        root = Path(settings.data_dir or "").expanduser()
        if not settings.data_dir or not root.is_dir() or not os.access(root, os.R_OK | os.X_OK):
            problem = "is no folder that can be read" if settings.data_dir else "is not set"
            raise self.refusal(settings, problem)
        return root

    def _parts(self, settings: TaskSettings) -> list[Part]:
        root = self.root(settings)
        parts = self.parts(root)
        for part in parts:
            if not part.folder.is_dir():
                raise self.refusal(settings, f"has no {part.folder.relative_to(root)}/")
        return parts

    def class_folders(self, settings: TaskSettings) -> list[str]:
        """Names of the class folders, sorted: the order of torchvision's ImageFolder."""
        parts = self._parts(settings)
        names = {f.name for part in parts if not part.held for f in subfolders(part.folder)}
        if len(names) < 2 or self.classes not in (None, len(names)):
            wanted = f", not {self.classes}" if self.classes else ""
            raise self.refusal(settings, f"holds {len(names)} class folders{wanted}")
        return sorted(names)

    def find(self, settings: TaskSettings) -> tuple[str, Callable[[], Listing]]:
        """Return what stands for the data, a hash of names, sizes and times, and how to list the files."""
        listing, digest = self._list(settings)
        return digest, lambda: listing

    def list_files(self, settings: TaskSettings) -> Listing:
        """List the images; none is opened."""
        return self._list(settings)[0]

    def _list(self, settings: TaskSettings) -> tuple[Listing, str]:
        root, folders = self.root(settings), self.class_folders(settings)
        number = {name: k for k, name in enumerate(folders)}
        rows: list[tuple[Path, str, bool | None, int | None]] = []
        for part in self._parts(settings):
            for folder in subfolders(part.folder):
                files = image_files(folder)
                if not files:
                    raise self.refusal(settings, f"holds no image in {folder.relative_to(root)}/")
                rows += [(file, folder.name, part.held, part.domain) for file in files]
        if self.test:
            rows += [(file, folder, True, None) for file, folder in self.test(self, settings, root)]
        if unknown := [name for _, name, *_ in rows if name not in number]:
            raise self.refusal(settings, f"has test images of class {unknown[0]!r}, which is not in train/")
        paths, labels, held, domains = (list(column) for column in zip(*rows, strict=True))
        labels, names = [number[name] for name in labels], [p.relative_to(root).as_posix() for p in paths]
        classes = self.names(root, folders)
        listing = Listing(
            classes,
            names,
            labels,
            None if held[0] is None else held,
            None if domains[0] is None else domains,
            lambda row: Image.open(paths[row]),
        )
        stamps = [_stamp(path) for path in paths]
        return listing, hash_of([self.name, classes, names, labels, held, domains, stamps])


ImageSet = TorchvisionSet | FolderSet
IMAGE_SETS: dict[str, ImageSet] = {}


def register(*sets: ImageSet) -> None:
    """Make data sets known to the whole package and its workers, under their names as `task.name`."""
    add(*sets)
    in_workers(add, *sets)


def add(*sets: ImageSet) -> None:
    """Make data sets known in this process."""
    for one in sets:
        if one.name in TASKS and one.name not in IMAGE_SETS:
            raise BadInput(f"task.name={one.name!r} is a task that is not read from files: choose another")
        IMAGE_SETS[one.name] = one
        TASKS[one.name] = one.classes


def num_classes(settings: TaskSettings) -> int:
    """Count a task's classes: in the folder, which is checked, where it is a folder of images."""
    image_set = IMAGE_SETS.get(settings.name)
    if isinstance(image_set, FolderSet):
        return len(image_set.class_folders(settings))
    return TASKS[settings.name]


def hash_of(parts: Any) -> str:
    """Hash JSON-able facts."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def subfolders(folder: Path) -> list[Path]:
    """Visible folders in a folder, sorted; none where it is no folder."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def image_files(folder: Path) -> list[Path]:
    """Image files in a folder and below, in ImageFolder's order."""
    walk = sorted(os.walk(folder, followlinks=True))
    paths = (Path(at) / name for at, _, names in walk for name in sorted(names) if name[0] != ".")
    return [p for p in paths if p.suffix.lower() in SUFFIXES]


def _stamp(path: Path) -> tuple[int, int]:
    """Size and time of change; a file that is not there is found out when it is opened."""
    try:
        facts = path.stat()
    except OSError:
        return 0, 0
    return facts.st_size, facts.st_mtime_ns
