"""Images in files: decoded once, then read from disk batch by batch.

Each image is decoded, cropped to a square and kept as bytes in one memory-mapped array in the run store.
`Photos` takes the place of a tensor of images in a `Split` and reads only the images that are indexed, so a
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
FORMAT = 1  # raised when the same files are decoded to other bytes


@dataclass(frozen=True, eq=False)
class Photos:
    """Images (n, ch, size, size), normalised for the model, that are read from disk when they are indexed.

    pixels (N, side, side, ch): all images of a task as uint8, memory-mapped. index (n,): the rows of pixels
    that these images are. stats: mean and standard deviation, each (ch, 1, 1). Indexing and `split` return
    float32 tensors on `device`, as they do for a tensor of images.
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
        """The shape (n, ch, size, size) of all images together."""
        return torch.Size((len(self), self.pixels.shape[-1], self.size, self.size))

    def to(self, device: torch.device | str) -> "Photos":
        """Return the same images, still unread, for batches on another device."""
        return replace(self, device=torch.device(device))

    def take(self, index: Tensor) -> "Photos":
        """Return the images of these indices, still unread."""
        return replace(self, index=self.index[index])

    def split(self, batch_size: int) -> Iterator[Tensor]:
        """Yield all images in batches (b, ch, size, size); the last may be smaller."""
        return (self[start : start + batch_size] for start in range(0, len(self), batch_size))

    def __getitem__(self, index: int | slice | list[int] | Tensor) -> Tensor:
        """Return images (b, ch, size, size), or (ch, size, size) for a single number, as a tensor does."""
        rows = self.index[index.cpu() if isinstance(index, Tensor) else index]
        read = torch.from_numpy(self.pixels[rows.flatten().numpy()]).to(self.device)  # (b, side, side, ch)
        images = read.permute(0, 3, 1, 2).contiguous().float() / 255  # (b, ch, side, side)
        if images.shape[-1] != self.size:
            images = F.interpolate(images, (self.size, self.size), mode="bilinear", antialias=True)
        mean, std = (s.to(self.device) for s in self.stats)
        images = (images - mean) / std
        return images if rows.ndim else images[0]


class Album(NamedTuple):
    """All readable images of a task, with what is known of each.

    labels (n,). held (n,): whether an image is in the task's own test part; domains (n,); each is None where
    the task has none. classes: their names. digest: a hash that changes with the data.
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
    """Load a task's images at size × size pixels; decode them first unless `folder` has them.

    stats: mean and standard deviation, each (ch, 1, 1); with one channel the images are grey. folder: by
    default a temporary one, removed when the process ends. A file that is no readable image is left out and
    named on stderr. Raises BadInput for data that is missing or not laid out as its task should be.
    """
    image_set, channels = IMAGE_SETS[settings.name], len(stats[0])
    side = image_set.side or size
    digest, list_files = image_set.scan(settings)
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
    return store.read(name, key, partial(_read_album, size, stats, digest))


def _read_album(size: int, stats: tuple[Tensor, Tensor], digest: str, folder: Path) -> Album:
    """Read what `decode` wrote to a folder; the pixels stay on disk."""
    index = json.loads((folder / "index.json").read_text())
    rows = [row for row in range(len(index["labels"])) if str(row) not in index["broken"]]
    columns = (index[column] for column in ("labels", "held", "domains"))
    pixels = np.load(folder / "pixels.npy", mmap_mode="r")
    return Album(
        Photos(pixels, torch.tensor(rows), size, stats),
        *(None if column is None else torch.tensor(column)[rows] for column in columns),
        tuple(index["classes"]),
        digest,
    )


@cache
def _scratch() -> TemporaryDirectory:
    """Make a folder that is removed when the process ends."""
    return TemporaryDirectory(prefix="fedmitr-")


# Decoding.


def decode(settings: TaskSettings, listing: Listing, side: int, channels: int, folder: Path) -> None:
    """Decode listed images into a folder, with one image in memory at a time.

    Writes pixels.npy (n, side, side, ch) as uint8, and index.json with the columns of the listing and the
    rows of broken images, which are black. Raises BadInput where a class has no readable image.
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
    # no class may lose all its images, nor all its test images
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
    """Turn an image upright, resize its shorter side to `side`, crop the centre: (side, side, ch) uint8."""
    image = ImageOps.exif_transpose(image).convert("RGB" if channels == 3 else "L")
    image = ImageOps.fit(image, (side, side), Image.Resampling.BILINEAR)
    return np.asarray(image).reshape(side, side, channels)


def own_images(
    folder: str, classes: Sequence[str], size: int, stats: tuple[Tensor, Tensor]
) -> tuple[Photos, Tensor]:
    """Read all images of folder/<class>/ into memory; return them and their labels, numbered as in classes.

    A client need not have all classes. A file that is no readable image is left out and named on stderr.
    Raises BadInput for a folder of another class, and where there is no readable image.
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
