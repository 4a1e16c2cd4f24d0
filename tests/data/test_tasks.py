"""tasks.py: what a task holds, how it is split, and runs on it."""

import shutil

import numpy as np
import pytest
import torch
from photo_files import GREY, album, draw, experiment, fill, load, parts, rows
from PIL import Image
from sklearn.datasets import load_digits
from torchvision.transforms import v2

import fedmitr as fm
from fedmitr.data import photos
from fedmitr.data.image_sets import IMAGE_SETS
from fedmitr.data.tasks import stratified_split
from fedmitr.experiments import clients
from fedmitr.settings.schema import TaskSettings


def load_digits_task(seed=0, **options):
    return fm.load_task(TaskSettings(**options), seed, 24, GREY)


# Digits.


def test_every_digit_is_in_one_split_and_none_twice():
    labels = load_digits().target
    splits = stratified_split(labels, 0.1, 0.25, seed=3)
    assert sorted(np.concatenate(splits)) == list(range(1797))
    assert [len(s) for s in splits] == [1797 - 180 - 450, 180, 450]


def test_splits_are_stratified():
    labels = load_digits().target
    whole = np.bincount(labels) / len(labels)
    for part in stratified_split(labels, 0.2, 0.3, seed=1):
        assert np.abs(np.bincount(labels[part]) - whole * len(part)).max() <= 2


def test_a_split_that_leaves_no_training_images_is_one_line(one_line):
    with pytest.raises(fm.BadInput) as error:
        load_digits_task(validation=0.5, test=0.5)
    one_line(error.value, "task.validation=0.5", "task.test=0.5")


def test_the_seed_fixes_everything_and_another_changes_it():
    one, again, other = load_digits_task(seed=4), load_digits_task(seed=4), load_digits_task(seed=5)
    for a, b, c in zip(parts(one), parts(again), parts(other), strict=True):
        assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)
        assert torch.equal(a.foreground, b.foreground)
        assert a.images.shape == c.images.shape and not torch.equal(a.images, c.images)
        assert not torch.equal(a.labels, c.labels)


def test_all_1797_digits_are_there_with_their_labels():
    task = load_digits_task()
    labels = torch.cat([p.labels for p in parts(task)])
    assert len(labels) == 1797
    assert torch.bincount(labels).tolist() == np.bincount(load_digits().target).tolist()
    assert task.classes == tuple("0123456789")


def test_a_subset_keeps_columns_together():
    test = load_digits_task().test
    index = torch.tensor([5, 2, 2])
    few = test.subset(index)
    assert len(few) == 3
    for column in ("images", "labels", "foreground"):
        assert torch.equal(getattr(few, column), getattr(test, column)[index])


def test_an_unknown_task_is_one_line(one_line):
    with pytest.raises(fm.BadInput) as error:
        load_digits_task(name="cifar")
    one_line(error.value, "task.name='cifar'", "digits")


# Images in files.


def test_a_folder_of_classes_is_split_like_digits_are(folder):
    task = load(folder, seed=3, validation=0.2, test=0.3)
    labels = np.repeat([0, 1, 2], 10)
    wanted = stratified_split(labels, 0.2, 0.3, seed=3)
    assert [rows(p) for p in parts(task)] == [w.tolist() for w in wanted]
    assert sorted(row for part in parts(task) for row in rows(part)) == list(range(30))
    assert all(torch.equal(p.labels, torch.tensor(labels[rows(p)])) for p in parts(task))
    assert torch.bincount(task.test.labels).tolist() == [3, 3, 3]
    assert task.train.foreground is None and task.train.domains is None


def test_the_seed_fixes_the_splits(folder):
    one, again, other = (load(folder, seed=seed, limit=3) for seed in (4, 4, 5))
    assert [rows(p) for p in parts(one)] == [rows(p) for p in parts(again)]
    assert all(rows(a) != rows(b) for a, b in zip(parts(one), parts(other), strict=True))


def test_a_test_folder_stays_the_test_part(tmp_path):
    fill(tmp_path / "train")
    fill(tmp_path / "test", each=4)
    one, other = (load(tmp_path, seed=seed, test=0.9, validation=0.3) for seed in (0, 1))
    names = IMAGE_SETS["image-folder"].list_files(TaskSettings(data_dir=str(tmp_path))).names
    for task in (one, other):
        assert [names[row].split("/")[0] for row in rows(task.test)] == ["test"] * 12
        assert {names[row].split("/")[0] for p in parts(task)[:2] for row in rows(p)} == {"train"}
        assert torch.bincount(task.validation.labels).tolist() == [3, 3, 3] and len(task.train) == 21
    assert rows(one.validation) != rows(other.validation)


@pytest.mark.parametrize("name", ["image-folder", "digits"])
def test_limit_draws_training_images_of_each_class_and_leaves_the_rest(folder, name):
    def some(limit, seed=1):
        if name == "digits":
            return load_digits_task(seed, limit=limit)
        return load(folder, seed=seed, limit=limit)

    whole, four, two, other = some(None), some(4), some(2), some(4, seed=2)
    for task, limit in ((four, 4), (two, 2), (other, 4)):
        assert set(torch.bincount(task.train.labels).tolist()) == {limit}
    for a, b in zip(parts(whole)[1:], parts(four)[1:], strict=True):
        assert torch.equal(a.images[:], b.images[:])
    sets = [{image.numpy().tobytes() for image in t.train.images[:]} for t in (two, four, whole, other)]
    assert sets[0] < sets[1] < sets[2] and sets[3] != sets[1]
    first = [(whole.train.labels == c).nonzero()[:2, 0] for c in range(3)]
    assert not sets[0] >= {i.numpy().tobytes() for i in whole.train.images[torch.cat(first)]}  # drawn


@pytest.mark.parametrize("options", [dict(validation=0.01), dict(validation=0.5, test=0.5)])
def test_shares_that_leave_a_class_nothing_are_one_line(options, folder, one_line):
    with pytest.raises(fm.BadInput) as error:
        load(folder, **options)
    one_line(error.value, f"task.validation={options['validation']}")


# In an experiment.


def test_a_run_on_a_folder_and_again_from_the_store(folder, tmp_path, forbid):
    first = experiment(folder, tmp_path / "store")
    assert first.initial.num_classes == 3 and first.task.train.images.shape[1:] == (1, 24, 24)
    result = first.result("fedavg")
    assert len(result.accuracy_per_class) == 3 and 0 <= result.accuracy <= 1
    forbid(photos, "decode")
    forbid(clients, "train_client")
    assert experiment(folder, tmp_path / "store").result("fedavg") == result
    shutil.copytree(folder, tmp_path / "moved")
    moved = experiment(tmp_path / "moved", tmp_path / "store")
    assert [u.digest for u in moved.uploads] == [u.digest for u in first.uploads]


def test_a_changed_folder_trains_anew(folder, tmp_path):
    before = experiment(folder, tmp_path / "store")
    keys = [before.upload_key(0), before.central_key]
    draw(folder / "bee" / "3.png", 99)
    after = experiment(folder, tmp_path / "store")
    assert keys[0] != after.upload_key(0) and keys[1] != after.central_key
    assert keys == [before.upload_key(0), before.central_key]  # what is loaded stays what it was


def test_a_timm_model_gets_colour_at_its_own_size(folder, tmp_path):
    given = {"model.name": "deit_tiny_patch16_224", "model.pretrained": False, "model.image_size": 32}
    deit = experiment(folder, tmp_path / "store", **given, **{"client.batch_size": 4, "task.limit": 2})
    assert deit.task.train.images.shape == (6, 3, 32, 32)
    image = Image.open(folder / "ant" / "0.png").resize((32, 32), Image.Resampling.BILINEAR)
    mean, std = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    whole = album(folder, size=32, stats=deit.task.stats).images
    by_hand = v2.Normalize(mean, std)(v2.functional.to_image(image) / 255)
    torch.testing.assert_close(whole[0], by_hand, atol=1e-5, rtol=1e-5)
    assert deit.uploads[0].size + deit.uploads[1].size == 6
