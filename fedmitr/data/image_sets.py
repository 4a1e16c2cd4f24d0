"""Records of data sets of image files: torchvision's classes, and layouts of folders.

A record has the name of a data set, its number of classes, and how to list its images; photos.py decodes what
is listed. `register` adds a record: its name is then a `task.name` for settings, runs, plans and the command
line.
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


class Part(NamedTuple):
    """A folder of class folders.

    held: whether its images are held out as the test part; None for all parts of a task that has none.
    domain: the number of its domain; None for all parts of a task without domains.
    """

    folder: Path
    held: bool | None = None
    domain: int | None = None


class Listing(NamedTuple):
    """The images of a task before any is opened: one entry per image in every list but `classes`.

    names: for messages. labels: 0, 1, … into `classes`. held: whether an image is in the test part, and its
    domain; None where the task has none. open: opens the image of a row.
    """

    classes: list[str]
    names: list[str]
    labels: list[int]
    held: list[bool] | None
    domains: list[int] | None
    open: Callable[[int], Image.Image]


@dataclass(frozen=True)
class TorchvisionSet:
    """A data set that one of torchvision's classes reads.

    name: as task.name. loader: the name of the class in `torchvision.datasets`. classes: how many there are.
    side: of the images, in pixels. images: how many there are in all, and in the test part. files: what the
    loader expects in its folder, as text. train, test: the loader's arguments for the two parts. labels: its
    attribute with the labels. facts: its attributes that identify the data, such as published checksums.
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
    facts: tuple[str, ...] = ()

    def read_class(self) -> type:
        """Return torchvision's class."""
        import torchvision.datasets  # slow to import, and only these tasks need it

        if not hasattr(torchvision.datasets, self.loader):
            raise BadInput(f"task.name={self.name!r}: torchvision.datasets has no {self.loader!r}")
        return getattr(torchvision.datasets, self.loader)

    def digest(self) -> str:
        """Hash the facts that identify the data; no file is read."""
        loader = self.read_class()
        facts = [getattr(loader, name) for name in self.facts] or [self.loader, self.images]
        return hash_of([self.name, facts[0] if len(facts) == 1 else facts])

    def refusal(self, settings: TaskSettings, problem: str) -> BadInput:
        """Return the error for a problem with the files."""
        return BadInput(f"task.data_dir={settings.data_dir!r} {problem}: {self.name} is {self.files}")

    def scan(self, settings: TaskSettings) -> tuple[str, Callable[[], Listing]]:
        """Return a digest of the data, which needs no file, and a function that lists the images."""
        return self.digest(), lambda: self.list_files(settings)

    def list_files(self, settings: TaskSettings) -> Listing:
        """List training and test images; raise BadInput if torchvision does not find or download its files.

        The folder is task.data_dir, by default data/downloads.
        """
        folder = settings.data_dir or str(home() / "data" / "downloads")
        try:
            with redirect_stdout(sys.stderr):  # torchvision prints
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
    """A data set that is a layout of folders, with images in <class>/ folders.

    name: as task.name. layout: which files belong where, as text. classes: how many there are, None where
    they are counted. side: of the images in pixels, where all have the same. parts: returns the folders that
    have class folders, given the root; by default the root itself. test: lists test images that are not in
    class folders, as (file, class folder). names: returns the names of the classes, given the root and the
    names of the class folders.
    """

    name: str
    layout: str
    classes: int | None = None
    side: int | None = None
    parts: Callable[[Path], list[Part]] = lambda root: [Part(root)]
    test: Callable[["FolderSet", TaskSettings, Path], list[tuple[Path, str]]] | None = None
    names: Callable[[Path, list[str]], list[str]] = lambda root, folders: folders

    def refusal(self, settings: TaskSettings, problem: str) -> BadInput:
        """Return the error for a problem with the folder, which says how it should be laid out."""
        return BadInput(
            f"task.data_dir={settings.data_dir!r} {problem}: {self.name} is a folder of {self.layout}"
        )

    def root(self, settings: TaskSettings) -> Path:
        """Return the folder of the data; raise BadInput where it cannot be read."""
        root = Path(settings.data_dir or "").expanduser()
        if not settings.data_dir or not root.is_dir() or not os.access(root, os.R_OK | os.X_OK):
            problem = "is no folder that can be read" if settings.data_dir else "is not set"
            raise self.refusal(settings, problem)
        return root

    def _parts(self, settings: TaskSettings) -> list[Part]:
        """Return the parts; raise BadInput where one is no folder."""
        root = self.root(settings)
        parts = self.parts(root)
        for part in parts:
            if not part.folder.is_dir():
                raise self.refusal(settings, f"has no {part.folder.relative_to(root)}/")
        return parts

    def class_folders(self, settings: TaskSettings) -> list[str]:
        """Return the names of the class folders, sorted as in torchvision's ImageFolder.

        Raises BadInput for fewer than two of them, or another number than `classes`.
        """
        parts = self._parts(settings)
        names = {f.name for part in parts if not part.held for f in subfolders(part.folder)}
        if len(names) < 2 or self.classes not in (None, len(names)):
            wanted = f", not {self.classes}" if self.classes else ""
            raise self.refusal(settings, f"holds {len(names)} class folders{wanted}")
        return sorted(names)

    def scan(self, settings: TaskSettings) -> tuple[str, Callable[[], Listing]]:
        """Return a digest of the files' names, sizes and times of change, and a function that lists them."""
        listing, digest = self._list(settings)
        return digest, lambda: listing

    def list_files(self, settings: TaskSettings) -> Listing:
        """List the images; none is opened. Raises BadInput for another layout."""
        return self._list(settings)[0]

    def _list(self, settings: TaskSettings) -> tuple[Listing, str]:
        """Return the listing and its digest."""
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
    """Make data sets known in this process and in its workers, under their names as `task.name`.

    A data set of a known name takes its place. Raises BadInput for a task that is not read from files.
    """
    add(*sets)
    in_workers(add, *sets)


def add(*sets: ImageSet) -> None:
    """Make data sets known in this process alone; else as `register`."""
    for image_set in sets:
        name = image_set.name
        if name in TASKS and name not in IMAGE_SETS:
            raise BadInput(f"task.name={name!r} is a task that is not read from files: choose another")
        IMAGE_SETS[name] = image_set
        TASKS[name] = image_set.classes


def num_classes(settings: TaskSettings) -> int:
    """Return the number of a task's classes, counted in its folder where it is a `FolderSet`."""
    image_set = IMAGE_SETS.get(settings.name)
    if isinstance(image_set, FolderSet):
        return len(image_set.class_folders(settings))
    return TASKS[settings.name]


def hash_of(parts: Any) -> str:
    """Return the SHA-256 of JSON-able parts."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def subfolders(folder: Path) -> list[Path]:
    """List the visible folders in a folder, sorted; none where it is no folder."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def image_files(folder: Path) -> list[Path]:
    """List the image files in a folder and below, in the order of torchvision's ImageFolder."""
    walk = sorted(os.walk(folder, followlinks=True))
    paths = (Path(at) / name for at, _, names in walk for name in sorted(names) if name[0] != ".")
    return [p for p in paths if p.suffix.lower() in SUFFIXES]


def _stamp(path: Path) -> tuple[int, int]:
    """Return size and time of change of a file; (0, 0) if it is missing: opening it will say so."""
    try:
        facts = path.stat()
    except OSError:
        return 0, 0
    return facts.st_size, facts.st_mtime_ns
