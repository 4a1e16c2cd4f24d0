"""catalogue.py: the layouts of the paper's data sets, and torchvision's own loaders."""

import hashlib
import pickle
import shutil
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from photo_files import RGB, SIZE, draw, experiment, load, parts, rows
from PIL import Image
from scipy.io import savemat
from torchvision.transforms import v2

import fedmitr as fm
from fedmitr.data import image_sets, photos
from fedmitr.data.catalogue import DOMAINS
from fedmitr.data.image_sets import IMAGE_SETS, TorchvisionSet
from fedmitr.data.partition import partition
from fedmitr.settings.schema import PartitionSettings, TaskSettings

# Layouts of folders.


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny") / "tiny-imagenet-200"
    wnids = [f"n{k:08d}" for k in range(200)]
    for k, wnid in enumerate(wnids):
        for i in range(2):
            draw(root / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", 3 * k + i, (4, 4))
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text("")
    order = np.random.default_rng(0).permutation(200)
    for k in order:
        draw(root / "val" / "images" / f"val_{k}.JPEG", 3 * k + 2, (4, 4))
    table = [f"val_{k}.JPEG\t{wnids[k]}\t0\t0\t3\t3\n" for k in order]
    (root / "val" / "val_annotations.txt").write_text("".join(table))
    (root / "words.txt").write_text("".join(f"{w}\tname {w[-3:]}, other\n" for w in wnids[1:]))
    return root, order


def test_tiny_imagenet(tiny):
    root, order = tiny
    task = load(root, "tiny-imagenet", validation=0.5)
    assert task.classes[:2] == ("n00000000", "name 001") and len(task.classes) == 200
    assert task.test.labels.tolist() == order.tolist()
    assert len(task.train) == len(task.validation) == 200
    assert task.train.images.pixels.shape[1:] == (64, 64, 3) and task.train.images.shape[2:] == (SIZE, SIZE)
    image = Image.open(root / "val" / "images" / f"val_{order[0]}.JPEG")
    by_hand = v2.functional.to_image(image.resize((64, 64), Image.Resampling.BILINEAR)) / 255
    read = task.test.images[0] * RGB[1] + RGB[0]
    assert (read - v2.functional.resize(by_hand, [SIZE, SIZE], antialias=True)).abs().max() < 0.01


def test_tiny_imagenet_without_its_annotations_is_one_line(tiny, tmp_path, one_line):
    shutil.copytree(tiny[0] / "train", tmp_path / "train")
    with pytest.raises(fm.BadInput) as error:
        load(tmp_path, "tiny-imagenet")
    one_line(error.value, "val/val_annotations.txt")


@pytest.mark.parametrize("where", [("",), ("train", "val", "test")])
def test_mini_imagenet_merges_its_few_shot_parts(where, tmp_path):
    wnids = [f"n{k:08d}" for k in range(100)]
    for k, wnid in enumerate(wnids):
        for i in range(4):
            draw(tmp_path / where[k % len(where)] / wnid / f"{i}.jpg", 4 * k + i, (4, 4))
    task = load(tmp_path, "mini-imagenet", validation=0.25, test=0.25)
    assert task.classes == tuple(wnids)
    assert [torch.bincount(p.labels).unique().tolist() for p in parts(task)] == [[2], [1], [1]]


@pytest.fixture(scope="module")
def office(tmp_path_factory):
    root = tmp_path_factory.mktemp("office")
    for d, domain in enumerate(DOMAINS):
        for k in range(65):
            draw(root / domain / f"Class {k:02d}" / "0.jpg", 65 * d + k, (4, 4))
    return root


def test_office_home_gives_each_client_a_domain(office):
    task = load(office, "office-home", validation=0.25, test=0.25)
    assert len(task.classes) == 65 and task.test.domains.unique().tolist() == [0, 1, 2, 3]
    names = IMAGE_SETS["office-home"].list_files(TaskSettings(data_dir=str(office))).names
    settings = PartitionSettings(scheme="domain", clients=4)
    shards = partition(task.train.labels, settings, 0, task.train.domains)
    assert torch.equal(torch.cat(shards).sort().values, torch.arange(len(task.train)))
    for domain, shard in zip(DOMAINS, shards, strict=True):
        held = task.train.subset(shard)
        assert {names[row].split("/")[0] for row in rows(held)} == {domain}


def test_an_experiment_with_domains(office, tmp_path):
    given = {"task.name": "office-home", "partition.scheme": "domain", "partition.clients": 4}
    given |= {"task.validation": 0.25, "task.test": 0.25}
    found = experiment(office, tmp_path / "store", **given)
    assert found.initial.num_classes == 65
    for k, shard in enumerate(found.shards):
        assert found.task.train.subset(shard).domains.unique().tolist() == [k]


# torchvision's loaders.


def cifar(root, monkeypatch, kind, base, name, key, classes):
    """A few random images in CIFAR's own files, whose checksums its loader is told."""
    rng = np.random.default_rng(0)
    (root / base).mkdir(parents=True)
    truth = {}
    for part, listed in (("train", "train_list"), ("test", "test_list")):
        data = rng.integers(0, 256, (40, 3072), dtype=np.uint8)
        truth[part] = (data.reshape(40, 3, 32, 32), np.arange(40) % classes)
        content = pickle.dumps({"data": data, key: truth[part][1].tolist()})
        (root / base / part).write_bytes(content)
        monkeypatch.setattr(kind, listed, [[part, hashlib.md5(content).hexdigest()]])
    content = pickle.dumps({name: [f"class {k}" for k in range(classes)]})
    (root / base / "meta").write_bytes(content)
    facts = {"filename": "meta", "key": name, "md5": hashlib.md5(content).hexdigest()}
    monkeypatch.setattr(kind, "meta", facts)
    return truth


def svhn(root, monkeypatch):
    root.mkdir()
    rng, truth, listed = np.random.default_rng(0), {}, {}
    for part in ("train", "test"):
        data = rng.integers(0, 256, (32, 32, 3, 40), dtype=np.uint8)
        labels = np.arange(40) % 10
        savemat(root / f"{part}.mat", {"X": data, "y": np.where(labels == 0, 10, labels)[:, None]})
        truth[part] = (data.transpose(3, 2, 0, 1), labels)
        content = (root / f"{part}.mat").read_bytes()
        listed[part] = ["http://localhost/none", f"{part}.mat", hashlib.md5(content).hexdigest()]
    monkeypatch.setattr(torchvision.datasets.SVHN, "split_list", listed)
    return truth


@pytest.fixture(params=["cifar10", "cifar100", "svhn"])
def archive(request, tmp_path, monkeypatch):
    """Name of a task of torchvision's, its folder, and what is in it."""
    root, sets = tmp_path / "raw", torchvision.datasets
    if request.param == "svhn":
        return request.param, root, svhn(root, monkeypatch)
    if request.param == "cifar10":
        given = (sets.CIFAR10, "cifar-10-batches-py", "label_names", "labels", 10)
    else:
        given = (sets.CIFAR100, "cifar-100-python", "fine_label_names", "fine_labels", 20)
    return request.param, root, cifar(root, monkeypatch, *given)


def test_torchvisions_tasks(archive, tmp_path):
    name, root, truth = archive
    task = load(root, name, size=32, validation=0.5, cache=tmp_path / "cache")
    assert task.classes[:2] == (("0", "1") if name == "svhn" else ("class 0", "class 1"))
    pixels, labels = truth["test"]
    assert task.test.labels.tolist() == labels.tolist()
    torch.testing.assert_close(task.test.images[:], (torch.from_numpy(pixels.copy()) / 255 - RGB[0]) / RGB[1])
    pixels, labels = truth["train"]
    assert sorted(rows(task.train) + rows(task.validation)) == list(range(40))
    mine = task.train
    torch.testing.assert_close(
        mine.images[:], (torch.from_numpy(pixels[rows(mine)].copy()) / 255 - RGB[0]) / RGB[1]
    )
    assert mine.labels.tolist() == labels[rows(mine)].tolist()


def test_what_torchvision_read_once_is_kept_at_32_pixels_and_needs_no_files(archive, tmp_path, forbid):
    name, root, truth = archive
    first = load(root, name, size=32, validation=0.5, cache=tmp_path / "cache")
    shutil.rmtree(root)
    forbid(photos, "decode")
    forbid(TorchvisionSet, "list_files")
    again = load(None, name, size=20, validation=0.5, cache=tmp_path / "cache")
    assert again.digest == first.digest and again.test.images.shape == (40, 3, 20, 20)
    small = Image.fromarray(truth["test"][0][7].transpose(1, 2, 0)).resize(
        (20, 20), Image.Resampling.BILINEAR
    )
    read = again.test.images[7] * RGB[1] + RGB[0]
    assert (read - v2.functional.to_image(small) / 255).abs().max() < 1.01 / 255


def test_a_file_with_another_checksum_is_one_line(archive, one_line):
    name, root, _ = archive
    file = next(p for p in sorted(root.rglob("*")) if p.is_file() and "test" in p.name)
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(fm.BadInput) as error:
        load(root, name)
    one_line(error.value, f"task.name={name!r}", str(root), "task.download=true")


FILES = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python", "svhn": "train_32x32.mat"}


@pytest.mark.parametrize("name", FILES)
def test_without_files_and_download_the_line_says_what_goes_where(name, tmp_path, monkeypatch, one_line):
    monkeypatch.setattr(image_sets, "home", lambda: tmp_path)
    for root, place in ((tmp_path / "none", tmp_path / "none"), (None, tmp_path / "data" / "downloads")):
        with pytest.raises(fm.BadInput) as error:
            load(root, name)
        one_line(error.value, f"task.name={name!r}", FILES[name], f"task.data_dir={str(place)!r}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", FILES)
def test_a_download_that_fails_is_one_line(name, tmp_path, monkeypatch, one_line):
    def offline(*_, **__):
        raise URLError("no\nnetwork")

    for where in ("cifar.download_and_extract_archive", "svhn.download_url"):
        monkeypatch.setattr(f"torchvision.datasets.{where}", offline)
    with pytest.raises(fm.BadInput) as error:
        load(tmp_path, name, download=True)
    one_line(error.value, "task.download=true", FILES[name], f"task.data_dir={str(tmp_path)!r}")


def test_no_download_without_leave(archive, monkeypatch, forbid):
    name, root, _ = archive
    forbid(torchvision.datasets.cifar, "download_and_extract_archive")
    forbid(torchvision.datasets.svhn, "download_url")
    assert len(load(root, name, validation=0.5).test) == 40
