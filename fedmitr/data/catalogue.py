"""The data sets of image files that ship: the paper's, and `image-folder` for your own."""

from pathlib import Path

from ..settings.schema import TaskSettings
from .image_sets import FolderSet, Part, TorchvisionSet, add, subfolders

TRAIN, TEST = {"train": True}, {"train": False}
CHECKSUMS = ("train_list", "test_list")  # of torchvision's CIFAR
DOMAINS = ("Art", "Clipart", "Product", "Real World")  # of Office-Home


def _train_and_test(root: Path) -> list[Part]:
    """Return train/ and test/ where there is a train/; else the root itself."""
    if subfolders(root / "train"):
        return [Part(root / "train", held=False), Part(root / "test", held=True)]
    return [Part(root)]


def _few_shot_parts(root: Path) -> list[Part]:
    """Return Mini-ImageNet's few-shot parts, whose classes differ, or the root where they are merged."""
    parts = [Part(root / name) for name in ("train", "val", "test") if subfolders(root / name)]
    return parts or [Part(root)]


def _tiny_test(tiny: FolderSet, settings: TaskSettings, root: Path) -> list[tuple[Path, str]]:
    """List Tiny-ImageNet's validation images: they are its test part, whose own labels are not public."""
    table = root / "val" / "val_annotations.txt"
    if not table.is_file():
        raise tiny.refusal(settings, "has no val/val_annotations.txt")
    rows = [line.split("\t") for line in table.read_text().splitlines()]
    return [(root / "val" / "images" / row[0], row[1]) for row in rows if len(row) > 1]


def _tiny_names(root: Path, wnids: list[str]) -> list[str]:
    """Return the first name of each class in words.txt; its WordNet id where there is none."""
    table = root / "words.txt"
    rows = [line.split("\t") for line in table.read_text().splitlines()] if table.is_file() else []
    names = {row[0]: row[1].split(",")[0] for row in rows if len(row) > 1}
    return [names.get(wnid, wnid) for wnid in wnids]


add(
    TorchvisionSet(
        "cifar10",
        loader="CIFAR10",
        classes=10,
        side=32,
        images=(60_000, 10_000),
        files="cifar-10-batches-py/ (from cifar-10-python.tar.gz)",
        train=TRAIN,
        test=TEST,
        facts=CHECKSUMS,
    ),
    TorchvisionSet(
        "cifar100",
        loader="CIFAR100",
        classes=100,
        side=32,
        images=(60_000, 10_000),
        files="cifar-100-python/ (from cifar-100-python.tar.gz)",
        train=TRAIN,
        test=TEST,
        facts=CHECKSUMS,
    ),
    TorchvisionSet(
        "svhn",
        loader="SVHN",
        classes=10,
        side=32,
        images=(99_289, 26_032),
        files="train_32x32.mat and test_32x32.mat",
        train={"split": "train"},
        test={"split": "test"},
        labels="labels",
        facts=("split_list",),
    ),
    FolderSet(
        "tiny-imagenet",
        layout="train/<wnid>/images/*.JPEG, val/images/*.JPEG, val/val_annotations.txt and words.txt, "
        "as tiny-imagenet-200.zip unpacks to tiny-imagenet-200",
        classes=200,
        side=64,
        parts=lambda root: [Part(root / "train", held=False)],
        test=_tiny_test,
        names=_tiny_names,
    ),
    FolderSet(
        "mini-imagenet",
        layout="<wnid>/*.jpg of 100 classes, or the same below train/, val/ and test/",
        classes=100,
        parts=_few_shot_parts,
    ),
    FolderSet(
        "office-home",
        layout="<domain>/<class>/*.jpg, domains Art, Clipart, Product and 'Real World', "
        "as OfficeHomeDataset_10072016.zip unpacks",
        classes=65,
        parts=lambda root: [Part(root / name, domain=k) for k, name in enumerate(DOMAINS)],
    ),
    FolderSet(
        "image-folder",
        layout="<class>/*.jpg of two classes or more, or train/<class>/*.jpg with test/<class>/*.jpg",
        parts=_train_and_test,
    ),
)
