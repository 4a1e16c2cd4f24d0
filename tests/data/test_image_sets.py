"""image_sets.py: how folders are listed, what is wrong with them in one line, and data sets of your own."""

import shutil
from pathlib import Path

import pytest
import torch
import torchvision
from photo_files import RGB, SIZE, draw, experiment, fill, load
from PIL import Image

import fedmitr as fm
from fedmitr.core.processes import parallel
from fedmitr.data import FolderSet, Part, TorchvisionSet, register
from fedmitr.data.image_sets import IMAGE_SETS, num_classes
from fedmitr.evaluation.plan import training_images
from fedmitr.experiments import clients
from fedmitr.settings.schema import TASKS, TaskSettings


def list_folder(root, name="image-folder"):
    return IMAGE_SETS[name].list_files(TaskSettings(name=name, data_dir=str(root)))


# What is listed: classes and order.


def test_classes_and_order_are_those_of_image_folder(folder):
    draw(folder / "bee" / "more" / "x.PNG", 5)
    draw(folder / "bee" / "0.jpeg", 6)
    (folder / "bee" / "notes.txt").write_text("no image")
    (folder / "readme.txt").write_text("no class")
    theirs = torchvision.datasets.ImageFolder(folder)
    listing = list_folder(folder)
    assert listing.classes == theirs.classes == ["ant", "bee", "cat"]
    assert [folder / name for name in listing.names] == [Path(path) for path, _ in theirs.samples]
    assert listing.labels == theirs.targets and len(theirs) == 32
    assert num_classes(TaskSettings(name="image-folder", data_dir=str(folder))) == 3


def test_hidden_files_and_folders_are_not_read(folder):
    draw(folder / ".checkpoints" / "0.png", 1)
    (folder / "ant" / "._0.png").write_bytes(b"resource fork")
    listing = list_folder(folder)
    assert listing.classes == ["ant", "bee", "cat"] and len(listing.names) == 30


def test_a_class_may_be_called_train(tmp_path):
    fill(tmp_path, classes=("bus", "train"))
    assert load(tmp_path).classes == ("bus", "train")


# Bad folders: one line, before any training.


def empty_class(root):
    shutil.rmtree(root / "ant")
    (root / "ant").mkdir()


def unreadable_class(root):
    for file in (root / "ant").iterdir():
        file.write_bytes(b"no image")


def with_parts(root):
    fill(root / "train")
    fill(root / "test", each=2)
    for name in ("ant", "bee", "cat"):
        shutil.rmtree(root / name)


def unknown_class(root):
    with_parts(root)
    draw(root / "test" / "dog" / "0.png", 1)


def untested_class(root):
    with_parts(root)
    shutil.rmtree(root / "test" / "ant")


def unreadable_test_class(root):
    with_parts(root)
    for file in (root / "test" / "ant").iterdir():
        file.write_bytes(b"no image")


def no_test(root):
    with_parts(root)
    shutil.rmtree(root / "test")


def no_class(root):
    with_parts(root)
    shutil.rmtree(root)
    draw(root / "0.png", 1)


def a_file(root):
    shutil.rmtree(root)
    root.write_text("")


BAD = [
    (empty_class, "holds no image in ant/"),
    (unreadable_class, "no readable images of class 'ant'"),
    (unknown_class, "class 'dog', which is not in train/"),
    (untested_class, "no test image of class 'ant'"),
    (unreadable_test_class, "no readable test images of class 'ant'"),
    (no_test, "has no test/"),
    (no_class, "holds 0 class folders"),
    (shutil.rmtree, "is no folder that can be read"),
    (a_file, "is no folder that can be read"),
    (lambda root: [shutil.rmtree(root / name) for name in ("ant", "bee")], "holds 1 class folders"),
]


@pytest.mark.parametrize("spoil, said", BAD, ids=[said for _, said in BAD])
def test_a_bad_folder_is_one_line_before_any_training(
    spoil, said, folder, tmp_path, capsys, forbid, one_line, monkeypatch
):
    monkeypatch.setenv("FEDMITR_STATIC", "1")  # no progress bar
    spoil(folder)
    forbid(clients, "train_client")
    settings = fm.Settings.load("smoke", {"task.name": "image-folder", "task.data_dir": str(folder)})
    with pytest.raises(fm.BadInput) as error:
        fm.run("fedavg", settings, tmp_path / "store")
    one_line(error.value, f"task.data_dir={str(folder)!r}", said)
    assert capsys.readouterr().err == ""
    kept = [p for p in (tmp_path / "store").rglob("*") if p.is_file()]
    assert kept == [] or said.startswith("no test image")


LAYOUTS = {name: s.layout for name, s in IMAGE_SETS.items() if isinstance(s, FolderSet)}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("given", [None, ""])
def test_no_folder_at_all_is_one_line(name, given, one_line):
    with pytest.raises(fm.BadInput) as error:
        num_classes(TaskSettings(name=name, data_dir=given))
    one_line(error.value, f"task.data_dir={given!r} is not set", name)


@pytest.mark.parametrize(
    "name, said",
    [
        ("tiny-imagenet", "has no train/"),
        ("mini-imagenet", "holds 3 class folders, not 100"),
        ("office-home", "has no Art/"),
    ],
)
def test_another_layout_than_the_tasks_is_one_line(name, said, folder, one_line):
    with pytest.raises(fm.BadInput) as error:
        load(folder, name)
    one_line(error.value, f"task.data_dir={str(folder)!r}", said, LAYOUTS[name])


@pytest.mark.parametrize("name, value", [("limit", 0), ("download", "maybe"), ("data_dir", [1])])
def test_settings_out_of_range_are_one_line(name, value, one_line):
    with pytest.raises(fm.BadInput) as error:
        fm.Settings.load("smoke", {f"task.{name}": value})
    one_line(error.value, f"task.{name}")


# Data sets of your own: one record each.


class Blobs(torch.utils.data.Dataset):
    """A data set in the manner of torchvision's: 15 grey images of three classes, 6 more for the test."""

    digest = "made on the spot"

    def __init__(self, root, part="train", download=False):
        self.targets = [k % 3 for k in range(15 if part == "train" else 6)]
        self.first = 0 if part == "train" else 15

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, row):
        return Image.new("L", (10, 10), 10 * (self.first + row)), self.targets[row]


BLOBS = TorchvisionSet(
    "blobs",
    loader="Blobs",
    classes=3,
    side=10,
    images=(21, 6),
    files="nothing",
    train={"part": "train"},
    test={"part": "test"},
    facts=("digest",),
)
SEASONS = FolderSet(
    "seasons",
    layout="learn/<class>/*.png and check/<class>/*.png",
    parts=lambda root: [Part(root / "learn", held=False), Part(root / "check", held=True)],
)


@pytest.fixture(params=[BLOBS, SEASONS], ids=["torchvision", "folders"])
def own(request, registry, tmp_path, monkeypatch):
    """A data set that one call of `register` made known, and the folder of its files."""
    monkeypatch.setattr(torchvision.datasets, "Blobs", Blobs, raising=False)
    register(request.param)
    fill(tmp_path / "raw" / "learn", each=5)
    fill(tmp_path / "raw" / "check", each=2)
    return request.param, tmp_path / "raw"


def test_a_data_set_of_your_own_is_a_task(own):
    record, root = own
    task = load(root, record.name, validation=0.2)
    assert task.name == record.name and len(task.classes) == 3
    assert [len(part) for part in (task.train, task.validation, task.test)] == [12, 3, 6]
    assert task.train.images.shape == (12, 3, SIZE, SIZE) and task.digest
    if record is BLOBS:
        grey = task.test.images[:][:, 0, 0, 0] * RGB[1][0] + RGB[0][0]
        assert torch.allclose(255 * grey.flatten(), 10.0 * torch.arange(15, 21), atol=1e-3)


def test_a_data_set_of_your_own_has_settings_and_a_plan(own):
    record, root = own
    given = {"task.name": record.name, "task.data_dir": str(root), "task.validation": 0.2}
    settings = fm.Settings.load("smoke", given)
    assert settings.task.name == record.name and num_classes(settings.task) == 3
    assert training_images(settings.task) == 12


def test_a_data_set_of_your_own_runs(own, tmp_path):
    record, root = own
    given = {"task.name": record.name, "task.validation": 0.2}
    found = experiment(root, tmp_path / "store", **given)
    assert found.initial.num_classes == 3
    assert sum(upload.size for upload in found.uploads) == len(found.task.train) == 12


def known_images(name):
    return TASKS.get(name), IMAGE_SETS[name].layout


def test_workers_know_a_data_set_of_your_own(registry, monkeypatch):
    monkeypatch.setenv("FEDMITR_JOBS", "2")
    register(SEASONS)
    found = dict(parallel(known_images, ["seasons", "image-folder"]))
    assert found[0] == (None, SEASONS.layout) and found[1][0] is None


def test_a_record_takes_the_place_of_one_of_its_name_but_not_of_the_digits(registry, one_line):
    other = FolderSet("image-folder", layout="<class>/*.gif", classes=7)
    register(other)
    assert IMAGE_SETS["image-folder"] is other and TASKS["image-folder"] == 7
    with pytest.raises(fm.BadInput) as error:
        register(FolderSet("digits", layout="<class>/*.png"))
    one_line(error.value, "task.name='digits'")
    assert "digits" not in IMAGE_SETS and TASKS["digits"] == 10


def test_registrations_are_taken_back():
    assert not {"blobs", "seasons"} & (TASKS.keys() | IMAGE_SETS.keys())
    assert TASKS["image-folder"] is None
