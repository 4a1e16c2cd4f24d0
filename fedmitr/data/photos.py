"""Photos on disk: the paper's tasks and folders of your own, decoded once and then read batch by batch.

An image is decoded, brought to a square and kept as bytes in one memory-mapped array of the run store.
`Photos` stands where a tensor of images stands in a `Split` and reads only what it is asked for, so a
task may be larger than memory.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from ..core.errors import BadInput
from ..core.progress import progress
from ..core.store import Store, write_json
from ..settings.schema import TaskSettings
from .image_sets import IMAGE_SETS, Listing, hash_of, image_files, subfolders

CPU = torch.device("cpu")
FORMAT = 1  # raised when the same files give other bytes


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


def load_photos(
    settings: TaskSettings, size: int, stats: tuple[Tensor, Tensor], folder: Path | None = None
) -> Album:
    """The task's images at size pixels, decoded into a folder (default: one that this process removes).

    stats = mean and std, each (ch, 1, 1): one channel makes the images grey. A file that is no readable
    image is left out, and named on stderr. Raises BadInput, one line, for data that is not there or does
    not have the layout of its task.
    """
    image_set, channels = IMAGE_SETS[settings.name], len(stats[0])
    side = image_set.side or size
    digest, list_files = image_set.find(settings)
    name, key = settings.name, hash_of([FORMAT, digest, side, channels])[:16]
    store = Store(folder or _scratch().name)
    if not store.has(name, key):
        listing = list_files()
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
        raise IMAGE_SETS[settings.name].refusal(
            settings, f"holds no readable {part} of class {listing.classes[label]!r}"
        )
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


def own_images(
    folder: str, classes: Sequence[str], size: int, stats: tuple[Tensor, Tensor]
) -> tuple[Photos, Tensor]:
    """All readable images of folder/<class>/ and their labels, numbered as in classes, kept in memory.

    A client may hold any of the classes, one too. Raises BadInput for other folders and where no image is.
    """
    root, pixels, labels = Path(folder).expanduser(), [], []
    for at in subfolders(root):
        if at.name not in classes:
            raise BadInput(f"data-dir={folder!r}: {at.name!r} is not among classes={','.join(classes)}")
        for path in image_files(at):
            try:
                with Image.open(path) as image:
                    pixels.append(squared(image, size, len(stats[0])))
                labels.append(classes.index(at.name))
            except Exception:  # each format has its own ways to be broken
                print(f"{path.relative_to(root)} cannot be read and is left out", file=sys.stderr)
    if not labels:
        raise BadInput(f"data-dir={folder!r} holds no readable image <class>/*.jpg")
    return Photos(np.stack(pixels), torch.arange(len(labels)), size, stats), torch.tensor(labels)
